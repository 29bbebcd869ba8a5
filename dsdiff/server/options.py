"""The options of the server, as frozen values that check themselves. Nothing here imports torch or a web framework."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from dsdiff.options import DrawOptions, EmbeddingOptions, LoraOptions, ModelOptions, QuantizationOptions

LEAST_TOKEN = 8  # characters
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a single request, and of how many may wait.

    side: pixels of the longer side. steps: of sampling, as asked. batch: pictures drawn at a time. pictures: in all.
    queue: requests that wait while one is drawn; more are refused. prompt: characters. body: bytes of a request.
    init_pixels: of a picture that is sent. Raises ValueError for a limit that lets nothing through.
    """

    side: int = 1024
    steps: int = 150
    batch: int = 4
    pictures: int = 16
    queue: int = 8
    prompt: int = 10_000
    body: int = 64 * 2**20
    init_pixels: int = 64 * 2**20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "queue" else 1
            if value < least:
                raise ValueError(f"the limit {name} is {value}: it must be {least} or more")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the server listens, and whom it answers.

    host, port: the address; port 0 takes one that is free. token: what requests must bring, as a bearer token or as
    the password of any user; needed on any address but this machine's own. page: whether there is a page at /.
    outdir: a folder that gets every picture drawn, too; None keeps none. Raises ValueError for an address that others
    reach without a token, and for a token of fewer than LEAST_TOKEN characters.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    page: bool = True
    outdir: Path | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: it must be in 0..65535")
        if self.token is None and not self.is_local:
            raise ValueError(f"others can reach {self.host}: give a --token that they must know, or leave --host out")
        if self.token is not None and (len(self.token) < LEAST_TOKEN or not self.token.isascii()):
            raise ValueError(f"the token must have {LEAST_TOKEN} ASCII characters or more")

    @property
    def is_local(self) -> bool:
        """True if only this machine reaches the address."""
        if self.host in LOCAL_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # another name
            return False


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """The model that is drawn with at first, and where others are found.

    model, quantization, loras, embeddings, device: see Pipeline. precision, prompt_weights, long_prompts: of all
    pictures, see DrawOptions. model_dir: a folder of checkpoints, bundles and folders of diffusers. lora_dir: a folder
    of LoRAs, which prompts name as <lora:NAME:SCALE>.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    quantization: QuantizationOptions | None = None
    loras: tuple[LoraOptions, ...] = ()
    embeddings: tuple[EmbeddingOptions, ...] = ()
    device: str = "auto"
    precision: str | None = None
    prompt_weights: bool = DrawOptions.prompt_weights
    long_prompts: str = DrawOptions.long_prompts
    model_dir: Path | None = None
    lora_dir: Path | None = None
