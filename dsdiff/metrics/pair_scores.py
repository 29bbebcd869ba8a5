"""Scores of pairs of pictures of the same prompt and seed: PSNR, SSIM and LPIPS between the two, CLIP score of each.

Pictures are paired by the prompt and the seed inside their PNGs, whatever the names and the order of the files.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dsdiff.images.sets import FilePictures
from dsdiff.images.sources import SHAPES, Size, size_text
from dsdiff.metrics.clip_scores import CLIP, build_clip, build_shapes_clip
from dsdiff.metrics.intervals import bootstrap_interval
from dsdiff.metrics.scores import Score, Scores

SSIM_WINDOW = 11
LPIPS_SIDE = 64  # pixels; of less, AlexNet's poolings leave nothing
MSE = "mse"  # the mean squared error of a pair, from which its PSNR comes
TITLES = {  # key -> name of the score, and which way is better
    "psnr": ("PSNR, dB", "higher"),
    "psnr_mean_of_pictures": ("mean of per-picture PSNR, dB", "higher"),
    "ssim": ("SSIM", "higher"),
    "lpips": ("LPIPS (AlexNet)", "lower"),
    "clip_score": ("CLIP score", "higher"),
    "clip_score_paired": ("CLIP score of the other folder", "higher"),
    "shapes_clip_score": ("CLIP score (shapes)", "higher"),
    "shapes_clip_score_paired": ("CLIP score (shapes) of the other folder", "higher"),
}

PairScore = Callable[[Tensor, Tensor, Sequence[str]], Tensor]  # two uint8 [B, 3, H, W] and their prompts -> [B]


# --- pairing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """The pairs of two folders: first[firsts[k]] and second[seconds[k]] are of the same seed and of prompts[k]."""

    first: FilePictures
    second: FilePictures
    firsts: tuple[int, ...]
    seconds: tuple[int, ...]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)


def pair_up(first: FilePictures, second: FilePictures) -> Pairing:
    """Return all pairs of two sets, in the order of `first`.

    Raises ValueError if there are none, if a set has a prompt and seed twice, or if the two sets differ in size.
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
    """Return (prompt, seed) -> index of the picture. Raises ValueError if two pictures have the same."""
    places: dict[tuple[str, str], int] = {}
    for i in tqdm(range(len(pictures)), desc="prompts", unit="picture", leave=False):
        key = pictures.prompt_and_seed(i)
        if key in places:
            one, other = (str(pictures.paths[place]) for place in (places[key], i))
            raise ValueError(f"{one!r} and {other!r} are both of prompt {key[0]!r} and seed {key[1]}: keep one of them")
        places[key] = i
    return places


# --- scores of pairs ---------------------------------------------------------------------------------------


def squared_errors(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean squared error of each pair, float64 [B], for values of a pixel in [0, 1]."""
    return (first.double() - second.double()).square().flatten(1).mean(1) / 255**2


def psnr(errors: Tensor | np.ndarray) -> float:
    """Return the PSNR in dB: -10 log10 of the mean squared error over all pictures; inf where all are equal.

    errors: [N], of `squared_errors`. This is what PSNR means everywhere in this project; the mean of the pictures' own
    PSNRs, which is larger, is called the mean of per-picture PSNR.
    """
    error = float(errors.mean())
    return -10 * math.log10(error) if error else math.inf


def psnr_interval(
    errors: np.ndarray, prompts: Sequence[str], resamples: int, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """Return the 95% interval of `psnr` by a bootstrap over prompts.

    It is (None, None) for a single pair and where all pairs are equal. Its upper end can be inf where most are equal.
    """
    interval = bootstrap_interval(errors, prompts, resamples, seed) if errors.any() else None
    if interval is None:
        return None, None
    least, most = (psnr(np.array([error])) for error in reversed(interval))
    return least, most


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Return the SSIM of each pair, float64 [B], as torchmetrics defines it (Wang et al. 2004, eq. 13).

    A Gaussian window of 11 pixels with sigma 1.5 around every pixel, the pictures mirrored beyond their borders,
    averaged over pixels and RGB. torchmetrics itself is off by 0.001 in float32 where pictures are flat, and slow in
    float64.
    """
    x, y = first.double() / 255, second.double() / 255
    mu_x, mu_y = windowed(x), windowed(y)
    var_x, var_y = windowed(x * x) - mu_x**2, windowed(y * y) - mu_y**2
    covariance = windowed(x * y) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean((1, 2, 3))


def windowed(x: Tensor) -> Tensor:
    """Return x, [B, 3, H, W], averaged with the window of SSIM, along one axis after the other."""
    down, across = (_window(length, x.dtype).to(x.device) for length in x.shape[2:])
    return down @ x @ across.T


@functools.cache
def _window(length: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix [length, length] whose product averages a row with SSIM's window, mirrored at both ends.

    A product of matrices takes a quarter of the time of a sum over the places of the window.
    """
    reach = SSIM_WINDOW // 2
    weights = torch.exp(-torch.arange(-reach, reach + 1, dtype=dtype).square() / (2 * 1.5**2))
    places = torch.nn.functional.pad(torch.eye(length, dtype=dtype)[None], [reach] * 2, mode="reflect")[0]
    return (places.unfold(1, SSIM_WINDOW, 1) @ (weights / weights.sum())).T.contiguous()


def lpips_weights() -> Path:
    """Return the file in which torchvision keeps AlexNet, on which LPIPS builds."""
    from torchvision.models import AlexNet_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]


def build_lpips(device: torch.device) -> PairScore:
    """Return the LPIPS of Zhang et al. 2018 on AlexNet, whose weights must be at `lpips_weights()`."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    @torch.no_grad()
    def lpips(first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor:
        images = zip(*((batch.to(device).float() / 255).split(1) for batch in (first, second)), strict=True)
        return torch.stack([metric(one, other).cpu() for one, other in images])

    return lpips


def choose_scores(size: Size, device: torch.device, clip: str | None) -> tuple[dict[str, PairScore], list[str]]:
    """Return what can be computed of pictures of `size`, by key, and a note for each score that cannot.

    clip: a folder, "shapes" for the embedded model's own CLIP, None for Hugging Face's cache. Raises ValueError or
    OSError if `clip` is given and holds no CLIP model.
    """
    scores: dict[str, PairScore] = {MSE: lambda first, second, prompts: squared_errors(first, second)}
    notes = []
    if min(size) >= SSIM_WINDOW:
        scores["ssim"] = lambda first, second, prompts: ssim(first.to(device), second.to(device)).cpu()
    else:
        notes.append(f"SSIM: left out, its window of {SSIM_WINDOW} pixels is larger than {size_text(size)}")
    if min(size) < LPIPS_SIDE:
        notes.append(f"LPIPS: left out, pictures of {size_text(size)} are smaller than {LPIPS_SIDE} pixels")
    elif lpips_weights().is_file():
        scores["lpips"] = build_lpips(device)
    else:
        notes.append(f"LPIPS: left out, the weights of AlexNet are not at {str(lpips_weights())!r}")
    key = "shapes_clip_score" if clip == SHAPES else "clip_score"
    try:
        score = build_shapes_clip(device) if clip == SHAPES else build_clip(clip or CLIP, device)
    except (OSError, ValueError) as error:
        if clip == SHAPES:
            raise
        if clip is not None:
            raise ValueError(f"--clip {clip!r} holds no CLIP model with its processor") from error
        notes.append(f"CLIP score: left out, {CLIP} is not in Hugging Face's cache (or give its files with --clip DIR)")
    else:
        scores[key] = lambda first, second, prompts: score(first, prompts)
        scores[f"{key}_paired"] = lambda first, second, prompts: score(second, prompts)
    return scores, notes


# --- a set of pairs ----------------------------------------------------------------------------------------


def pair_values(pairing: Pairing, scores: Mapping[str, PairScore], batch_size: int) -> dict[str, np.ndarray]:
    """Return each score of each pair: float64 [pairs] by key."""
    values: dict[str, list[Tensor]] = {key: [] for key in scores}
    with tqdm(total=len(pairing), desc="paired scores", unit="pair") as bar:
        for start in range(0, len(pairing), batch_size):
            part = slice(start, start + batch_size)
            first = torch.stack([pairing.first[i] for i in pairing.firsts[part]])
            second = torch.stack([pairing.second[i] for i in pairing.seconds[part]])
            for key, score in scores.items():
                values[key].append(score(first, second, pairing.prompts[part]).double())
            bar.update(len(first))
    return {key: torch.cat(parts).numpy() for key, parts in values.items()}


def add_paired_scores(
    scores: Scores,
    pairing: Pairing,
    chosen: Mapping[str, PairScore],
    *,
    batch_size: int,
    resamples: int,
    seed: int,
) -> None:
    """Add the chosen scores of the pairs, with 95% intervals by a bootstrap over prompts."""
    alone = [len(pictures) - len(pairing) for pictures in (pairing.first, pairing.second)]
    if any(alone):
        scores.notes.append(f"paired scores: {alone[0]} pictures and {alone[1]} of the other folder have no partner")
    if len(pairing) < 2:
        scores.notes.append("paired scores: of a single pair, which has no interval")
    values = pair_values(pairing, chosen, batch_size)
    add_psnr(scores, values.pop(MSE), pairing.prompts, resamples, seed)
    for key, single in values.items():
        add_mean(scores, key, single, pairing.prompts, resamples, seed)


def add_psnr(scores: Scores, errors: np.ndarray, prompts: Sequence[str], resamples: int, seed: int) -> None:
    """Add the PSNR of all pairs, and the mean of per-picture PSNR over the pairs that are not equal."""
    title, better = TITLES["psnr"]
    low, high = psnr_interval(errors, prompts, resamples, seed)
    scores.by_key["psnr"] = Score(name=title, value=psnr(errors), n=len(errors), better=better, low=low, high=high)
    different = errors > 0
    if not different.all():
        equal = f"{len(errors) - different.sum()} of {len(errors)} pairs are equal, pixel by pixel"
        left_out = "the mean of per-picture PSNR leaves them out, for theirs is infinite"
        scores.notes.append(f"PSNR: {equal}" + (f"; {left_out}" if different.any() else ", so that it is infinite"))
    if different.any():
        kept = [prompt for prompt, keep in zip(prompts, different, strict=True) if keep]
        add_mean(scores, "psnr_mean_of_pictures", -10 * np.log10(errors[different]), kept, resamples, seed)


def add_mean(scores: Scores, key: str, values: np.ndarray, prompts: Sequence[str], resamples: int, seed: int) -> None:
    """Add the mean of a score over all pairs."""
    title, better = TITLES[key]
    low, high = bootstrap_interval(values, prompts, resamples, seed) or (None, None)
    mean = math.fsum(values) / len(values)
    scores.by_key[key] = Score(name=title, value=mean, n=len(values), better=better, low=low, high=high)
