"""Run the server until Ctrl-C or SIGTERM."""

import logging
import socket
from types import FrameType

import uvicorn

from dsdiff.server.app import build_app
from dsdiff.server.options import ModelChoice, ServerOptions
from dsdiff.server.shelf import Shelf
from dsdiff.server.studio import Studio
from ldm.fileio import check_writable

logger = logging.getLogger(__name__)

PATIENCE = 5  # seconds for replies to be sent once the server is being stopped


class StoppingServer(uvicorn.Server):
    """A server that stops its studio as it stops itself: who waits for a picture gets an answer."""

    def __init__(self, config: uvicorn.Config, studio: Studio):
        super().__init__(config)
        self.studio = studio

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.studio.stop()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # streams that are cut now are no errors
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises ValueError, in a line, for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}; use another --port") from error


def address(listening: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(choice: ModelChoice, options: ServerOptions) -> None:
    """Read the first model, and answer until a signal comes, which is raised again once all is in order."""
    if options.outdir is not None:
        check_writable(options.outdir)
        options.outdir.mkdir(parents=True, exist_ok=True)
    shelf = Shelf(choice)
    with listen(options.host, options.port) as listening:  # before the model is read, which may take long
        studio = Studio(shelf, options.limits, options.outdir)
        try:
            studio.switch(studio.title).future.result()
            config = uvicorn.Config(
                build_app(studio, options),
                log_level="warning",
                timeout_graceful_shutdown=PATIENCE,
                ws="none",
                server_header=False,
            )
            server = StoppingServer(config, studio)
            what = "the page, and the API at /sdapi/v1" if options.page else "the API, at /sdapi/v1"
            logger.info("%s: %s", address(listening), what)
            server.run(sockets=[listening])
        finally:
            studio.close()
