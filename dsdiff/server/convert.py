"""Turn bodies of the API into requests for the studio, and its drawings into replies."""

import json
from typing import Any

from PIL import ImageOps
from pydantic import ValidationError

from dsdiff.images.init import flattened
from dsdiff.options import STOCHASTIC, DrawOptions, InitOptions
from dsdiff.record import USUAL_NAMES
from dsdiff.server.names import find_sampler
from dsdiff.server.options import Limits
from dsdiff.server.pictures import from_base64, open_picture, png_base64, record_of
from dsdiff.server.requests import Drawing, DrawRequest, any_seed, merge_of, split_loras
from dsdiff.server.schemas import Img2Img, Request, Settings
from dsdiff.server.shelf import Shelf


def one_line(error: ValidationError) -> str:
    """Return the first complaint of pydantic, with the field that it is about."""
    first = error.errors(include_url=False, include_input=False)[0]
    return complaint(first["loc"], first["msg"])


def complaint(location: tuple[int | str, ...], message: str) -> str:
    """Return a line about a field of a body."""
    where = ".".join(str(part) for part in location if part != "body")
    return f"{where}: {message}" if where else message.removeprefix("Value error, ")


def changed(settings: Settings, changes: dict[str, Any], shelf: Shelf) -> Settings:
    """Return settings with changes. Raises ValueError for names and values that there are not."""
    known = ", ".join(Settings.model_fields)
    unknown = [name for name in changes if name not in Settings.model_fields]
    if unknown:
        raise ValueError(f"there is no setting {unknown[0]!r}: the settings are {known}")
    try:
        new = Settings.model_validate(settings.model_dump() | changes)
    except ValidationError as error:
        raise ValueError(one_line(error)) from error
    return new.model_copy(update={"sd_model_checkpoint": shelf.find(new.sd_model_checkpoint).title})


def to_request(body: Request, settings: Settings, shelf: Shelf, limits: Limits) -> DrawRequest:
    """Return what a body asks for. Raises ValueError for what cannot be."""
    settings = changed(settings, body.override_settings, shelf)
    prompt, loras = split_loras(body.prompt, shelf.lora)
    sampler = find_sampler(body.sampler_name or DrawOptions.sampler, body.scheduler)
    drawn_from = _init(body, limits) if isinstance(body, Img2Img) else {}
    options = DrawOptions(
        height=body.height,
        width=body.width,
        sampler=sampler,
        steps=body.steps,
        eta=body.eta if sampler in STOCHASTIC else None,  # clients send one with every sampler
        scale=body.cfg_scale,
        negative_prompt=body.negative_prompt,
        prompt_weights=shelf.choice.prompt_weights,
        long_prompts=shelf.choice.long_prompts,
        precision=shelf.choice.precision,
        guidance_start=settings.dsdiff_guidance_start,
        guidance_stop=settings.dsdiff_guidance_stop,
        cache=settings.dsdiff_cache,
        cache_depth=settings.dsdiff_cache_depth,
        vae=settings.dsdiff_vae,
        merge=merge_of(settings.token_merging_ratio, settings.dsdiff_proportional),
        init=_init_options(body) if isinstance(body, Img2Img) else None,
    )
    return DrawRequest(
        prompt=prompt,
        seed=any_seed() if body.seed == -1 else body.seed,
        pictures=body.batch_size * body.n_iter,
        batch_size=body.batch_size,
        model=settings.sd_model_checkpoint,
        loras=loras,
        options=options,
        **drawn_from,
    )


def _init_options(body: Img2Img) -> InitOptions:
    if body.mask is not None and body.inpaint_full_res:
        raise ValueError("inpaint_full_res has no effect on this server, which draws masks at full size: send false")
    if body.mask is not None and body.inpainting_fill != 1:
        raise ValueError("inpainting_fill has no effect on this server: send 1, which starts from the picture")
    resize = "crop" if body.resize_mode == 1 else "stretch"
    return InitOptions(strength=body.denoising_strength, resize=resize, mask_blur=body.mask_blur)


def _init(body: Img2Img, limits: Limits) -> dict[str, Any]:
    data = from_base64(body.init_images[0], "init_images[0]")
    init = open_picture(data, "init_images[0]", limits.init_pixels)
    if body.mask is None:
        return {"init": init, "init_file": record_of(data)}
    mask = flattened(open_picture(from_base64(body.mask, "mask"), "mask", limits.init_pixels), "black").convert("L")
    mask = ImageOps.invert(mask) if body.inpainting_mask_invert else mask
    return {"init": init, "init_file": record_of(data), "mask": mask}


# --- replies -----------------------------------------------------------------------------------------------


def to_reply(body: Request, drawing: Drawing) -> dict[str, Any]:
    """Return the reply of /txt2img and /img2img. The pictures that clients sent are not sent back."""
    parameters = body.model_dump(exclude={"init_images", "mask"})
    return {
        "images": [png_base64(each.image, each.texts) for each in drawing.pictures if body.send_images],
        "parameters": parameters,
        "info": json.dumps(_info(drawing), ensure_ascii=False),
    }


def _info(drawing: Drawing) -> dict[str, Any]:
    request, settings = drawing.request, drawing.settings
    seeds = [picture.seed for picture in drawing.pictures]
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * len(seeds),
        "negative_prompt": settings.negative_prompt,
        "all_negative_prompts": [settings.negative_prompt] * len(seeds),
        "seed": request.seed,
        "all_seeds": seeds,
        "width": settings.width,
        "height": settings.height,
        "sampler_name": USUAL_NAMES[settings.sampler],
        "cfg_scale": settings.scale,
        "steps": settings.steps,
        "batch_size": request.batch_size,
        "denoising_strength": None if settings.init is None else settings.init.strength,
        "sd_model_name": request.model,
        "infotexts": [picture.texts["parameters"] for picture in drawing.pictures],
        "job_timestamp": drawing.finished.strftime("%Y%m%d%H%M%S"),
        "interrupted": drawing.interrupted,
        "seconds": drawing.seconds,
        "memory": drawing.memory,
    }
