"""How alike pictures of the same prompt and seed are: PSNR, SSIM, LPIPS; and how well they show the prompt: CLIP score.

Pictures are paired by the prompt and the seed inside their PNGs, whatever the names and the order of the files.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import AlexNet_Weights
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

from dsdiff.images.folders import FilePictures, size_text
from dsdiff.metrics.set_scores import Score, Scores, bootstrap_interval

CLIP = "openai/clip-vit-large-patch14"  # on the Hugging Face hub
SSIM_WINDOW = 11
LPIPS_SIDE = 64  # the least that AlexNet's poolings leave something of
TITLES = {  # of the scores, and which way is better
    "psnr": ("PSNR, dB", "higher"),
    "ssim": ("SSIM", "higher"),
    "lpips": ("LPIPS (AlexNet)", "lower"),
    "clip_score": ("CLIP score", "higher"),
    "clip_score_paired": ("CLIP score of the other folder", "higher"),
}

PairScore = Callable[[Tensor, Tensor, Sequence[str]], Tensor]  # two uint8 [B, 3, H, W] and their prompts -> [B]


# --- pairing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Pictures of two folders that have the same prompts and seeds: first[firsts[k]] goes with second[seconds[k]]."""

    first: FilePictures
    second: FilePictures
    firsts: tuple[int, ...]
    seconds: tuple[int, ...]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)


def pair_up(first: FilePictures, second: FilePictures) -> Pairing:
    """All pairs, in the order of `first`.

    ValueError if there are none, if a set has one prompt and seed twice, or if the two sets differ in size.
    """
    if first.size != second.size:
        raise ValueError(
            f"{first.name} is {size_text(first.size)}, {second.name} is {size_text(second.size)}: pairs need one size; "
            "use --resize squash or center-crop"
        )
    places, partners = _places(first), _places(second)
    keys = [key for key in places if key in partners]
    if not keys:
        raise ValueError(f"no prompt and seed is in both {first.name} and {second.name}: there is nothing to pair")
    return Pairing(
        first=first,
        second=second,
        firsts=tuple(places[key] for key in keys),
        seconds=tuple(partners[key] for key in keys),
        prompts=tuple(prompt for prompt, _ in keys),
    )


def _places(pictures: FilePictures) -> dict[tuple[str, str], int]:
    places: dict[tuple[str, str], int] = {}
    for i in tqdm(range(len(pictures)), desc="prompts", unit="picture", leave=False):
        key = pictures.prompt_and_seed(i)
        if key in places:
            one, other = (str(pictures.paths[place]) for place in (places[key], i))
            raise ValueError(f"{one!r} and {other!r} are both of prompt {key[0]!r} and seed {key[1]}: keep one of them")
        places[key] = i
    return places


# --- scores of pairs ---------------------------------------------------------------------------------------


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """In dB, a picture: [B]; inf where two are equal."""
    images = (first.double() / 255, second.double() / 255)
    return peak_signal_noise_ratio(*images, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """A picture: [B]. As torchmetrics has it: Gaussian window of 11 pixels with sigma 1.5 (Wang et al. 2004, eq. 13)
    around every pixel, the pictures mirrored beyond their borders, averaged over pixels and RGB.

    Not by torchmetrics itself, which is off by 0.001 in float32 where pictures are flat, and slow in float64.
    """
    x, y = first.double() / 255, second.double() / 255
    mu_x, mu_y = windowed(x), windowed(y)
    var_x, var_y = windowed(x * x) - mu_x**2, windowed(y * y) - mu_y**2
    covariance = windowed(x * y) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean((1, 2, 3))


def windowed(x: Tensor) -> Tensor:
    """[B, 3, H, W], averaged with the window of SSIM, along one axis after the other."""
    reach = SSIM_WINDOW // 2
    weights = torch.exp(-torch.arange(-reach, reach + 1, dtype=x.dtype).square() / (2 * 1.5**2))
    x = torch.nn.functional.pad(x, [reach] * 4, mode="reflect")
    for axis in (2, 3):
        length = x.shape[axis] - 2 * reach
        x = sum(weight * x.narrow(axis, i, length) for i, weight in enumerate((weights / weights.sum()).tolist()))
    return x


def lpips_weights() -> Path:
    """Where torchvision keeps AlexNet, on which LPIPS builds."""
    return Path(torch.hub.get_dir()) / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]


def build_lpips(device: torch.device) -> PairScore:
    """LPIPS of Zhang et al. 2018 on AlexNet. Its weights must be at `lpips_weights()`."""
    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    @torch.no_grad()
    def lpips(first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor:
        images = zip(*((batch.to(device).float() / 255).split(1) for batch in (first, second)), strict=True)
        return torch.stack([metric(one, other).cpu() for one, other in images])

    return lpips


def build_clip(source: str, device: torch.device) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """CLIP score of Hessel et al. 2021 with the files of `source`, which must be there: nothing is fetched.

    uint8 [B, 3, H, W] and their prompts -> [B], 100 times the cosine, at least 0. OSError if the files are not there.
    """
    model = CLIPModel.from_pretrained(source, local_files_only=True).to(device).eval()
    processor = CLIPProcessor.from_pretrained(source, local_files_only=True)

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        inputs = processor(
            text=list(prompts), images=list(images), return_tensors="pt", padding=True, truncation=True
        ).to(device)
        found = model(**inputs)
        cosines = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return (100 * cosines).clamp(min=0).cpu()

    return score


def choose_scores(
    size: tuple[int, int], device: torch.device, clip: str | None
) -> tuple[dict[str, PairScore], list[str]]:
    """What can be computed of pictures of `size`, and a note a score that cannot. clip: a folder, None for the cache.

    ValueError if `clip` is given and holds no CLIP model.
    """
    scores: dict[str, PairScore] = {"psnr": lambda first, second, prompts: psnr(first, second)}
    notes = []
    if min(size) >= SSIM_WINDOW:
        scores["ssim"] = lambda first, second, prompts: ssim(first, second)
    else:
        notes.append(f"SSIM: left out, its window of {SSIM_WINDOW} pixels is larger than {size_text(size)}")
    if min(size) < LPIPS_SIDE:
        notes.append(f"LPIPS: left out, pictures of {size_text(size)} are smaller than {LPIPS_SIDE} pixels")
    elif lpips_weights().is_file():
        scores["lpips"] = build_lpips(device)
    else:
        notes.append(f"LPIPS: left out, the weights of AlexNet are not at {str(lpips_weights())!r}")
    try:
        score = build_clip(clip or CLIP, device)
    except (OSError, ValueError) as error:
        if clip is not None:
            raise ValueError(f"--clip {clip!r} holds no CLIP model with its processor") from error
        notes.append(f"CLIP score: left out, {CLIP} is not in Hugging Face's cache (or give its files with --clip DIR)")
    else:
        scores["clip_score"] = lambda first, second, prompts: score(first, prompts)
        scores["clip_score_paired"] = lambda first, second, prompts: score(second, prompts)
    return scores, notes


# --- a set of pairs ----------------------------------------------------------------------------------------


def pair_values(pairing: Pairing, scores: Mapping[str, PairScore], batch_size: int) -> dict[str, np.ndarray]:
    """Each score of each pair: float64 [pairs] by score."""
    values: dict[str, list[Tensor]] = {name: [] for name in scores}
    with tqdm(total=len(pairing), desc="paired scores", unit="pair") as bar:
        for start in range(0, len(pairing), batch_size):
            part = slice(start, start + batch_size)
            first = torch.stack([pairing.first[i] for i in pairing.firsts[part]])
            second = torch.stack([pairing.second[i] for i in pairing.seconds[part]])
            for name, score in scores.items():
                values[name].append(score(first, second, pairing.prompts[part]).double())
            bar.update(len(first))
    return {name: torch.cat(parts).numpy() for name, parts in values.items()}


def add_paired_scores(
    scores: Scores,
    pairing: Pairing,
    *,
    device: torch.device,
    batch_size: int,
    resamples: int,
    seed: int,
    clip: str | None = None,
) -> None:
    """Means over all pairs, with 95% bootstrap intervals."""
    found, notes = choose_scores(pairing.first.size, device, clip)
    scores.notes += notes
    alone = [len(pictures) - len(pairing) for pictures in (pairing.first, pairing.second)]
    if any(alone):
        scores.notes.append(f"paired scores: {alone[0]} pictures and {alone[1]} of the other folder have no partner")
    for name, values in pair_values(pairing, found, batch_size).items():
        add_mean(scores, name, values, pairing.prompts, resamples, seed)


def add_mean(scores: Scores, name: str, values: np.ndarray, prompts: Sequence[str], resamples: int, seed: int) -> None:
    """The mean of a score over the pairs where it is finite: the PSNR of equal pictures is not."""
    finite = np.isfinite(values)
    title, better = TITLES[name]
    if not finite.all():
        equal = f"{len(values) - finite.sum()} of {len(values)} pairs are equal"
        scores.notes.append(f"{title}: {equal}, pixel by pixel, and left out of the mean, for theirs is infinite")
    if not finite.any():
        return
    kept = [prompt for prompt, keep in zip(prompts, finite, strict=True) if keep]
    interval = bootstrap_interval(values[finite], kept, resamples, seed)
    if interval is None:
        scores.notes.append(f"{title}: of a single pair, which has no interval")
    low, high = interval or (None, None)
    mean = math.fsum(values[finite]) / int(finite.sum())
    scores.by_key[name] = Score(name=title, value=mean, n=int(finite.sum()), better=better, low=low, high=high)
