"""Classifier-free guidance (Ho & Salimans, arXiv:2207.12598), in all steps or in an interval of them.

Guidance wraps the model: a sampler calls `predict_eps(x, t)`, and never sees the conditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Conditioning = Any  # a tensor [B, T, D], or a list or dict of such, however nested
PredictEps = Callable[[Tensor, int | float], Tensor]  # (x_t [B, C, H, W], t) -> eps [B, C, H, W]
Interval = tuple[float, float]  # first and last share of the steps, the last one excluded
ALL_STEPS: Interval = (0.0, 1.0)


def _leaves(conditioning: Conditioning) -> Iterator[Tensor]:
    """Yield the tensors of a conditioning, however nested."""
    if isinstance(conditioning, Tensor):
        yield conditioning
    elif isinstance(conditioning, dict):
        for value in conditioning.values():
            yield from _leaves(value)
    elif isinstance(conditioning, list | tuple):
        for value in conditioning:
            yield from _leaves(value)
    else:
        raise ValueError(
            f"conditioning must be a tensor, or a list or dict of tensors, got {type(conditioning).__name__}"
        )


def _check_batch(conditioning: Conditioning, batch_size: int, what: str) -> None:
    for c in _leaves(conditioning):
        if c.ndim == 0 or c.shape[0] != batch_size:
            raise ValueError(
                f"{what} of shape {tuple(c.shape)} does not fit {batch_size} picture(s): give one row a picture"
            )


def _join(first: Conditioning, second: Conditioning) -> Conditioning:
    """Concatenate two conditionings of the same structure along the batch."""
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape[1:] == second.shape[1:]:
        return torch.cat([first, second])
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: _join(first[key], second[key]) for key in first}
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return [_join(a, b) for a, b in zip(first, second, strict=True)]
    raise ValueError("unconditional and conditional conditioning must have the same structure and shapes")


def guided(
    model: Any, batch_size: int, conditioning: Conditioning, unconditional: Conditioning, scale: float
) -> PredictEps:
    """Wrap `model.apply_model` into `predict_eps(x, t)` with classifier-free guidance (Ho & Salimans 2022).

    eps = eps_u + scale * (eps_c - eps_u), both from one call with the batch [unconditional; conditional].
    With scale 1, or without an unconditional conditioning, the model is called once, without guidance. The model
    gets an int t as int64 [B] and a float t as float32 [B]; eps is returned in the dtype of x.
    Raises ValueError for a conditioning that does not have `batch_size` rows.
    """

    def call_model(x: Tensor, t: int | float, c: Conditioning) -> Tensor:
        dtype = torch.float32 if isinstance(t, float) else torch.int64
        ts = torch.full((x.shape[0],), t, device=x.device, dtype=dtype)
        return model.apply_model(x, ts, c).to(x.dtype)

    if conditioning is not None:
        _check_batch(conditioning, batch_size, "conditioning")
    if scale == 1 or unconditional is None:
        return lambda x, t: call_model(x, t, conditioning)

    _check_batch(unconditional, batch_size, "unconditional conditioning")
    both = _join(unconditional, conditioning)

    def predict_eps(x: Tensor, t: int | float) -> Tensor:
        return guide(call_model(torch.cat([x, x]), t, both), scale)

    return predict_eps


def guide(eps: Tensor, scale: float | Tensor) -> Tensor:
    """Return eps_u + scale (eps_c - eps_u), [B, ...], of the batch [eps_u; eps_c], [2 B, ...]."""
    eps_u, eps_c = eps.chunk(2)
    return eps_u + scale * (eps_c - eps_u)


# --- guidance in some of the steps ---------------------------------------------------------------------------


def guided_steps(n_steps: int, interval: Interval) -> list[bool]:
    """Return for each of n steps if it is guided: step i is where start <= i / n < stop.

    (0, 1) are all steps, and start = stop is none. Raises ValueError unless 0 <= start <= stop <= 1.
    """
    start, stop = interval
    if not 0 <= start <= stop <= 1:
        raise ValueError(f"guidance must start and stop at shares of the steps in 0..1, in order, got {start}..{stop}")
    return [start <= i / n_steps < stop for i in range(n_steps)]


@dataclass(kw_only=True)
class LimitedGuidance:
    """A `predict_eps(x, t)` that guides in some steps only (Kynkäänniemi et al., arXiv:2404.07724).

    A step without guidance calls the model with one sample a picture in place of two. The calls of a step are alike.

    inside, outside: what predicts in guided steps, and in the others. steps: for each step if it is guided. step: the
    number of the present one, which the walk counts.
    """

    inside: PredictEps
    outside: PredictEps
    steps: Sequence[bool]
    step: int = 0

    def __call__(self, x: Tensor, t: int | float) -> Tensor:
        return (self.inside if self.steps[self.step] else self.outside)(x, t)
