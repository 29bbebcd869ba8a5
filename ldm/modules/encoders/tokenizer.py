"""Where the files of a CLIP tokenizer are looked for."""

from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTokenizer

VOCABULARY_FILES = ("vocab.json", "merges.txt")
SINGLE_FILE = "tokenizer.json"
FILES_WANTED = f"{' and '.join(VOCABULARY_FILES)} (or {SINGLE_FILE})"
DEFAULT_PLACE = "models/ldm/stable-diffusion-v1/tokenizer"
HUB_TIMEOUT = 5.0  # seconds


@dataclass(kw_only=True)
class TokenizerSource:
    """The places of a tokenizer: `directory` alone if given, else the `candidates` in order, else the hub.

    hub_name: a repository of the hub: its files are taken from the local cache, or else downloaded.
    """

    directory: Path | None = None
    candidates: tuple[Path, ...] = ()
    hub_name: str | None = None

    def load(self) -> tuple[CLIPTokenizer, Path]:
        """The tokenizer and the directory that it came from.

        Raises FileNotFoundError, which says what to put where; ValueError for files that cannot be read.
        """
        places = self.candidates if self.directory is None else (self.directory,)
        reason = ""
        found = next(filter(has_tokenizer_files, places), None)
        if found is None and self.directory is None and self.hub_name is not None:
            found, reason = _hub_directory(self.hub_name)
        if found is None:
            raise FileNotFoundError(self._advice(reason))
        return _read_tokenizer(found), found

    def _advice(self, reason: str) -> str:
        if self.directory is not None:
            return f"no tokenizer in {str(self.directory)!r}: put {FILES_WANTED} there"
        place = self.candidates[0] if self.candidates else DEFAULT_PLACE
        hub = f" ({self.hub_name} cannot be downloaded: {reason})" if reason else ""
        return f"no tokenizer{hub}: put {FILES_WANTED} into {place}, or give their directory with --tokenizer DIR"


def has_tokenizer_files(directory: str | Path) -> bool:
    """Whether a CLIP tokenizer lies in `directory`."""
    there = Path(directory)
    return (there / SINGLE_FILE).is_file() or all((there / name).is_file() for name in VOCABULARY_FILES)


def _read_tokenizer(directory: Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # the parsers behind it raise many types, a plain Exception among them
        raise ValueError(f"the tokenizer in {str(directory)!r} cannot be read: {_first_line(error)}") from error


def _hub_directory(name: str) -> tuple[Path | None, str]:
    """The local directory of the hub's files, or None and the reason. Takes seconds, not minutes, when offline."""
    from huggingface_hub import get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        cached = [try_to_load_from_cache(name, file) for file in VOCABULARY_FILES]
        if not all(isinstance(path, str) for path in cached):
            # One plain request first: the download on its own would go on trying for minutes.
            get_session().head(hf_hub_url(name, VOCABULARY_FILES[0]), timeout=HUB_TIMEOUT)
            cached = [hf_hub_download(name, file) for file in VOCABULARY_FILES]
    except Exception as error:  # no network, no such repository, no room: each leaves us without the files
        return None, _first_line(error)
    return Path(cached[0]).parent, ""


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
