"""Rank the inputs of layers by what their quantization adds to the error of the model's output.

Let d be the error that quantization makes of an input, and J the derivative of the output eps by that input. The error
of eps is J d to first order. For a random vector v of signs, E[(v J d)^2] = |J d|^2 (Hutchinson's estimator), and
v J d is the scalar product of d with the gradient of v eps. So one backward pass estimates it for all inputs at once.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Progress
from qdiff.config import MixConfig
from qdiff.distributed import from_first_rank
from qdiff.observers import fit_activations
from qdiff.quant_model import QuantModel
from qdiff.quantizers import Quantizer

BACKWARD = 4  # samples at most in a pass whose gradients are taken


def act_sensitivities(
    qnn: QuantModel,
    data: CalibrationSet,
    batch_size: int,
    *,
    probes: int = 4,
    seed: int = 0,
    progress: Progress = lambda samples: None,
) -> dict[str, float]:
    """Return the estimated squared error of eps that each input's quantization adds, by the name of its quantizer.

    Each is summed over eps and averaged over the samples of `data`; weights are quantized, other activations float.
    batch_size: samples per pass. probes: random vectors v for each sample. seed: of these. progress(n) is called when n
    more samples are done. All ranges must be fitted; raises ValueError otherwise, and for what is NaN or infinite.
    """
    device = next(qnn.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    totals = dict.fromkeys(qnn.input_quantizers(), 0.0)
    for start in range(0, len(data), batch_size):
        part = slice(start, min(start + batch_size, len(data)))
        for _ in range(probes):
            for name, grad in switch_gradients(qnn, data.batch(part, device), generator).items():
                totals[name] += 0.0 if grad is None else float(grad.double().square().sum())
        progress(part.stop - part.start)
    bad = [name for name, total in totals.items() if not math.isfinite(total)]
    if bad:
        raise ValueError(f"{bad[0]}: the gradient of the output by its quantization is NaN or infinite")
    sums = torch.tensor(list(totals.values()), device=device, dtype=torch.float64)
    from_first_rank([sums])  # all processes choose alike
    return dict(zip(totals, (sums / (len(data) * probes)).tolist(), strict=True))


def switch_gradients(
    qnn: QuantModel, batch: Sequence[Tensor], generator: torch.Generator
) -> Mapping[str, Tensor | None]:
    """Return the gradient [B] of v eps by the switch of each input's quantization, for one v; None without influence.

    batch: the UNet's arguments, of B samples. The pass keeps the error of each input, all that the layers' gradients
    need, and the quantized weights as floats, until the gradients are there.
    """
    with _switches(qnn, qnn.input_quantizers(), len(batch[0])) as switches:
        eps = qnn(*batch)
        signs = torch.randint(2, eps.shape, generator=generator).to(eps) * 2 - 1
        grads = torch.autograd.grad((eps.float() * signs).sum(), list(switches.values()), allow_unused=True)
    return dict(zip(switches, grads, strict=True))


@contextmanager
def _switches(qnn: QuantModel, quantizers: Mapping[str, Quantizer], samples: int) -> Iterator[dict[str, Tensor]]:
    """Let each quantizer return x + s (x' - x) within the block, with a switch s of 0 for each sample: {name: s}."""
    device = next(qnn.parameters()).device
    with qnn.quant_state(True, True), torch.enable_grad():
        switches = {name: torch.zeros(samples, device=device, requires_grad=True) for name in quantizers}
        hooks = [
            quantizer.register_forward_hook(partial(_blend, switches[name])) for name, quantizer in quantizers.items()
        ]
        others = [q for name, q in qnn.act_quantizers().items() if name not in quantizers]
        for other in others:
            other.enabled = False
        try:
            yield switches
        finally:
            for hook in hooks:
                hook.remove()


def _blend(switch: Tensor, quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    x = args[0]
    each = switch.repeat_interleave(len(x) // len(switch))  # a time embedding may stand for several samples
    return x + each.view(-1, *[1] * (x.ndim - 1)) * (output - x).detach()


def most_sensitive(sensitivities: Mapping[str, float], amount: float) -> list[str]:
    """Return the names of the most sensitive inputs, the most sensitive one first. amount: see MixConfig."""
    ranked = sorted(sensitivities, key=lambda name: (-sensitivities[name], name))
    if amount >= 1:
        return ranked[: int(amount)]
    sums = itertools.accumulate(sensitivities[name] for name in ranked)
    wanted = amount * sum(sensitivities.values())
    return ranked[: 1 + sum(reached < wanted for reached in sums)]


def mix_activations(
    qnn: QuantModel,
    data: CalibrationSet,
    mix: MixConfig,
    batch_size: int,
    *,
    running: bool = False,
    progress: Progress = lambda samples: None,
) -> dict[str, float]:
    """Give the most sensitive inputs `mix.bits` bits, as the config's `mixed_act`; return the share of each.

    The share is that of the error of all inputs at their present bits. Weights are quantized already. Ranges are fitted
    to a part of the data only to rank the inputs; fit those of all activations afterwards. batch_size: samples per
    pass. running: see `fit_activations`. progress(n) is called when n more samples are done, 2 `mix.samples` in all.
    """
    part = data.subset(mix.samples, mix.seed)
    batch_size = min(batch_size, BACKWARD)
    fit_activations(qnn, part, batch_size, running=running, seed=mix.seed, progress=progress)
    ranks = act_sensitivities(qnn, part, batch_size, probes=mix.probes, seed=mix.seed, progress=progress)
    chosen = most_sensitive(ranks, mix.amount)
    qnn.mix_act(dict.fromkeys(chosen, mix.bits))
    total = sum(ranks.values()) or 1.0
    return {name: ranks[name] / total for name in chosen}
