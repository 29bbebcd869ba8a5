"""The optimisation loop of reconstruction: train some parameters by Adam, so that a function fits its targets."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.capture import Progress
from qdiff.distributed import rank, sum_over_ranks, world_size
from qdiff.finite import check_error, is_finite
from qdiff.quantizers import lp_loss

GPU_LOOKS = 64  # steps between two looks at the loss on a GPU, for which it has to be waited for


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """N examples of a function.

    inputs: one tensor [N, ...] for each argument. target: the outputs [N, ...]. device: where the function computes;
    the tensors themselves may lie elsewhere.
    """

    inputs: list[Tensor]
    target: Tensor
    device: torch.device

    def __len__(self) -> int:
        return len(self.target)

    def loss(self, forward: Callable[..., Tensor], chosen: Tensor | slice, p: float) -> Tensor:
        """Return the loss |forward(inputs) - target|^p of the chosen samples, see `lp_loss`."""
        batch = [values[chosen].to(self.device) for values in self.inputs]
        return lp_loss(forward(*batch), self.target[chosen].to(self.device), p)


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """The settings of one optimisation.

    steps: 0 or more. lr: the learning rate. cosine: lower it to 0 along a half cosine. p: exponent of the loss.
    batch_size: samples per step, over all processes. seed: for the choice of these samples.
    """

    steps: int
    lr: float
    p: float
    batch_size: int
    seed: int
    cosine: bool = False


def minimize(
    forward: Callable[..., Tensor],
    samples: Samples,
    parameters: list[Tensor],
    settings: AdamSettings,
    *,
    regularizer: Callable[[int], Tensor] | None = None,
    progress: Progress = lambda steps: None,
) -> None:
    """Learn `parameters` by Adam, so that forward(*inputs) approaches the target.

    All processes choose the same samples; each works on its part of them, and gradients are averaged.
    regularizer(step) is added to the loss. progress(1) is called after each step. Raises ValueError, which names the
    step, for a loss or a parameter that becomes NaN or infinite.
    """
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.steps) if settings.cosine else None
    generator = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch_size, len(samples))
    looks = 1 if samples.device.type == "cpu" else GPU_LOOKS
    for step in range(settings.steps):
        chosen = torch.randperm(len(samples), generator=generator)[:size]
        mine = chosen[rank() :: world_size()]
        optimizer.zero_grad()
        if len(mine):
            loss = samples.loss(forward, mine, settings.p) * (len(mine) / size)
            if step % looks == 0 and not is_finite(loss):
                raise ValueError(_diverged("loss", step + 1, settings))
            loss.backward()
        _sum_gradients(parameters)
        penalty = None if regularizer is None else regularizer(step)
        if penalty is not None and penalty.requires_grad:
            penalty.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        progress(1)
    if not all(is_finite(parameter.detach()) for parameter in parameters):
        raise ValueError(_diverged("result", settings.steps, settings))


def _diverged(what: str, step: int, settings: AdamSettings) -> str:
    where = f"the {what} is NaN or infinite at step {step} of {settings.steps}"
    return f"{where}: use a smaller learning rate than {settings.lr:g}"


def _sum_gradients(parameters: list[Tensor]) -> None:
    """Sum the gradients over all processes; each process has already scaled its own by its share of the batch."""
    if world_size() == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    sum_over_ranks(gradients)


@torch.no_grad()
def mean_error(forward: Callable[..., Tensor], samples: Samples, p: float, batch_size: int) -> float:
    """Return the loss over all samples, computed `batch_size` at a time, by all processes together.

    Raises ValueError for one that is NaN or infinite.
    """
    total = torch.zeros((), dtype=torch.float64)
    for number, start in enumerate(range(0, len(samples), batch_size)):
        if number % world_size() == rank():
            part = slice(start, min(start + batch_size, len(samples)))
            total += samples.loss(forward, part, p).double().cpu() * (part.stop - part.start)
    sum_over_ranks([total])
    return check_error(float(total) / len(samples), "the error of the outputs")
