"""The error of eps in one step: what merging changes in a prediction, for the same latents.

A picture is drawn without merging, and the latents of each step are kept. Then the sampler walks once more, with merged
tokens, and the UNet gets the kept latents of each step in place of its own. So errors do not add up over the steps, and
schedules and matchings that are kept over steps do as they do in a picture.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dsdiff.draw_settings import DrawSettings
from dsdiff.options import MergeOptions
from dsdiff.pipeline import Pipeline
from ldm.models.diffusion.guidance import guide


@dataclass(kw_only=True)
class Calls:
    """The latents [B, C, h, w] that the UNet got in each call, and what it returned; both halves of a guided batch."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def recorded(unet: nn.Module, given: Sequence[Tensor] | None = None) -> Iterator[Calls]:
    """Record the calls of the UNet within the block. given: latents that call i gets in place of its own."""
    calls = Calls()

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        x = args[0] if given is None else given[len(calls.inputs)].to(args[0])
        calls.inputs.append(x.detach().clone())
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
    """Measures ways to merge on the same pictures. The walks without merging are made at first use, and kept."""

    def __init__(self, pipeline: Pipeline, settings: DrawSettings, prompts: Sequence[str], seed: int, batch_size: int):
        self.pipeline, self.settings, self.prompts, self.seed = pipeline, settings, prompts, seed
        self.parts = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
        self.unmerged: list[Calls] = []  # a batch each

    def of(self, merge: MergeOptions, title: str) -> Tensor:
        """Return the mean squared error of guided eps, float64 [prompts, calls]. title: of the bar."""
        if not self.unmerged:
            self.unmerged = [self._walk(part, None) for part in tqdm(self.parts, "eps, unmerged", unit="batch")]
        errors = []
        for part, base in zip(tqdm(self.parts, f"eps, {title}", unit="batch"), self.unmerged, strict=True):
            merged = self._walk(part, merge, base.inputs)
            pairs = zip(merged.outputs, base.outputs, strict=True)
            pictures = len(self.prompts[part])
            errors.append(torch.stack([self._error(own, other, pictures) for own, other in pairs], dim=1))
        return torch.cat(errors).cpu()

    def _walk(self, part: slice, merge: MergeOptions | None, given: Sequence[Tensor] | None = None) -> Calls:
        settings = replace(self.settings, merge=merge)
        prompts = self.prompts[part]
        seeds = range(self.seed + part.start, self.seed + part.start + len(prompts))
        unet = self.pipeline.prepare(settings).model.diffusion_model
        with recorded(unet, given) as calls:
            self.pipeline.sample(prompts, list(seeds), settings)
        return calls

    def _error(self, own: Tensor, other: Tensor, pictures: int) -> Tensor:
        """Return the mean squared difference of guided eps, [B], of what two calls for B pictures returned."""
        return (self._guided(own, pictures) - self._guided(other, pictures)).square().flatten(1).mean(1)

    def _guided(self, output: Tensor, pictures: int) -> Tensor:
        output = output.double()
        return output if len(output) == pictures else guide(output, self.settings.scale)  # a step may have no guidance
