"""Weights in prompts, in the syntax of stable-diffusion-webui.

(text) counts 1.1 times, ((text)) 1.21 times, [text] 1 / 1.1 times, (text:1.3) 1.3 times. A backslash before a bracket
makes it a plain one. BREAK begins a new chunk of tokens. A bracket that is not closed holds to the end, and one that
was not opened is text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

STRONG, MOST = 2.0, 100.0  # weights above which pictures fall apart, and above which they are noise; as negative ones
ROUND, SQUARE = 1.1, 1 / 1.1  # the factors of a pair of brackets
MARKS = re.compile(r"[()\[\]\\]|\bBREAK\b")  # a prompt without any of them reads the same with weights and without
TOKENS = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|\s*\b(?P<BREAK>BREAK)\b\s*"
    r"|.",
    re.DOTALL,
)


@dataclass(frozen=True)
class Piece:
    """A part of a prompt that has one weight. `begins`: the prompt asks for a new chunk before it."""

    text: str
    weight: float = 1.0
    begins: bool = False


def parse_weights(prompt: str) -> list[Piece]:
    """Return the parts of a prompt with their weights, which multiply where brackets are nested. At least one part."""
    parsed = _Parsed()
    for token in TOKENS.finditer(prompt):
        parsed.take(token)
    for start in parsed.opened["("]:
        parsed.scale(start, ROUND)
    for start in parsed.opened["["]:
        parsed.scale(start, SQUARE)
    return list(_joined(parsed.pieces)) or [Piece("")]


def strong_pieces(prompt: str) -> list[Piece]:
    """Return the parts of a prompt whose weight is above STRONG, or below -STRONG.

    Raises ValueError for one beyond MOST.
    """
    found = [piece for piece in parse_weights(prompt) if piece.text.strip() and not abs(piece.weight) <= STRONG]
    for piece in found:
        if not abs(piece.weight) <= MOST:
            raise ValueError(
                f"the weight of {piece.text.strip()!r} in a prompt is {piece.weight:g}, which draws noise: {MOST:g} is "
                "the most, and 0.5 to 1.5 is wise"
            )
    return found


class _Parsed:
    """The part of a prompt that is read: its pieces, and for each open bracket how many pieces were before it."""

    def __init__(self):
        self.pieces: list[Piece] = []
        self.opened: dict[str, list[int]] = {"(": [], "[": []}

    def take(self, token: re.Match[str]) -> None:
        found, round_, square = token.group(), self.opened["("], self.opened["["]
        if token["escaped"] is not None:
            self.pieces.append(Piece(token["escaped"]))
        elif token["weight"] and round_:
            self.scale(round_.pop(), float(token["weight"]))
        elif token["BREAK"]:
            self.pieces.append(Piece("", begins=True))
        elif found in self.opened:
            self.opened[found].append(len(self.pieces))
        elif found == ")" and round_:
            self.scale(round_.pop(), ROUND)
        elif found == "]" and square:
            self.scale(square.pop(), SQUARE)
        else:
            self.pieces.append(Piece(found))

    def scale(self, start: int, factor: float) -> None:
        """Multiply the weights of the pieces from `start` on."""
        self.pieces[start:] = [Piece(piece.text, piece.weight * factor, piece.begins) for piece in self.pieces[start:]]


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    """Yield pieces, with neighbours of one weight as one."""
    last: Piece | None = None
    for piece in pieces:
        if last is not None and not piece.begins and (piece.weight == last.weight or not last.text):
            last = Piece(last.text + piece.text, piece.weight, last.begins)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last
