"""What scripts/benchmark.py measures, how it compares, and what it refuses. Nothing here depends on the time taken."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldm.checkpoint import save_checkpoint
from scripts import benchmark as script

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [2, 1],
        "num_res_blocks": 1,
        "channel_mult": [1, 1],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "context_dim": 12,
        "legacy": False,
    },
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The path of a config with a tiny UNet, each measurement of which takes one call."""
    monkeypatch.setattr(script, "MIN_SECONDS", 0)
    path = tmp_path / "tiny.yaml"
    encoder = {"target": "torch.nn.Identity", "params": {"max_length": 5}}
    params = {"image_size": 8, "channels": 4, "unet_config": UNET, "cond_stage_config": encoder}
    path.write_text(yaml.safe_dump({"model": {"params": params}}))
    return path


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(config, outdir, *flags):
    script.main(["--config", str(config), "--random_weights", "--device", "cpu", "--outdir", str(outdir), *flags])
    return json.loads((outdir / "benchmark.json").read_text())


def refusal(capsys, *flags):
    with pytest.raises(SystemExit) as left:
        script.main([str(flag) for flag in flags])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# What is measured


def test_report_of_a_tiny_model(config, tmp_path, capsys, threads):
    report = run(config, tmp_path / "out", "--repeats", "2", "--ratio", "0", "0.5", "--threads", "1")
    rows = report["settings"]
    assert [(row["precision"], row["ratio"]) for row in rows] == [
        ("full", 0.0),
        ("full", 0.5),
        ("autocast", 0.0),
        ("autocast", 0.5),
    ]
    for row in rows:
        assert len(row["seconds_by_repeat"]) == 2 and min(row["seconds_by_repeat"]) > 0
        # 3 blocks of 64 tokens, which merge to 32, and 3 of 16, which are too coarse, with the one in the middle.
        assert row["tokens"] == pytest.approx((3 * 32 + 4 * 16) / (3 * 64 + 4 * 16) if row["ratio"] else 1)
        assert row["peak_bytes"] is None or row["peak_bytes"] > report["model"]["weight_bytes"]
    assert rows[0]["speedup"] == {"median": 1, "min": 1, "max": 1}
    unet = script.random_unet(UNET)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert report["model"] == {
        "config": "tiny.yaml",
        "random_weights": True,
        "parameters": parameters,
        "weight_bytes": 4 * parameters,
        "latents": [2, 4, 8, 8],
        "context": [2, 5, 12],
    }
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["threads"] == 1
    assert report["machine"]["cpu"] and report["machine"]["cores"] >= 1
    assert (report["autocast"], report["repeats"], report["channels_last"]) == ("bfloat16", 2, False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny.yaml: UNet of") and "[2, 4, 8, 8]" in lines[0]
    assert [line.split()[:2] for line in lines[2:]] == [
        ["precision", "ratio"],
        ["full", "0"],
        ["full", "0.5"],
        ["autocast", "0"],
        ["autocast", "0.5"],
    ]


def test_speedups_are_taken_within_a_repeat():
    merged = script.Setting(precision="autocast", ratio=0.5)
    found = {
        script.BASELINE: script.Measured(seconds=[2.0, 4.0, 9.0]),
        merged: script.Measured(seconds=[1.0, 4.0, 3.0], tokens=0.5, peak_bytes=5),
    }
    row = script.rows_of(found)[1]
    assert row["speedup"] == {"median": 2.0, "min": 1.0, "max": 3.0}  # not 4 / 3, the ratio of the medians
    assert row["seconds"] == {"median": 3.0, "min": 1.0, "max": 4.0}


def test_settings_take_turns_and_leave_no_trace(config, monkeypatch):
    unet = script.random_unet(UNET).eval()
    inputs = script.inputs_of(script.read_params(config), torch.device("cpu"))
    with torch.no_grad():
        before = unet(**inputs)
    order, apply = [], script.applied
    monkeypatch.setattr(script, "applied", lambda setting, *rest: order.append(setting) or apply(setting, *rest))
    settings = script.settings_of([0.0, 0.3])
    script.measure(unet, inputs, settings, 3, torch.device("cpu"))
    assert order == [*settings, *settings[::-1], *settings]
    with torch.no_grad():
        assert torch.equal(unet(**inputs), before) and before.any()


def test_each_setting_changes_what_runs(config):
    unet = script.random_unet(UNET).eval()
    device = torch.device("cpu")
    inputs = script.inputs_of(script.read_params(config), device)
    outputs = []
    for setting in script.settings_of([0.0, 0.5]):
        with script.applied(setting, unet, device):
            outputs.append(unet(**inputs))
    full, merged, autocast, both = outputs
    assert 0 < (autocast - full).norm() < 0.1 * full.norm()
    assert 0 < (merged - full).norm() < full.norm() and not torch.equal(both, autocast)


def test_the_baseline_is_measured_even_if_not_asked_for():
    assert script.settings_of([0.5, 0.5]) == [
        script.BASELINE,
        script.Setting(precision="full", ratio=0.5),
        script.Setting(precision="autocast", ratio=0.5),
    ]


def test_channels_last_reaches_the_unet(config, tmp_path, monkeypatch):
    seen = []

    def look(unet, inputs, *rest):
        weight = unet.input_blocks[0][0].weight
        seen.extend(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (weight, inputs["x"]))
        return {script.BASELINE: script.Measured(seconds=[1.0])}

    monkeypatch.setattr(script, "measure", look)
    assert run(config, tmp_path, "--channels_last")["channels_last"] and seen == [True, True]
    assert not run(config, tmp_path)["channels_last"] and seen[2:] == [False, False]


def test_trained_weights_are_the_files(tmp_path):
    weights = {script.UNET_PREFIX + name: tensor for name, tensor in script.random_unet(UNET).state_dict().items()}
    weights["first_stage_model.encoder.weight"] = torch.ones(3)  # another part, which is not built
    save_checkpoint(weights, tmp_path / "model.safetensors")
    unet = script.trained_unet(UNET, tmp_path / "model.ckpt", tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in unet.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[script.UNET_PREFIX + name].float()), name


@pytest.mark.parametrize("name, latents, context", [("embedded", 16, (32, 128)), ("sd-v1", 64, (77, 768))])
def test_models_have_their_real_sizes(name, latents, context):
    inputs = script.inputs_of(script.read_params(script.MODELS[name]), torch.device("cpu"))
    assert inputs["x"].shape == (2, 4, latents, latents) and inputs["context"].shape == (2, *context)


# What is refused


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--random_weights"], "--random_weights contradicts the embedded model"),
        (["--model", "embedded", "--random_weights"], "--random_weights contradicts the embedded model"),
        (["--config", "some.yaml"], "add --random_weights"),
        (["--config", "some.yaml", "--model", "sd-v1"], "not allowed with"),
        (["--config", "none.yaml", "--random_weights"], "No such file or directory"),
        (["--ratio", "1.5"], "in 0..1"),
        (["--ratio", "0.8"], "ratio is 0.8"),
        (["--repeats", "0"], "whole number of 1 or more"),
        (["--device", "tpu"], "device 'tpu' is not supported"),
    ],
)
def test_bad_flags_are_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *flags)
    assert not list(tmp_path.iterdir())


def test_threads_are_refused_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(script, "choose_device", lambda name: torch.device("cuda"))
    assert "--threads 2 has no effect on a GPU" in refusal(capsys, "--threads", 2)


def test_a_missing_checkpoint_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(script.CHECKPOINTS, script.STABLE_DIFFUSION, (tmp_path / "model.ckpt",))
    line = refusal(capsys, "--model", "sd-v1", "--device", "cpu", "--outdir", tmp_path / "out")
    assert "no checkpoint at" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["model: 3", "model: {params: {image_size: 8}}", "[1", ""])
def test_configs_of_other_things_are_refused(tmp_path, capsys, text):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    line = refusal(capsys, "--config", path, "--random_weights", "--outdir", tmp_path / "out")
    assert "other.yaml" in line and ("describes no latent diffusion model" in line or "no valid yaml" in line)
