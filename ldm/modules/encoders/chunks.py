"""Prompts as chunks of tokens, each as long as the text tower sees at once."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ldm.modules.encoders.prompt_syntax import Piece, parse_weights
from ldm.modules.encoders.tokenizer import ClipTokenizer

COMMA_REACH = 20  # tokens before the end of a chunk, within which a comma ends it earlier


@dataclass(frozen=True, kw_only=True)
class PromptStyle:
    """How prompts are read.

    weights: brackets give weights, see `prompt_syntax`; without, they are text. long: a prompt of more tokens than fit
    into a chunk becomes several chunks ("chunk"), or ends where the first one is full ("cut").
    """

    weights: bool = True
    long: str = "chunk"


@dataclass(frozen=True)
class Chunk:
    """Token ids from start to padding, and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Word:
    """Tokens that stay in one chunk: a single one, or those of an embedding."""

    ids: tuple[int, ...]
    weight: float


class Chunker:
    """Splits prompts into chunks of `length` tokens, start and end included.

    added: name -> ids of further tokens that the name stands for, where a prompt has it as a word of its own.
    """

    def __init__(self, tokenizer: ClipTokenizer, length: int, added: Mapping[str, Sequence[int]] | None = None):
        self.tokenizer, self.length = tokenizer, length
        self.added = {name.lower(): tuple(ids) for name, ids in (added or {}).items()}
        self._names = _names_pattern(self.added)
        comma = self._plain_ids(",")
        self._comma = comma[0] if len(comma) == 1 else None

    @property
    def room(self) -> int:
        """How many tokens of a prompt fit into a chunk."""
        return self.length - 2

    def split(self, prompt: str, style: PromptStyle) -> tuple[list[Chunk], str]:
        """Return the chunks of a prompt, at least one, and the text that is cut off, "" for none."""
        pieces = parse_weights(prompt) if style.weights else [Piece(prompt)]
        if style.long == "cut":
            words = [word for piece in pieces for word in self._words(piece)]
            return self._cut(words)
        filled: list[list[Word]] = [[]]
        for i, piece in enumerate(pieces):
            if piece.begins and (i > 0 or filled[-1]):
                filled.append([])
            for word in self._words(piece):
                self._add(filled, word)
        if len(filled) > 1 and not filled[-1]:  # BREAK at the end
            filled.pop()
        return [self._chunk(words) for words in filled], ""

    def _add(self, filled: list[list[Word]], word: Word) -> None:
        """Add a word to the last chunk, or to a new one, which takes over what follows a comma near the end."""
        last = filled[-1]
        if _size(last) + len(word.ids) > self.room:
            moved: list[Word] = []
            commas = [i for i, each in enumerate(last) if each.ids == (self._comma,)]
            ordinary = len(word.ids) == 1 and word.ids != (self._comma,)
            if ordinary and commas and _size(last[commas[-1] :]) <= COMMA_REACH:
                moved = last[commas[-1] + 1 :]
                filled[-1] = last[: commas[-1] + 1]
            filled.append(moved)
        filled[-1].append(word)

    def _cut(self, words: Sequence[Word]) -> tuple[list[Chunk], str]:
        kept = 0
        while kept < len(words) and _size(words[: kept + 1]) <= self.room:
            kept += 1
        return [self._chunk(words[:kept])], self._text(words[kept:])

    def _chunk(self, words: Sequence[Word]) -> Chunk:
        pairs = [(id_, word.weight) for word in words for id_ in word.ids]
        ids = [self.tokenizer.bos_id, *(id_ for id_, _ in pairs), self.tokenizer.eos_id]
        weights = [1.0, *(weight for _, weight in pairs), 1.0]
        padding = self.length - len(ids)
        return Chunk((*ids, *[self.tokenizer.pad_id] * padding), (*weights, *[1.0] * padding))

    # --- words --------------------------------------------------------------------------------------------

    def _words(self, piece: Piece) -> Iterator[Word]:
        """Yield the words of a piece: the tokens of each name, and each other token by itself."""
        for part in self._names.split(piece.text) if self._names else [piece.text]:
            ids = self.added.get(part.lower())
            if ids is not None:
                yield Word(ids, piece.weight)
            else:
                for id_ in self._plain_ids(part):
                    yield Word((id_,), piece.weight)

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)[1:-1]

    def _text(self, words: Sequence[Word]) -> str:
        """Return the text of words, as a message shows it."""
        names = {ids: name for name, ids in self.added.items()}
        parts: list[str] = []
        plain: list[int] = []
        for word in words:
            if word.ids in names:
                parts += [self.tokenizer.decode(plain), names[word.ids]]
                plain = []
            else:
                plain += word.ids
        return " ".join(part for part in (*parts, self.tokenizer.decode(plain)) if part)


def _size(words: Sequence[Word]) -> int:
    return sum(len(word.ids) for word in words)


def _names_pattern(names: Mapping[str, Sequence[int]]) -> re.Pattern[str] | None:
    """Return what finds the names as words of their own, the longest first; None if there are none."""
    if not names:
        return None
    return re.compile(f"({'|'.join(map(_as_word, sorted(names, key=len, reverse=True)))})", re.IGNORECASE)


def _as_word(name: str) -> str:
    """Return the regular expression of a name as a word of its own."""
    return (r"(?<!\w)" if name[0].isalnum() else "") + re.escape(name) + (r"(?!\w)" if name[-1].isalnum() else "")


def has_word(text: str, name: str) -> bool:
    """Return whether a prompt has the name as a word of its own, in upper or lower case."""
    return re.search(_as_word(name), text, re.IGNORECASE) is not None
