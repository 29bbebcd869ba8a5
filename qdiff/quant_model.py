"""A UNet whose layers and blocks are quantized."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn
from torch import Tensor

from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from qdiff.config import QuantConfig
from qdiff.quant_block import FLOAT, QUANTIZED, BaseQuantBlock, convert, restore
from qdiff.quant_layer import FrozenQuantizer, Quantizer, QuantModule, SplitQuantModule, check_layer

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class QuantModel(nn.Module):
    """`QuantModel(unet, config)` quantizes a UNetModel in place and computes what it computes.

    All Linear, Conv1d and Conv2d layers become QuantModules, the blocks of `quant_block.QUANTIZED` their quantized
    classes. At first all quantizers are off and nothing changes; see `set_quant_state`. Layers and parameters keep
    their names: the state_dict is the UNet's, under `model.`, with the quantizers in between. `restore` undoes it.
    """

    def __init__(self, unet: UNetModel, config: QuantConfig):
        super().__init__()
        if any(isinstance(module, QuantModule) for module in unet.modules()):
            raise ValueError("this UNet is quantized already: build it anew, or restore() it first")
        for block in unet.modules():
            if isinstance(block, tuple(QUANTIZED)) and type(block) not in QUANTIZED:
                kind = f"{type(block).__module__}.{type(block).__name__}"
                raise ValueError(f"blocks of {kind} cannot be quantized: quantize first, patch (merge tokens) last")
        for module in unet.modules():
            if isinstance(module, LAYERS):
                check_layer(module)
        self.config = config
        self.model = unet
        self._modes: list[tuple[nn.Module, bool]] | None = [(module, module.training) for module in unet.modules()]
        splits = split_widths(unet) if config.split else {}
        for block in list(unet.modules()):
            convert(block, config)
        for name, layer in list(unet.named_modules()):
            if isinstance(layer, LAYERS):
                split = splits.get(name)
                quantized = SplitQuantModule(layer, config, split) if split else QuantModule(layer, config)
                put_module(unet, name, quantized)
        self.to(next(unet.parameters()).device)
        self.eval()
        self.set_quant_state(False, False)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """As UNetModel.forward."""
        return self.model(x, timesteps, context=context, y=y)

    def restore(self) -> UNetModel:
        """The float UNet, as it was; this model must not be used any more.

        Raises ValueError while it is patched, and once `forget_float` was called.
        """
        self.check_float()
        if any(isinstance(block, BaseQuantBlock) and type(block) not in FLOAT for block in self.model.modules()):
            raise ValueError("the blocks are patched: take the patch off (tomesd.remove_patch) before restore()")
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, QuantModule):
                put_module(self.model, name, layer.layer)
        for block in list(self.model.modules()):
            restore(block)
        for module, training in self._modes:
            module.training = training
        return self.model

    def forget_float(self) -> None:
        """Let go of the float layers: all that keeps their weights then is what computes with them."""
        self._modes = None

    def check_float(self) -> None:
        """Raises ValueError once `forget_float` was called, as packing does."""
        if self._modes is None:
            raise ValueError("the model is packed, its float weights are gone: load it anew")

    # --- what is in it ------------------------------------------------------------------------------------

    def layers(self) -> dict[str, QuantModule]:
        """All quantized layers, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, QuantModule)}

    def weight_quantizers(self) -> dict[str, Quantizer]:
        """All quantizers of weights, by name."""
        return {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in self.layers().items()
            for part in layer.weight_parts()
        }

    def act_quantizers(self) -> dict[str, Quantizer]:
        """All quantizers of activations, attention operands included, by name."""
        weights = {id(quantizer) for quantizer in self.weight_quantizers().values()}
        found = {name: module for name, module in self.named_modules() if isinstance(module, Quantizer)}
        return {name: module for name, module in found.items() if id(module) not in weights}

    def units(self) -> dict[str, nn.Module]:
        """What is reconstructed, in the order of execution: blocks, and the layers outside of blocks, by name."""
        return dict(_units_of(self, ""))

    # --- its states ---------------------------------------------------------------------------------------

    def set_quant_state(self, weight_quant: bool = False, act_quant: bool = False) -> None:
        """Switch all quantizers of weights, and all of activations, on or off.

        Raises ValueError for switching on what has no range yet, activations that the config leaves float, and once the
        float layers are gone.
        """
        self.check_float()
        states = ((weight_quant, self.weight_quantizers()), (act_quant, self.act_quantizers()))
        if act_quant and not self.config.quant_act:
            raise ValueError("this model quantizes weights only (quant_act is False)")
        for on, quantizers in states:
            unknown = [name for name, quantizer in quantizers.items() if not quantizer.is_set] if on else []
            if unknown:
                raise ValueError(
                    f"{len(unknown)} quantizers have no range yet, such as {unknown[0]}: calibrate, or load a cali_ckpt"
                )
        for on, quantizers in states:
            for quantizer in quantizers.values():
                quantizer.enabled = on

    @contextmanager
    def quant_state(self, weight_quant: bool, act_quant: bool) -> Iterator[None]:
        """`set_quant_state` within the block; afterwards each quantizer, or what stands in its slot, is as before."""
        before = {name: quantizer.enabled for name, quantizer in self._quantizers()}
        try:
            self.set_quant_state(weight_quant, act_quant)
            yield
        finally:
            for name, quantizer in self._quantizers():
                quantizer.enabled = before[name]

    def _quantizers(self) -> list[tuple[str, Quantizer]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, Quantizer)]

    def fit_weights(self) -> None:
        """Fit the range of every weight that has none yet."""
        for layer in self.layers().values():
            if not all(getattr(layer, name).is_set for name in layer.weight_parts()):
                layer.fit_weight()

    def freeze(self) -> None:
        """Decide all roundings: every weight quantizer becomes a FrozenQuantizer with the codes that it gives now."""
        for layer in self.layers().values():
            freeze_layer(layer)


def freeze_layer(layer: QuantModule) -> None:
    """Replace the layer's weight quantizers by their frozen codes."""
    for name, part in layer.weight_parts().items():
        quantizer = getattr(layer, name)
        if not isinstance(quantizer, FrozenQuantizer):
            setattr(layer, name, FrozenQuantizer(quantizer, part))


def split_widths(unet: UNetModel) -> dict[str, int]:
    """The layers that see a concatenation [h, skip] unnormalised -> the channels of h."""
    widths = {}
    channels = unet.middle_block[-1].out_channels
    for i, block in enumerate(unet.output_blocks):
        residual = block[0]
        if isinstance(residual, ResBlock):
            if isinstance(residual.skip_connection, LAYERS):
                widths[f"output_blocks.{i}.0.skip_connection"] = channels
            channels = residual.out_channels
    return widths


def _units_of(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, BaseQuantBlock | QuantModule):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _units_of(child, f"{name}.{child_name}" if name else child_name)


def put_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` into the slot `name` of `root`."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
