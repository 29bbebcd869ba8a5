"""Models of Hugging Face's hub: found in its cache on this machine, or else downloaded, the needed files alone."""

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ldm.diffusers_config import SCHEDULER_FILE
from ldm.diffusers_folder import CONFIG_FILE, INDEX_FILE, choose_weights, files_read, read_json
from ldm.diffusers_names import PREFIXES
from ldm.messages import first_line
from ldm.weight_files import SAFETENSORS_SUFFIX, TORCH_SUFFIXES

HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
SUFFIXES = (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)
TIMEOUT = 5.0  # seconds, of the first request
TOKENIZER = re.compile(r"tokenizer/[\w.-]+\.(json|txt)")


def is_hub_id(path: Path) -> bool:
    """Tell whether `path` is no file or folder of this machine and reads as owner/name or owner/name@revision."""
    return not path.exists() and path.suffix not in SUFFIXES and bool(HUB_ID.fullmatch(path.as_posix()))


def from_hub(path: Path, networks: Collection[str] = tuple(PREFIXES)) -> Path:
    """Return the local folder of a model on the hub; a path that is no hub id stays as it is.

    networks: the folders of diffusers that are needed: all, or the autoencoder's alone. What is in the cache is not
    looked up again: another state of the model needs a revision. Raises FileNotFoundError if the model is neither there
    nor can be downloaded.
    """
    if not is_hub_id(path):
        return path
    match = HUB_ID.fullmatch(path.as_posix())
    assert match is not None, "is_hub_id has matched it"
    repository, revision = match["repository"], match["revision"]
    folder = _cached(repository, revision, networks)
    if folder is not None:
        return folder
    try:
        return _downloaded(repository, revision, networks)
    except Exception as error:  # no network, no such model, no access, no room: in each case we lack the files
        raise FileNotFoundError(
            f"no checkpoint at {str(path)!r}, and it cannot be had from the hub ({first_line(error)}): give the path "
            "of a file or of a folder as diffusers saves it"
        ) from error


def _cached(repository: str, revision: str | None, networks: Collection[str]) -> Path | None:
    """Return the model's folder in the cache, if all that is needed is there."""
    from huggingface_hub import try_to_load_from_cache

    for name in (INDEX_FILE, f"vae/{CONFIG_FILE}", CONFIG_FILE):
        found = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent.parent if "/" in name else Path(found).parent
            return folder if _is_complete(folder, networks) else None
    return None


def _is_complete(folder: Path, networks: Collection[str]) -> bool:
    try:
        return all(path.exists() for path in files_read(folder, networks))
    except (OSError, ValueError):
        return False


def _downloaded(repository: str, revision: str | None, networks: Collection[str]) -> Path:
    """Download what is needed of a model; return its folder in the cache."""
    from huggingface_hub import HfApi, get_session, hf_hub_download, hf_hub_url

    # One plain request first: a download on its own would be tried again and again, for minutes.
    get_session().head(hf_hub_url(repository, INDEX_FILE, revision=revision), timeout=TIMEOUT)
    info = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT)
    names = [sibling.rfilename for sibling in info.siblings or ()]

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repository, name, revision=revision))

    paths = {name: fetch(name) for name in needed_files(names, networks, fetch)}
    name, path = next(iter(paths.items()))
    return path.parents[name.count("/")]


def needed_files(names: Collection[str], networks: Collection[str], fetch: Callable[[str], Path]) -> Iterator[str]:
    """Yield those of a repository's files that drawing needs: configs, tokenizer, and each network's weights once.

    fetch: returns the local path of a file, for the index of shards. Raises FileNotFoundError if there are no weights.
    """
    for network in networks:
        folder = f"{network}/" if any(name.startswith(f"{network}/") for name in names) else ""
        own = [name.removeprefix(folder) for name in names if name.startswith(folder)]
        weights = choose_weights(network, [name for name in own if "/" not in name])
        if weights is None or (not folder and tuple(networks) != ("vae",)):
            files = [name for name in names if Path(name).suffix in SUFFIXES]
            hint = f"; it holds {files[0]!r}: download that and give its path" if files else ""
            raise FileNotFoundError(f"the repository has no {network} as diffusers saves it{hint}")
        yield from (f"{folder}{name}" for name in (CONFIG_FILE, weights) if name in own)
        if weights.endswith(".json"):
            shards = read_json(fetch(f"{folder}{weights}")).get("weight_map", {})
            yield from (f"{folder}{name}" for name in sorted(set(shards.values())) if name in own)
    if tuple(networks) != ("vae",):
        yield from (name for name in names if name in (INDEX_FILE, f"scheduler/{SCHEDULER_FILE}"))
        yield from (name for name in names if TOKENIZER.fullmatch(name))
