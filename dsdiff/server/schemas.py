"""The bodies of requests as the web UI's clients send them, checked by pydantic."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dsdiff.options import VAES

# Fields that clients send with every request, and that change no picture here: whatever they hold is accepted. Those of
# a second pass, of scripts, of variations and of refiners count only beside fields that are refused.
WITHOUT_EFFECT = {
    *("do_not_save_samples", "do_not_save_grid", "sampler_index", "comments", "force_task_id", "script_args"),
    *("override_settings_restore_afterwards", "firstphase_width", "firstphase_height", "s_tmin", "s_tmax", "subseed"),
    *("hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "hr_checkpoint_name"),
    *("hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt", "hr_cfg", "hr_additional_modules"),
    *("refiner_switch_at", "image_cfg_scale", "distilled_cfg_scale", "inpaint_full_res_padding"),
}
NOTHING = (None, False, 0, -1, "", [], {}, "None")


class Request(BaseModel):
    """Common fields of requests for pictures. None stands for the model's default.

    Fields that this server knows nothing of are refused, unless they hold nothing or are WITHOUT_EFFECT.
    """

    model_config = ConfigDict(extra="allow")

    prompt: str = ""
    negative_prompt: str = ""
    seed: Annotated[int, Field(ge=-1)] = -1
    sampler_name: str | None = None
    scheduler: str | None = None
    batch_size: Annotated[int, Field(ge=1)] = 1
    n_iter: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] | None = None
    cfg_scale: Annotated[float, Field(ge=0)] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    height: Annotated[int, Field(ge=1)] | None = None
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    s_noise: Literal[1] | None = None
    send_images: bool = True
    override_settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _refuse_the_unknown(self) -> "Request":
        for name, value in (self.model_extra or {}).items():
            if name not in WITHOUT_EFFECT and value not in NOTHING:
                raise ValueError(f"{name} has no effect on this server: leave it out")
        return self


class Txt2Img(Request):
    """A request for pictures of a prompt."""

    denoising_strength: float | None = None  # of a second pass, which there is not


class Img2Img(Request):
    """A request for pictures of a prompt, drawn from others. Pictures and mask are base64, with or without a data URL.

    resize_mode: 0 stretches, 1 crops. With a mask, inpainting_fill must be 1, which starts from the picture, and
    inpaint_full_res, which would draw the masked part enlarged, false.
    """

    init_images: Annotated[list[str], Field(min_length=1, max_length=1)]
    mask: str | None = None
    denoising_strength: Annotated[float, Field(gt=0, le=1)] = 0.75
    resize_mode: Literal[0, 1] = 0
    mask_blur: Annotated[float, Field(ge=0)] = 4
    inpainting_fill: int = 1
    inpaint_full_res: bool = False
    inpainting_mask_invert: Literal[0, 1] = 0
    initial_noise_multiplier: Literal[1] | None = None


class Settings(BaseModel):
    """The settings of the server that clients may change, for all requests or for one of them.

    sd_model_checkpoint: the title of a model. token_merging_ratio: the part of the tokens that is merged, 0 for none.
    dsdiff_proportional: let merged keys count as often as tokens were merged into them, see MergeOptions.
    dsdiff_cache, dsdiff_cache_depth, dsdiff_vae, dsdiff_guidance_start, dsdiff_guidance_stop: see DrawOptions.
    """

    model_config = ConfigDict(extra="forbid")

    sd_model_checkpoint: str
    token_merging_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dsdiff_proportional: bool = False
    dsdiff_cache: Annotated[int, Field(ge=1)] = 1
    dsdiff_cache_depth: Annotated[int, Field(ge=1)] = 1
    dsdiff_vae: Literal[VAES] | None = None  # pyright: ignore[reportInvalidTypeForm]
    dsdiff_guidance_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    dsdiff_guidance_stop: Annotated[float, Field(ge=0, le=1)] = 1.0
    samples_format: Literal["png"] = "png"
    CLIP_stop_at_last_layers: Literal[1] = 1


class PngInfo(BaseModel):
    """A picture, base64, whose text chunks are asked for."""

    image: str
