"""scripts/calibrate.py, and drawing with what it makes, on random weights and tiny pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dsdiff.cli.flags import QUANTIZATION_FLAGS
from dsdiff.models.registry import CHECKPOINTS, EMBEDDED
from qdiff.checkpoint import read_cali_header
from qdiff.engine.backends import onednn
from qdiff.resume import ProgressFolder
from scripts import calibrate, export, txt2img

ROOT = Path(__file__).resolve().parents[2]

TINY = ["--ddim_steps", "2", "--cali_st", "2", "--cali_n", "2", "--batch_size", "4", "--device", "cpu"]
LEARN = ["--rounding", "adaround", "--iters_w", "2", "--iters_a", "2", "--quant_act", "--split", "--no_grad_ckpt"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\n\na blue star\n")
    return path


@pytest.fixture(scope="module")
def make(small_model, prompts):
    """make(outdir, *flags): calibrates the small model."""

    def call(outdir, *flags):
        config, ckpt = small_model
        model = ["--config", config, "--ckpt", ckpt, "--outdir", outdir]
        data = [] if "--data_path" in flags else ["--prompts", prompts]
        size = [flag for flag in TINY if "--data_path" not in flags] or ["--batch_size", "4", "--device", "cpu"]
        calibrate.main([str(flag) for flag in (*model, *data, *size, *flags)])
        return outdir

    return call


@pytest.fixture(scope="module")
def calibrated(make, tmp_path_factory):
    """The folder of an uninterrupted calibration."""
    return make(tmp_path_factory.mktemp("calibrated"), *LEARN, "--cond")


@pytest.fixture(scope="module")
def dynamic(make, calibrated, tmp_path_factory):
    """A cali_ckpt with dynamic ranges, and two inputs of 12 bits."""
    linear = ["--quant_mode", "linear", "--quant_act", "--split", "--data_path", next(calibrated.glob("data-*"))]
    folder = make(tmp_path_factory.mktemp("dynamic"), *linear, "--act_range", "dynamic", "--mixed_act", "2")
    return folder / "cali.safetensors"


@pytest.fixture
def draw(small_model, tmp_path):
    """draw(name, *flags) -> the folder of two small pictures, of the small model or of a bundle."""

    def call(name, *flags, bundle=None):
        config, ckpt = small_model
        model = ["--config", config, "--ckpt", ckpt] if bundle is None else ["--ckpt", bundle]
        model += ["--outdir", tmp_path / name]
        size = ["--H", "32", "--W", "32", "--ddim_steps", "2", "--device", "cpu", "--n_iter", "1", "--n_samples", "2"]
        txt2img.main([str(flag) for flag in (*model, *size, "--prompt", "a red circle", *flags)])
        return tmp_path / name

    return call


def picture(folder, i=0):
    return np.asarray(Image.open(folder / f"samples/{i:05}.png")).astype(int)


def error_of(capsys, call, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        call(*args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert leaving.value.code == 2
    last = lines[-1]
    assert last.startswith("error: "), lines
    return last


# --- what it writes ----------------------------------------------------------------------------------------


def test_writes_the_file_the_report_and_the_data(calibrated):
    names = sorted(path.name for path in calibrated.iterdir())
    assert names[0] == "cali.safetensors" and names[-1] == "report.json"
    assert len(names) == 3 and names[1].startswith("data-")
    header = read_cali_header(calibrated / "cali.safetensors")
    assert (header.config.weight_bit, header.config.act_bit, header.config.sm_abit) == (4, 8, 16)
    assert header.config.quant_act and header.config.split and header.merge is None
    assert header.calibration["samples"] == 8 and header.calibration["quant_mode"] == "qdiff"
    assert header.calibration["preset"] == "fast" and header.calibration["recon"]["iters_w"] == 2
    assert header.source["ckpt"] == "small.safetensors"


def test_an_interrupted_calibration_tells_how_to_go_on(make, tmp_path, monkeypatch, capsys):
    plain, linear = ProgressFolder.save, ["--quant_mode", "linear", "--quant_act"]

    def save(self, number, *args):
        plain(self, number, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressFolder, "save", save)
        with pytest.raises(SystemExit) as leaving:
            make(tmp_path, *linear)
    assert leaving.value.code == 130 and "the same command with --resume goes on" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("dsdiff.calibration.run.find_model", None)  # the refusal comes before anything is read
        assert "go on with --resume" in error_of(capsys, make, tmp_path, *linear)
    assert "other settings: running_stat" in error_of(capsys, make, tmp_path, *linear, "--running_stat", "--resume")
    make(tmp_path, *linear, "--resume")
    assert (tmp_path / "cali.safetensors").is_file() and not (tmp_path / "progress").exists()


@pytest.mark.slow
def test_processes_share_a_calibration(small_model, calibrated, tmp_path):
    config, ckpt = small_model
    data = next(calibrated.glob("data-*"))
    flags = ["--config", config, "--ckpt", ckpt, "--data_path", data, "--outdir", tmp_path, "--device", "cpu"]
    flags += ["--quant_act", "--split", "--rounding", "gptq", "--samples_w", "6", "--iters_a", "1"]
    flags += ["--batch_size", "4", "--ratio", "0.5"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / "scripts/calibrate.py"), *map(str, flags)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cali.safetensors", "report.json"]
    header = read_cali_header(tmp_path / "cali.safetensors")
    assert header.calibration["processes"] == 2 and header.merge["ratio"] == 0.5


def test_ready_data_gives_the_same_file(make, calibrated, tmp_path):
    make(tmp_path, *LEARN, "--data_path", next(calibrated.glob("data-*")), "--quant_mode", "qdiff")
    assert (tmp_path / "cali.safetensors").read_bytes() == (calibrated / "cali.safetensors").read_bytes()


def test_gptq_and_nearest_draw_and_say_so_in_the_header(make, calibrated, draw, tmp_path):
    data, drawn = next(calibrated.glob("data-*")), []
    for rounding, more in (("gptq", ["--samples_w", "6"]), ("nearest", [])):
        own = ["--rounding", rounding, *more, "--quant_act", "--split", "--iters_a", "0", "--data_path", data]
        file = make(tmp_path / rounding, *own) / "cali.safetensors"
        header = read_cali_header(file)
        assert header.calibration["rounding"] == header.calibration["recon"]["rounding"] == rounding
        drawn.append(picture(draw(f"drawn-{rounding}", "--ptq", "--cali_ckpt", file)))
    assert read_cali_header(calibrated / "cali.safetensors").calibration["rounding"] == "adaround"
    assert not np.array_equal(*drawn)


def test_qdiffusions_format_draws_the_same(make, calibrated, draw, tmp_path):
    folder = make(tmp_path / "q", *LEARN, "--cond", "--format", "qdiff")
    ours = draw("ours", "--ptq", "--cali_ckpt", calibrated / "cali.safetensors")
    theirs = draw("theirs", "--ptq", "--cali_ckpt", folder / "cali.pth")
    assert np.abs(picture(ours) - picture(theirs)).max() <= 1


def test_mixed_bits_are_in_the_file_and_drawn_by_all_engines(make, calibrated, draw, tmp_path, capsys):
    data = next(calibrated.glob("data-*"))
    linear = ["--quant_mode", "linear", "--quant_act", "--split", "--data_path", data]
    file = make(tmp_path / "mixed", *linear, "--mixed_act", "0.8", "--mixed_act_bit", "10") / "cali.safetensors"
    config = read_cali_header(file).config
    assert config.mixed_act and set(config.mixed_act.values()) == {10}
    said = capsys.readouterr()
    assert f"10 bits for {len(config.mixed_act)} inputs, " in said.out + said.err
    pictures = [picture(draw("simulated", "--ptq", "--cali_ckpt", file, "--engine", "simulate", "--precision", "full"))]
    if onednn.largest_exact_weight():
        pictures.append(picture(draw("int8", "--ptq", "--cali_ckpt", file, "--engine", "int8", "--precision", "full")))
        assert np.abs(pictures[1] - pictures[0]).max() <= 1
    plain = make(tmp_path / "plain", *linear) / "cali.safetensors"
    assert np.abs(picture(draw("plain", "--ptq", "--cali_ckpt", plain, "--precision", "full")) - pictures[0]).max() > 1


def test_dynamic_ranges_are_in_the_file_and_drawn_by_all_engines(dynamic, draw, capsys):
    flags = ["--ptq", "--cali_ckpt", dynamic, "--precision", "full"]
    assert read_cali_header(dynamic).config.act_range == "dynamic"
    for way in ([], ["--act_range", "dynamic", "--cache", "2", "--ratio", "0.5"]):
        simulated = picture(draw(f"simulated{len(way)}", *flags, *way, "--engine", "simulate"))
        if onednn.largest_exact_weight():
            drawn = picture(draw(f"int8{len(way)}", *flags, *way, "--engine", "int8"))
            assert np.abs(drawn - simulated).max() <= 1, way
    assert "act_range static contradicts" in error_of(capsys, draw, "refused", *flags, "--act_range", "static")


def test_a_bundle_has_dynamic_ranges(dynamic, draw, small_model, tmp_path):
    (config, ckpt), bundle = small_model, tmp_path / "bundle.safetensors"
    model = ["--config", config, "--ckpt", ckpt, "--cali_ckpt", dynamic, "--vae_pictures", "0"]
    export.main([str(flag) for flag in (bundle, *model)])
    how = ["--engine", "simulate", "--precision", "full", "--vae", "float32"]
    own, packed = draw("own", "--ptq", "--cali_ckpt", dynamic, *how), draw("packed", *how, bundle=bundle)
    assert "dynamic" in yaml.safe_load((packed / "settings.yaml").read_text())["quantization"]["bits"]
    assert np.abs(picture(packed) - picture(own)).mean() < 2  # a bundle's other parts are in float16


# --- flags -------------------------------------------------------------------------------------------------


def test_bad_flags(make, tmp_path, capsys):
    outdir = tmp_path / "out"
    cases = [
        (["--act_bit", "8"], "--act_bit has no effect"),
        (["--mixed_act", "6"], "--mixed_act has no effect"),
        (["--quant_act", "--mixed_act", "1.5"], "mixed_act is 1.5: it must be a whole number of 1 or more, or a share"),
        (["--quant_act", "--mixed_act", "0"], "mixed_act is 0"),
        (["--quant_act", "--mixed_act_bit", "12"], "--mixed_act_bit has no effect"),
        (["--quant_act", "--mixed_act", "6", "--mixed_act_bit", "8"], "in 9..16"),
        (["--quant_act", "--mixed_act", "6", "--format", "qdiff"], "one width for all activations"),
        (["--act_range", "dynamic"], "--act_range has no effect"),
        (["--quant_act", "--act_range", "dynamic", "--format", "qdiff"], "a fixed range for each activation"),
        (["--format", "qdiff"], "GPTQ goes farther: give --rounding adaround or nearest"),
        (["--running_stat"], "--running_stat has no effect"),
        (["--quant_mode", "linear", "--iters_w", "5"], "--iters_w has no effect"),
        (["--rounding", "adaround", "--iters_w", "0", "--warmup", "0.1"], "--warmup has no effect"),
        (["--iters_w", "5"], "GPTQ learns nothing, as --rounding adaround does, so --iters_w has no effect"),
        (["--rounding", "nearest", "--damp", "0.1"], "--damp has no effect"),
        (["--preset", "paper", "--samples_w", "5"], "--samples_w has no effect"),
        (["--rounding", "gptq", "--damp", "0"], "damp is 0"),
        (["--rounding", "best"], "invalid choice: 'best'"),
        (["--quant_act", "--iters_a", "0", "--p", "2"], "--p has no effect"),
        (["--data_path", "x.safetensors", "--plms"], "a sampler has no effect"),
        (["--data_path", "x.safetensors", "--cond"], "--cond has no effect"),
        (["--data_path", "x.safetensors"], "No such file"),
        (["--cond", "--scale", "1"], "no branch without the prompt"),
        (["--prompts", "missing.txt"], "No such file"),
        (["--weight_bit", "1"], "in 2..16"),
        (["--iters_w", "-1"], "0 or more"),
        (["--b_start", "1", "--b_end", "5"], "b_start"),
        (["--ratio", "0.9"], "ratio is 0.9"),
    ]
    for flags, says in cases:
        assert says in error_of(capsys, make, outdir, *flags), flags
        assert not outdir.exists(), flags


def test_flags_become_options():
    flags = ["--ddim_steps", "5", "--plms", "--ratio", "0.5", "--cond", "--no_grad_ckpt", "--lr", "0.1", "--seed", "3"]
    flags += ["--config", "a.yaml", "--device", "cpu", "--outdir", "b", "--weight_bit", "8", "--quant_act", "--resume"]
    options = calibrate.options_of(calibrate.parse_args(flags))
    assert (options.draw.steps, options.draw.sampler, options.draw.merge) == (5, "plms", None)
    assert (options.merge.ratio, options.model.config, options.outdir) == (0.5, Path("a.yaml"), Path("b"))
    assert options.cond and options.no_grad_ckpt and options.quant_act and options.resume and not options.split
    assert (options.weight_bit, options.lr, options.seed, options.device) == (8, 0.1, 3, "cpu")
    default = calibrate.CalibrationOptions()
    assert calibrate.options_of(calibrate.parse_args([])) == default


# --- drawing with it ---------------------------------------------------------------------------------------


def test_txt2img_needs_no_flag_but_the_file(draw, calibrated):
    plain = draw("plain")
    quantized = draw("quantized", "--ptq", "--cali_ckpt", calibrated / "cali.safetensors")
    assert 0 < np.abs(picture(plain) - picture(quantized)).mean() < 40
    settings = yaml.safe_load((quantized / "settings.yaml").read_text())
    assert settings["quantization"]["bits"] == "W4A8 sm16 split"
    info = Image.open(quantized / "samples/00000.png").info
    assert json.loads(info["dsdiff"])["quantization"]["cali_ckpt"] == "cali.safetensors"
    assert "Quantization: W4A8 sm16 split" in info["parameters"]


def test_flags_that_agree_change_nothing(draw, calibrated):
    cali = ["--ptq", "--cali_ckpt", calibrated / "cali.safetensors"]
    all_flags = ["--weight_bit", 4, "--quant_act", "--act_bit", 8, "--sm_abit", 16, "--split", "--quant_mode", "qdiff"]
    first = draw("first", *cali)
    second = draw("second", *cali, *all_flags, "--cond", "--no_grad_ckpt")
    assert np.array_equal(picture(first), picture(second))


def test_activations_can_stay_float(draw, calibrated):
    cali = ["--ptq", "--cali_ckpt", calibrated / "cali.safetensors"]
    both, weights = draw("both", *cali), draw("weights", *cali, "--no-quant_act")
    assert not np.array_equal(picture(both), picture(weights))
    assert yaml.safe_load((weights / "settings.yaml").read_text())["quantization"]["bits"] == "W4A32 split"


@pytest.mark.skipif(onednn.largest_exact_weight() == 0, reason="no exact integer kernels here")
def test_engines_draw_the_same(draw, calibrated):
    cali = ["--ptq", "--cali_ckpt", calibrated / "cali.safetensors", "--ratio", 0.5]
    default, simulated = draw("default", *cali), draw("simulated", *cali, "--engine", "simulate")
    assert [
        yaml.safe_load((folder / "settings.yaml").read_text())["quantization"]["engine"]
        for folder in (default, simulated)
    ] == ["int8", "simulate"]
    assert np.array_equal(picture(default), picture(simulated))


def test_where_int8_cannot_be_had_it_is_simulated(draw, calibrated, monkeypatch):
    monkeypatch.setattr(onednn, "largest_exact_weight", lambda: 0)
    folder = draw("quantized", "--ptq", "--cali_ckpt", calibrated / "cali.safetensors")
    assert yaml.safe_load((folder / "settings.yaml").read_text())["quantization"]["engine"] == "simulate"


def test_merging_comes_on_top(draw, calibrated):
    cali = ["--ptq", "--cali_ckpt", calibrated / "cali.safetensors"]
    assert not np.array_equal(picture(draw("plain", *cali)), picture(draw("merged", *cali, "--ratio", 0.5)))


def test_flags_that_contradict_the_file_are_refused(draw, calibrated, capsys, tmp_path):
    cases = [
        (["--weight_bit", "8"], ["weight_bit 8 contradicts", "made with weight_bit 4"]),
        (["--act_bit", "4"], ["act_bit 4 contradicts", "made with act_bit 8"]),
        (["--sm_abit", "8"], ["sm_abit 8 contradicts", "made with sm_abit 16"]),
        (["--quant_mode", "linear"], ["--quant_mode is linear", "quant_mode qdiff"]),
        (["--no-quant_act", "--act_bit", "8"], ["--act_bit has no effect"]),
        (["--no-quant_act", "--engine", "int8"], ["--engine int8: ", "activations are float", "use --engine simulate"]),
    ]
    for flags, says in cases:
        line = error_of(capsys, draw, "refused", "--ptq", "--cali_ckpt", calibrated / "cali.safetensors", *flags)
        assert all(part in line for part in says), (flags, line)
        assert not (tmp_path / "refused").exists(), flags


def test_without_ptq_no_flag_is_accepted(draw, capsys):
    values = {"cali_ckpt": ["x.pth"], "quant_mode": ["qdiff"], "engine": ["int8"], "act_range": ["dynamic"]}
    for name in QUANTIZATION_FLAGS:
        if name != "ptq":
            value = values.get(name, [8] if "bit" in name else [])
            line = error_of(capsys, draw, "refused", f"--{name}", *value)
            assert f"--{name} has no effect: add --ptq" in line, name


def test_another_model_is_refused(calibrated, random_ckpt, tmp_path, capsys):
    flags = ["--ckpt", str(random_ckpt), "--prompt", "a", "--outdir", str(tmp_path / "out"), "--ddim_steps", "2"]
    flags += ["--config", str(EMBEDDED), "--ptq", "--cali_ckpt", str(calibrated / "cali.safetensors")]
    assert "of another architecture" in error_of(capsys, txt2img.main, flags)
    assert not (tmp_path / "out").exists()


def test_a_model_without_cali_ckpt_needs_one(draw, capsys):
    assert "this model comes with no calibration: give a --cali_ckpt" in error_of(capsys, draw, "refused", "--ptq")


# --- what comes with the embedded model --------------------------------------------------------------------


@pytest.mark.slow
def test_shipped_files_are_the_default(tmp_path):
    prompt = "a large red circle on a blue background"  # which leaves little open that a small error may decide
    flags = ["--config", str(EMBEDDED), "--prompt", prompt, "--n_iter", "1", "--n_samples", "1", "--seed", "1"]
    flags += ["--dpm_solver", "--ddim_steps", "10", "--device", "cpu"]
    txt2img.main([*flags, "--outdir", str(tmp_path / "float")])
    for bits, chosen in ((4, []), (8, ["--weight_bit", "8", "--quant_act"])):
        folder = tmp_path / f"w{bits}"
        txt2img.main([*flags, "--ptq", *chosen, "--outdir", str(folder)])
        settings = yaml.safe_load((folder / "settings.yaml").read_text())["quantization"]
        assert settings["cali_ckpt"].endswith(f"models/ldm/shapes/cali_w{bits}a8.safetensors"), bits
        assert settings["bits"] == f"W{bits}A8 sm16 split", bits
        error = np.square(picture(tmp_path / "float") - picture(folder)).mean()
        assert 0 < error < 255**2 / 10**1.8, bits  # 18 dB: the same picture


def test_shipped_files_are_small():
    sizes = {path.name: path.stat().st_size for path in CHECKPOINTS[EMBEDDED][0].parent.glob("*.safetensors")}
    assert sizes["cali_w4a8.safetensors"] < 4e6 < sizes["cali_w8a8.safetensors"] < 8e6
    assert sizes["cali_w4a8.safetensors"] < sizes["model.safetensors"] / 4
