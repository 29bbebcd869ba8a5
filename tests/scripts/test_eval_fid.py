"""scripts/eval_fid.py against torch-fidelity's own command, its files, and what it refuses."""

import hashlib
import json
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from torch_fidelity import fidelity
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import DATASETS_REGISTRY, FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from dsdiff.metrics import extractors as features
from dsdiff.models.registry import READER
from ldm.data.reader import ShapesReader
from ldm.data.shapes import ShapesDataset, caption
from scripts import eval_fid as script

N, SIDE = 150, 32


def write_png(path, picture, prompt, seed):
    """Write a PNG as txt2img.py does."""
    info = PngInfo()
    info.add_text("prompt", prompt)
    info.add_text("seed", str(seed))
    picture.save(path, pnginfo=info)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sharp pictures, and the same ones blurred, of the same prompts and seeds in the opposite order of names."""
    sharp, blurred = tmp_path_factory.mktemp("sharp"), tmp_path_factory.mktemp("blurred")
    data = ShapesDataset(N, "heldout", SIDE, 0)
    for i in range(N):
        picture, prompt = data.picture(i), caption(data.spec(i))
        write_png(sharp / f"{i:05}.png", picture, prompt, i)
        write_png(blurred / f"{N - 1 - i:05}.png", picture.filter(ImageFilter.GaussianBlur(0.7)), prompt, i)
    return sharp, blurred


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """So that each folder is read by the network once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def score(tmp_path, cache):
    """Runs the command on the shapes features and returns what scores.json holds."""

    def run(*flags, features="shapes"):
        outdir = tmp_path / "out"
        extra = ["--features", features] if features else []
        script.main([*map(str, flags), *extra, "--device", "cpu", "--outdir", str(outdir), "--cache", str(cache)])
        return json.loads((outdir / "scores.json").read_text())

    return run


@pytest.fixture
def few(folders, tmp_path):
    """A folder of six of the pictures, to be changed."""
    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(6):
        shutil.copy(folders[0] / f"{i:05}.png", folder)
    return folder


def values(content):
    return {key: score["value"] for key, score in content["scores"].items()}


# --- against torch-fidelity --------------------------------------------------------------------------------


def test_scores_are_those_of_torch_fidelitys_own_command(folders, score, capsys, monkeypatch):
    """The same two folders, the extractor found in torch-fidelity's registry."""
    ours = values(score(folders[1], "--reference", folders[0]))
    capsys.readouterr()
    sources = ["--input1", str(folders[1]), "--input2", str(folders[0]), "--feature-extractor", "shapes"]
    quiet = ["--cpu", "--no-cache", "--save-cpu-ram", "--silent", "--json"]
    scores = ["--fid", "--kid", "--kid-subset-size", str(N // 2), "--prc"]
    monkeypatch.setattr(fidelity.sys, "argv", ["fidelity", *sources, *scores, *quiet])
    fidelity.main()
    theirs = json.loads(capsys.readouterr().out)
    assert ours["fid"] > 0.1
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-3)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)


def test_fid_of_a_set_with_itself_is_zero(folders, score):
    assert abs(values(score(folders[0], "--reference", folders[0]))["fid"]) < 1e-4


def test_fid_is_that_of_the_readers_features_in_float64(folders, score):
    """From pixels to the formula by hand, the root by the symmetric form."""
    reader = ShapesReader.from_file(READER)
    sets = []
    for folder in folders:
        pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])
        sets.append(reader.features(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).double().numpy())
    (mu1, s1), (mu2, s2) = ((v.mean(0), np.cov(v, rowvar=False)) for v in sets)
    values2, basis = np.linalg.eigh(s2)
    root = basis * np.sqrt(values2.clip(0)) @ basis.T
    crossed = np.sqrt(np.linalg.eigvalsh(root @ s1 @ root).clip(0)).sum()
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(s1) + np.trace(s2) - 2 * crossed
    assert values(score(folders[0], "--reference", folders[1]))["fid"] == pytest.approx(expected, abs=1e-3)


def test_the_registered_extractor_knows_its_weights_and_has_no_logits(tmp_path):
    extractor = create_feature_extractor("shapes", ["128"], cuda=False, verbose=False)
    assert extractor.get_name() == f"shapes-{hashlib.sha256(READER.read_bytes()).hexdigest()[:16]}"
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    assert [layer.shape for layer in extractor(images)] == [(2, 128)]
    with pytest.raises(ValueError, match="no class logits"):
        torch_fidelity.calculate_metrics(
            input1=str(tmp_path), isc=True, feature_extractor="shapes", cuda=False, verbose=False
        )


# --- sources -----------------------------------------------------------------------------------------------


def test_shapes_are_rendered_at_the_pictures_size(few, score):
    content = score(few, "--reference", "shapes", "--reference_n", 9, features=None)
    assert content["protocol"]["reference"]["size"] == [SIDE, SIDE] and content["protocol"]["reference"]["n"] == 9
    assert content["scores"]["fid"]["name"] == "FID (shapes features)"
    assert any("learnt from 128x128" in note for note in content["notes"])


def imagenet(folder, counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"ILSVRC2012_val_{i:08}.JPEG")


# --- resize ------------------------------------------------------------------------------------------------


def test_resizing_is_part_of_the_protocol_and_of_the_cache_name(few, score, cache, capsys):
    plain = score(few, "--reference", "shapes", "--reference_n", 4)
    names = {path.name for path in cache.iterdir()}
    resized = score(few, "--reference", "shapes", "--reference_n", 4, "--resize", "squash", "--size", 16)
    assert plain["protocol"]["resize"] == "none" and "squash to 16x16, bicubic" in resized["protocol"]["resize"]
    assert "resize: squash to 16x16" in capsys.readouterr().out
    assert plain["protocol"]["pictures"]["content_sha256"] != resized["protocol"]["pictures"]["content_sha256"]
    assert len({path.name for path in cache.iterdir()} - names) == 2


def test_the_size_is_that_of_the_pictures_by_default(few, tmp_path, score):
    real = tmp_path / "real"
    imagenet(real, {"n01": 4})
    Image.new("RGB", (60, 20)).save(real / "n01" / "wide.png")
    flags = ["--reference", f"imagenet:{real}", "--resize", "center-crop"]
    assert score(few, *flags)["protocol"]["reference"]["size"] == [SIDE, SIDE]


# --- statistics and cache ----------------------------------------------------------------------------------


def test_statistics_stand_for_the_pictures(folders, score, tmp_path):
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / "new" / f"stats{suffix}"
        assert score(folders[0], "--save_stats", path)["scores"] == {}, suffix
        by_pictures, by_file = (score(folders[1], "--reference", source) for source in (folders[0], path))
        assert values(by_file)["fid"] == pytest.approx(values(by_pictures)["fid"], abs=1e-9), suffix
        assert set(values(by_file)) == {"fid"}, suffix
        assert any("no single pictures" in note for note in by_file["notes"]), suffix
        assert by_file["protocol"]["reference"]["n"] == N, suffix
        replicates = [content["scores"]["fid"]["replicates"] for content in (by_file, by_pictures)]
        assert replicates[0] == pytest.approx(replicates[1]), suffix


def test_statistics_say_which_features_to_take(few, score, tmp_path):
    score(few, "--save_stats", tmp_path / "stats.npz")
    assert score(few, "--reference", tmp_path / "stats.npz", features=None)["scores"]["fid"]["value"] < 1e-4


def test_statistics_of_other_programs_are_taken_with_a_warning(few, score, tmp_path, capsys):
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(128, dtype=np.float32), sigma=np.eye(128))
    content = score(few, "--reference", tmp_path / "foreign.npz")
    assert content["scores"]["fid"]["value"] > 0 and content["protocol"]["reference"]["n"] is None
    assert "does not say how its features came about" in capsys.readouterr().out


def test_features_are_made_once(few, score, monkeypatch):
    first = score(few, "--reference", "shapes", "--reference_n", 5)
    monkeypatch.setattr(features.FeatureStore, "extract", lambda *_: pytest.fail("made again"))
    assert score(few, "--reference", "shapes", "--reference_n", 5) == first


def test_cache_names_carry_weights_and_pictures(few, score, cache):
    content = score(few, "--save_stats", few / "stats.npz")
    hashes = (content["protocol"]["features"]["weights_sha256"], content["protocol"]["pictures"]["content_sha256"])
    assert (cache / f"shapes-{hashes[0][:16]}-{hashes[1][:16]}.safetensors").is_file()
    Image.new("RGB", (SIDE, SIDE)).save(few / "00003.png")
    assert score(few, "--save_stats", few / "stats.npz")["protocol"]["pictures"]["content_sha256"] != hashes[1]


def test_damaged_features_are_made_anew(few, score, cache):
    first = score(few, "--reference", few)
    name = first["protocol"]["pictures"]["content_sha256"][:16]
    (path,) = cache.glob(f"shapes-*-{name}.safetensors")
    good = load_file(path)["vectors"].clone()
    path.write_bytes(path.read_bytes()[:100])
    assert score(few, "--reference", few) == first and load_file(path)["vectors"].equal(good)


def test_without_a_cache_nothing_is_kept(few, tmp_path):
    flags = ["--features", "shapes", "--device", "cpu", "--no_cache", "--outdir", str(tmp_path / "out")]
    script.main([str(few), "--reference", str(few), "--cache", str(tmp_path / "cache"), *flags])
    assert not (tmp_path / "cache").exists()


# --- pairs -------------------------------------------------------------------------------------------------


def test_paired_scores_and_the_difference_of_fids(folders, score):
    sharp, blurred = folders
    content = score(blurred, "--reference", "shapes", "--reference_n", 200, "--paired", sharp)
    found = values(content)
    data = ShapesDataset(N, "heldout", SIDE, 0)
    errors = []
    for i in range(N):
        both = (data.picture(i).filter(ImageFilter.GaussianBlur(0.7)), data.picture(i))
        errors.append(np.square(np.subtract(*(np.asarray(picture) / 255 for picture in both))).mean())
    assert found["psnr"] == pytest.approx(-10 * np.log10(np.mean(errors)), abs=1e-9)
    assert found["psnr_mean_of_pictures"] == pytest.approx(np.mean(-10 * np.log10(errors)), abs=1e-9)
    assert found["psnr"] < found["psnr_mean_of_pictures"] - 0.1
    for key, name in (("psnr", "PSNR, dB"), ("psnr_mean_of_pictures", "mean of per-picture PSNR, dB")):
        written = content["scores"][key]
        assert written["low"] < found[key] < written["high"] and written["name"] == name, key
    assert 0.5 < found["ssim"] < 1
    alone = values(score(sharp, "--reference", "shapes", "--reference_n", 200))
    assert found["fid_difference"] == pytest.approx(found["fid"] - alone["fid"], abs=1e-4)


def test_intervals_go_by_the_seed(folders, score):
    flags = [folders[1], "--n", 40, "--reference", folders[0], "--paired", folders[0]]
    first, again, other = score(*flags), score(*flags), score(*flags, "--seed", 1)
    assert first == again
    for key in ("fid", "psnr", "psnr_mean_of_pictures", "ssim"):
        assert first["scores"][key]["low"] != other["scores"][key]["low"]
        assert first["scores"][key]["value"] == other["scores"][key]["value"]


def test_pairs_need_no_features(folders, score):
    content = score(folders[0], "--paired", folders[1], "--n", 8, features=None)
    assert set(values(content)) == {"psnr", "psnr_mean_of_pictures", "ssim"}
    assert "features" not in content["protocol"] and "kid_and_is_seed" not in content["protocol"]
    assert any("142 of the other folder have no partner" in note for note in content["notes"])


# --- Inception ---------------------------------------------------------------------------------------------


class StandIn(FeatureExtractorBase):
    """In Inception's place: means and deviations of colours, and some logits of them."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
        super().__init__(name, features_list)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    @staticmethod
    def get_provided_features_list():
        return ("2048", "logits_unbiased")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits_unbiased" if metric == "isc" else "2048"

    def forward(self, images):
        vectors = torch.cat([images.float().mean((2, 3)), images.float().std((2, 3))], dim=1) / 64
        layers = {"2048": vectors, "logits_unbiased": 10 * vectors.roll(1, 1)}
        return tuple(layers[name] for name in self.features_list)


@pytest.fixture
def inception(monkeypatch, tmp_path):
    """Weights that the stand-in takes."""
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "inception-v3-compat", StandIn)
    torch.save({}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_inception_score_is_torch_fidelitys(folders, score, inception, monkeypatch):
    monkeypatch.setattr(features, "_inception_prefix", lambda: hashlib.sha256(inception.read_bytes()).hexdigest()[:8])
    content = score(folders[1], "--reference", folders[0], "--inception_weights", inception, features=None)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[1]),
        input2=str(folders[0]),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception),
        **dict.fromkeys(("isc", "fid", "save_cpu_ram"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
    )
    found = content["scores"]
    assert found["inception_score"]["value"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert found["inception_score"]["spread"] == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    assert found["fid"]["value"] == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)
    assert found["fid"]["name"] == "FID"


def test_other_weights_are_named(few, score, inception):
    content = score(few, "--reference", few, "--inception_weights", inception, features="inception")
    assert content["scores"]["fid"]["name"] == "FID (other weights than torch-fidelity's)"


def test_offline_without_inception_is_one_line(few, tmp_path, monkeypatch, capsys):
    def no_network(*_):
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(features.torch.hub, "download_url_to_file", no_network)
    message = refused(capsys, few, "--reference", few)
    assert "no Inception weights" in message and "--inception_weights FILE" in message and "no route" in message


def test_weights_that_are_code_are_refused(few, tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    torch.save({"a": Code()}, tmp_path / "code.pth")
    assert "holds no weights" in refused(capsys, few, "--reference", few, "--inception_weights", tmp_path / "code.pth")
    assert not (tmp_path / "run").exists()


# --- what is written ---------------------------------------------------------------------------------------


def test_table_json_and_row(few, score, tmp_path, capsys):
    content = score(few, "--reference", few, "--paired", few, "--name", "a | b")
    out = capsys.readouterr().out
    lines = (tmp_path / "out" / "scores.md").read_text().splitlines()
    assert len(lines) == 3 and lines[2].startswith("| a \\| b | 0 |") and "FID (shapes features)" in lines[0]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].replace("\\|", "").count("|")
    assert content["versions"]["torch-fidelity"] == torch_fidelity.__version__
    assert content["protocol"]["features"]["weights_sha256"] == hashlib.sha256(READER.read_bytes()).hexdigest()
    for words in ("pictures: folder", "reference: folder", "paired: folder", "resize: none", "features: shapes"):
        assert words in out
    for words in (
        "6 pictures and 6 in the reference for 128 dimensions: a covariance is rank deficient",
        "6 of 6 pairs",
    ):
        assert words in out and any(words in note for note in content["notes"])
    assert content["scores"]["psnr"]["value"] is None and content["scores"]["psnr"]["low"] is None
    assert "psnr_mean_of_pictures" not in content["scores"] and "| inf |" in lines[2]
    assert content["scores"]["ssim"]["value"] == pytest.approx(1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scores.json", "scores.md"]


# --- refusals ----------------------------------------------------------------------------------------------


def refused(capsys, *flags):
    """The one line on stderr, progress bars aside, of a run that leaves with status 2."""
    with pytest.raises(SystemExit) as leaving:
        script.main([*map(str, flags), "--device", "cpu", "--no_cache"])
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    said = [line for line in lines if line.strip() and "it/s" not in line and "/s]" not in line]
    assert leaving.value.code == 2 and len(said) == 1 and said[0].startswith("error: ")
    return said[0]


BAD_FLAGS = [
    ([], "nothing to compare with"),
    (["--reference", "missing"], "no reference at 'missing'"),
    (["--reference", "missing.npz"], "no reference at 'missing.npz'"),
    (["--reference", "imagenet:missing"], "no reference at 'missing'"),
    (["--paired", "missing"], "no folder to pair with at 'missing'"),
    (["--reference", "shapes", "--size", "64"], "size has no effect"),
    (["--reference", "shapes", "--per_class", "5"], "--per_class has no effect"),
    (["--reference", "x.npz", "--reference_n", "5"], "--reference_n has no effect"),
    (["--reference", "shapes", "--clip", "x"], "--clip has no effect"),
    (["--paired", ".", "--features", "shapes"], "--features has no effect"),
    (["--paired", ".", "--reader", "x"], "--reader has no effect"),
    (
        ["--reference", "shapes", "--inception_weights", "x"],
        "--inception_weights has no effect with features of shapes",
    ),
    (["--reference", "shapes", "--resize", "crop"], "invalid choice"),
    (["--reference", "shapes", "--reader", "missing"], "no weights of the reader of shapes at 'missing'"),
    (["--reference", "shapes", "--n_samples", "8"], "unrecognized arguments: --n_samples"),
    (["--save_stats", "stats.txt"], "must end in .npz or .safetensors"),
]


def test_bad_flags_are_one_line(few, capsys):
    for flags, said in BAD_FLAGS:
        assert said in refused(capsys, few, *flags), flags


def test_statistics_cannot_be_scored(capsys):
    assert "can only be the --reference" in refused(capsys, "stats.npz", "--reference", "shapes")


def test_an_empty_folder_is_refused(tmp_path, capsys):
    (tmp_path / "note.txt").write_text("")
    assert "no pictures in" in refused(capsys, tmp_path, "--reference", "shapes")


def test_a_broken_picture_is_named(few, capsys):
    path = few / "00004.png"
    whole = path.read_bytes()
    for keep in (0, 20, 400):
        path.write_bytes(whole[:keep])
        message = refused(capsys, few, "--reference", "shapes", "--reference_n", 4)
        assert "00004.png' is no readable picture" in message, f"{keep} bytes"


def test_16_bits_are_refused(few, capsys):
    Image.new("I;16", (SIDE, SIDE)).save(few / "00004.png")
    assert "only pictures of 8 bits" in refused(capsys, few, "--reference", "shapes")


def test_mixed_sizes_need_a_resize(few, capsys):
    Image.new("RGB", (40, 24)).save(few / "x.png")
    message = refused(capsys, few, "--reference", "shapes")
    assert "32x32 in 00000.png, 40x24 in x.png" in message and "--resize squash or center-crop" in message
    assert "needs a --size" in refused(capsys, few, "--reference", "shapes", "--resize", "squash")


def test_a_reference_of_another_size_is_refused(few, tmp_path, capsys):
    imagenet(tmp_path, {"real": 4})
    message = refused(capsys, few, "--reference", tmp_path / "real", "--features", "shapes")
    assert "the pictures are 32x32, the reference is 8x8" in message
    assert "pairs need one size" in refused(capsys, few, "--paired", tmp_path / "real")


def test_sizes_that_the_reader_cannot_take_are_refused(tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    message = refused(capsys, tmp_path, "--reference", tmp_path, "--features", "shapes")
    assert "multiples of 8" in message and "--resize squash --size 128" in message


def test_pictures_without_prompt_cannot_be_paired(few, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(other / "x.png")
    assert "x.png' holds no prompt and seed" in refused(capsys, few, "--paired", other)
    assert "is not one" in refused(capsys, "shapes", "--paired", few, "--n", 2)


def test_imagenet_is_not_cut_to_its_first_classes(few, tmp_path, capsys):
    imagenet(tmp_path, {"n01": 4})
    message = refused(capsys, few, "--reference", f"imagenet:{tmp_path}", "--reference_n", 2)
    assert "use --per_class" in message
    assert "no class folders" in refused(capsys, few, "--reference", f"imagenet:{few}")


def test_one_picture_is_no_set(tmp_path, capsys):
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "x.png")
    assert "at least 2" in refused(capsys, tmp_path, "--reference", tmp_path, "--features", "shapes")


BAD_STATISTICS = [
    ({"mu": np.zeros(64), "sigma": np.eye(64)}, "is of 64 features, shapes has 128"),
    ({"mu": np.zeros(128), "sigma": np.eye(64)}, "are no statistics"),
    ({"mu": np.full(128, np.nan), "sigma": np.eye(128)}, "are no statistics"),
    ({"mean": np.zeros(128)}, "is no statistics file with mu and sigma"),
    ({"mu": np.array([None]), "sigma": np.eye(1)}, "is no statistics file with mu and sigma"),
    ({"mu": np.zeros(1), "sigma": np.eye(1), "facts": np.array('{"extractor": "vgg"}')}, "features 'vgg'"),
]


def test_statistics_that_do_not_fit_are_refused(few, tmp_path, capsys):
    for arrays, said in BAD_STATISTICS:
        np.savez(tmp_path / "stats.npz", **arrays)
        extra = [] if "facts" in arrays else ["--features", "shapes"]
        assert said in refused(capsys, few, "--reference", tmp_path / "stats.npz", *extra), said


def test_damaged_statistics_are_refused(few, tmp_path, capsys):
    for name in ("stats.npz", "stats.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
        assert "is no statistics file" in refused(capsys, few, "--reference", tmp_path / name)


def test_statistics_of_another_protocol_are_refused(few, score, tmp_path, capsys):
    score(few, "--save_stats", tmp_path / "stats.npz")
    with np.load(tmp_path / "stats.npz") as file:
        arrays = dict(file)
    facts = json.loads(str(arrays["facts"]))
    for name, value in (("weights_sha256", "0" * 64), ("size", [64, 64])):
        arrays["facts"] = np.array(json.dumps(facts | {name: value}))
        np.savez(tmp_path / "stats.npz", **arrays)
        assert f"is of another {name}" in refused(capsys, few, "--reference", tmp_path / "stats.npz"), name


def test_a_data_set_that_cannot_be_fetched_is_refused(few, tmp_path, monkeypatch, capsys):
    def no_network(root, download):
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(DATASETS_REGISTRY, "cifar10-val", no_network)
    assert "'cifar10-val' is not under" in refused(capsys, few, "--reference", "cifar10-val")
