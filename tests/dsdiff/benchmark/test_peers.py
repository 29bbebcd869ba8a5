"""Other libraries' UNets, each in a process of its own: this process imports none of the libraries."""

import os
import signal
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import yaml

import tomesd
from dsdiff.benchmark import peers, peers_openvino, variants
from dsdiff.benchmark.options import CALL_PEERS
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
    names, reasons = peers.choose_peers(CALL_PEERS, CPU)
    assert names == [name for name in CALL_PEERS if "int8" not in name]
    expected = ["openvino-int8", "openvino-int8-float32", "openvino-int8-tome"]
    assert reasons == dict.fromkeys(expected, "not installed: pip install nncf")
    names, reasons = peers.choose_peers(["openvino-bf16", "diffusers-bf16"], torch.device("cuda"))
    assert names == ["diffusers-bf16"] and "--device cpu" in reasons["openvino-bf16"]
    assert peers.choose_peers(["sdcpp-q4"], CPU) == ([], {"sdcpp-q4": "it draws whole pictures only: add --pictures"})
    assert peers.choose_peers(["sdcpp-q4"], CPU, pictures=True) == (["sdcpp-q4"], {})
    monkeypatch.setattr(peers.util, "find_spec", lambda name: None)
    reasons = peers.choose_peers(["sdcpp-q4", "diffusers-bf16"], CPU, pictures=True)[1]
    assert reasons["sdcpp-q4"] == "not installed: pip install stable-diffusion-cpp-python"
    assert reasons["diffusers-bf16"] == "not installed: pip install diffusers transformers"


# OpenVINO


def test_converted_models_are_complete_and_kept(source, tmp_path, monkeypatch):
    made = []

    class OpenVINO:
        @staticmethod
        def save_model(model, path, compress_to_fp16):
            made.append((path.name, model, compress_to_fp16))
            path.write_text("model")
            if len(made) == 2:
                raise KeyboardInterrupt
            path.with_suffix(".bin").write_text("weights")

        @staticmethod
        def Core():  # noqa: N802 (OpenVINO's name)
            return SimpleNamespace(read_model=lambda xml: "read")

    monkeypatch.setattr(peers_openvino.importlib, "import_module", lambda name: OpenVINO)
    monkeypatch.setattr(peers_openvino, "_unet", lambda source, ratio=0.0: f"merged {ratio}" if ratio else "floats")
    monkeypatch.setattr(peers_openvino, "_quantized", lambda model, source: f"{model} in integers")
    folder = peers_openvino.folder_of(source, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        peers_openvino.convert("openvino-int8", source, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["float32.bin", "float32.xml"]
    for _ in range(2):
        peers_openvino.convert("openvino-int8", source, tmp_path)
    quantized = ("int8.xml", "read in integers", True)
    assert made == [("float32.xml", "floats", False), quantized, quantized]
    for name in ("openvino-int8-tome", "openvino-bf16-tome"):
        peers_openvino.convert(name, source, tmp_path)
    merged = ("int8-tome-2x32x32.xml", "merged 0.5 in integers", True)
    assert made[3:] == [merged, ("float32-tome-2x32x32.xml", "merged 0.5", False)]
    other = Source.read(EMBEDDED, False, CPU, batch=1, latents=(32, 16))
    assert peers_openvino.file_of("openvino-int8", other, tmp_path) == folder / "int8.xml"  # of any batch and size
    assert peers_openvino.file_of("openvino-int8-tome", other, tmp_path) == folder / "int8-tome-1x32x16.xml"
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
    furthest = {"openvino-float32": 1e-5, "openvino-bf16": 0.02, "openvino-bf16-tome": 0.02}
    if find_spec("nncf") is not None:
        furthest |= {"openvino-int8": 0.2, "openvino-int8-tome": 0.03}
    bytes_a_weight = {"float32": 4, "bf16": 2, "int8": 1}
    for shape in ({}, {"batch": 1, "latents": (24, 16)}):
        source = Source.read(EMBEDDED, False, CPU, **shape)
        plain, merged = expected_outputs(source)
        assert distance(merged, plain) > 0.025  # more than merging in OpenVINO may differ from merging here
        assert peers.convert(list(furthest), source, tmp_path) == {}
        for name, limit in furthest.items():
            peer = Peer(name, source, weight_bit=4, outdir=tmp_path)
            try:
                expected = merged if name.endswith("-tome") else plain
                assert distance(output(peer, tmp_path), expected) < limit, (name, shape)
                tokens = peer.time(0.5, seconds=0, warm=True, profiled=False).tokens
                assert tokens == (0.625 if name.endswith("-tome") else 1), name
                share = bytes_a_weight[name.split("-")[1]]
                assert peer.weight_bytes == pytest.approx(share * source.parameters(), rel=0.1), name
            finally:
                peer.close()


def expected_outputs(source):
    """The outputs of our float UNet, without merging and with the destinations that OpenVINO's merges into."""
    unet = source.unet()
    with torch.no_grad():
        plain = unet(**source.inputs())
        tomesd.apply_patch(unet, ratio=0.5)
        with tomesd.pinned(unet, 0):
            return plain, unet(**source.inputs())


@pytest.mark.slow
def test_workers_take_other_batches_and_sizes(tmp_path):
    source = Source.read(EMBEDDED, False, CPU, batch=1, latents=(24, 16))
    with peers.start(source, weight_bit=4, outdir=tmp_path) as process:
        process.ask("build", name="float32")
        process.ask("output", path=str(tmp_path / "output.pt"))
    assert torch.load(tmp_path / "output.pt").shape == (1, 4, 24, 16)


def test_a_process_that_does_not_end_by_itself_is_killed(monkeypatch):
    process = WorkerProcess()
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr("dsdiff.benchmark.process.PATIENCE", 0.1)
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
