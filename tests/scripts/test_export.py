"""scripts/export.py, and drawing from the one file that it writes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsdiff.models.registry import CALI_CKPTS, CHECKPOINTS, EMBEDDED, READER
from dsdiff.pipeline import load
from ldm.tensor_files import save_tensors
from qdiff.checkpoint import HEADER, read_cali_header
from qdiff.engine.backends import onednn
from qdiff.engine.lower import backend_for
from scripts import calibrate, export, txt2img

FLAGS = ["--prompt", "a large red circle", "--dpm_solver", "--ddim_steps", "2", "--n_samples", "1", "--n_iter", "1"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "shapes-w4a8.safetensors"
    export.main([str(path)])
    return path


def draw(folder, *flags):
    decoder = () if "--vae" in flags else ("--vae", "float32")
    txt2img.main([*FLAGS, "--outdir", str(folder), *decoder, *map(str, flags)])
    return np.asarray(Image.open(folder / "samples" / "00000.png"))


def test_it_draws_what_the_parts_draw(bundle, tmp_path):
    integers = backend_exists()
    for line in ("--precision full", "--ratio 0.5", "--engine simulate", "--no-quant_act", "--low_memory"):
        if line == "--low_memory" and not integers:  # it is for the integer engine, see test_lower
            continue
        alone = draw(tmp_path / f"alone{line}", "--ckpt", bundle, *line.split())
        parts = draw(tmp_path / f"parts{line}", "--ptq", *line.split())
        # The shipped checkpoint is float16, as the file's other parts are; layouts differ, and so does rounding.
        assert np.abs(alone.astype(int) - parts.astype(int)).max() <= 2, line


def test_its_decoder_runs_on_integers(bundle, tmp_path):
    if onednn.largest_exact_weight() < onednn.LARGEST:
        pytest.skip("this CPU has no exact kernels for weights of 8 bits")
    for steps in (2, 10):  # latents of few steps are larger
        exact, whole, tiled = (
            draw(tmp_path / f"{steps}-{i}", "--ckpt", bundle, "--ddim_steps", steps, "--vae", *flags).astype(float)
            for i, flags in enumerate((["float32"], ["int8"], ["int8", "--vae_tiling"]))
        )
        assert 0 < np.square(whole - exact).mean() < 255**2 / 10**3.6, steps  # 36 dB
        # Statistics of norms that differ in their last bit tip codes over.
        assert np.square(tiled - whole).mean() < 255**2 / 10**4.2, steps


def test_without_ranges_there_is_no_integer_decoder(bundle, tmp_path, capsys):
    tensors = {name: tensor for name, tensor in load_file(bundle).items() if not name.startswith("decoder.")}
    with safe_open(bundle, framework="pt") as file:
        save_tensors(tensors, tmp_path / "old.safetensors", file.metadata())
    assert draw(tmp_path / "out", "--ckpt", tmp_path / "old.safetensors").std() > 0
    with pytest.raises(SystemExit):
        draw(tmp_path / "none", "--ckpt", tmp_path / "old.safetensors", "--vae", "int8")
    assert "no calibrated ranges" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_it_is_no_cali_ckpt(bundle, tmp_path, capsys):
    with pytest.raises(SystemExit):
        draw(tmp_path / "out", "--ptq", "--cali_ckpt", bundle)
    assert "is a whole model, which draws alone: give it with --ckpt" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_refused(bundle, tmp_path, capsys):
    tensors = load_file(bundle)
    with safe_open(bundle, framework="pt") as file:
        metadata = file.metadata()
    for start in ("first_stage_model.", "cond_stage_model.", "model.diffusion_model.", "unet."):
        name = next(name for name, tensor in tensors.items() if name.startswith(start) and tensor.is_floating_point())
        damaged = tensors[name].clone()
        damaged.view(-1)[0] = float("nan")
        save_tensors(tensors | {name: damaged}, tmp_path / "nan.safetensors", metadata)
        with pytest.raises(SystemExit):
            draw(tmp_path / "out", "--ckpt", tmp_path / "nan.safetensors")
        assert "is damaged: " in capsys.readouterr().err and not (tmp_path / "out").exists(), name


def backend_exists():
    """Whether the integer engine runs W4A8 here."""
    try:
        backend_for(read_cali_header(CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]][4]).config, torch.device("cpu"))
    except ValueError:
        return False
    return True


def test_it_needs_no_other_file(bundle, tmp_path, monkeypatch):
    for name in ("CHECKPOINTS", "CALI_CKPTS"):
        monkeypatch.setattr(f"dsdiff.models.spec.{name}", {})
    monkeypatch.chdir(tmp_path)
    assert draw(tmp_path / "out", "--ckpt", bundle).std() > 0


def test_it_is_smaller_than_the_checkpoint_and_holds_no_float_weight(bundle):
    assert bundle.stat().st_size < 0.5 * CHECKPOINTS[EMBEDDED][0].stat().st_size
    with safe_open(bundle, framework="pt") as file:
        sizes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        unet = [name for name in sizes if name.startswith("model.diffusion_model.")]
        assert unet and all(len(sizes[name].get_shape()) == 1 for name in unet)
        others = [name for name in sizes if name.startswith(("first_stage_model.", "cond_stage_model."))]
        assert others and {sizes[name].get_dtype() for name in others} <= {"F16", "I64"}


def test_the_float_unet_is_never_built(bundle, monkeypatch):
    built = []
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, *a, **k: built.append(tensor.is_meta))
    load(bundle)
    assert built and all(built)


def test_pictures_say_what_drew_them(bundle, tmp_path):
    draw(tmp_path, "--ckpt", bundle)
    with Image.open(tmp_path / "samples" / "00000.png") as picture:
        facts = json.loads(picture.text["dsdiff"])
    assert facts["quantization"]["bits"] == "W4A8 sm16 split" and facts["ckpt"] == bundle.name


CONTRADICTIONS = (
    (["--config", str(EMBEDDED)], "brings its own"),
    (["--tokenizer", "."], "brings its own"),
    (["--ptq", "--cali_ckpt", "x.safetensors"], "calibrated already"),
    (["--weight_bit", "8"], "made with weight_bit 4"),
    (["--no-quant_act", "--low_memory"], "--low_memory has no effect"),
    (["--engine", "simulate", "--low_memory"], "--low_memory has no effect"),
)


def test_what_contradicts_the_file_is_refused(bundle, tmp_path, capsys):
    for flags, said in CONTRADICTIONS:
        refuse(txt2img, [*FLAGS, "--ckpt", str(bundle), "--outdir", str(tmp_path / "out"), *flags], capsys, said)
        assert not list(tmp_path.iterdir()), flags
    with pytest.raises(ValueError, match="brings its own"):
        load(bundle, tokenizer=tmp_path)


def refuse(script, flags, capsys, said):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        script.main(flags)
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and said in lines[0], lines


def test_commands_that_need_the_float_model_say_so(bundle, tmp_path, capsys):
    refuse(calibrate, ["--ckpt", str(bundle), "--outdir", str(tmp_path / "x")], capsys, "holds a quantized model")
    refuse(export, [str(tmp_path / "y.safetensors"), "--ckpt", str(bundle)], capsys, "holds a quantized model")
    other = ["--config", str(EMBEDDED), "--ckpt", str(READER)]  # a file that no cali_ckpt comes with
    refuse(export, [str(tmp_path / "y.safetensors"), *other], capsys, "no calibration: give a --cali_ckpt")
    refuse(export, [str(tmp_path / "y.pth")], capsys, "must end in .safetensors")
    for flag in ("--weight_bit", "--vae_pictures"):
        refuse(
            export, [str(tmp_path / "y.safetensors"), "--random_weights", flag, "4"], capsys, f"{flag} has no effect"
        )
    refuse(export, [str(tmp_path / "y.safetensors"), "--cali_ckpt", "missing"], capsys, "missing")
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_not_written_to(tmp_path, capsys):
    ckpt, cali = (tmp_path / name for name in ("model.safetensors", "cali.safetensors"))
    shutil.copy(CHECKPOINTS[EMBEDDED][0], ckpt)
    shutil.copy(CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]][4], cali)
    before = ckpt.read_bytes(), cali.read_bytes()
    flags = ["--config", str(EMBEDDED), "--ckpt", str(ckpt), "--cali_ckpt", str(cali)]
    for target in (ckpt, cali):
        refuse(export, [str(target), *flags], capsys, "is what is read")
    assert (ckpt.read_bytes(), cali.read_bytes()) == before


def damaged(bundle, target, change):
    """A copy of the file, its tensors and its header changed."""
    with safe_open(bundle, framework="pt") as file:
        content = json.loads(file.metadata()[HEADER])
    tensors = load_file(bundle)
    change(tensors, content)
    save_file(tensors, target, metadata={HEADER: json.dumps(content)})
    return target


def aim(content, target):
    content["model"]["model"]["params"]["first_stage_config"]["target"] = target


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


CODES = "unet.model.input_blocks.0.0.weight_quantizer.codes"
DAMAGES = {
    "code to run": (lambda tensors, content: aim(content, "os.system"), "refused"),
    "a function": (lambda tensors, content: aim(content, "ldm.modules.attention.rearrange"), "refused"),
    "no codes": (lambda tensors, content: tensors.pop(CODES), "lacks"),
    "codes cut": (lambda tensors, content: tensors.update({CODES: tensors[CODES][:, :-1].contiguous()}), "damaged"),
    "no norm": (lambda tensors, content: tensors.pop("model.diffusion_model.out.0.weight"), "biases and norms"),
    "no autoencoder": (lambda tensors, content: tensors.pop("first_stage_model.decoder.conv_in.weight"), "missing"),
    "no tokenizer": (
        lambda tensors, content: [tensors.pop(name) for name in list(tensors) if name.startswith("tokenizer.")],
        "no tokenizer",
    ),
    "a tokenizer elsewhere": (
        lambda tensors, content: rename(tensors, "tokenizer.tokenizer_config.json", "tokenizer.../x.json"),
        "outside",
    ),
    "no config": (lambda tensors, content: content.update(model=[]), "describes no latent diffusion model"),
}


def test_damaged_files_are_refused(bundle, tmp_path, capsys):
    for name, (change, said) in DAMAGES.items():
        path = damaged(bundle, tmp_path / "damaged.safetensors", change)
        refuse(txt2img, [*FLAGS, "--ckpt", str(path), "--outdir", str(tmp_path / "out")], capsys, said)
        assert list(tmp_path.iterdir()) == [path], name


def test_a_bit_that_was_turned_over_is_refused(bundle, tmp_path, capsys):
    content, path = bytearray(bundle.read_bytes()), tmp_path / "bit.safetensors"
    digit = re.search(rb"scale_factor\W+\d\.(\d)", content).start(1)
    for place in (digit, len(content) // 2, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        refuse(txt2img, [*FLAGS, "--ckpt", str(path), "--outdir", str(tmp_path / "out")], capsys, "checksum is wrong")
        content[place] ^= 1
        assert list(tmp_path.iterdir()) == [path], place
