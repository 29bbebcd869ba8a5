"""Learn the vocabulary of the embedded model's tokenizer, and write the files of the tokenizer.

Byte-pair encoding (Sennrich et al. 2016, algorithm 1) is run over the words of the caption grammar until every word is
one token, and no further. The 256 byte letters stay in the vocabulary, each inside a word and at its end (`</w>`), so
that any text can be encoded. The result depends on the grammar alone, not on chance.
"""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers

from ldm.data.captions import RELATIONS, SHAPES, SIZES, TEXTURES
from ldm.data.palette import COLORS
from ldm.fileio import check_writable, write_atomically
from ldm.modules.encoders.tokenizer import (
    CONFIG_FILE,
    END_OF_WORD,
    SPECIAL_FILE,
    SPECIAL_TOKENS,
    VOCABULARY_FILES,
)

CONTEXT = 77  # tokens per prompt, start and end included

Pair = tuple[str, str]


def grammar_words() -> list[str]:
    """Return every word that `ldm.data.captions.caption` can write, sorted."""
    terms = (*SHAPES, *COLORS, *SIZES, *TEXTURES, *RELATIONS, "a an on to gradient background")
    return sorted({word for term in terms for word in term.split()})


def merge_pair(symbols: list[str], pair: Pair) -> list[str]:
    """Return `symbols` with each occurrence of `pair`, from the left, joined into one symbol."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Return the pairs to join, in order, until each word is one symbol.

    Each is the most frequent pair of its time, or among equally frequent ones the first in alphabetical order.
    """
    splits = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(words))]
    merges: list[Pair] = []
    while counts := Counter(pair for split in splits for pair in pairwise(split)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        splits = [merge_pair(split, best) for split in splits]
    return merges


def build_vocabulary(merges: Iterable[Pair]) -> dict[str, int]:
    """Return token -> id in CLIP's order: bytes, bytes at a word's end, merges, start, end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *map("".join, merges)]
    tokens += [SPECIAL_TOKENS["bos_token"], SPECIAL_TOKENS["eos_token"]]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def tokenizer_files(words: Iterable[str]) -> dict[str, str]:
    """Return file name -> text, of the files from which `ClipTokenizer` and transformers' CLIPTokenizer read."""
    merges = learn_merges(words)
    vocabulary = json.dumps(build_vocabulary(merges), ensure_ascii=False, indent=0) + "\n"
    pairs = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, **SPECIAL_TOKENS}
    return {
        **dict(zip(VOCABULARY_FILES, (vocabulary, pairs), strict=True)),
        CONFIG_FILE: json.dumps(config, indent=2) + "\n",
        SPECIAL_FILE: json.dumps(dict(SPECIAL_TOKENS), indent=2) + "\n",
    }


def write_tokenizer(directory: Path) -> int:
    """Write the files of the embedded model's tokenizer into a folder; return the number of tokens.

    Raises ValueError if the folder cannot be created or written to.
    """
    check_writable(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = tokenizer_files(grammar_words())
    for name, text in files.items():
        write_atomically(
            directory / name, lambda path, text=text: path.write_text(text, encoding="utf-8", newline="\n")
        )
    return len(json.loads(files[VOCABULARY_FILES[0]]))
