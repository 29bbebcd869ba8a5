"""Other libraries' UNets, each in a process of its own: this process imports none of the libraries."""

import os
import signal
from importlib.util import find_spec

import pytest
import torch
import yaml

from dsdiff.benchmark import peers, peers_openvino, variants
from dsdiff.benchmark.options import PEERS
from dsdiff.benchmark.peers import Peer
from dsdiff.benchmark.process import WorkerError, WorkerProcess
from dsdiff.benchmark.source import Source
from dsdiff.models.registry import EMBEDDED

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source():
    return Source.read(EMBEDDED, False, CPU)


def output(peer, tmp_path):
    peer.process.ask("output", path=str(tmp_path / "output.pt"))
    return torch.load(tmp_path / "output.pt")


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def deeper(source, tmp_path):
    """The path of a config whose UNet has deeper transformers, which diffusers has not."""
    unet_config = {**source.unet_config, "params": {**source.unet_config["params"], "legacy": True}}
    unet_config["params"]["transformer_depth"] = 2
    config = {"model": {"params": {**source.params, "unet_config": unet_config}}}
    (tmp_path / "deeper.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "deeper.yaml"


@pytest.mark.slow
def test_diffusers_runs_in_a_process_of_its_own(source, deeper, tmp_path):
    peer = Peer("diffusers-bf16", source, weight_bit=4, outdir=tmp_path)
    try:
        assert peer.process.pid != os.getpid()
        assert peer.weight_bytes == 2 * source.parameters() and peer.precision == "full"
        timing = peer.time(0.0, seconds=0, warm=False, profiled=True)
        assert timing.seconds > 0 and timing.tokens == 1
        assert timing.shares is not None and sum(timing.shares.values()) == pytest.approx(1)
        assert output(peer, tmp_path).shape == source.inputs()["x"].shape
        start = {"random_weights": True, "device": "cpu", "threads": 1, "weight_bit": 4, "outdir": str(tmp_path)}
        peer.process.ask("start", config=str(deeper), **start)
        with pytest.raises(WorkerError, match="parameters, in place of"):
            peer.process.ask("build", name="diffusers-bf16")
        os.kill(peer.process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError) as failed:
            peer.time(0.0, seconds=0, warm=False, profiled=False)
        assert "its process ended by SIGKILL" in str(failed.value)
    finally:
        peer.close()


@pytest.mark.slow
def test_a_worker_refuses_in_one_line_and_goes_on(source, tmp_path):
    with peers.start(source, weight_bit=4, outdir=tmp_path) as process:
        for request, message in (({"name": "int4"}, "int4"), ({}, "name")):
            with pytest.raises(WorkerError) as refused:
                process.ask("build", **request)
            assert message in str(refused.value) and "\n" not in str(refused.value), request
        built = process.ask("build", name="float32")
        assert built == {"weight_bytes": 4 * source.parameters(), "precision": "full"}
        process.ask("output", path=str(tmp_path / "output.pt"))
        with variants.build("float32", source, variants.quant_config(4)).running(0.0) as call:
            assert torch.equal(torch.load(tmp_path / "output.pt"), call())


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_told(monkeypatch, source, tmp_path):
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))  # where no Python is
    with pytest.raises(WorkerError) as failed:
        peers.start(source, weight_bit=4, outdir=tmp_path)
    assert "its process ended (1): " in str(failed.value)


def test_peers_that_cannot_be_measured_are_told(monkeypatch):
    monkeypatch.setattr(peers.util, "find_spec", lambda name: None if name == "nncf" else object())
    names, reasons = peers.choose_peers(PEERS, CPU)
    assert names == [name for name in PEERS if "int8" not in name]
    assert reasons == dict.fromkeys(["openvino-int8", "openvino-int8-float32"], "not installed: pip install nncf")
    names, reasons = peers.choose_peers(["openvino-bf16", "diffusers-bf16"], torch.device("cuda"))
    assert names == ["diffusers-bf16"] and "--device cpu" in reasons["openvino-bf16"]


# OpenVINO


def test_converted_models_are_complete_and_kept(source, tmp_path, monkeypatch):
    made = []

    def save(path):
        made.append(path.name)
        path.write_text("model")
        if len(made) == 2:
            raise KeyboardInterrupt
        path.with_suffix(".bin").write_text("weights")

    monkeypatch.setattr(peers_openvino, "_converted", lambda source: save)
    monkeypatch.setattr(peers_openvino, "_quantized", lambda xml, source: save)
    folder = peers_openvino.folder_of(source, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        peers_openvino.convert("openvino-int8", source, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["float32.bin", "float32.xml"]
    for _ in range(2):
        peers_openvino.convert("openvino-int8", source, tmp_path)
    assert made == ["float32.xml", "int8.xml", "int8.xml"]
    assert folder != peers_openvino.folder_of(Source.read(EMBEDDED, True, CPU), tmp_path)


def test_files_that_are_there_start_no_process(source, tmp_path, monkeypatch):
    xml = peers_openvino.file_of("openvino-int8", source, tmp_path)
    xml.parent.mkdir(parents=True)
    xml.write_text("model")
    monkeypatch.setattr(peers, "start", None)
    assert peers.convert(["float32", "diffusers-bf16", "openvino-int8"], source, tmp_path) == {}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openvino") is not None, reason="OpenVINO is installed")
def test_a_conversion_that_fails_is_told(source, tmp_path):
    reasons = peers.convert(["openvino-bf16"], source, tmp_path)
    assert reasons == {"openvino-bf16": "conversion failed: No module named 'openvino'"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino_computes_what_we_compute(source, tmp_path):
    furthest = {"openvino-float32": 1e-5, "openvino-bf16": 0.02}
    if find_spec("nncf") is not None:
        furthest["openvino-int8"] = 0.2
    with variants.build("float32", source, variants.quant_config(4)).running(0.0) as call:
        expected = call()
    assert peers.convert(list(furthest), source, tmp_path) == {}
    for name, limit in furthest.items():
        peer = Peer(name, source, weight_bit=4, outdir=tmp_path)
        try:
            assert distance(output(peer, tmp_path), expected) < limit, name
            share = {"openvino-float32": 4, "openvino-bf16": 2, "openvino-int8": 1}[name]
            assert peer.weight_bytes == pytest.approx(share * source.parameters(), rel=0.1), name
        finally:
            peer.close()


def test_a_process_that_does_not_end_by_itself_is_killed(monkeypatch):
    process = WorkerProcess()
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr("dsdiff.benchmark.process.PATIENCE", 0.1)
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
