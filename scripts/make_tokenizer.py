#!/usr/bin/env python
"""Write the tokenizer of the embedded model: a CLIP byte-pair vocabulary that knows one small language.

    python scripts/make_tokenizer.py [--outdir models/ldm/shapes/tokenizer]

The result depends on the grammar of the captions alone, not on chance.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsdiff.cli.console import ArgumentParser, command
from dsdiff.models.registry import TOKENIZER


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--outdir", type=Path, default=TOKENIZER, metavar="DIR", help="for its files (default: %(default)s)"
    )
    outdir = parser.parse_args(argv).outdir

    from dsdiff.training.vocabulary import write_tokenizer

    print(f"{outdir}: {write_tokenizer(outdir)} tokens")


if __name__ == "__main__":
    main()
