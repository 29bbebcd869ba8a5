#!/usr/bin/env python
"""Choose the steps that compute all of the UNet: python scripts/schedule_cache.py cache.json --whole 8 --ddim_steps 20

The other steps compute its ends alone, on deep features of the last whole step, as with txt2img.py --cache N. How long
features may be kept differs from step to step: a few pictures are drawn without it, the error that features of each
step make in each later one is measured, and dynamic programming finds the best steps: the fewest whole ones with at
most the error --error, or those of least error among --whole. Prints the best steps for each number of whole ones,
writes those chosen to FILE, and

  python scripts/txt2img.py --cache FILE --ddim_steps 20 ...

draws with them. The file is for one sampler, number of steps and interval of guidance, and is refused with others. Give
the flags of the model, of few bits and of merging that the pictures are to be drawn with.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.cli import arguments, flags
from dsdiff.cli.console import ArgumentParser, command, logger, logs, number


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the JSON file to write")
    group = parser.add_argument_group("what is asked for (one of the first two)")
    goal = group.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--error",
        type=number(float, 0),
        metavar="X",
        help="the largest squared error of guided eps that is allowed, weighted by the noise that a step removes",
    )
    goal.add_argument("--whole", type=number(int, 1), metavar="N", help="number of whole steps")
    arguments.add_cache_depth(group)
    most = "steps that features may be kept for; the time of measuring grows with it (default: %(default)s)"
    group.add_argument("--longest", type=number(int, 2), default=10, metavar="N", help=most)
    add = parser.add_argument_group("what is measured").add_argument
    add("--prompts", type=Path, metavar="FILE", help="a prompt per line (default: cali_prompts.txt beside the config)")
    add("--n", type=number(int, 1), default=8, metavar="N", help="prompts, each drawn once (default: %(default)s)")
    add("--verbose", action="store_true", help="show details, and tracebacks of errors")
    arguments.add_model_arguments(parser, lora="a LoRA that changes the model")
    arguments.add_sampler_arguments(parser, cache=False)
    arguments.add_noise_arguments(parser)
    arguments.add_size_arguments(parser)
    arguments.add_tome_arguments(parser)
    arguments.add_quantization_arguments(parser)
    return parser.parse_args(argv)


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    draw = flags.draw_options(argparse.Namespace(**{**vars(args), "cache_depth": None}))
    from dsdiff.calibration import cached_steps
    from dsdiff.models.spec import find_model
    from dsdiff.pipeline import Pipeline
    from ldm.fileio import check_writable

    spec = find_model(flags.model_options(args))
    flags.check_latent_flags(args, spec)
    quantization = flags.quantization_of(args, spec)
    pipeline = Pipeline(spec, device=args.device, tokenizer=args.tokenizer, quantization=quantization, lora=args.lora)
    search = cached_steps.Search(
        prompts=cached_steps.prompts_of(spec, args.prompts, args.n),
        seed=args.seed,
        batch_size=args.batch_size,
        depth=args.cache_depth or 1,
        longest=args.longest,
    )
    check_writable(args.file.parent)
    settings = pipeline.resolve(draw)
    if args.whole is not None and args.whole > settings.steps_taken:
        raise ValueError(f"--whole is {args.whole}: there are {settings.steps_taken} steps")
    with logs(args.verbose):
        for line in (pipeline, *pipeline.notes):
            logger.info("%s", line)
        found = cached_steps.schedules(pipeline, settings, search)
        chosen = cached_steps.pick(found, error=args.error, whole=args.whole)
        cached_steps.write(chosen, args.file)
        print(cached_steps.markdown(found, chosen))
        logger.info("written to %s", args.file)


if __name__ == "__main__":
    main()
