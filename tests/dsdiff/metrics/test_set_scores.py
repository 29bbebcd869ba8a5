"""Scores from features and of pairs, against formulas in float64, numbers worked by hand, and statistics."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchmetrics.functional.image import structural_similarity_index_measure
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from dsdiff.images.folders import FilePictures
from dsdiff.metrics import pair_scores as paired
from dsdiff.metrics import set_scores as scores
from dsdiff.metrics.extractors import Features, Gaussian
from dsdiff.pipeline import ROOT


def vectors_of(n, d=6, seed=0, shift=0.0):
    """Correlated, not Gaussian, of different variances."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) ** 3 @ rng.uniform(-1, 1, (d, d)) + shift).astype(np.float64)


def gaussian(vectors):
    return scores.gaussian_of(Features(vectors=torch.from_numpy(vectors)))


def frechet(first, second):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with the root of a product of covariances by its eigenvalues."""
    mu1, mu2 = first.mean(0), second.mean(0)
    s1, s2 = ((v - v.mean(0)).T @ (v - v.mean(0)) / (len(v) - 1) for v in (first, second))
    values, basis = np.linalg.eig(s1 @ s2)
    root = (basis * np.sqrt(values.astype(complex))) @ np.linalg.inv(basis)
    assert np.allclose(root @ root, s1 @ s2)
    return np.sum((mu1 - mu2) ** 2) + np.trace(s1 + s2 - 2 * root.real)


# --- Frechet distance --------------------------------------------------------------------------------------


def test_fid_is_the_formula():
    first, second = vectors_of(50), vectors_of(70, seed=1, shift=0.3)
    assert scores.fid(gaussian(first), gaussian(second)) == pytest.approx(frechet(first, second), rel=1e-9)


def test_fid_of_one_dimension_by_hand():
    """Means 0 and 3, standard deviations 1 and 2: 9 + (1 - 2)^2."""
    one = Gaussian(mu=np.array([0.0]), sigma=np.array([[1.0]]))
    other = Gaussian(mu=np.array([3.0]), sigma=np.array([[4.0]]))
    assert scores.fid(one, other) == pytest.approx(10)


@pytest.mark.parametrize("n", [50, 5], ids=["full rank", "rank deficient"])
def test_fid_of_a_set_with_itself_is_zero(n):
    vectors = vectors_of(n)
    assert abs(scores.fid(gaussian(vectors), gaussian(vectors))) < 1e-5 * np.trace(gaussian(vectors).sigma)


@pytest.mark.parametrize("n", [50, 5], ids=["full rank", "rank deficient"])
def test_the_fast_fid_is_the_fid(n):
    vectors, reference = vectors_of(n), gaussian(vectors_of(70, seed=1, shift=0.3))
    assert scores.fid_of_vectors(vectors, reference) == pytest.approx(
        scores.fid(gaussian(vectors), reference), rel=1e-6
    )


def test_a_line_in_1_over_n_is_extrapolated_exactly():
    curve = [(n, 2.5 + 40 / n) for n in (10, 20, 40, 100)]
    assert scores.extrapolate(curve) == pytest.approx(2.5)


def test_curve_has_growing_counts_and_ends_with_the_fid_of_all():
    vectors, reference = vectors_of(60), gaussian(vectors_of(70, seed=1))
    curve = scores.fid_curve(vectors, reference, seed=0)
    counts = [count for count, _ in curve]
    assert counts == sorted(counts) and len(counts) == 8 and (counts[0], counts[-1]) == (12, 60)
    assert curve[-1][1] == pytest.approx(scores.fid(gaussian(vectors), reference))
    assert curve == scores.fid_curve(vectors, reference, seed=0) != scores.fid_curve(vectors, reference, seed=1)


def test_extrapolation_takes_the_bias_of_few_pictures_away():
    """Pictures from the reference's own distribution: the true distance is 0."""
    reference = Gaussian(mu=np.zeros(8), sigma=np.eye(8))
    drawn = np.random.default_rng(0).standard_normal((20, 160, 8))
    biased = np.mean([scores.fid_of_vectors(vectors, reference) for vectors in drawn])
    extrapolated = np.mean([scores.extrapolate(scores.fid_curve(vectors, reference, 0)) for vectors in drawn])
    assert biased > 0.1 and abs(extrapolated) < biased / 5


# --- uncertainty -------------------------------------------------------------------------------------------


def test_the_jackknife_masks_leave_each_picture_out_once():
    masks = np.array(list(scores.without_groups(37, seed=3)))
    assert masks.shape == (10, 37) and ((~masks).sum(0) == 1).all()


def test_jackknife_error_of_a_mean_is_the_known_one():
    """With groups of one, the jackknife's error of a mean is s / sqrt(n) exactly."""
    values = np.random.default_rng(0).standard_normal(30)
    replicates = [np.delete(values, i).mean() for i in range(30)]
    assert scores.jackknife_error(replicates) == pytest.approx(values.std(ddof=1) / math.sqrt(30))


def test_the_interval_of_the_fid_is_as_wide_as_the_fid_scatters():
    reference = Gaussian(mu=np.zeros(8), sigma=np.eye(8))
    drawn = np.random.default_rng(0).standard_normal((60, 100, 8)) * 1.3
    scatter = np.std([scores.fid_of_vectors(vectors, reference) for vectors in drawn])
    errors = [scores.jackknife_error(scores.fid_replicates(vectors, reference, 0)) for vectors in drawn[:20]]
    assert 0.7 < np.mean(errors) / scatter < 1.5


def test_bootstrap_is_deterministic_and_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).standard_normal(400)
    names = [str(i) for i in range(400)]
    low, high = scores.bootstrap_interval(values, names, 2000, seed=5)
    assert (low, high) == scores.bootstrap_interval(values, names, 2000, seed=5)
    assert (low, high) != scores.bootstrap_interval(values, names, 2000, seed=6)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02) and high == pytest.approx(
        values.mean() + half, abs=0.02
    )


def test_bootstrap_draws_prompts_not_pictures():
    """Four equal pictures of each prompt say no more than one."""
    values, names = np.random.default_rng(0).standard_normal(50), [str(i) for i in range(50)]
    once = scores.bootstrap_interval(values, names, 500, seed=0)
    four = scores.bootstrap_interval(np.repeat(values, 4), np.repeat(names, 4), 500, seed=0)
    assert np.ptp(four) == pytest.approx(np.ptp(once), rel=0.15)


def test_bootstrap_of_one_prompt_draws_its_pictures():
    low, high = scores.bootstrap_interval(np.arange(10.0), ["same"] * 10, 500, seed=0)
    assert 2 < low < 3.5 and 5.5 < high < 7


def test_one_value_has_no_interval():
    assert scores.bootstrap_interval(np.array([1.0]), ["a"], 100, seed=0) is None


def test_the_difference_of_pairs_is_surer_than_the_scores():
    reference = gaussian(vectors_of(200, seed=1))
    first = vectors_of(100)
    both = [Features(vectors=torch.from_numpy(vectors)) for vectors in (first, first + 0.05)]
    found = scores.Scores()
    scores.add_fid_difference(found, *both, reference)
    difference = found.by_key["fid_difference"]
    scores.add_fid(found, both[0], reference, 0)
    fids = [scores.fid(scores.gaussian_of(features), reference) for features in both]
    assert difference.value == pytest.approx(fids[0] - fids[1])
    assert difference.low < difference.value < difference.high
    assert difference.high - difference.low < (found.by_key["fid"].high - found.by_key["fid"].low) / 2


# --- what the numbers of pictures allow --------------------------------------------------------------------


def scored(n, m, logits=None):
    found = scores.Scores()
    first = Features(vectors=torch.from_numpy(vectors_of(n)).float(), logits=logits)
    scores.add_set_scores(found, first, Features(vectors=torch.from_numpy(vectors_of(m, seed=1)).float()))
    return found


@pytest.mark.parametrize(
    ("n", "m", "present", "told"),
    [
        (
            60,
            60,
            {"fid", "fid_infinity", "kid", "precision", "recall"},
            ["biased by", "unbiased but noisy", "too high"],
        ),
        (23, 60, {"fid", "kid", "precision", "recall"}, ["FID infinity: left out", "same numbers"]),
        (6, 60, {"fid", "kid", "precision", "recall"}, ["6 pictures for 6 dimensions", "rank deficient"]),
        (60, 5, {"fid", "fid_infinity", "kid", "precision", "recall"}, ["5 in the reference for 6 dimensions"]),
        (3, 60, {"fid"}, ["KID: left out", "precision, recall: left out", "without interval"]),
    ],
)
def test_what_few_pictures_do_is_told(n, m, present, told):
    found = scored(n, m)
    assert set(found.by_key) == present
    for words in [*told, "Inception Score: left out"]:
        assert sum(words in note for note in found.notes) == 1, words
    assert (found.by_key["fid"].low is None) == (n < 20)


def test_enough_pictures_are_no_reason_for_notes_on_rank():
    assert not any("rank deficient" in note for note in scored(7, 7).notes)


def test_one_picture_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        scored(1, 60)


def test_inception_score_by_hand():
    """Ten splits of two sure pictures of two classes: exp of the entropy ln 2."""
    logits = torch.zeros(20, 4)
    order = np.random.RandomState(2020).permutation(20)  # torch-fidelity's
    logits[order[::2], 0] = logits[order[1::2], 1] = 100
    found = scored(20, 20, logits=logits)
    assert found.by_key["inception_score"].value == pytest.approx(2) and found.by_key["inception_score"].spread < 1e-6
    assert any("all 4 classes" in note for note in found.notes)


# --- pairs -------------------------------------------------------------------------------------------------


def images_of(n, seed=0, side=24):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_psnr_by_hand():
    """Off by 10 everywhere: 20 log10(25.5). Off by 255: 0. Equal: infinite."""
    first = torch.full((3, 3, 12, 12), 100, dtype=torch.uint8)
    second = first.clone()
    second[0] += 10
    first[1], second[1] = 0, 255
    assert paired.psnr(first, second).tolist() == pytest.approx([20 * math.log10(25.5), 0, math.inf])


def test_ssim_is_that_of_torchmetrics_in_float64():
    first = images_of(3)
    first[2] = 255
    second = (first.float() * 0.8 + images_of(3, seed=1).float() * 0.2).round().to(torch.uint8)
    images = (first.double() / 255, second.double() / 255)
    expected = structural_similarity_index_measure(*images, data_range=1.0, reduction="none").reshape(3).tolist()
    assert paired.ssim(first, second).tolist() == pytest.approx(expected, abs=1e-9) and max(expected) < 0.99


def test_ssim_of_even_pictures_by_hand():
    """Nothing varies, what is left is the luminance: (2 a b + 0.0001) / (a^2 + b^2 + 0.0001)."""
    first, second = (
        torch.full((1, 3, 12, 12), 51, dtype=torch.uint8),
        torch.full((1, 3, 12, 12), 102, dtype=torch.uint8),
    )
    assert paired.ssim(first, second).tolist() == pytest.approx([(0.16 + 1e-4) / (0.2 + 1e-4)])
    assert paired.ssim(first, first).tolist() == pytest.approx([1])


def folder_of(folder, keys, seed=0):
    """A PNG for each (prompt, seed), named by its place."""
    folder.mkdir()
    for i, ((prompt, number), image) in enumerate(zip(keys, images_of(len(keys), seed), strict=True)):
        info = PngInfo()
        info.add_text("prompt", prompt)
        info.add_text("seed", number)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png", pnginfo=info)
    return FilePictures(str(folder), sorted(folder.glob("*.png")))


def test_pairs_go_by_prompt_and_seed_not_by_order(tmp_path):
    first = folder_of(tmp_path / "a", [("x", "1"), ("x", "2"), ("y", "1"), ("z", "1")])
    second = folder_of(tmp_path / "b", [("y", "1"), ("x", "2"), ("w", "1"), ("x", "1")])
    pairing = paired.pair_up(first, second)
    assert pairing.prompts == ("x", "x", "y") and (pairing.firsts, pairing.seconds) == ((0, 1, 2), (3, 1, 0))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([("x", "1")], [("x", "2")], "nothing to pair"),
        ([("x", "1")], [("x", "1"), ("x", "1")], r"0.png' and .*1.png' are both of prompt 'x' and seed 1"),
    ],
)
def test_what_does_not_pair_is_refused(first, second, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        paired.pair_up(folder_of(tmp_path / "a", first), folder_of(tmp_path / "b", second))


def test_equal_pairs_are_told_and_left_out_of_the_psnr():
    found = scores.Scores()
    paired.add_mean(found, "psnr", np.array([20.0, math.inf, 30.0]), ["a", "b", "c"], 200, 0)
    assert (found.by_key["psnr"].value, found.by_key["psnr"].n) == (25, 2)
    assert found.by_key["psnr"].low == 20 and "1 of 3 pairs are equal" in found.notes[0]
    paired.add_mean(found, "ssim", np.array([math.inf]), ["a"], 200, 0)
    assert "ssim" not in found.by_key


def test_scores_whose_weights_are_missing_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(paired, "CLIP", str(tmp_path / "clip"))  # Hugging Face's cache has it not either
    found, notes = paired.choose_scores((128, 128), torch.device("cpu"), None)
    assert set(found) == {"psnr", "ssim"} and [note.split(":")[0] for note in notes] == ["LPIPS", "CLIP score"]
    assert str(tmp_path) in notes[0]
    found, notes = paired.choose_scores((8, 128), torch.device("cpu"), None)
    assert set(found) == {"psnr"} and len(notes) == 3


def test_lpips_is_of_single_pairs(tmp_path, monkeypatch):
    """With a stand-in for the network: what it is given, and that nothing is averaged over the batch."""

    class Network(torch.nn.Module):
        def __init__(self, net_type, normalize):
            super().__init__()
            assert (net_type, normalize) == ("alex", True)

        def forward(self, first, second):
            assert first.shape == (1, 3, 64, 64) and first.dtype == torch.float32 and first.max() <= 1
            return (first - second).abs().mean()

    monkeypatch.setattr(paired, "LearnedPerceptualImagePatchSimilarity", Network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    paired.lpips_weights().parent.mkdir(parents=True)
    paired.lpips_weights().touch()
    found, _ = paired.choose_scores((64, 64), torch.device("cpu"), None)
    first, second = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    second[1] = 51
    assert found["lpips"](first, second, ["", ""]).tolist() == pytest.approx([0, 0.2])


def test_clip_score_is_the_cosine_of_picture_and_prompt(tmp_path):
    """A small model with random weights, read from its files; the features are taken apart here."""
    tokenizer = CLIPTokenizer.from_pretrained(str(ROOT / "models/ldm/shapes/tokenizer"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=sizes | special, vision_config=vision, projection_dim=8)).eval()
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found, _ = paired.choose_scores((24, 24), torch.device("cpu"), str(tmp_path))
    images, prompts = images_of(3), ["a red circle", "a blue ring", "a cross " * 90]
    values = found["clip_score"](images, images.flip(0), prompts)
    for image, prompt, value in zip(images, prompts, values.tolist(), strict=True):
        pixels = processor.image_processor(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")
        ids = tokenizer(prompt, truncation=True, return_tensors="pt")
        with torch.no_grad():
            one = model.visual_projection(model.vision_model(**pixels).pooler_output)[0]
            other = model.text_projection(model.text_model(**ids).pooler_output)[0]
        cosine = float(one @ other / one.norm() / other.norm())
        assert value == pytest.approx(max(100 * cosine, 0), abs=1e-3)
    assert values.tolist() == pytest.approx(found["clip_score_paired"](images.flip(0), images, prompts).tolist())
    assert len({round(value, 3) for value in values.tolist()}) > 1


def test_a_folder_without_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no CLIP model"):
        paired.choose_scores((24, 24), torch.device("cpu"), str(tmp_path))
