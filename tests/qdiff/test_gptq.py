"""GPTQ against the paper's recursion, written directly, and what it promises of a layer's error."""

from itertools import product

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from qdiff.config import QuantConfig
from qdiff.gptq import Grid, InputStatistics, gptq_codes, input_columns, output_of, round_layer
from qdiff.quant_layer import QuantModule, SplitQuantModule
from qdiff.quantizers import FrozenQuantizer

CONFIG = QuantConfig(weight_bit=4, quant_act=False, scale_method="mse")


def layers():
    """Return every kind of layer, with an input that it takes."""
    generator = torch.Generator().manual_seed(0)

    def x(*shape, channels=1):
        values = torch.randn(shape, generator=generator)
        return values + 0.7 * values.roll(1, dims=channels) + 0.3  # neighbouring channels are alike, as in a network

    torch.manual_seed(0)
    return {
        "linear": (QuantModule(nn.Linear(12, 7), CONFIG), x(50, 12)),
        "tokens": (QuantModule(nn.Linear(12, 7, bias=False), CONFIG), x(5, 9, 12, channels=2)),
        "1x1": (QuantModule(nn.Conv2d(6, 5, 1), CONFIG), x(4, 6, 5, 4)),
        "padded": (QuantModule(nn.Conv2d(3, 5, 3, padding=1), CONFIG), x(6, 3, 6, 5)),
        "strided": (QuantModule(nn.Conv2d(3, 4, 3, stride=2, padding=1), CONFIG), x(9, 3, 7, 6)),
        "uneven": (QuantModule(nn.Conv2d(2, 4, (3, 2), padding="same", dilation=(2, 1)), CONFIG), x(6, 2, 6, 7)),
        "unpadded": (QuantModule(nn.Conv2d(2, 4, 3, padding="valid"), CONFIG), x(6, 2, 6, 7)),
        "grouped": (QuantModule(nn.Conv2d(6, 4, 3, padding=1, groups=2), CONFIG), x(6, 6, 5, 5)),
        "one dimension": (QuantModule(nn.Conv1d(4, 6, 3, stride=2, padding=1), CONFIG), x(8, 4, 9)),
        "split linear": (SplitQuantModule(nn.Linear(12, 7), CONFIG, 5), x(50, 12)),
        "split 1x1": (SplitQuantModule(nn.Conv2d(8, 5, 1), CONFIG, 3), x(4, 8, 5, 4)),
        "split 3x3": (SplitQuantModule(nn.Conv2d(5, 4, 3, padding=1), CONFIG, 2), x(6, 5, 6, 5)),
    }


def paper(weight, hessian, delta, zero_point, damp, act_order):
    """Round a weight [rows, n] as in Frantar et al. 2022, eq. 2 and 3: column after column, the inverse updated."""
    n = weight.shape[1]
    weight, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    hessian = 2 * hessian.double()
    inverse = torch.linalg.inv(hessian + damp * hessian.diagonal().mean() * torch.eye(n, dtype=torch.float64))
    order = hessian.diagonal().argsort(stable=True).flip(0) if act_order else range(n)
    left = torch.ones(n, dtype=torch.bool)
    for j in map(int, order):
        codes[:, j] = ((weight[:, j] / delta[:, j]).round() + zero_point[:, j]).clamp(0, 15)
        error = (weight[:, j] - (codes[:, j] - zero_point[:, j]) * delta[:, j]) / inverse[j, j]
        weight[:, left] -= error[:, None] * inverse[j, left]
        inverse = inverse - inverse[:, [j]] @ inverse[[j], :] / inverse[j, j]
        left[j] = False
    return codes


def codes_of(layer):
    return torch.cat([getattr(layer, name).codes().flatten(1) for name in layer.weight_parts()], dim=1)


def grids(layer):
    """Return delta and zero point of each weight, [rows, n], by the quantizers themselves."""
    parts = layer.weight_parts()
    return (
        torch.cat(
            [getattr(getattr(layer, name), what).expand(part.shape).flatten(1) for name, part in parts.items()], 1
        )
        for what in ("delta", "zero_point")
    )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_the_columns_of_a_layer_are_what_its_weight_multiplies(monkeypatch):
    for (name, (layer, x)), chunk in product(layers().items(), (1, 2**24)):
        monkeypatch.setattr("qdiff.gptq.CHUNK", chunk)
        groups = layer.options.get("groups", 1)
        columns = torch.cat([part.reshape(groups, -1, part.shape[-1]) for part in input_columns(layer, x)], dim=1)
        weight = layer.weight.reshape(groups, -1, columns.shape[-1])
        outputs = (columns @ weight.transpose(1, 2)).permute(1, 0, 2).flatten(1)  # [m, rows]
        expected = layer.op(x, layer.weight, None, **layer.options)
        expected = expected if layer.op is F.linear else expected.movedim(1, -1)
        torch.testing.assert_close(outputs, expected.reshape(outputs.shape), rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_codes_are_those_of_the_papers_recursion(monkeypatch):
    monkeypatch.setattr("qdiff.gptq.BLOCK", 5)  # several blocks, the last one shorter
    changed = 0
    for damp, act_order in product((0.01, 0.1), (False, True)):
        for name, (layer, x) in layers().items():
            layer.fit_weight()
            delta, zero_point = grids(layer)
            nearest = ((layer.weight.flatten(1) / delta).round() + zero_point).clamp(0, 15)
            statistics = InputStatistics(layer)
            statistics.add(x)
            size = len(layer.weight) // len(statistics.hessian)
            parts = [slice(i * size, (i + 1) * size) for i in range(len(statistics.hessian))]
            weight = layer.weight.flatten(1)
            expected = torch.cat(
                [
                    paper(weight[part], hessian, delta[part], zero_point[part], damp, act_order)
                    for part, hessian in zip(parts, statistics.hessian, strict=True)
                ]
            )
            round_layer(layer, statistics, damp=damp, act_order=act_order)
            assert all(isinstance(getattr(layer, part), FrozenQuantizer) for part in layer.weight_parts())
            assert torch.equal(codes_of(layer).double(), expected), (name, damp, act_order)
            changed += int((codes_of(layer) != nearest).sum())
    assert changed > 100


@torch.no_grad()
def test_no_layer_is_worse_on_its_inputs_than_rounding_to_nearest():
    gains = []
    for name, (layer, x) in layers().items():
        layer.fit_weight()
        exact = output_of(layer, x, layer.weight)
        nearest = (output_of(layer, x, layer.quantized_weight()) - exact).square().sum()
        statistics = InputStatistics(layer)
        for part in x.split(2):  # sums do not depend on how the inputs come
            statistics.add(part)
        before, after = round_layer(layer, statistics, damp=0.01, act_order=True)
        error = (output_of(layer, x, layer.quantized_weight()) - exact).square().sum()
        assert error <= nearest, name
        assert before * statistics.count == pytest.approx(float(nearest), rel=1e-3), name
        assert after * statistics.count == pytest.approx(float(error), rel=1e-3), name
        gains.append(float(error / nearest))
    assert sorted(gains)[len(gains) // 2] < 0.85


@torch.no_grad()
def test_targets_are_met_better_than_without_them():
    for name, (layer, exact) in layers().items():
        torch.manual_seed(1)
        x = exact + 0.3 * exact.roll(1, dims=0) + 0.1  # what the layers before made of it
        target = output_of(layer, exact, layer.weight)
        errors = {}
        for kind in ("without", "with"):
            own = type(layer)(layer.original, CONFIG, *([layer.split] if isinstance(layer, SplitQuantModule) else []))
            own.fit_weight()
            statistics = InputStatistics(own, targets=kind == "with")
            statistics.add(x, target if kind == "with" else None)
            round_layer(own, statistics, damp=0.01, act_order=True)
            errors[kind] = float((output_of(own, x, own.quantized_weight()) - target).square().sum())
        assert errors["with"] < errors["without"], name


def test_columns_that_are_always_zero_are_rounded_to_nearest():
    torch.manual_seed(0)
    layer = QuantModule(nn.Linear(6, 4), CONFIG)
    layer.fit_weight()
    x = torch.randn(30, 6)
    x[:, 2] = 0
    nearest = layer.weight_quantizer.codes(layer.weight)[:, 2]
    for inputs in (x, torch.zeros_like(x)):
        statistics = InputStatistics(layer)
        statistics.add(inputs)
        grid = Grid.of_layer(layer)
        codes, _, _ = gptq_codes(layer.weight.detach(), statistics.hessian[0], grid, damp=0.01, act_order=True)
        assert torch.equal(codes[:, 2], nearest)


def test_infinite_inputs_are_refused():
    layer = QuantModule(nn.Linear(3, 2), CONFIG)
    layer.fit_weight()
    statistics = InputStatistics(layer)
    statistics.add(torch.full((2, 3), float("inf")))
    with pytest.raises(ValueError, match="NaN or infinite"):
        round_layer(layer, statistics, damp=0.01, act_order=False)
