"""A UNet whose layers and blocks are quantized."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch.nn as nn
from torch import Tensor

from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from qdiff.config import QuantConfig
from qdiff.exchange import check_unmerged, eject, exchange, put_module, release
from qdiff.quant_block import QUANTIZED, BaseQuantBlock
from qdiff.quant_layer import QuantModule, SplitQuantModule, check_layer
from qdiff.quantizers import DynamicQuantizer, FrozenQuantizer, Quantizer

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class QuantModel(nn.Module):
    """A UNetModel whose layers and blocks are quantized in place.

    QuantModules take the slots of all Linear, Conv1d and Conv2d layers, and quantized blocks those of the blocks that
    `quant_block.QUANTIZED` knows. At first all quantizers are off and nothing changes; see `set_quant_state`. Layers
    and parameters keep their names: the state_dict is the UNet's, under `model.`, with the quantizers in between.
    `restore` undoes it. Raises ValueError, and leaves the UNet as it is, if it cannot be quantized.
    """

    def __init__(self, unet: UNetModel, config: QuantConfig):
        super().__init__()
        check_unmerged(unet)
        _check_float(unet)
        self.config = config
        self.model = unet
        self._modes: list[tuple[nn.Module, bool]] | None = [(module, module.training) for module in unet.modules()]
        splits = split_widths(unet) if config.split else {}
        exchange(unet, dict.fromkeys(QUANTIZED, partial(_quantized_block, config=config)))
        for name, layer in list(unet.named_modules()):
            if isinstance(layer, LAYERS):
                split = splits.get(name)
                quantized = SplitQuantModule(layer, config, split) if split else QuantModule(layer, config)
                put_module(unet, name, quantized)
        if config.quant_act:
            self._set_mixed_act()
        self.to(next(unet.parameters()).device)
        self.eval()
        self.set_quant_state(False, False)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Predict the noise; arguments and result are those of UNetModel.forward."""
        return self.model(x, timesteps, context=context, y=y)

    def mix_act(self, bits: Mapping[str, int]) -> None:
        """Change the config's `mixed_act` to `bits`. Ranges of quantizers whose bits change must be fitted anew.

        Raises ValueError, and changes nothing, for names of no layer's input.
        """
        before, self.config = self.config, replace(self.config, mixed_act=dict(bits))
        try:
            self._set_mixed_act()
        except ValueError:
            self.config = before
            raise

    def _set_mixed_act(self) -> None:
        inputs = self.input_quantizers()
        unknown = sorted(set(self.config.mixed_act) - set(inputs))
        if unknown:
            raise ValueError(f"mixed_act names {unknown[0]}, which is no layer's input: the file is of another model?")
        for name, quantizer in inputs.items():
            quantizer.n_bits = self.config.mixed_act.get(name, self.config.act_bit)

    def restore(self) -> UNetModel:
        """Return the float UNet, as it was; this model must not be used any more.

        Raises ValueError while tokens are merged in it, and once `forget_float` was called.
        """
        self.check_float()
        check_unmerged(self)
        eject(self.model)
        for module, training in self._modes or ():
            module.training = training
        return self.model

    def forget_float(self) -> None:
        """Drop all float layers and blocks, and free the weights that only they hold. `restore` raises afterwards."""
        self._modes = None
        release(self)

    def check_float(self) -> None:
        """Raise ValueError once `forget_float` was called, as lowering does."""
        if self._modes is None:
            raise ValueError("the model is lowered, its float weights are gone: load it anew")

    # --- its parts ----------------------------------------------------------------------------------------

    def layers(self) -> dict[str, QuantModule]:
        """Return all quantized layers by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, QuantModule)}

    def weight_quantizers(self) -> dict[str, Quantizer]:
        """Return all quantizers of weights by name."""
        return {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in self.layers().items()
            for part in layer.weight_parts()
        }

    def act_quantizers(self) -> dict[str, Quantizer]:
        """Return all quantizers of activations by name, those of attention operands included."""
        weights = self.weight_quantizers()
        return {name: quantizer for name, quantizer in self._quantizers() if name not in weights}

    def input_quantizers(self) -> dict[str, Quantizer]:
        """Return the quantizers of the inputs of layers by name; none if activations are float."""
        weights = {f"{name}.{part}" for name, layer in self.layers().items() for part in layer.weight_parts()}
        inputs = {name.replace("weight_quantizer", "act_quantizer") for name in weights}
        return {name: quantizer for name, quantizer in self.act_quantizers().items() if name in inputs}

    def units(self) -> dict[str, nn.Module]:
        """Return the units of reconstruction by name, in order of execution: blocks, and the layers between them."""
        return dict(_units_below(self, ""))

    # --- its states ---------------------------------------------------------------------------------------

    def set_quant_state(
        self, weight_quant: bool = False, act_quant: bool = False, *, dynamic: bool | None = None
    ) -> None:
        """Switch all quantizers of weights, and all of activations, on or off.

        dynamic: whether the quantizers of activations that have dynamic ranges are on; None for like the others.
        Raises ValueError if one to be switched on has no range yet, if the config leaves activations float, and once
        the float layers are gone.
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
        if dynamic is not None:
            for quantizer in self.act_quantizers().values():
                if isinstance(quantizer, DynamicQuantizer):
                    quantizer.enabled = dynamic

    @contextmanager
    def quant_state(self, weight_quant: bool, act_quant: bool, *, dynamic: bool | None = None) -> Iterator[None]:
        """Apply `set_quant_state` within the block; afterwards each quantizer is on or off as before.

        A quantizer that took another's slot within the block takes over its state.
        """
        before = {name: quantizer.enabled for name, quantizer in self._quantizers()}
        try:
            self.set_quant_state(weight_quant, act_quant, dynamic=dynamic)
            yield
        finally:
            for name, quantizer in self._quantizers():
                quantizer.enabled = before[name]

    def _quantizers(self) -> list[tuple[str, Quantizer]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, Quantizer)]

    def fit_weights(self) -> None:
        """Fit the ranges of all weights that have none yet."""
        for layer in self.layers().values():
            if not all(getattr(layer, name).is_set for name in layer.weight_parts()):
                layer.fit_weight()

    def freeze(self) -> None:
        """Fix all roundings: replace all weight quantizers by FrozenQuantizers with the present codes."""
        for layer in self.layers().values():
            freeze_layer(layer)


def freeze_layer(layer: QuantModule) -> None:
    """Replace the layer's weight quantizers by FrozenQuantizers with the present codes."""
    for name, part in layer.weight_parts().items():
        quantizer = getattr(layer, name)
        if not isinstance(quantizer, FrozenQuantizer):
            setattr(layer, name, FrozenQuantizer(quantizer, part))


def _quantized_block(block: nn.Module, config: QuantConfig) -> nn.Module:
    return QUANTIZED[type(block)](block, config)


def _check_float(unet: UNetModel) -> None:
    """Raise ValueError if the UNet holds what cannot be quantized, or what is quantized already."""
    if any(isinstance(module, QuantModule) for module in unet.modules()):
        raise ValueError("this UNet is quantized already: build it anew, or restore() it first")
    if unet.time_cond_proj_dim is not None:
        raise ValueError(
            "a UNet with an embedding of guidance (time_cond_proj_dim) cannot be quantized: "
            "quantize the model from which it was distilled, and draw with an LCM-LoRA"
        )
    for module in unet.modules():
        if isinstance(module, tuple(QUANTIZED)) and type(module) not in QUANTIZED:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise ValueError(f"blocks of {kind} cannot be quantized: quantize first, patch (merge tokens) last")
        if isinstance(module, LAYERS):
            check_layer(module)


def split_widths(unet: UNetModel) -> dict[str, int]:
    """Return name of each layer to split -> channels of its first part.

    The shortcuts of the decoder's residual blocks are split: their input is the concatenation [h, skip] without a norm.
    h is the output of the block before, and has its channels.
    """
    widths = {}
    channels = unet.middle_block[-1].out_channels
    for i, block in enumerate(unet.output_blocks):
        residual = next(block.children())
        if isinstance(residual, ResBlock):
            if isinstance(residual.skip_connection, LAYERS):
                widths[f"output_blocks.{i}.0.skip_connection"] = channels
            channels = residual.out_channels
    return widths


def _units_below(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the units of reconstruction of `module`, which is called `name`."""
    if isinstance(module, BaseQuantBlock | QuantModule):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _units_below(child, f"{name}.{child_name}" if name else child_name)
