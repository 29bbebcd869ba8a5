"""GPTQ: round the weights of a layer column after column, each making good the errors of those before it.

Frantar et al. 2022 (arXiv 2210.17323). A layer computes W x from inputs x; its weight W [rows, n] becomes Q, whose rows
lie on given grids. The error, summed over the inputs x of a calibration, is

    sum |(W - Q) x|^2 = tr((W - Q) H (W - Q)^T)          H = sum x x^T   [n, n]

Columns are rounded one by one, and the error of each is made up for in those that are left. The paper has the upper
Cholesky factor U of the inverse, H^-1 = U^T U, and for each column j in turn

    q_j = round(w_j)          w_k -= (w_j - q_j) U_jk / U_jj   for all k > j

With T = U^-1, which is the upper triangle in H = T T^T, and with w as it was at first, the same codes come from

    q_j = round(w_j + sum_{i < j} (w_i - q_i) T_ij / T_jj)

So H is factored once and never inverted. The sums over earlier columns are matrix products, a block of columns at a
time (the paper's lazy updates).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.bitpack import pack
from qdiff.distributed import sum_over_ranks
from qdiff.finite import check_error
from qdiff.quant_layer import QuantModule
from qdiff.quantizers import FrozenQuantizer, UniformAffineQuantizer

BLOCK = 128  # columns between which sums over earlier ones are made by one matrix product
EXACT = 8192  # columns up to which H is factored in float64; for more it would take too much memory
CHUNK = 2**24  # numbers of a layer's inputs that are laid out as columns at once: 64 MiB


# --- the inputs of a layer -----------------------------------------------------------------------------------


def output_of(layer: QuantModule, x: Tensor, weight: Tensor) -> Tensor:
    """Return what the layer computes from inputs x that are not quantized, with `weight` in place of its own."""
    return layer.op(x, weight, layer.bias, **layer.options)


def input_columns(layer: QuantModule, x: Tensor) -> Iterator[Tensor]:
    """Yield all vectors [m, n] that the rows of the layer's weight are multiplied by in layer(x), some at a time.

    n is the number of columns of `weight.flatten(1)`, in its order. A convolution with g groups yields [g, m, n].
    """
    if layer.op is F.linear:
        yield from x.reshape(-1, x.shape[-1]).split(max(1, CHUNK // x.shape[-1]))
        return
    groups = layer.options["groups"]
    outputs = output_of(layer, x[:1], layer.weight)[0, 0].numel()
    size = max(1, CHUNK // (outputs * layer.weight[0].numel() * groups))
    for part in x.split(size):
        grouped = _patches(layer, part).unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        yield grouped if groups > 1 else grouped[0]


def _patches(layer: QuantModule, x: Tensor) -> Tensor:
    """Return what a convolution's kernel sees at each of its places, [b, channels * kernel, places]."""
    kernel, dilation, stride = tuple(layer.weight.shape[2:]), layer.options["dilation"], layer.options["stride"]
    padding = layer.options["padding"]
    if padding == "same":  # an odd one is larger at the end, as in torch
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in ([0] * len(kernel) if padding == "valid" else padding)]
    x = F.pad(x, [p for pair in reversed(sides) for p in pair])
    if x.ndim == 3:
        x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    return F.unfold(x, kernel, dilation=dilation, stride=stride)


class InputStatistics:
    """The sums over a layer's inputs from which its weight is rounded; the inputs themselves are not kept.

    hessian: sum x x^T, [groups, n, n]. shift: sum (y - W x) x^T, [groups, rows, n], for targets y of the outputs that
    differ from W x; None without targets. count: how many x.
    """

    def __init__(self, layer: QuantModule, targets: bool = False):
        self.layer = layer
        groups = layer.options.get("groups", 1)
        rows, n = layer.weight.flatten(1).shape
        self.hessian = layer.weight.new_zeros(groups, n, n, dtype=torch.float32)
        self.shift = layer.weight.new_zeros(groups, rows // groups, n, dtype=torch.float32) if targets else None
        self.count = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add the inputs in x. y: what the layer should compute from them; given if there are targets."""
        groups = len(self.hessian)
        weight = self.layer.weight.detach().float().reshape(groups, -1, self.hessian.shape[-1])
        targets = None if y is None else self._targets(y).reshape(-1, *weight.shape[:2])
        done = 0
        for columns in input_columns(self.layer, x.float()):
            columns = columns.reshape(groups, -1, columns.shape[-1])
            m = columns.shape[1]
            self.hessian.baddbmm_(columns.transpose(1, 2), columns)
            if targets is not None and self.shift is not None:
                missing = targets[done : done + m].permute(1, 2, 0) - weight @ columns.transpose(1, 2)
                self.shift.baddbmm_(missing, columns)
            done += m
        self.count += done

    def _targets(self, y: Tensor) -> Tensor:
        """Return outputs without the bias, the rows last, in the order of `input_columns`."""
        last = y.float() if self.layer.op is F.linear else y.float().movedim(1, -1)
        return last if self.layer.bias is None else last - self.layer.bias.detach()

    def sum_over_processes(self) -> None:
        """Add up the sums of all processes of the calibration, in each of them."""
        count = torch.tensor([float(self.count)], dtype=torch.float64, device=self.hessian.device)
        sum_over_ranks([self.hessian, count] if self.shift is None else [self.hessian, self.shift, count])
        self.count = int(count)


# --- rounding ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers that a weight may become: (q - zero_point) * delta with whole q in 0..high.

    delta, zero_point: [rows, parts]; part: int64 [n], the part of each column. Split layers have two parts.
    """

    delta: Tensor
    zero_point: Tensor
    part: Tensor
    high: int

    @classmethod
    def of_layer(cls, layer: QuantModule) -> "Grid":
        """Return the grid of a layer whose weight quantizers have ranges."""
        quantizers = [getattr(layer, name) for name in layer.weight_parts()]
        widths = [part[0].numel() for part in layer.weight_parts().values()]
        delta, zero_point = (
            torch.cat([getattr(quantizer, what).flatten(1) for quantizer in quantizers], dim=1)
            for what in ("delta", "zero_point")
        )
        part = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths)).to(delta.device)
        return cls(delta=delta, zero_point=zero_point, part=part, high=quantizers[0].high)

    def rows(self, chosen: slice) -> "Grid":
        """Return the grid of some of the rows."""
        return Grid(delta=self.delta[chosen], zero_point=self.zero_point[chosen], part=self.part, high=self.high)

    def round(self, weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes nearest to a weight with these `columns`, ties to even, and the numbers they stand for."""
        part = self.part[columns]
        delta, zero_point = self.delta[:, part].to(weight), self.zero_point[:, part].to(weight)
        codes = ((weight / delta).round() + zero_point).clamp(0, self.high)
        return codes, (codes - zero_point) * delta


def gptq_codes(
    weight: Tensor, hessian: Tensor, grid: Grid, *, damp: float, act_order: bool, shift: Tensor | None = None
) -> tuple[Tensor, float, float]:
    """Round a weight [rows, n] by GPTQ; return its codes [rows, n] and two errors, by nearest rounding and by GPTQ.

    hessian: [n, n]. damp: share of its mean diagonal that is added to its diagonal. act_order: round the columns of the
    largest diagonal first, instead of in their order. shift: see InputStatistics; rounded is then the weight that comes
    closest to the targets, W + shift H^-1. Errors are sums over the inputs. Whichever is better of both is returned.
    Raises ValueError if the Hessian cannot be factored, and if a number is NaN or infinite.
    """
    n = len(hessian)
    diagonal = hessian.diagonal()
    # The last column of this order is rounded first: thus an ordinary, lower factor is what is needed.
    order = torch.argsort(diagonal, stable=True) if act_order else torch.arange(n - 1, -1, -1, device=weight.device)
    damping = float(damp * diagonal.mean()) or 1.0
    if not math.isfinite(damping):
        raise ValueError("the inputs are NaN or infinite: is the calibration data of this model?")
    dtype = torch.float64 if n <= EXACT else torch.float32
    permuted = hessian[order[:, None], order[None, :]].to(dtype)
    permuted.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(permuted)
    if failed:
        raise ValueError(f"damp is {damp!r}, which is too little to factor the Hessian: use a larger one")
    del permuted
    ideal = weight[:, order].to(dtype)
    if shift is not None:
        ideal += torch.cholesky_solve(shift[:, order].to(dtype).T, factor).T

    def error(rounded: Tensor) -> float:
        difference = ideal - rounded
        return float((difference @ factor).square().sum() - damping * difference.square().sum())

    nearest, plain = grid.round(weight[:, order].to(dtype), order)
    codes, rounded = _round_from_the_last(ideal, factor, grid, order)
    before = check_error(error(plain), "the error of rounding to nearest")
    after = check_error(error(rounded), "the error of GPTQ's rounding")
    result = torch.empty_like(codes)
    result[:, order] = codes if after < before else nearest
    return result, before, min(before, after)


def _round_from_the_last(weight: Tensor, factor: Tensor, grid: Grid, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and their numbers, both [rows, n], of a weight [rows, n] whose last column is rounded first.

    factor: lower triangle L with H = L L^T, which is T of the module's text, turned about.
    """
    rows, n = weight.shape
    codes, errors = weight.new_empty(n, rows), weight.new_zeros(n, rows)  # a column in one piece
    columns = weight.T.contiguous()
    delta, zero_point = (
        values.to(weight)[:, grid.part[order]].T.contiguous() for values in (grid.delta, grid.zero_point)
    )
    starts = [*range(n, 0, -BLOCK), 0]
    for end, start in pairwise(starts):
        carried = factor[end:, start:end].T @ errors[end:]
        for j in range(end - 1, start - 1, -1):
            sums = carried[j - start] + factor[j + 1 : end, j] @ errors[j + 1 : end]
            wanted = columns[j] + sums / factor[j, j]
            codes[j] = ((wanted / delta[j]).round() + zero_point[j]).clamp(0, grid.high)
            errors[j] = columns[j] - (codes[j] - zero_point[j]) * delta[j]
    return codes.T, weight - errors.T


def round_layer(
    layer: QuantModule, statistics: InputStatistics, *, damp: float, act_order: bool
) -> tuple[float, float]:
    """Round a layer's weight by GPTQ and freeze it; return the mean squared errors of its outputs, summed over rows.

    The first is that of rounding to nearest, the second GPTQ's; they are means over the inputs. See `gptq_codes`.
    """
    grid, weight = Grid.of_layer(layer), layer.weight.detach().float().flatten(1)
    groups = len(statistics.hessian)
    size = len(weight) // groups
    codes, before, after = torch.empty_like(weight), 0.0, 0.0
    for group, hessian in enumerate(statistics.hessian):
        rows = slice(group * size, (group + 1) * size)
        shift = None if statistics.shift is None else statistics.shift[group]
        settings = {"damp": damp, "act_order": act_order, "shift": shift}
        codes[rows], nearest, gptq = gptq_codes(weight[rows], hessian, grid.rows(rows), **settings)
        before, after = before + nearest / statistics.count, after + gptq / statistics.count
    _freeze(layer, codes)
    return before, after


def _freeze(layer: QuantModule, codes: Tensor) -> None:
    """Put FrozenQuantizers with these codes [rows, n] into the layer, with the ranges and states of its quantizers."""
    parts = layer.weight_parts()
    widths = [part[0].numel() for part in parts.values()]
    for (name, part), own in zip(parts.items(), codes.split(widths, dim=1), strict=True):
        old: UniformAffineQuantizer = getattr(layer, name)
        packed = pack(own, old.n_bits)
        new = FrozenQuantizer.from_packed(packed, tuple(part.shape), old.n_bits, old.delta, old.zero_point)
        new.enabled = old.enabled
        setattr(layer, name, new.to(part.device))
