"""Exponential moving average of a network's weights, under the key names of CompVis checkpoints."""

# pyright: reportPrivateImportUsage=false
# (the functions on lists of tensors, as torch.optim uses them)

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn


class LitEma(nn.Module):
    """Keep a running average of all trainable parameters of a model, in buffers whose names have no dots.

    decay_t = min(decay, (1 + t) / (10 + t)), so that the first updates forget the initial weights quickly. Raises
    ValueError unless `decay` lies in [0, 1].
    """

    decay: torch.Tensor
    num_updates: torch.Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"EMA decay is {decay}: it must lie in [0, 1]")
        self.buffer_names: dict[str, str] = {}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.buffer_names[name] = name.replace(".", "")
                self.register_buffer(self.buffer_names[name], parameter.detach().clone())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the average one step towards the model's present weights."""
        # Tensors throughout, and few operations: a GPU need not be waited for.
        counts = self.num_updates >= 0
        self.num_updates += counts
        warming = (1 + self.num_updates) / (10 + self.num_updates)
        decay = torch.where(counts, torch.minimum(self.decay, warming), self.decay)
        parameters = dict(model.named_parameters())
        averages = [getattr(self, buffer_name) for buffer_name in self.buffer_names.values()]
        changes = torch._foreach_sub([parameters[name].to(averages[0]) for name in self.buffer_names], averages)
        torch._foreach_mul_(changes, 1.0 - decay)
        torch._foreach_add_(averages, changes)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights into the model."""
        parameters = dict(model.named_parameters())
        for name, buffer_name in self.buffer_names.items():
            parameters[name].copy_(getattr(self, buffer_name))

    @contextmanager
    def average_parameters(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights within the block; restore its own afterwards."""
        parameters = dict(model.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.buffer_names}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)
