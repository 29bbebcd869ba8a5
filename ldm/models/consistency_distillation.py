"""Latent consistency distillation of a LoRA (Luo et al., arXiv:2310.04378 and arXiv:2311.05556)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.func import functional_call

from ldm.lora import layer_shapes, merge_lora, read_lora
from ldm.lora_names import UNET
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.guidance import guide
from ldm.models.diffusion.lcm import TEACHER_STEPS, boundary_scalings
from ldm.modules.ema import LitEma
from ldm.modules.low_rank import LowRank
from ldm.util import load_model_from_config

WRAPPED = UNET.removeprefix("model.")  # the UNet within LatentDiffusion.model


class LowRankFactors(nn.Module):
    """The factors of a change to one layer, to be trained; the change is zero at first.

    down: [rank, inputs, *kernel]. up: [outputs, rank]. The rank is smaller where the weight's own is.
    """

    def __init__(self, shape: Sequence[int], rank: int) -> None:
        super().__init__()
        outputs, *inputs = shape
        rank = min(rank, outputs, torch.Size(inputs).numel())
        self.down = nn.Parameter(torch.empty(rank, *inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)  # as a layer with these inputs begins

    def low_rank(self) -> LowRank:
        """Return the change, with alpha equal to the rank."""
        return LowRank(down=self.down, up=self.up, strength=1.0)

    @torch.no_grad()
    def begin_from(self, change: LowRank) -> None:
        """Take the factors of a change. Raises ValueError for one of another rank."""
        if len(change.down) != len(self.down):
            raise ValueError(f"rank {len(change.down)} in place of {len(self.down)}")
        self.down.copy_(change.down)
        self.up.copy_(change.up * change.strength)


class ConsistencyDistillation(nn.Module):
    """A LoRA of a LatentDiffusion, which learns to go from any noise to the teacher's end in one step.

    The student's consistency function is f(x, t) = c_skip(t) x + c_out(t) x_0(x, t), as in `LCMSampler`. It is to be
    the same at both ends of a step that the teacher takes, with guidance and by DDIM, from t down to t - k.

    teacher: the config file of the LatentDiffusion. ckpt: its weights, which are not part of the state_dict.
    rank: of the changes to each linear layer and convolution of the UNet.
    lora: a file whose changes are the first ones, of this rank; None begins without any.
    guidance: lowest and highest scale of the teacher's guidance, between which that of each picture is drawn.
    skip: k, in steps of LCM's 50. huber: c of the pseudo-Huber distance sqrt(d² + c²) - c.
    low_snr: the loss at t has the weight min(1, sqrt(SNR_t / low_snr)); 0 weights all alike. Errors of x_0 at large t
        are divided by a small sqrt(alpha_bar), and mostly covered by the noise of the next step.
    average_decay: of the running average of the factors, which is exported. average_target: the far end of the step
        is seen by the average in place of the student itself.
    scheduler_config: how training changes the learning rate; kept as an attribute.
    Raises ValueError for values out of range, for a teacher that predicts v, and for a `lora` that does not fit.
    """

    times: Tensor
    alpha_bar: Tensor
    scalings: Tensor
    weights: Tensor

    def __init__(
        self,
        teacher: str,
        ckpt: str,
        rank: int = 16,
        lora: str | None = None,
        guidance: Sequence[float] = (4.0, 4.0),
        skip: int = 1,
        huber: float = 1e-3,
        low_snr: float = 0.0,
        average_decay: float = 0.99,
        average_target: bool = False,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check(rank, guidance, skip, huber, low_snr)
        self.guidance, self.skip, self.huber = tuple(guidance), skip, huber
        self.average_target, self.scheduler_config = average_target, scheduler_config
        model = cast(LatentDiffusion, load_model_from_config(OmegaConf.load(teacher).model, ckpt))
        if model.parameterization != "eps":
            raise ValueError(f"{teacher!r} predicts {model.parameterization}: only a teacher that predicts eps works")
        self._teacher = (model.requires_grad_(False),)  # in a tuple: not a submodule
        shapes = layer_shapes(self.teacher.model.diffusion_model, self.teacher.cond_stage_model)
        self.layers = [name for name in shapes if name.startswith(UNET)]
        self.factors = nn.ModuleDict({_key(name): LowRankFactors(shapes[name], rank) for name in self.layers})
        if lora is not None:
            self._begin_from(lora, shapes)
        self.average = LitEma(self.factors, decay=average_decay)
        self._register_schedule(low_snr)

    def _begin_from(self, lora: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take the factors of a file. Raises ValueError, and FileNotFoundError, as `read_lora` does."""
        for name, change in read_lora(lora, shapes).items():
            if name not in self.layers:
                raise ValueError(f"LoRA {lora!r} changes {name}, which is not trained: only layers of the UNet are")
            factors = cast(LowRankFactors, self.factors[_key(name)])
            try:
                factors.begin_from(change)
            except ValueError as error:
                raise ValueError(f"LoRA {lora!r} cannot be trained on: {name} has {error}") from error

    def _register_schedule(self, low_snr: float) -> None:
        """Compute what depends on the place in the teacher's schedule: 0 is the picture, 50 the noise."""
        N = self.teacher.num_timesteps
        times = [0, *(N // TEACHER_STEPS * (i + 1) - 1 for i in range(TEACHER_STEPS))]
        alpha_bar = self.teacher.alphas_cumprod[times]
        alpha_bar[0] = 1.0  # the step that ends in the picture leaves no noise
        snr = alpha_bar / (1 - alpha_bar)
        weights = (snr / low_snr).sqrt().clamp(max=1) if low_snr else torch.ones_like(snr)
        self.register_buffer("times", torch.tensor(times), persistent=False)
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        self.register_buffer("scalings", torch.tensor([boundary_scalings(t) for t in times]), persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    @property
    def teacher(self) -> LatentDiffusion:
        """The model whose steps are learnt, on the device of the factors since `forward` moved it there."""
        return self._teacher[0]

    # --- the changes ---------------------------------------------------------------------------------------

    def changes(self) -> dict[str, LowRank]:
        """Return the factors as they are, by our names of the layers."""
        factors = {name: self.factors[_key(name)] for name in self.layers}
        return {name: own.low_rank() for name, own in factors.items() if isinstance(own, LowRankFactors)}

    def changed_weights(self) -> dict[str, Tensor]:
        """Return the UNet's weights with the changes, float32, by the names in `teacher.model`."""
        with torch.autocast(self.times.device.type, enabled=False):
            deltas = {name: change.delta() for name, change in self.changes().items()}
        names = {name: name.replace(UNET, WRAPPED, 1) + ".weight" for name in deltas}
        return {names[name]: self.teacher.model.get_parameter(names[name]) + delta for name, delta in deltas.items()}

    @contextmanager
    def applied(self) -> Iterator[LatentDiffusion]:
        """Give the teacher the averaged changes within the block, and its own weights back afterwards."""
        kept = {name: self.teacher.get_submodule(name).weight for name in self.layers}
        kept = {name: weight.detach().clone() for name, weight in kept.items() if isinstance(weight, Tensor)}
        try:
            with self.average.average_parameters(self.factors):
                merge_lora(self.teacher, self.changes(), 1.0)
            yield self.teacher
        finally:
            for name, weight in kept.items():
                self.teacher.get_submodule(name).weight.data = weight

    # --- the objective -------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a batch, a scalar, for steps, noise and guidance drawn at random."""
        teacher = self.teacher.to(self.times.device)
        latents = teacher.get_input(batch)
        captions = list(batch[teacher.cond_stage_key])
        with torch.no_grad():
            context = teacher.get_learned_conditioning(captions)
            empty = teacher.get_learned_conditioning([""]).expand_as(context)
        place = torch.randint(1, len(self.times), (len(latents),), device=latents.device)
        low, high = self.guidance
        guidance = low + (high - low) * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        return self.losses(latents, context, empty, place, torch.randn_like(latents), guidance).mean()

    def losses(
        self, latents: Tensor, context: Tensor, empty: Tensor, place: Tensor, noise: Tensor, guidance: Tensor
    ) -> Tensor:
        """Return the weighted distance [B] between the two ends of the teacher's steps (LCM, eq. 14 and 17).

        latents, noise: [B, C, h, w]. context, empty: [B, M, D], of the captions and of "". place: of the steps' noisy
        ends in `times`, [B], 1 or more. guidance: [B, 1, 1, 1].
        """
        further = (place - self.skip).clamp(min=0)
        x = self.teacher.q_sample(latents, self.times[place], noise)
        weights = self.changed_weights()
        predicted = self._consistent(weights, x, place, context)
        with torch.no_grad():
            x_further = self._solve(x, place, further, torch.cat((empty, context)), guidance)
            if self.average_target:
                with self.average.average_parameters(self.factors):
                    weights = self.changed_weights()
            target = self._consistent(weights, x_further, further, context)
        distance = ((predicted - target) ** 2 + self.huber**2).sqrt() - self.huber
        return distance.mean(dim=(1, 2, 3)) * self.weights[place]

    def _consistent(self, weights: Mapping[str, Tensor], x: Tensor, place: Tensor, context: Tensor) -> Tensor:
        """Return the consistency function f(x, t) of a UNet with these weights."""
        t = self.times[place]
        model = self.teacher.model
        eps = functional_call(model, dict(weights), (x, t), {"c_crossattn": [context]}).float()
        c_skip, c_out = self.scalings[place].view(-1, 2, 1, 1, 1).unbind(1)
        return c_skip * x + c_out * self.teacher.predict_start_from_noise(x, t, eps)

    def _solve(self, x: Tensor, place: Tensor, further: Tensor, contexts: Tensor, guidance: Tensor) -> Tensor:
        """Return x after one guided DDIM step of the teacher. contexts: of "", then of the captions."""
        t = self.times[place]
        eps = guide(self.teacher.apply_model(torch.cat((x, x)), torch.cat((t, t)), contexts).float(), guidance)
        pred_x0 = self.teacher.predict_start_from_noise(x, t, eps)
        alpha_bar = self.alpha_bar[further].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * pred_x0 + (1 - alpha_bar).sqrt() * eps


def _key(layer: str) -> str:
    """Return the name of a layer's factors, which may have no dots."""
    return layer.removeprefix(UNET).replace(".", "_")


def _check(rank: int, guidance: Sequence[float], skip: int, huber: float, low_snr: float) -> None:
    """Raise ValueError for settings that cannot be."""
    if rank < 1:
        raise ValueError(f"rank is {rank}: it must be 1 or more")
    if len(guidance) != 2 or not 1 <= guidance[0] <= guidance[1]:
        raise ValueError(f"guidance is {list(guidance)}: it must be a lowest and a highest scale, 1 or more")
    if not 1 <= skip <= TEACHER_STEPS:
        raise ValueError(f"skip is {skip}: it must be in 1..{TEACHER_STEPS}")
    if huber < 0 or low_snr < 0:
        raise ValueError(f"huber is {huber} and low_snr {low_snr}: they must be 0 or more")
