"""The routes of the web UI's API that its clients use. Errors are JSON, each with a line that tells what to do."""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil
import torch
from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dsdiff.errors import is_out_of_memory
from dsdiff.record import USUAL_NAMES
from dsdiff.server import schemas
from dsdiff.server.convert import changed, complaint, to_reply, to_request
from dsdiff.server.job import BusyError, Job, StoppingError
from dsdiff.server.names import AUTOMATIC, KARRAS
from dsdiff.server.pictures import from_base64, open_picture, preview_base64
from dsdiff.server.studio import Studio

logger = logging.getLogger(__name__)

LOOK = 0.5  # seconds between two looks whether a client that waits is still there
# Lists that clients ask for, and of which this server has nothing.
EMPTY_LISTS = ("sd-vae", "upscalers", "latent-upscale-modes", "hypernetworks", "face-restorers", "realesrgan-models")
EMPTY_LISTS += ("prompt-styles", "extensions", "script-info")
CLIENT_IS_GONE = 499  # as nginx calls it; nobody reads it
IDLE = Job("", lambda job: None, walks=0)  # in the place of a job at hand where there is none


class Api:
    """The routes, over a studio. settings: what requests that name none are drawn with."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.settings = schemas.Settings(sd_model_checkpoint=studio.title)
        self.router = APIRouter(prefix="/sdapi/v1")
        routes = {
            ("POST", "/txt2img"): self.txt2img,
            ("POST", "/img2img"): self.img2img,
            ("GET", "/progress"): self.progress,
            ("POST", "/interrupt"): self.interrupt,
            ("POST", "/skip"): self.interrupt,
            ("GET", "/options"): self.get_options,
            ("POST", "/options"): self.set_options,
            ("GET", "/sd-models"): self.sd_models,
            ("POST", "/refresh-checkpoints"): self.refresh,
            ("POST", "/refresh-loras"): self.refresh,
            ("GET", "/samplers"): self.samplers,
            ("GET", "/schedulers"): self.schedulers,
            ("GET", "/loras"): self.loras,
            ("GET", "/embeddings"): self.embeddings,
            ("GET", "/scripts"): self.scripts,
            ("GET", "/memory"): self.memory,
            ("GET", "/cmd-flags"): self.cmd_flags,
            ("POST", "/png-info"): self.png_info,
        }
        for (method, path), route in routes.items():
            self.router.add_api_route(path, route, methods=[method])
        for name in EMPTY_LISTS:
            self.router.add_api_route(f"/{name}", self.empty_list, methods=["GET"], name=name)
        # Last, so that what no route above takes is refused here, and not by the page below.
        self.router.add_api_route("/{path:path}", self.unknown, methods=["GET", "POST"], include_in_schema=False)

    def unknown(self, path: str, request: Request) -> None:
        """Refuse a route that this server does not have, or not by this method."""
        known = any(getattr(route, "path", None) == f"{self.router.prefix}/{path}" for route in self.router.routes)
        reason = f"is not for {request.method}" if known else "is no route of this server, see docs/server.md"
        raise HTTPException(405 if known else 404, f"{self.router.prefix}/{path} {reason}")

    # --- pictures -----------------------------------------------------------------------------------------

    async def txt2img(self, body: schemas.Txt2Img, request: Request) -> dict[str, Any]:
        """Draw pictures of a prompt."""
        return await self._draw(body, request, "txt2img")

    async def img2img(self, body: schemas.Img2Img, request: Request) -> dict[str, Any]:
        """Draw pictures from a picture and a prompt."""
        return await self._draw(body, request, "img2img")

    async def _draw(self, body: schemas.Request, request: Request, kind: str) -> dict[str, Any]:
        studio = self.studio
        wanted = await run_in_threadpool(to_request, body, self.settings, studio.shelf, studio.limits)
        drawing = await _finished(studio.draw(wanted, kind), request)
        return await run_in_threadpool(to_reply, body, drawing)

    def progress(self, skip_current_image: bool = Query(default=False)) -> dict[str, Any]:
        """Tell how far the job at hand is, with a preview."""
        job, colors = self.studio.job or IDLE, self.studio.colors
        latents = job.latents
        preview = None if skip_current_image or latents is None or colors is None else colors.picture(latents)
        return {
            "progress": job.progress,
            "eta_relative": job.seconds_left,
            "state": _state(job),
            "current_image": None if preview is None else preview_base64(preview),
            "textinfo": None,
            "waiting": self.studio.waiting(),
        }

    def interrupt(self) -> dict[str, Any]:
        """Stop the job at hand after its step."""
        self.studio.interrupt()
        return {}

    # --- settings -----------------------------------------------------------------------------------------

    def get_options(self) -> schemas.Settings:
        """Return the settings."""
        return self.settings

    async def set_options(self, changes: dict[str, Any], request: Request) -> dict[str, Any]:
        """Change settings; another model is read at once."""
        new = changed(self.settings, changes, self.studio.shelf)
        if new.sd_model_checkpoint != self.settings.sd_model_checkpoint:
            await _finished(self.studio.switch(new.sd_model_checkpoint), request)
        self.settings = changed(self.settings, changes, self.studio.shelf)  # others may have changed them meanwhile
        return {}

    # --- what there is ------------------------------------------------------------------------------------

    def sd_models(self) -> list[dict[str, Any]]:
        """List the models. Where their files lie is not told."""
        entries = self.studio.shelf.entries.values()
        return [
            {
                "title": entry.title,
                "model_name": entry.title,
                "hash": None,
                "sha256": None,
                "filename": entry.spec.ckpt.name,
                "config": entry.spec.config_path.name,
            }
            for entry in entries
        ]

    def refresh(self) -> dict[str, Any]:
        """Look for models and LoRAs again."""
        self.studio.shelf.refresh()
        return {}

    def samplers(self) -> list[dict[str, Any]]:
        """List the samplers."""
        return [{"name": usual, "aliases": [own], "options": {}} for own, usual in USUAL_NAMES.items()]

    def schedulers(self) -> list[dict[str, Any]]:
        """List the schedules of noise."""
        rest = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return [{"name": name, "label": name.capitalize(), **rest} for name in (AUTOMATIC, KARRAS)]

    def loras(self) -> list[dict[str, Any]]:
        """List the LoRAs that prompts may name."""
        loras = self.studio.shelf.loras.items()
        return [{"name": name, "alias": name, "path": path.name, "metadata": {}} for name, path in loras]

    def embeddings(self) -> dict[str, Any]:
        """List the embeddings that prompts may name."""
        options = self.studio.shelf.choice.embeddings
        return {"loaded": {each.name or each.path.stem: {} for each in options}, "skipped": {}}

    def scripts(self) -> dict[str, Any]:
        """List the scripts, of which there are none."""
        return {"txt2img": [], "img2img": []}

    def empty_list(self) -> list[str]:
        """List what this server has none of."""
        return []

    def memory(self) -> dict[str, Any]:
        """Tell the memory of this process and its machine, in bytes."""
        used, machine = psutil.Process().memory_info().rss, psutil.virtual_memory()
        ram = {"free": machine.available, "used": used, "total": machine.total}
        if not torch.cuda.is_available():
            return {"ram": ram, "cuda": {}}
        free, total = torch.cuda.mem_get_info()
        return {"ram": ram, "cuda": {"system": {"free": free, "used": total - free, "total": total}}}

    def cmd_flags(self) -> dict[str, Any]:
        """Tell the flags that clients may know, of which there are none."""
        return {}

    def png_info(self, body: schemas.PngInfo) -> dict[str, Any]:
        """Return the text chunks of a PNG; `info` is that of the web UI."""
        data = from_base64(body.image, "image")
        picture = open_picture(data, "image", self.studio.limits.init_pixels)
        items = {name: text for name, text in picture.info.items() if isinstance(text, str)}
        return {"info": items.get("parameters", ""), "items": items, "parameters": {}}


def _state(job: Job) -> dict[str, Any]:
    return {
        "skipped": False,
        "interrupted": job.interrupted.is_set(),
        "stopping_generation": False,
        "job": job.kind,
        "job_count": job.walks,
        "job_no": job.walk,
        "job_timestamp": f"{job.started or 0:.0f}",
        "sampling_step": job.step,
        "sampling_steps": job.steps,
    }


async def _finished(job: Job, request: Request) -> Any:
    """Return the result of a job. A client that goes away ends its job."""
    future = asyncio.wrap_future(job.future)
    try:
        while not (await asyncio.wait([future], timeout=LOOK))[0]:
            if await request.is_disconnected():
                job.interrupt()
                with suppress(Exception):
                    await future
                raise HTTPException(CLIENT_IS_GONE, "the client has gone")
        return future.result()
    except asyncio.CancelledError:
        job.interrupt()
        raise


# --- errors ------------------------------------------------------------------------------------------------


def add_errors(app: FastAPI) -> None:
    """Make errors of the API JSON with a line: {"error": the kind, "detail": the line, "errors": the same}."""

    def reply(kind: str, line: str, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
        line = " ".join(line.split())
        return JSONResponse({"error": kind, "detail": line, "errors": line}, status, headers)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return reply("invalid", f"the body is no JSON: {first['ctx']['error']} at {first['loc'][-1]}", 422)
        return reply("invalid", complaint(first["loc"], first["msg"]), 422)

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        return reply("http", str(error.detail), error.status_code, error.headers)

    @app.exception_handler(BusyError)
    @app.exception_handler(StoppingError)
    def busy(request: Request, error: Exception) -> JSONResponse:
        return reply("busy", str(error), 503, {"Retry-After": "10"})

    @app.exception_handler(ValueError)
    @app.exception_handler(OSError)
    @app.exception_handler(NotImplementedError)
    def impossible(request: Request, error: Exception) -> JSONResponse:
        logger.debug("%s is refused", request.url.path, exc_info=error)
        return reply("invalid", str(error) or type(error).__name__, 422)

    @app.exception_handler(MemoryError)
    @app.exception_handler(RuntimeError)
    def no_memory(request: Request, error: Exception) -> JSONResponse:
        if not is_out_of_memory(error):
            raise error  # to `defect`
        return reply("memory", "out of memory: ask for smaller or fewer pictures", 507)

    @app.exception_handler(Exception)
    def defect(request: Request, error: Exception) -> JSONResponse:
        return reply("internal", f"{type(error).__name__}: the server's log tells more", 500)
