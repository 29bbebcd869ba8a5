"""CLIP's byte-pair tokenizer, and the places where its files are looked for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ldm.messages import first_line

VOCABULARY_FILES = ("vocab.json", "merges.txt")
SINGLE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
FILES_WANTED = f"{' and '.join(VOCABULARY_FILES)} (or {SINGLE_FILE})"
DEFAULT_PLACE = "models/ldm/stable-diffusion-v1/tokenizer"
HUB_TIMEOUT = 5.0  # seconds

END_OF_WORD = "</w>"
# What CLIP splits a text into, before byte pairs: special tokens, contractions, words, single digits, signs.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Role of a special token -> its text, unless the tokenizer's files say otherwise.
SPECIAL_TOKENS: Mapping[str, str] = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


class ClipTokenizer:
    """Texts <-> token ids, with the ids of transformers' CLIPTokenizer.

    A text is composed (NFC), put in lower case, and split into words; each word into the byte pairs of the vocabulary.

    vocab, merges: the byte pairs, or the paths of vocab.json and merges.txt.
    special: role -> special token, where it differs from `SPECIAL_TOKENS`.
    added: further tokens to find in a text before it is split. Their flags also hold for special ones of the same text.
    """

    def __init__(
        self,
        vocab: dict[str, int] | str,
        merges: Sequence[tuple[str, str]] | str,
        special: Mapping[str, AddedToken] | None = None,
        added: Sequence[AddedToken] = (),
    ) -> None:
        tokens = {role: AddedToken(text, special=True) for role, text in SPECIAL_TOKENS.items()} | dict(special or {})
        self.special = {role: token.content for role, token in tokens.items()}
        model = BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            unk_token=self.special["unk_token"],
        )
        self._backend = Tokenizer(model)
        self._backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
        self._backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self._backend.decoder = decoders.ByteLevel()
        known = {token.content for token in added}
        by_text = {token.content: token for token in tokens.values()}  # one text may have several roles
        self._backend.add_tokens([*added, *(token for text, token in by_text.items() if text not in known)])
        self.bos_id, self.eos_id, self.pad_id = map(self._id_of, ("bos_token", "eos_token", "pad_token"))
        end, start = (self.special["eos_token"], self.eos_id), (self.special["bos_token"], self.bos_id)
        self._backend.post_processor = processors.RobertaProcessing(
            end, start, trim_offsets=False, add_prefix_space=False
        )

    def _id_of(self, role: str) -> int:
        index = self._backend.token_to_id(self.special[role])
        if index is None:
            raise ValueError(f"the tokenizer has no {role} {self.special[role]!r}")
        return index

    @classmethod
    def from_directory(cls, directory: str | Path) -> "ClipTokenizer":
        """Read the files in `directory`: tokenizer.json, else vocab.json and merges.txt, with their settings if any.

        Raises ValueError, in one line, for files that cannot be read.
        """
        try:
            return cls._read(Path(directory))
        except Exception as error:  # the parsers behind it raise many types, a plain Exception among them
            raise ValueError(f"the tokenizer in {str(directory)!r} cannot be read: {first_line(error)}") from error

    @classmethod
    def _read(cls, directory: Path) -> "ClipTokenizer":
        config, named = _read_json(directory / CONFIG_FILE), _read_json(directory / SPECIAL_FILE)
        added = {int(index): _added_token(token) for index, token in config.get("added_tokens_decoder", {}).items()}
        if not added:  # an older layout: in the other files
            config |= named
        if (directory / SINGLE_FILE).is_file():
            content = _read_json(directory / SINGLE_FILE)
            vocab = content["model"]["vocab"]
            merges = [_pair(merge) for merge in content["model"]["merges"]]
            added = added or {token["id"]: _added_token(token) for token in content["added_tokens"]}
        else:
            vocab, merges = (str(directory / name) for name in VOCABULARY_FILES)
        special = {role: _added_token(config[role], special=True) for role in SPECIAL_TOKENS if config.get(role)}
        return cls(vocab, merges, special, [token for _, token in sorted(added.items())])

    def __len__(self) -> int:
        """Return the number of tokens, special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, between those of start and end."""
        return self._backend.encode(text).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of the ids, with a space after each word."""
        text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text.replace(END_OF_WORD, " ").strip()

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder, for `from_directory` and for transformers."""
        self._backend.save(str(Path(directory) / SINGLE_FILE))
        settings = {"tokenizer_class": "CLIPTokenizer", **self.special}
        (Path(directory) / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, empty if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _added_token(token: str | dict[str, Any], **more: Any) -> AddedToken:
    """Make an AddedToken from its text, or from its text and flags as the files hold them."""
    if isinstance(token, str):
        return AddedToken(token, **more)
    flags: dict[str, Any] = {name: value for name, value in token.items() if name not in ("id", "__type")}
    return AddedToken(**flags | more)


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the two sides of a merge, which older files hold as one text."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


@dataclass(kw_only=True)
class TokenizerSource:
    """The places of a tokenizer: `directory` alone if given, else the `candidates` in order, else the hub.

    hub_name: a repository on the hub, "owner/name". Its files come from the local cache, or are downloaded.
    """

    directory: Path | None = None
    candidates: tuple[Path, ...] = ()
    hub_name: str | None = None

    def load(self) -> tuple[ClipTokenizer, Path]:
        """Return the tokenizer, and the directory that holds its files.

        Raises FileNotFoundError, which says what to put where; ValueError for files that cannot be read.
        """
        places = self.candidates if self.directory is None else (self.directory,)
        reason = ""
        found = next(filter(has_tokenizer_files, places), None)
        if found is None and self.directory is None and self.hub_name is not None:
            found, reason = _hub_directory(self.hub_name)
        if found is None:
            raise FileNotFoundError(self._advice(reason))
        return ClipTokenizer.from_directory(found), found

    def _advice(self, reason: str) -> str:
        if self.directory is not None:
            return f"no tokenizer in {str(self.directory)!r}: put {FILES_WANTED} there"
        place = self.candidates[0] if self.candidates else DEFAULT_PLACE
        hub = f" ({self.hub_name} cannot be downloaded: {reason})" if reason else ""
        return f"no tokenizer{hub}: put {FILES_WANTED} into {place}, or give their directory with --tokenizer DIR"


def has_tokenizer_files(directory: str | Path) -> bool:
    """Tell whether the files of a CLIP tokenizer are in `directory`."""
    there = Path(directory)
    return (there / SINGLE_FILE).is_file() or all((there / name).is_file() for name in VOCABULARY_FILES)


def _hub_directory(name: str) -> tuple[Path | None, str]:
    """Return the local directory of the hub's files, or None and the reason. Takes seconds, not minutes, if offline."""
    from huggingface_hub import get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        cached = [try_to_load_from_cache(name, file) for file in VOCABULARY_FILES]
        if not all(isinstance(path, str) for path in cached):
            # One plain request first: a download on its own would be tried again and again, for minutes.
            get_session().head(hf_hub_url(name, VOCABULARY_FILES[0]), timeout=HUB_TIMEOUT)
            cached = [hf_hub_download(name, file) for file in VOCABULARY_FILES]
    except Exception as error:  # no network, no such repository, no room: in each case we lack the files
        return None, first_line(error)
    return Path(str(cached[0])).parent, ""
