"""The model that a Pipeline draws with: read at first use, quantized, with LoRAs and embeddings, its tokens merged."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

import tomesd
from dsdiff.models.bundle import load_bundle
from dsdiff.models.cuda_graph import GraphedUNet
from dsdiff.models.embeddings import Embeddings
from dsdiff.models.float_model import load_float_model
from dsdiff.models.lora import BranchSites, Loras, merge_loras
from dsdiff.models.quantized import Quantization, install, quantize
from dsdiff.models.spec import ModelSpec
from dsdiff.options import MergeOptions
from ldm.half_storage import drop_mapped, give_back_freed
from ldm.models.diffusion.ddpm import LatentDiffusion
from qdiff.engine.lower import fits_bytes
from qdiff.engine.matching import nearest

logger = logging.getLogger(__name__)


class HeldModel:
    """A LatentDiffusion with all that changes it. Its weights are read at first use.

    spec, device, tokenizer, quantization: see Pipeline. loras, embeddings: resolved for this model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        tokenizer: Path | None,
        quantization: Quantization | None,
        loras: Loras,
        embeddings: Embeddings,
    ):
        self.spec, self.device, self.tokenizer = spec, device, tokenizer
        self.quantization, self.loras, self.embeddings = quantization, loras, embeddings
        self._model: LatentDiffusion | None = None
        self._sites: BranchSites | None = None  # of the loaded model
        self._merged: MergeOptions | None = None
        self._graphed: GraphedUNet | None = None  # of the loaded model, on a GPU

    @property
    def model(self) -> LatentDiffusion:
        """The model as it is now: quantized as asked, with tokens merged as last asked."""
        return self._model if self._model is not None else self._load()

    def hold(self, model: LatentDiffusion) -> None:
        """Take this model, such as one whose networks another program computes; none is read then."""
        self._model, self._sites, self._merged, self._graphed = model, None, None, None

    def merged(self, merge: MergeOptions | None) -> LatentDiffusion:
        """Return the model with tokens merged so, None for not. The order is quantize, lower, merge."""
        model = self.model
        if merge != self._merged:
            tomesd.remove_patch(model)
            self._merged = None  # also where merging is refused below
            if merge is not None:
                # A float model compares tokens as PyPI's tomesd does.
                tomesd.apply_patch(model, **asdict(merge), nearest=nearest if self._is_lowered else None)
            self._merged = merge
        return model

    @contextmanager
    def recorded(self) -> Iterator[nn.Module]:
        """Let the model call its UNet by CUDA graphs within the block, if it computes in integers on a GPU.

        Yields what it calls: a GraphedUNet, or the UNet itself. Recordings are kept for the next block.
        """
        wrapper, unet = self.model.model, self.model.model.diffusion_model
        if self._graphed is None and self._can_be_recorded:
            self._graphed = GraphedUNet(unet)
        wrapper.diffusion_model = unet if self._graphed is None else self._graphed
        try:
            yield wrapper.diffusion_model
        finally:
            wrapper.diffusion_model = unet

    @property
    def _can_be_recorded(self) -> bool:
        """True unless weights are unpacked in each call (`--low_memory`), for which the CPU waits for the GPU."""
        quantization = self.quantization
        integers = quantization is not None and quantization.engine == "int8" and not quantization.low_memory
        return integers and self.device.type == "cuda"

    def set_loras(self, loras: Loras) -> bool:
        """Change the model by these LoRAs, in place of those of before; return True if it must be read anew for them.

        Raises ValueError or FileNotFoundError, and changes nothing, for files that do not fit.
        """
        anew = self._model is not None and self.quantization is None
        if self._model is not None and self._sites is not None:
            if anew:
                self._sites.read(replace(loras, merged=0))  # checks them
                self._model = None
            else:
                self._sites.set(self._model, self._sites.read(loras))
        self.loras = loras
        return anew

    def give_back(self) -> None:
        """Return to the system what was read of a bundle, and what is freed."""
        if self.spec.bundle:
            drop_mapped(self.spec.ckpt)
            give_back_freed()

    @property
    def _is_lowered(self) -> bool:
        """True if the UNet computes from codes of bytes, simulated ones too."""
        quantization = self.quantization
        return quantization is not None and quantization.engine is not None and fits_bytes(quantization.effective)

    def _load(self) -> LatentDiffusion:
        self._model, self._sites, self._merged, self._graphed = None, None, None, None
        if self.spec.bundle:
            assert self.quantization is not None, "a bundle is quantized"
            model, qnn = load_bundle(self.spec.ckpt, self.device)
            logger.debug("weights read")
            sites = BranchSites(model, qnn.model)
            branches = sites.read(self.loras)  # before the work, so that errors come early
            install(model, qnn, self.quantization, made=self.give_back)
            give_back_freed()
        else:
            model = load_float_model(self.spec, self.device, self.tokenizer)
            logger.debug("weights read")
            sites = BranchSites(model, model.model.diffusion_model)
            merge_loras(model, self.loras)
            branches = sites.read(self.loras)
            if self.quantization is not None:
                quantize(model, self.quantization)
        if branches:
            sites.set(model, branches)
        if self.embeddings.vectors:
            model.cond_stage_model.set_vectors(self.embeddings.vectors)
        logger.debug("model ready")
        self._model, self._sites = model, sites
        return model
