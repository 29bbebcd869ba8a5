"""A server of the embedded model in a thread, as a client sees it."""

import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"


@pytest.fixture(scope="session")
def serving():
    """serving(studio, options): a block within which a server runs in a thread; it gives the port."""
    return _serving


@contextmanager
def _serving(studio, options):
    import uvicorn

    from dsdiff.server.app import build_app
    from dsdiff.server.run import listen

    with listen(options.host, 0) as listening:
        config = uvicorn.Config(build_app(studio, options), log_level="warning", ws="none", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="package")
def studio(tmp_path_factory):
    """The studio of the embedded model, with narrow limits, two LoRAs, and a folder that keeps what is drawn.

    own.safetensors fits the model, other.safetensors does not.
    """
    pytest.importorskip("fastapi")
    from dsdiff.models.registry import EMBEDDED
    from dsdiff.options import ModelOptions
    from dsdiff.server.options import Limits, ModelChoice
    from dsdiff.server.shelf import Shelf
    from dsdiff.server.studio import Studio

    loras = tmp_path_factory.mktemp("loras")
    torch.manual_seed(0)
    layer, (rows, columns) = "lora_te_text_model_encoder_layers_0_mlp_fc1", (512, 128)
    own = {f"{layer}.lora_down.weight": torch.randn(2, columns), f"{layer}.lora_up.weight": torch.randn(rows, 2)}
    save_file(own, loras / "own.safetensors")
    shutil.copy(GOLDENS / "lora.safetensors", loras / "other.safetensors")
    choice = ModelChoice(model=ModelOptions(config=EMBEDDED), device="cpu", lora_dir=loras)
    limits = Limits(side=256, steps=60, batch=2, pictures=3, queue=1)
    studio = Studio(Shelf(choice), limits, tmp_path_factory.mktemp("pictures"))
    yield studio
    studio.close()
