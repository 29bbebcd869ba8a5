"""The files that pictures are drawn from: those that are shipped, and those that are made once, in OUTDIR/pictures."""

import hashlib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dsdiff.benchmark import peers, peers_openvino
from dsdiff.benchmark.options import DIFFUSERS, FLOAT_ENGINES, OPENVINO, SDCPP, TINY, BenchmarkOptions
from dsdiff.benchmark.process import WorkerError
from dsdiff.benchmark.source import Source
from dsdiff.benchmark.startup import random_bundle
from dsdiff.models.configs import read_config
from dsdiff.models.registry import CALI_CKPTS, EMBEDDED, STABLE_DIFFUSION, TINY_DECODERS, TOKENIZER
from ldm.checkpoint import save_checkpoint
from ldm.fileio import write_atomically
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.tiny_decoder import read_tiny_decoder
from ldm.modules.diffusionmodules.tiny import TinyDecoder
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import for_inference, instantiate_from_config, load_model_from_config

logger = logging.getLogger(__name__)

TINY_RANDOM = "tiny-random.safetensors"  # a tiny decoder with random weights


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files that an engine or peer reads.

    ckpt: the weights, or a bundle. tokenizer: a folder, None beside the weights. others: the further files of
    `PictureRequest.files`. stored: all files that count as its size on the disk.
    """

    ckpt: Path
    tokenizer: Path | None
    others: Mapping[str, Path] = field(default_factory=dict)
    stored: Sequence[Path]

    @property
    def bytes(self) -> int:
        """The size of all that is stored."""
        return sum(path.stat().st_size for path in self.stored)


class Files:
    """The files of all rows of a run; `of` makes those that are not there yet.

    source: the model, with the batch of a call with guidance. Files of other sources lie in other folders.
    """

    def __init__(self, options: BenchmarkOptions, source: Source):
        self.options, self.source = options, source
        facts = f"{source.config.read_text(encoding='utf-8')} {source.ckpt}"
        self.folder = options.outdir / "pictures" / hashlib.sha256(facts.encode()).hexdigest()[:16]
        self.tokenizer = TOKENIZER if source.ckpt is None else None

    def why_not(self, name: str) -> str | None:
        """Return why an engine or a peer cannot draw this model; None if it can."""
        bits, ckpt = self.options.weight_bit, self.source.ckpt
        if name in SDCPP and self.source.config == EMBEDDED:
            return "it knows the sizes of Stable Diffusion alone"
        if name in FLOAT_ENGINES or name in (*OPENVINO, *DIFFUSERS, *SDCPP):
            return None
        if ckpt is None and bits != 4:
            return f"the bundle with random weights has 4 bits, not {bits}: leave out --weight_bit"
        if ckpt is not None and bits not in CALI_CKPTS.get(ckpt, {}):
            return "no calibration comes with this checkpoint: use --random_weights"
        return None

    def of(self, name: str, scale: float, *, tiny: bool = False) -> ModelFiles:
        """Return the files of an engine or a peer, for pictures with this scale of guidance. tiny: by a tiny decoder.

        Raises WorkerError if they cannot be made.
        """
        if name in OPENVINO:
            return self._openvino(name, scale, tiny)
        made = self._of(name)
        if not tiny:
            return made
        decoder = self._tiny()
        return replace(made, others={**made.others, TINY: decoder}, stored=[*made.stored, decoder])

    def _of(self, name: str) -> ModelFiles:
        if name in DIFFUSERS:
            folder = self._made("diffusers", self.folder / "diffusers")
            stored = sorted(folder.rglob("*.safetensors"))
            return ModelFiles(ckpt=self._checkpoint(), tokenizer=None, others={"folder": folder}, stored=stored)
        if name in SDCPP:
            file = self._made(name, self.folder / f"{name}.gguf")
            return ModelFiles(ckpt=self._checkpoint(), tokenizer=None, others={"model": file}, stored=[file])
        if name in FLOAT_ENGINES:
            ckpt = self._checkpoint()
            return ModelFiles(ckpt=ckpt, tokenizer=self.tokenizer, stored=[ckpt])
        if self.source.ckpt is None:
            bundle = random_bundle(self.options.outdir)
            return ModelFiles(ckpt=bundle, tokenizer=None, stored=[bundle])
        calibrated = CALI_CKPTS[self.source.ckpt][self.options.weight_bit]
        stored = [self.source.ckpt, calibrated]
        return ModelFiles(ckpt=stored[0], tokenizer=None, others={"cali_ckpt": calibrated}, stored=stored)

    def _openvino(self, name: str, scale: float, tiny: bool) -> ModelFiles:
        batch = 1 if scale == 1 else 2
        source = Source.read(self.source.config, self.source.ckpt is None, self.source.device, batch=batch)
        reasons = peers.convert([name], source, self.options.outdir)
        if reasons:
            raise WorkerError(reasons[name])
        names = {"text": "text", "decoder": TINY if tiny else "decoder"}
        parts = {part: self._made(kind, self.folder / f"{kind}.xml") for part, kind in names.items()}
        others = {"unet": peers_openvino.file_of(name, source, self.options.outdir), **parts}
        stored = [file for xml in others.values() for file in (xml, xml.with_suffix(".bin"))]
        return ModelFiles(ckpt=self._checkpoint(), tokenizer=self.tokenizer, others=others, stored=stored)

    def _tiny(self) -> Path:
        """Return the file of the tiny decoder: the model's own, or one with random weights."""
        own = TINY_DECODERS.get(self.source.config)
        if self.source.ckpt is not None and own is not None and own.is_file():
            return own
        return self._made(TINY_RANDOM, self.folder / TINY_RANDOM)

    def _checkpoint(self) -> Path:
        """Return the checkpoint of the float model."""
        return self.source.ckpt or self._made("checkpoint", self.folder / "sd-v1-float16.safetensors")

    def _made(self, kind: str, path: Path) -> Path:
        """Return a file or folder, made by a worker where it is not there yet."""
        if not path.exists():
            logger.info("making %s", path)
            weights = self._tiny if kind == TINY else self._checkpoint
            ckpt = "" if kind in ("checkpoint", TINY_RANDOM) else str(weights())
            path.parent.mkdir(parents=True, exist_ok=True)
            with peers.start(self.source, weight_bit=8, outdir=self.options.outdir) as process:
                process.ask("make", kind=kind, ckpt=ckpt, path=str(path))
        return path


# --- making them, in a worker ------------------------------------------------------------------------------


def make(kind: str, source: Source, ckpt: Path, path: Path) -> None:
    """Make a file or a folder of these kinds: checkpoint, text, decoder, diffusers, tiny (a decoder of OpenVINO, of the
    file `ckpt`), TINY_RANDOM, or the name of a peer of SDCPP."""
    if kind == "checkpoint":
        make_checkpoint(path)
    elif kind == "diffusers":
        from dsdiff.benchmark.pictures import by_diffusers

        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            whole = Path(temporary) / "folder"
            by_diffusers.make_folder(source, TOKENIZER, whole)
            whole.replace(path)
    elif kind == TINY_RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weights = TinyDecoder(source.params["channels"]).half().state_dict()
        layers = {name.replace("layers.", "decoder.layers.", 1): value for name, value in weights.items()}
        write_atomically(path, lambda temporary: save_file(layers, temporary))
    elif kind == TINY:
        latents = torch.randn(1, source.params["channels"], *source.latents)
        peers_openvino.save(peers_openvino.converted(read_tiny_decoder(ckpt), [latents]), path, half=True)
    elif kind in SDCPP:
        from dsdiff.benchmark.pictures import by_sdcpp

        by_sdcpp.make_file(kind, ckpt, path)
    else:
        model = load_model_from_config(read_config(source.config), ckpt, tokenizer=TOKENIZER)
        network, inputs = _part(kind, model, source)
        # Tracing would take what the tower asks of its input's length for a tensor.
        network = torch.export.export(network, tuple(inputs)) if kind == "text" else network
        peers_openvino.save(peers_openvino.converted(network, inputs), path, half=True)


def make_checkpoint(path: Path) -> None:
    """Write a checkpoint of Stable Diffusion v1's shapes with random weights, float16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = instantiate_from_config(for_inference(read_config(STABLE_DIFFUSION)["model"])).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(std=0.02)
    save_checkpoint(network, path)


class _Decoding(nn.Module):
    """The half of an autoencoder that decodes, as a network of its own."""

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)


def _part(kind: str, model: nn.Module, source: Source) -> tuple[nn.Module, list[Tensor]]:
    """Return the text encoder's tower or the decoder of a model, and inputs of it."""
    if kind == "text":
        encoder = model.cond_stage_model
        assert isinstance(encoder, FrozenCLIPEmbedder)
        return encoder.transformer, [encoder.tokenize([""])]
    latents = torch.randn(1, source.params["channels"], *source.latents)
    autoencoder = model.first_stage_model
    assert isinstance(autoencoder, AutoencoderKL)
    return _Decoding(autoencoder), [latents]
