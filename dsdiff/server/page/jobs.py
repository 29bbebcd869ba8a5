"""The page's way to the studio: jobs are put in line, followed, stopped, and their errors shown."""

from collections.abc import Iterator
from concurrent.futures import wait

import gradio as gr

from dsdiff.server.job import BusyError, Job, StoppingError
from dsdiff.server.page.figures import progress_html
from dsdiff.server.page.forms import Form
from dsdiff.server.requests import Drawing
from dsdiff.server.studio import Studio

LOOK = 0.2  # seconds between two previews
SELDOM = 1.0  # seconds between two looks at work whose time is measured
HIDDEN = "private"  # from gradio's own API: ours is /sdapi/v1


def put_in_line(studio: Studio, form: Form) -> Job:
    """Return the job of a form. Raises gr.Error, which the page shows, for what cannot be."""
    try:
        return studio.draw(form.request(studio.shelf), "page")
    except (ValueError, OSError, BusyError, StoppingError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def following(studio: Studio, job: Job, *, previews: bool = True) -> Iterator[str]:
    """Yield how far a job is, as HTML, until it is done. A visitor who leaves the page ends the job.

    previews: show its picture as it is, too, and more often.
    """
    try:
        while not job.future.done():
            yield progress_html(job, studio.colors if previews else None, studio.waiting())
            wait([job.future], timeout=LOOK if previews else SELDOM)
    finally:  # also where gradio closes this generator, since nobody listens any more
        job.interrupt()


def interrupt(job: Job | None) -> None:
    """Stop a job, if there is one."""
    if job is not None:
        job.interrupt()


def result_of(job: Job) -> Drawing:
    """Return the drawing of a job that is done. Raises gr.Error for one that failed."""
    try:
        return job.future.result()
    except Exception as error:
        known = isinstance(error, ValueError | OSError | NotImplementedError | StoppingError)
        raise gr.Error(str(error) or type(error).__name__, print_exception=not known) from error
