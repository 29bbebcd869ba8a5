"""The record of a run: all that its pictures depend on, in settings.yaml beside them and in each PNG."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dsdiff.draw_settings import DrawSettings
from dsdiff.images.init import FileRecord
from dsdiff.models.spec import ModelSpec
from dsdiff.options import MergeOptions
from dsdiff.prompt_rows import Row
from ldm.modules.encoders.prompt_syntax import MARKS
from qdiff.resume import flat

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.yaml"
# Entries that do not shape a picture: a resumed run may have others.
INCIDENTAL = ("model", "config", "ckpt", "tokenizer", "skip_grid", "n_rows", "first", "first_grid", "versions")
# Entries that older versions did not write, and what they did.
BEFORE = {
    "vae": "float32",
    "vae_tiling": False,
    "lora": [],
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "cache": 1,
    "cache_depth": 1,
    "tiny_decoder": None,
    "prompt_weights": False,
    "long_prompts": "cut",
    "embeddings": [],
    "init": None,
    "rows": [],
    "inits": [],
    "mask": None,
}
# Entries that say nothing of a single picture.
OF_THE_RUN = ("prompts", "rows", "inits", "first", "first_grid", "skip_grid", "n_rows")
# Names by which other tools know the samplers.
USUAL_NAMES = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "dpm_solver": "DPM++ 2M",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
    "lcm": "LCM",
    "tcd": "TCD",
}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of a run of scripts/txt2img.py or scripts/img2img.py.

    prompts: the prompts, used in turn.
    rows, row_draws: of a file in JSON lines, the row of each prompt, and how its pictures are drawn; else none.
    inits, mask: the files of the pictures to draw from, used in turn, and of the mask; for pictures from noise, none.
    pictures: the number of pictures in the run.
    n_iter, n_samples: the number of rounds, and of pictures per batch.
    seed: the seed of the first picture; picture i has seed + i, unless its row has one of its own.
    fixed_code: give all pictures the noise of `seed`.
    draw: how the pictures are drawn.
    spec, device, tokenizer: the model, the device's type, and the tokenizer's folder if one was given.
    skip_grid, n_rows: whether grids are left out, and the pictures per row of a grid.
    first, first_grid: the numbers of the first picture and of the first grid.
    versions: the versions of the packages on which pictures depend.
    """

    prompts: tuple[str, ...]
    pictures: int
    n_iter: int
    n_samples: int
    seed: int
    fixed_code: bool
    draw: DrawSettings
    spec: ModelSpec
    device: str
    tokenizer: str | None
    skip_grid: bool
    n_rows: int
    first: int
    first_grid: int
    versions: Mapping[str, str]
    rows: tuple[Row, ...] = ()
    row_draws: tuple[DrawSettings, ...] = ()
    inits: tuple[FileRecord, ...] = ()
    mask: FileRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values, for yaml and json."""
        return {
            "prompts": list(self.prompts),
            "pictures": self.pictures,
            "n_iter": self.n_iter,
            "n_samples": self.n_samples,
            "seed": self.seed,
            "fixed_code": self.fixed_code,
            **asdict(self.draw),  # the values of `merge` and `quantization` are plain as well
            "lora": [asdict(record) for record in self.draw.lora],
            "embeddings": [asdict(record) for record in self.draw.embeddings],
            "rows": [row.own for row in self.rows],
            "inits": [file.plain for file in self.inits],
            "mask": None if self.mask is None else self.mask.plain,
            "cache": self.draw.cache if isinstance(self.draw.cache, int) else list(self.draw.cache),
            "device": self.device,
            "model": self.spec.description,
            "config": str(self.spec.config_path),
            "ckpt": str(self.spec.ckpt),
            "tokenizer": self.tokenizer,
            **self.spec.hashes,
            "skip_grid": self.skip_grid,
            "n_rows": self.n_rows,
            "first": self.first,
            "first_grid": self.first_grid,
            "versions": dict(self.versions),
        }

    def to_yaml(self) -> str:
        """Return the content of settings.yaml."""
        content = self.to_dict()
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        # Some letters do not come back as they are written, such as U+0085, which yaml takes for the end of a line.
        return text if yaml.safe_load(text) == content else yaml.safe_dump(content, sort_keys=False)

    # --- text chunks of PNGs ------------------------------------------------------------------------------

    def texts(self, prompt: str, seed: int, draw: DrawSettings, init: FileRecord | None = None) -> dict[str, str]:
        """Return a picture's text chunks: prompt, seed, all settings as JSON, and those that other tools read.

        draw: how it is drawn. init: the file of the picture that it is drawn from.
        Files are told by their names and hashes: a picture that is passed on should not tell where they lie.
        """
        settings = replace(self, draw=draw).to_dict()
        own = {name: value for name, value in settings.items() if name not in OF_THE_RUN}
        own["init_picture"] = None if init is None else init.plain
        own |= {name: Path(own[name]).name for name in ("config", "ckpt", "tokenizer") if own[name]}
        if own["quantization"]:
            own["quantization"] = {**own["quantization"], "cali_ckpt": Path(own["quantization"]["cali_ckpt"]).name}
        own = {"prompt": prompt} | own | {"seed": seed, "run_seed": self.seed}
        return {
            "prompt": prompt,
            "seed": str(seed),
            "dsdiff": json.dumps(own, ensure_ascii=False),
            "parameters": self._parameters(prompt, seed, draw),
        }

    def _parameters(self, prompt: str, seed: int, draw: DrawSettings) -> str:
        """Return the chunk that stable-diffusion-webui writes and many viewers show."""
        lines = [prompt]
        if draw.negative_prompt:
            lines.append(f"Negative prompt: {draw.negative_prompt}")
        facts: dict[str, Any] = {
            "Steps": draw.steps,
            "Sampler": USUAL_NAMES[draw.sampler],
            "CFG scale": f"{draw.scale:g}",
            "Seed": seed,
            "Size": f"{draw.width}x{draw.height}",
            "Model hash": self.spec.hashes["ckpt_sha256"][:10],
            "Model": self.spec.name,
        }
        if draw.eta:
            facts["Eta"] = f"{draw.eta:g}"
        if (draw.guidance_start, draw.guidance_stop) != (0, 1):
            facts["Guidance interval"] = f"{draw.guidance_start:g} to {draw.guidance_stop:g}"
        if draw.keeps_features:
            whole = draw.cache if isinstance(draw.cache, int) else " ".join(map(str, draw.cache))
            facts["Feature cache"] = f"{whole}, depth {draw.cache_depth}"
        if draw.init:
            facts["Denoising strength"] = f"{draw.init.strength:g}"
        if draw.init and self.mask:
            facts["Mask blur"] = f"{draw.init.mask_blur:g}"
        if draw.embeddings:
            facts["TI hashes"] = ", ".join(map(str, draw.embeddings))
        if draw.quantization:
            facts["Quantization"] = draw.quantization.bits
        if draw.lora:
            facts["LoRA"] = " ".join(map(str, draw.lora))
        if draw.merge:
            facts["Token merging ratio"] = draw.merge.merge_schedule or f"{draw.merge.ratio:g}"
            facts |= _merge_options(draw.merge)
        lines.append(", ".join(f"{name}: {_quoted(str(fact))}" for name, fact in facts.items()))
        return "\n".join(lines)


def _merge_options(merge: MergeOptions) -> dict[str, str]:
    """Return the options of merging beside the ratio that are not the defaults, in one entry; nothing if all are."""
    plain = asdict(MergeOptions())
    told = {name: value for name, value in asdict(merge).items() if value != plain[name]}
    told = {name: value for name, value in told.items() if name not in ("ratio", "merge_schedule")}
    words = ", ".join(name if value is True else f"{name} {value}" for name, value in told.items())
    return {"Token merging options": words} if words else {}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


# --- going on with a run -----------------------------------------------------------------------------------


def resumed(record: RunRecord, outdir: Path) -> RunRecord:
    """Return the record with the picture numbers of the run in `outdir`, if one is there.

    Raises ValueError if that run has other settings, so that its pictures would not fit those to come.
    """
    path = outdir / SETTINGS_FILE
    if not path.exists():
        if record.first or record.first_grid:
            raise ValueError(f"--resume: {str(outdir)!r} holds pictures but no settings.yaml: choose another --outdir")
        return record
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        numbers = {name: int(old[name]) for name in ("first", "first_grid")}
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"--resume: {str(path)!r} cannot be read: choose another --outdir") from error
    if isinstance(old.get("merge"), dict):  # older versions knew fewer options, and did as the defaults of the others
        old["merge"] = asdict(MergeOptions()) | old["merge"]
    old = BEFORE | _where_all_read_alike(record) | old
    _check_same(flat(old), flat(record.to_dict()), outdir)
    if old.get("versions") != dict(record.versions):
        logger.warning("the run was begun with %s: pictures may differ", old.get("versions"))
    return replace(record, **numbers)


def _where_all_read_alike(record: RunRecord) -> dict[str, Any]:
    """Return how the record reads prompts, if all of its prompts are too plain and short to be read in two ways."""
    texts = [*record.prompts, record.draw.negative_prompt]
    plain = not any(MARKS.search(text) for text in texts)
    short = all(len(text.encode("utf-8")) <= record.spec.prompt_room for text in texts)  # a token has a byte or more
    entries = {"prompt_weights": record.draw.prompt_weights} if plain else {}
    return entries | ({"long_prompts": record.draw.long_prompts} if short else {})


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], outdir: Path) -> None:
    names = [name for name in (*now, *before) if name.split(".")[0] not in INCIDENTAL]
    changed = [name for name in dict.fromkeys(names) if before.get(name) != now.get(name)]
    if changed:
        what = ", ".join(_difference(name, before.get(name), now.get(name)) for name in changed[:3])
        raise ValueError(f"--resume: the run in {str(outdir)!r} has other settings: {what}; use its flags")


def _difference(name: str, old: Any, new: Any) -> str:
    short = len(f"{old}{new}") < 100
    return f"{name} ({old} there, {new} here)" if short else name
