"""The error of eps in one step: what a change of settings or of bits changes in a prediction, for the same latents.

A picture is drawn as it should be, and the latents of each call are kept. Then the sampler walks once more, with the
change, and the UNet gets the kept latents of each call in place of its own. So errors do not add up over the steps, and
all that follows the steps does as it does in a picture: schedules, matchings and features that are kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dsdiff.draw_settings import DrawSettings
from dsdiff.pipeline import Pipeline
from ldm.models.diffusion.guidance import guide


@dataclass(kw_only=True)
class Calls:
    """The latents [B, C, h, w] of the pictures that the UNet got in each call, and what it returned.

    outputs: [B, C, h, w], or [2 B, C, h, w] in a guided call.
    """

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def recorded(unet: nn.Module, pictures: int, given: Sequence[Tensor] | None = None) -> Iterator[Calls]:
    """Record the calls of the UNet within the block, each for so many `pictures`, with guidance or without.

    given: latents [B, C, h, w] that call i gets in place of its own, twice if it is guided.
    """
    calls = Calls()

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        x = args[0]
        if given is not None:
            x = given[len(calls.inputs)].to(x).repeat(len(x) // pictures, 1, 1, 1)
        calls.inputs.append(x[:pictures].detach().clone())
        return (x, *args[1:]), kwargs

    def after(module: nn.Module, args: tuple, output: Tensor) -> None:
        calls.outputs.append(output.detach().float())

    hooks = [unet.register_forward_pre_hook(before, with_kwargs=True), unet.register_forward_hook(after)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class EpsErrors:
    """Measures changes on the same pictures. The walks without a change are made at first use, and kept.

    settings: those without a change, of `pipeline`. Picture i is drawn of prompts[i], from the noise of seed + i.
    """

    def __init__(self, pipeline: Pipeline, settings: DrawSettings, prompts: Sequence[str], seed: int, batch_size: int):
        self.pipeline, self.settings, self.prompts, self.seed = pipeline, settings, prompts, seed
        self.parts = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
        self._exact: list[Calls] = []  # a batch each

    @property
    def exact(self) -> list[Calls]:
        """The calls without a change, a batch each."""
        if not self._exact:
            bar = tqdm(self.parts, "eps, exact", unit="batch")
            self._exact = [self._walk(self.pipeline, self.settings, part, None) for part in bar]
        return self._exact

    def of(self, settings: DrawSettings, title: str, pipeline: Pipeline | None = None) -> Tensor:
        """Return the mean squared error of guided eps, float64 [prompts, calls].

        settings: with the change; the sampler and the steps are those of the exact ones. title: of the bar. pipeline:
        another one that draws with them, as a quantized one. None takes the same.
        """
        errors = []
        for base, part in zip(self.exact, tqdm(self.parts, f"eps, {title}", unit="batch", leave=False), strict=True):
            own = self._walk(pipeline or self.pipeline, settings, part, base.inputs)
            pairs = zip(own.outputs, base.outputs, strict=True)
            pictures = len(self.prompts[part])
            errors.append(torch.stack([self._error(one, other, pictures) for one, other in pairs], dim=1))
        return torch.cat(errors).cpu()

    def _walk(
        self, pipeline: Pipeline, settings: DrawSettings, part: slice, given: Sequence[Tensor] | None = None
    ) -> Calls:
        prompts = self.prompts[part]
        seeds = range(self.seed + part.start, self.seed + part.start + len(prompts))
        unet = pipeline.prepare(settings).model.diffusion_model
        with recorded(unet, len(prompts), given) as calls:
            pipeline.sample(prompts, list(seeds), settings)
        return calls

    def _error(self, own: Tensor, other: Tensor, pictures: int) -> Tensor:
        """Return the mean squared difference of guided eps, [B], of what two calls for B pictures returned."""
        return (self._guided(own, pictures) - self._guided(other, pictures)).square().flatten(1).mean(1)

    def _guided(self, output: Tensor, pictures: int) -> Tensor:
        output = output.double()
        return output if len(output) == pictures else guide(output, self.settings.scale)  # a step may have no guidance
