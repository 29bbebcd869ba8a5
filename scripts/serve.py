#!/usr/bin/env python
"""A page to draw on, and the web UI's API: python scripts/serve.py, then open http://127.0.0.1:7860

One model is kept and draws one request after the other; a request may ask for another model of those that come with
the project or lie in --model_dir. Clients of the web UI's API talk to it at /sdapi/v1; prompts name the LoRAs of
--lora_dir as <lora:NAME:SCALE>.

Only this machine reaches it. With another --host a --token is needed (or the environment's DSDIFF_TOKEN), which
clients send as a bearer token or as the password of any user. Ctrl-C or SIGTERM ends the picture at hand.

Needs pip install ".[web]", or pip install -r requirements-web.txt.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.cli import arguments, flags
from dsdiff.cli.console import ArgumentParser, command, logs, number
from dsdiff.server.options import Limits, ModelChoice, ServerOptions

PACKAGES = ("fastapi", "uvicorn")
TOKEN = "DSDIFF_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 is all (default: %(default)s)")
    add("--port", type=number(int, 0, 65535), default=7860, help="0 takes a free one (default: %(default)s)")
    add("--token", metavar="TEXT", help=f"what requests must bring, 8 characters or more (default: ${TOKEN})")
    add("--no_page", action="store_true", help="the API alone, which needs no gradio")
    add("--model_dir", type=Path, metavar="DIR", help="a folder of checkpoints to choose from, exported ones too")
    add("--lora_dir", type=Path, metavar="DIR", help="a folder of LoRAs for prompts to name")
    add("--outdir", type=Path, metavar="DIR", help="keep every picture there, too, with its settings")
    add("--verbose", action="store_true", help="show details, and tracebacks of errors")
    add = parser.add_argument_group("limits of a request").add_argument
    limits = Limits()
    for flag, default, what in (
        ("--max_side", limits.side, "pixels of the longer side"),
        ("--max_steps", limits.steps, "steps"),
        ("--max_batch", limits.batch, "pictures drawn at a time"),
        ("--max_pictures", limits.pictures, "pictures in all"),
    ):
        add(flag, type=number(int, 1), default=default, metavar="N", help=f"{what} (default: %(default)s)")
    add(
        "--queue",
        type=number(int, 0),
        default=limits.queue,
        metavar="N",
        help="requests that may wait while one is drawn; others are refused (default: %(default)s)",
    )
    arguments.add_model_arguments(parser, lora="a LoRA that changes the first model, in all pictures")
    arguments.add_prompt_arguments(parser)
    arguments.add_quantization_arguments(parser)


def options_of(args: argparse.Namespace) -> tuple[ModelChoice, ServerOptions]:
    """Return what the flags mean. Raises ValueError for those that cannot be."""
    from dsdiff.models.spec import find_model

    model = flags.model_options(args)
    choice = ModelChoice(
        model=model,
        quantization=flags.quantization_of(args, find_model(model)),
        loras=tuple(args.lora),
        embeddings=tuple(args.embedding),
        device=args.device,
        precision=args.precision,
        **flags.given_flags(args, ("prompt_weights", "long_prompts")),
        model_dir=args.model_dir,
        lora_dir=args.lora_dir,
    )
    limits = Limits(
        side=args.max_side, steps=args.max_steps, batch=args.max_batch, pictures=args.max_pictures, queue=args.queue
    )
    token = args.token or os.environ.get(TOKEN) or None
    server = ServerOptions(
        host=args.host, port=args.port, token=token, page=not args.no_page, outdir=args.outdir, limits=limits
    )
    return choice, server


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    packages = PACKAGES if args.no_page else (*PACKAGES, "gradio")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{", ".join(missing)} is missing: pip install ".[web]", or -r requirements-web.txt')
    choice, options = options_of(args)
    with logs(args.verbose):
        from dsdiff.server.run import serve

        serve(choice, options)


if __name__ == "__main__":
    main()
