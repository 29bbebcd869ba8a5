"""Scores of pairs against formulas, numbers worked by hand, and the libraries that define them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image import lpip
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from dsdiff.images.sets import FilePictures
from dsdiff.metrics import pair_scores as paired
from dsdiff.metrics.clip_scores import build_shapes_clip
from dsdiff.metrics.scores import Score, Scores, cell
from dsdiff.models.configs import read_config
from dsdiff.models.registry import SHAPES_CLIP_CONFIG, TOKENIZER
from ldm.checkpoint import save_checkpoint
from ldm.data.contrasts import ContrastDataset
from ldm.util import instantiate_from_config


def images_of(n, seed=0, side=24):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_psnr_by_hand():
    """Off by 10 everywhere: 20 log10(25.5). Off by 255: 0. Equal: infinite."""
    first = torch.full((3, 3, 12, 12), 100, dtype=torch.uint8)
    second = first.clone()
    second[0] += 10
    first[1], second[1] = 0, 255
    errors = paired.squared_errors(first, second)
    assert errors.tolist() == pytest.approx([(10 / 255) ** 2, 1, 0])
    assert paired.psnr(errors[:1]) == pytest.approx(20 * math.log10(25.5))
    assert paired.psnr(errors[1:2]) == 0 and paired.psnr(errors[2:]) == math.inf


def test_psnr_is_that_of_the_error_over_all_pictures():
    """Not the mean of the pictures' own, which is larger; torchmetrics, too, takes all pictures together."""
    first, second = images_of(4), images_of(4, seed=1)
    second[0] = first[0] ^ 1
    errors = paired.squared_errors(first, second)
    theirs = peak_signal_noise_ratio(first.double() / 255, second.double() / 255, data_range=1.0)
    assert paired.psnr(errors) == pytest.approx(float(theirs), abs=1e-5)
    assert paired.psnr(errors) < float((-10 * errors.log10()).mean()) - 1


def test_psnr_of_one_value_that_is_off():
    first = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    second = first.clone()
    second[1, 0, 0, 0] = 101  # one of 2 * 3 * 8 * 8 values
    expected = 20 * math.log10(255) + 10 * math.log10(384)
    assert paired.psnr(paired.squared_errors(first, second)) == pytest.approx(expected)


def test_the_interval_of_the_psnr_is_that_of_the_error():
    """A bootstrap over prompts. The larger error is the lower end."""
    errors, names = np.random.default_rng(0).uniform(1e-4, 1e-2, 60), [str(i // 2) for i in range(60)]
    low, high = paired.psnr_interval(errors, names, 400, seed=3)
    least, most = paired.bootstrap_interval(errors, names, 400, seed=3)
    assert (low, high) == pytest.approx((-10 * math.log10(most), -10 * math.log10(least)))
    assert low < paired.psnr(errors) < high
    assert paired.psnr_interval(errors[:1], names[:1], 400, 0) == (None, None)
    assert paired.psnr_interval(np.zeros(5), names[:5], 400, 0) == (None, None)


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


def test_what_does_not_pair_is_refused(tmp_path):
    cases = [
        ([("x", "1")], [("x", "2")], "nothing to pair"),
        ([("x", "1")], [("x", "1"), ("x", "1")], r"0.png' and .*1.png' are both of prompt 'x' and seed 1"),
    ]
    for i, (first, second, said) in enumerate(cases):
        with pytest.raises(ValueError, match=said):
            paired.pair_up(folder_of(tmp_path / f"a{i}", first), folder_of(tmp_path / f"b{i}", second))


def test_pairs_that_are_equal():
    """They count for the PSNR, and are left out of the mean of the pictures' own."""
    found = Scores()
    paired.add_psnr(found, np.array([0.01, 0, 0.001]), ["a", "b", "c"], 200, 0)
    assert found.by_key["psnr"].value == pytest.approx(-10 * math.log10(0.011 / 3)) and found.by_key["psnr"].n == 3
    mean = found.by_key["psnr_mean_of_pictures"]
    assert (mean.value, mean.n, mean.name) == (25, 2, "mean of per-picture PSNR, dB") and mean.low == 20
    assert "1 of 3 pairs are equal" in found.notes[0]


def test_equal_folders_have_an_infinite_psnr():
    """In tables it is inf; as a plain value None, since JSON has no infinity."""
    found = Scores()
    paired.add_psnr(found, np.zeros(3), ["a", "b", "c"], 200, 0)
    (score,) = found.by_key.values()
    assert score.value == math.inf and cell(score) == "inf" and "so that it is infinite" in found.notes[0]
    assert score.to_dict()["value"] is None and score.low is None and score.high is None
    bounded = Score(name="PSNR, dB", value=40.0, n=3, better="higher", low=30.0, high=math.inf)
    assert bounded.to_dict()["high"] is None and bounded.to_dict()["low"] == 30
    assert cell(bounded) == "40 [30, inf]"


def test_scores_whose_weights_are_missing_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(paired, "CLIP", str(tmp_path / "clip"))  # Hugging Face's cache has it not either
    found, notes = paired.choose_scores((128, 128), torch.device("cpu"), None)
    assert set(found) == {"mse", "ssim"} and [note.split(":")[0] for note in notes] == ["LPIPS", "CLIP score"]
    assert str(tmp_path) in notes[0]
    found, notes = paired.choose_scores((8, 128), torch.device("cpu"), None)
    assert set(found) == {"mse"} and len(notes) == 3


def test_lpips_is_of_single_pairs(tmp_path, monkeypatch):
    """With a stand-in for the network: what it is given, and that nothing is averaged over the batch."""

    class Network(torch.nn.Module):
        def __init__(self, net_type, normalize):
            super().__init__()
            assert (net_type, normalize) == ("alex", True)

        def forward(self, first, second):
            assert first.shape == (1, 3, 64, 64) and first.dtype == torch.float32 and first.max() <= 1
            return (first - second).abs().mean()

    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", Network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    paired.lpips_weights().parent.mkdir(parents=True)
    paired.lpips_weights().touch()
    found, _ = paired.choose_scores((64, 64), torch.device("cpu"), None)
    first, second = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    second[1] = 51
    assert found["lpips"](first, second, ["", ""]).tolist() == pytest.approx([0, 0.2])


def test_clip_score_is_the_cosine_of_picture_and_prompt(tmp_path):
    """A small model with random weights, read from its files; the features are taken apart here."""
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
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


def test_the_clip_of_the_shapes_has_a_name_of_its_own(tmp_path, monkeypatch):
    """With random weights; its score is the cosine of the two towers' embeddings."""
    config = read_config(SHAPES_CLIP_CONFIG)["model"]
    model = instantiate_from_config({name: config[name] for name in ("target", "params")}).eval()
    path = tmp_path / "clip.safetensors"
    save_checkpoint(model, path)
    monkeypatch.setattr(paired, "build_shapes_clip", lambda device: build_shapes_clip(device, path))
    found, _ = paired.choose_scores((24, 24), torch.device("cpu"), "shapes")
    assert "clip_score" not in found and paired.TITLES["shapes_clip_score"][0] == "CLIP score (shapes)"
    images, prompts = images_of(2), ["a red circle", "a blue ring above a pink heart"]
    values = found["shapes_clip_score"](images, images.flip(0), prompts)
    pairs = model.embed_images(images.float() / 127.5 - 1) @ model.embed_texts(prompts).T
    assert values.tolist() == pytest.approx((100 * pairs.diagonal()).clamp(min=0).tolist(), abs=0.5)  # float16 weights
    assert found["shapes_clip_score_paired"](images.flip(0), images, prompts).tolist() == pytest.approx(values.tolist())
    save_checkpoint(torch.nn.Linear(2, 2), path)
    for weights, error in ((path, ValueError), (tmp_path / "missing.safetensors", FileNotFoundError)):
        with pytest.raises(error, match=str(weights)):
            build_shapes_clip(torch.device("cpu"), weights)


def test_the_clip_that_comes_with_the_model_tells_captions_apart():
    """Pictures of combinations that training did not show, against captions that contradict them."""
    data = ContrastDataset(48, "heldout", contrasts=5, augmented=False)
    score = build_shapes_clip(torch.device("cpu"))
    told = []
    for i in range(0, 48, 16):
        items = [data[j] for j in range(i, i + 16)]
        images = torch.stack([((item["image"] + 1) * 127.5).round().to(torch.uint8) for item in items])
        right = score(images, [item["caption"] for item in items])
        told += [right > score(images, [item["wrong"][k] for item in items]) for k in range(5)]
    assert torch.cat(told).float().mean() > 0.95
