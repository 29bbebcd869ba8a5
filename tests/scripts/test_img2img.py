"""scripts/img2img.py on random weights and tiny pictures: strength, masks, folders, what it records and refuses."""

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from dsdiff.models.registry import EMBEDDED
from scripts import img2img, txt2img

ONCE = ["--n_iter", "1", "--n_samples", "1"]


@pytest.fixture
def init(tmp_path):
    """The path of a smooth picture of 48x32 pixels."""
    x, y = np.meshgrid(np.linspace(0, 255, 48), np.linspace(0, 255, 32))
    path = tmp_path / "init.png"
    Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def mask(tmp_path):
    """The path of a mask: white in the left half, to a border of latents."""
    pixels = np.zeros((32, 48), np.uint8)
    pixels[:, :24] = 255
    path = tmp_path / "mask.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def run(run_tiny, init):
    """run(*flags) -> outdir; a picture is added where there is none, and no grid is drawn."""

    def call(*flags, **more):
        picture = () if "--init" in flags else ("--init", init)
        return run_tiny(img2img, "--ddim_steps", 4, "--skip_grid", *picture, *flags, **more)

    return call


def picture(folder, i=0):
    return np.asarray(Image.open(folder / f"samples/{i:05}.png")).astype(int)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def distance(a, b):
    return float(np.abs(a - b).mean())


# --- what it draws -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_strength_decides_how_much_is_left_of_the_picture(run, run_tiny, tmp_path):
    drawn = [picture(run(*ONCE, "--strength", x, outdir=f"s{x}")) for x in (0.25, 0.5, 1)]
    assert len({each.tobytes() for each in drawn}) == 3
    settings = yaml.safe_load((tmp_path / "s0.5/settings.yaml").read_text())
    assert (settings["steps"], settings["steps_taken"], settings["init"]["strength"]) == (4, 2, 0.5)
    from_noise = picture(run_tiny(txt2img, "--ddim_steps", 4, "--skip_grid", *ONCE, outdir="noise"))
    assert distance(drawn[2], from_noise) < distance(drawn[0], from_noise)


@pytest.mark.slow
def test_pixels_outside_of_a_mask_stay(run, init, mask):
    own = pixels(init)
    hard = picture(run(*ONCE, "--mask", mask, "--mask_blur", 0, outdir="hard"))
    assert (hard[:, 24:] == own[:, 24:]).all() and distance(hard[:, :24], own[:, :24]) > 5
    soft = picture(run(*ONCE, "--mask", mask, outdir="soft"))
    assert (soft[:, 40:] == own[:, 40:]).all() and distance(soft[:, 20:28], hard[:, 20:28]) > 0
    decoded = picture(run(*ONCE, "--mask", mask, "--no-paste", outdir="decoded"))
    assert distance(decoded[:, 24:], own[:, 24:]) > 0
    whole = picture(run(*ONCE, outdir="whole"))
    assert distance(whole[:, 24:], own[:, 24:]) > 5


def test_pictures_of_other_sizes_are_cropped_or_stretched(run, init, tmp_path, capsys):
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste(Image.open(init), (24, 0))
    wide.save(tmp_path / "wide.png")
    flags = (*ONCE, "--strength", 0.5)
    cropped = picture(run(*flags, "--init", tmp_path / "wide.png", outdir="cropped"))
    assert "wide.png: 96x32 pixels, scaled and cropped to 48x32" in capsys.readouterr().out
    assert (cropped == picture(run(*flags, outdir="own"))).all()
    stretched = picture(run(*flags, "--init", tmp_path / "wide.png", "--resize", "stretch", outdir="stretched"))
    assert distance(stretched, cropped) > 5


def test_a_folder_is_used_in_turn(run, init, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(init, folder / "b.png")
    Image.new("RGB", (48, 32), "white").save(folder / "a.jpg")
    (folder / "notes.txt").write_text("no picture")
    (tmp_path / "prompts.txt").write_text("a ring\na blue star\n")
    flags = ("--init", folder, "--n_samples", 2, "--n_iter", 2)
    outdir = run(*flags, outdir="one prompt")
    assert len(list((outdir / "samples").iterdir())) == 4
    told = [json.loads(Image.open(outdir / f"samples/{i:05}.png").info["dsdiff"]) for i in range(4)]
    assert [each["init_picture"]["name"] for each in told] == ["a.jpg", "b.png"] * 2
    outdir = run(*flags, "--from-file", tmp_path / "prompts.txt", outdir="own prompts")
    told = [json.loads(Image.open(outdir / f"samples/{i:05}.png").info["dsdiff"]) for i in range(4)]
    pairs = [(each["init_picture"]["name"], each["prompt"], each["seed"]) for each in told]
    assert pairs[:2] == [("a.jpg", "a ring", 42), ("b.png", "a blue star", 43)]
    assert pairs[2:] == [("a.jpg", "a ring", 44), ("b.png", "a blue star", 45)]
    alone = picture(run(*ONCE, "--init", folder / "b.png", "--prompt", "a blue star", "--seed", 43, outdir="alone"))
    assert np.abs(alone - picture(outdir, 1)).max() <= 1


@pytest.mark.slow
def test_each_sampler_and_each_way_to_draw_less_works(run, mask):
    for sampler in ("plms", "dpm_solver", "euler", "euler_a", "dpmpp_2m_karras", "unipc", "lcm", "tcd"):
        assert picture(run(*ONCE, "--sampler", sampler, "--mask", mask, outdir=sampler)).std() > 0, sampler
    flags = ("--ratio", 0.5, "--merge_every", 2, "--cache", 2, "--guidance_stop", 0.5)
    assert picture(run(*ONCE, *flags, "--mask", mask, outdir="less")).std() > 0


# --- records -----------------------------------------------------------------------------------------------


def test_settings_tell_the_picture_and_a_run_resumes(run, init, mask, tmp_path, refused):
    flags = ("--n_iter", 2, "--n_samples", 1, "--mask", mask, "--strength", 0.5)
    outdir = run(*flags)
    settings = yaml.safe_load((outdir / "settings.yaml").read_text())
    assert settings["init"] == {"strength": 0.5, "resize": "crop", "mask_blur": 4.0, "paste": True}
    assert [each["name"] for each in (*settings["inits"], settings["mask"])] == ["init.png", "mask.png"]
    assert all(len(each["sha256"]) == 64 for each in (*settings["inits"], settings["mask"]))
    info = Image.open(outdir / "samples/00001.png").info["parameters"]
    assert "Denoising strength: 0.5, Mask blur: 4" in info
    before = [path.read_bytes() for path in sorted((outdir / "samples").iterdir())]
    (outdir / "samples/00001.png").unlink()
    run(*flags, "--resume")
    assert [path.read_bytes() for path in sorted((outdir / "samples").iterdir())] == before
    shutil.copytree(outdir, tmp_path / "refused")
    assert "init.strength (0.5 there, 0.75 here)" in refused(*flags[:-2], "--resume")


def test_the_python_api_draws_the_same(run, init, mask, random_ckpt):
    import dsdiff

    drawn = picture(run(*ONCE, "--mask", mask, "--strength", 0.5))
    pipeline = dsdiff.load(random_ckpt, config=EMBEDDED, device="cpu")
    options = dsdiff.DrawOptions(height=32, width=48, steps=4, vae="float32", init=dsdiff.InitOptions(strength=0.5))
    pictures = pipeline.img2img("a red circle", Image.open(init), mask=Image.open(mask), options=options)
    (same,) = pictures
    assert (np.asarray(same.image) == drawn).all() and same.settings.steps_taken == 2
    with pytest.raises(ValueError, match="call img2img"):
        pipeline.draw("a red circle", options=options)
    with pytest.raises(ValueError, match="2 pictures for 1 prompts"):
        pipeline.img2img("a red circle", [Image.open(init)] * 2, options=options)
    with pytest.raises(ValueError, match="black throughout"):
        pipeline.img2img("a ring", Image.open(init), mask=Image.new("L", (48, 32)), options=options)


# --- what it refuses ---------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_in_a_line(refused, tmp_path, init, mask):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "two").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(init, tmp_path / "two" / name)
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    cases = (
        (("--init", tmp_path / "none.png"), "is not there: give a picture, or a folder"),
        (("--init", tmp_path / "empty"), "holds no pictures"),
        (("--init", tmp_path / "text.png"), "is no picture that can be read"),
        (("--init", tmp_path / "two", "--from-file", tmp_path / "three.txt"), "has 2 pictures and --from-file 3"),
        (("--mask", tmp_path / "small.png"), "8x8 pixels"),
        (("--mask", tmp_path / "none.png"), "is not there: give a black and white picture"),
        (("--mask_blur", 3), "--mask_blur has no effect without --mask"),
        (("--no-paste",), "--paste has no effect without --mask"),
        (("--mask", mask, "--mask_blur", 3, "--no-paste"), "no effect with --no-paste"),
        (("--strength", 0), "strength is 0.0"),
        (("--strength", 0.1), "takes none of 4 steps: use 0.25 or more"),
    )
    for flags, message in cases:
        assert message in refused(*flags), flags
