"""Quantizers of weights and of activations.

A quantizer maps a real x to an integer code q in low..high and back, with a step size `delta` and a zero point:

    q = clamp(round(x / delta) + zero_point, low, high)          x' = (q - zero_point) * delta
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from qdiff.bitpack import pack, packed_bytes, unpack
from qdiff.config import BITS, SCALE_METHODS

MIN_DELTA = 1e-8
TINY = 1e-30  # the least delta of the mse search: the reference has no limit there, this prevents division by 0
CANDIDATES = 80  # ranges that the mse search tries, each smaller than the last by 1 % of the full range
MSE_POWER = 2.4


def lp_loss(prediction: Tensor, target: Tensor, p: float = 2.0) -> Tensor:
    """Return |prediction - target|^p, summed over dimension 1 (channels, or tokens), averaged over the others: []."""
    return (prediction - target).abs().pow(p).sum(1).mean()


def round_ste(x: Tensor) -> Tensor:
    """Return round(x), ties to even, with the gradient of the identity (the straight-through estimator)."""
    return (x.round() - x).detach() + x if torch.is_grad_enabled() else x.round()


def clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    """Return x within its limits. The gradient is that of the identity between them, and 0 at them and beyond."""
    # Not clamp: at its limits the gradient is 1 in PyTorch 2.11, and 0 in 2.14. That of hardtanh is 0 in both.
    return F.hardtanh(x, low, high)


def check_range(delta: Tensor, zero_point: Tensor) -> None:
    """Raise ValueError unless delta is positive and finite, and zero_point whole and of the same shape."""
    if delta.shape != zero_point.shape:
        raise ValueError(f"delta {tuple(delta.shape)} and zero_point {tuple(zero_point.shape)} differ in shape")
    if not bool((torch.isfinite(delta) & (delta > 0)).all()):
        raise ValueError("delta must be positive and finite")
    if not bool((torch.isfinite(zero_point) & (zero_point == zero_point.round())).all()):
        raise ValueError("zero_point must be a whole number")


class Quantizer(nn.Module):
    """Base of all quantizers: bits, limits, `delta` and `zero_point`.

    n_bits: 2..16. symmetric: signed codes -2^(b-1)..2^(b-1)-1 and zero point 0, in place of 0..2^b-1.
    `delta` and `zero_point` (float32, [] or one per channel, broadcastable to x) are NaN until they are set.
    While `enabled` is False the quantizer returns its input unchanged; `QuantModel.set_quant_state` switches it.
    """

    delta: Tensor
    zero_point: Tensor

    def __init__(self, n_bits: int = 8, symmetric: bool = False):
        super().__init__()
        if n_bits not in BITS or type(n_bits) is not int:
            raise ValueError(f"n_bits is {n_bits!r}: it must be a whole number in {BITS[0]}..{BITS[-1]}")
        self.n_bits = n_bits
        self.symmetric = symmetric
        self.enabled = True
        self.register_buffer("delta", torch.tensor(float("nan")))
        self.register_buffer("zero_point", torch.tensor(float("nan")))

    @property
    def low(self) -> int:
        """The lowest code."""
        return -(2 ** (self.n_bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """The highest code."""
        return self.low + 2**self.n_bits - 1

    @property
    def is_set(self) -> bool:
        """True once delta and zero_point have values."""
        return not bool(self.delta.isnan().any())

    def set(self, delta: Tensor, zero_point: Tensor) -> None:
        """Set delta and zero_point. Raises ValueError if they are no range, see `check_range`."""
        check_range(delta, zero_point)
        device = self.delta.device
        self.delta = delta.detach().to(device, torch.float32)
        self.zero_point = zero_point.detach().to(device, torch.float32)

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of x, as float32 of x's shape."""
        raise NotImplementedError

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return (codes - zero_point) * delta."""
        return (codes - self.zero_point) * self.delta

    def forward(self, x: Tensor) -> Tensor:
        """Return x' for x of any float dtype, in that dtype; it is computed in float32."""
        return self.dequantize(self.codes(x)).to(x.dtype) if self.enabled else x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantizer":
        # `.half()` and the like move the ranges but do not cast them: a zero point of 16 bits would become infinite.
        delta, zero_point = self.delta, self.zero_point
        super()._apply(fn, recurse)
        self.delta, self.zero_point = delta.to(self.delta.device), zero_point.to(self.zero_point.device)
        return self

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, symmetric={self.symmetric}"


class UniformAffineQuantizer(Quantizer):
    """Rounds to nearest, ties to even; its range is fitted to data by `fit` or given by `set_range`.

    channel_wise: one range for each index of dimension 0. scale_method: "max", "max_scale" or "mse", see QuantConfig.
    always_zero: the zero point is 0 and the range [0, max], as the softmax output needs.
    """

    def __init__(
        self,
        n_bits: int = 8,
        symmetric: bool = False,
        channel_wise: bool = False,
        scale_method: str = "max",
        always_zero: bool = False,
    ):
        super().__init__(n_bits, symmetric)
        if scale_method not in SCALE_METHODS:
            raise ValueError(f"scale_method is {scale_method!r}: it must be one of {', '.join(SCALE_METHODS)}")
        if symmetric and always_zero:
            raise ValueError("always_zero is for unsigned codes: symmetric ones have zero point 0 anyway")
        self.channel_wise = channel_wise
        self.scale_method = scale_method
        self.always_zero = always_zero

    def codes(self, x: Tensor) -> Tensor:
        return clamp_ste(round_ste(x.float() / self.delta) + self.zero_point, self.low, self.high)

    @torch.no_grad()
    def fit(self, x: Tensor) -> "UniformAffineQuantizer":
        """Set delta and zero_point from the values of x; returns self. Raises ValueError if x holds NaN or inf."""
        rows = x.detach().float().reshape(x.shape[0] if self.channel_wise else 1, -1)
        low, high = rows.min(dim=1).values, rows.max(dim=1).values
        if not bool(torch.isfinite(low + high).all()):
            raise ValueError("cannot fit a range to data with NaN or infinite values")
        delta, zero_point = self._search(rows, low, high) if self.scale_method == "mse" else self._full(low, high)
        shape = (-1, *[1] * (x.ndim - 1)) if self.channel_wise else ()
        self.set(delta.float().reshape(shape), zero_point.float().reshape(shape))
        return self

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set delta and zero_point so that the codes span [low, high]. low, high: [], or one per channel."""
        self.set(*self._affine(low, high))

    def _full(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        # In float64, and rounded once. Zero must be within the range: all-positive data clips otherwise.
        low, high = low.double().clamp(max=0), high.double().clamp(min=0)
        if self.scale_method == "max_scale":
            low, high = low * (self.n_bits + 2) / 8, high * (self.n_bits + 2) / 8
        return self._affine(low, high)

    def _affine(self, low: Tensor, high: Tensor, min_delta: float = MIN_DELTA) -> tuple[Tensor, Tensor]:
        """Return delta and zero_point whose codes span [low, high].

        Symmetric codes span the smallest [-a, a] that contains it; with always_zero they span [0, high].
        """
        if self.symmetric:
            delta = torch.maximum(low.abs(), high.abs()) / self.high
        elif self.always_zero:
            delta = high / self.high
        else:
            delta = (high - low) / self.high
        delta = delta.clamp(min=min_delta)
        if self.symmetric or self.always_zero:
            return delta, torch.zeros_like(delta)
        return delta, (-low / delta).round()

    def _search(self, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return delta and zero_point of the shrunk [low, high] with the least mean |x - x'|^2.4, for each row."""
        best_delta, best_zero = self._affine(low, high, TINY)
        best = torch.full_like(low, float("inf"))
        for i in range(CANDIDATES):
            shrink = 1 - i * 0.01
            delta, zero_point = self._affine(low * shrink, high * shrink, TINY)
            codes = (rows / delta[:, None]).round_().add_(zero_point[:, None]).clamp_(self.low, self.high)
            error = codes.sub_(zero_point[:, None]).mul_(delta[:, None]).sub_(rows).abs_().pow_(MSE_POWER).mean(dim=1)
            better = error < best
            best = torch.where(better, error, best)
            best_delta = torch.where(better, delta, best_delta)
            best_zero = torch.where(better, zero_point, best_zero)
        return best_delta, best_zero


class DynamicQuantizer(Quantizer):
    """Rounds to nearest, with ranges that it takes anew from every input: from the extremes of it, and 0.

    per: "token" for a range of each row of the last dimension, "sample" for one of each entry of the first. Its own
    `delta` and `zero_point` stay NaN, so there is nothing to fit or to save. Ranges are computed in float32, as the
    integer engine's kernels do.
    """

    def __init__(self, n_bits: int = 8, symmetric: bool = False, *, per: str):
        super().__init__(n_bits, symmetric)
        if per not in ("token", "sample"):
            raise ValueError(f"per is {per!r}: it must be token or sample")
        self.per = per

    @property
    def is_set(self) -> bool:
        """True: nothing has to be set."""
        return True

    @torch.no_grad()
    def ranges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return delta and zero_point of each token or sample of x, float32, broadcastable to x."""
        dims = -1 if self.per == "token" else tuple(range(1, x.ndim))
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
        return dynamic_range(low, high, 2**self.n_bits - 1, self.symmetric)

    def codes(self, x: Tensor) -> Tensor:
        return self._codes(x, *self.ranges(x))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        delta, zero_point = self.ranges(x)
        return ((self._codes(x, delta, zero_point) - zero_point) * delta).to(x.dtype)

    def _codes(self, x: Tensor, delta: Tensor, zero_point: Tensor) -> Tensor:
        exact = x.float() / delta + zero_point
        codes = ((x.float() / delta).round() + zero_point).clamp(self.low, self.high)
        # Nothing is clipped but by the rounding of the zero point: extremes have a gradient, too.
        return (codes - exact).detach() + exact if torch.is_grad_enabled() else codes


def dynamic_range(low: Tensor, high: Tensor, steps: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return delta and zero_point of ranges that hold 0 and values in [low, high]; all in float32.

    steps: 2^bits - 1, the number of steps from the lowest code to the highest. With `symmetric` the zero point is 0,
    and the largest magnitude has the code (steps - 1) / 2.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if symmetric:
        delta = (torch.maximum(-low, high) / ((steps - 1) // 2)).clamp_(min=MIN_DELTA)
        return delta, torch.zeros_like(delta)
    delta = ((high - low) / steps).clamp_(min=MIN_DELTA)
    return delta, (-low / delta).round_()


class FrozenQuantizer(Quantizer):
    """A quantizer with the final codes of one weight, packed at their bit width. It ignores its input.

    shape: that of the weight. `packed`: uint8 [shape[0], bytes], see `qdiff.bitpack`.
    """

    packed: Tensor

    def __init__(self, quantizer: Quantizer, weight: Tensor):
        """Freeze the codes that `quantizer` gives `weight` at present. Raises ValueError while it rounds softly."""
        super().__init__(quantizer.n_bits, quantizer.symmetric)
        self.enabled = quantizer.enabled
        self.shape = tuple(weight.shape)
        self.to(weight.device)
        self.set(quantizer.delta, quantizer.zero_point)
        with torch.no_grad():
            codes = quantizer.codes(weight)
        if not torch.equal(codes, codes.round()):
            raise ValueError("codes that are not whole cannot be frozen: leave soft_rounding() first")
        self.register_buffer("packed", pack(codes - self.low, self.n_bits))

    @classmethod
    def from_packed(
        cls, packed: Tensor, shape: tuple[int, ...], n_bits: int, delta: Tensor, zero_point: Tensor
    ) -> "FrozenQuantizer":
        """Build one from the tensors of a file. Raises ValueError if their sizes do not fit each other."""
        rows = (shape[0], packed_bytes(shape, n_bits))
        if packed.dtype != torch.uint8 or tuple(packed.shape) != rows:
            raise ValueError(f"codes {tuple(packed.shape)} {packed.dtype} do not hold {n_bits} bits for {shape}")
        channels = (shape[0], *[1] * (len(shape) - 1))
        if tuple(delta.shape) != channels:
            raise ValueError(f"delta has shape {tuple(delta.shape)}, a weight of {tuple(shape)} needs {channels}")
        quantizer = cls.__new__(cls)
        Quantizer.__init__(quantizer, n_bits)
        quantizer.shape = tuple(shape)
        quantizer.set(delta, zero_point)
        quantizer.register_buffer("packed", packed)
        return quantizer

    def codes(self, x: Tensor | None = None) -> Tensor:
        return unpack(self.packed, self.shape, self.n_bits).to(torch.float32).add_(self.low)

    def whole_weight(self) -> Tensor:
        """Return q - zero_point in the weight's shape: int8 if all of them fit, else float32."""
        least, most = float(self.zero_point.min()), float(self.zero_point.max())
        if self.n_bits < 8 and self.low - most >= -128 and self.high - least <= 127 and self.low == 0:
            codes = unpack(self.packed, self.shape, self.n_bits)  # 7 bits at most, in a new tensor
            return codes.view(torch.int8).sub_(self.zero_point.to(torch.int8))
        weight = self.codes() - self.zero_point
        return weight.to(torch.int8) if weight.min() >= -128 and weight.max() <= 127 else weight
