"""A process that draws one picture and tells how long it took: `python -m dsdiff.benchmark.pictures.child REQUEST`.

REQUEST is a PictureRequest as JSON. The last line on stdout is a PictureTold as JSON; what libraries print goes to
stderr.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from dsdiff.benchmark.options import DIFFUSERS, OPENVINO, SDCPP
from dsdiff.benchmark.pictures.request import Clock, PictureRequest
from ldm.fileio import hash_ahead


def draw(request: PictureRequest, clock: Clock) -> str:
    """Draw by an engine or a peer, whose library is imported here and nowhere else; return facts in words."""
    if request.name in OPENVINO:
        from dsdiff.benchmark.pictures import by_openvino as drawer
    elif request.name in DIFFUSERS:
        from dsdiff.benchmark.pictures import by_diffusers as drawer
    elif request.name in SDCPP:
        from dsdiff.benchmark.pictures import by_sdcpp as drawer
    else:
        hash_ahead([Path(request.ckpt)])  # as scripts/txt2img.py does
        from dsdiff.benchmark.pictures import by_us as drawer
    return drawer.draw(request, clock)


def main() -> None:
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    clock = Clock()
    facts = draw(PictureRequest.from_json(sys.argv[1]), clock)
    print(json.dumps(asdict(clock.told(facts))), file=reply, flush=True)


if __name__ == "__main__":
    main()
