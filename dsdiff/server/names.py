"""Names by which the web UI's clients know samplers and schedules of noise."""

from dsdiff.options import SAMPLERS
from dsdiff.record import USUAL_NAMES

AUTOMATIC, KARRAS = "automatic", "karras"
WITH_KARRAS = {"dpm_solver": "dpmpp_2m_karras", "dpmpp_2m_karras": "dpmpp_2m_karras"}  # sampler -> with that schedule


def find_sampler(name: str, scheduler: str | None = None) -> str:
    """Return the sampler, one of SAMPLERS, of a usual name or our own, and of a schedule of noise.

    Raises ValueError for a name, or a pair, that there is not.
    """
    known = {usual.lower(): own for own, usual in USUAL_NAMES.items()} | {own: own for own in SAMPLERS}
    own = known.get(name.lower())
    if own is None:
        raise ValueError(f"there is no sampler {name!r}: the samplers are {', '.join(USUAL_NAMES.values())}")
    if (scheduler or AUTOMATIC).lower() == AUTOMATIC:
        return own
    if scheduler is not None and scheduler.lower() == KARRAS and own in WITH_KARRAS:
        return WITH_KARRAS[own]
    raise ValueError(f"{name} has no scheduler {scheduler!r}: use {AUTOMATIC}, or {KARRAS} with DPM++ 2M")
