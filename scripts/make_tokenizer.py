"""Write the tokenizer of the embedded model: a CLIP byte-pair vocabulary that knows one small language.

    python scripts/make_tokenizer.py [--outdir models/ldm/shapes/tokenizer]

Byte-pair encoding (Sennrich et al. 2016, algorithm 1) is run over the words of the caption grammar until every
word is one token, and no further. The 256 byte letters stay in the vocabulary, each within a word and at its
end (`</w>`), so that any text can be encoded. The result depends on the grammar alone, not on chance.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.data.shapes import COLORS, RELATIONS, SHAPES, SIZES, TEXTURES

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
OUTDIR = Path(__file__).resolve().parent.parent / "models/ldm/shapes/tokenizer"
CONTEXT = 77  # tokens per prompt, start and end included

Pair = tuple[str, str]


def grammar_words() -> list[str]:
    """Every word that `ldm.data.shapes.caption` can write, sorted."""
    terms = (*SHAPES, *COLORS, *SIZES, *TEXTURES, *RELATIONS, "a an on to gradient background")
    return sorted({word for term in terms for word in term.split()})


def merge_pair(symbols: list[str], pair: Pair) -> list[str]:
    """`symbols` with each occurrence of `pair`, from the left, joined into one symbol."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Join the most frequent pair (the first in alphabetical order among equals) until each word is one symbol."""
    splits = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(words))]
    merges: list[Pair] = []
    while counts := Counter(pair for split in splits for pair in pairwise(split)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        splits = [merge_pair(split, best) for split in splits]
    return merges


def build_vocabulary(merges: Iterable[Pair]) -> dict[str, int]:
    """Token -> id in CLIP's order: bytes, bytes at a word's end, merges, start, end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def tokenizer_files(words: Iterable[str]) -> dict[str, str]:
    """File name -> text of the files from which `CLIPTokenizer.from_pretrained(directory)` is built."""
    merges = learn_merges(words)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, **special}
    return {
        "vocab.json": json.dumps(build_vocabulary(merges), ensure_ascii=False, indent=0) + "\n",
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }


def write_files(files: dict[str, str], outdir: Path) -> None:
    """Write each text to its name in `outdir`, never half: first to a temporary name, then renamed."""
    outdir.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        temporary = outdir / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, outdir / name)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the tokenizer of the embedded model.", allow_abbrev=False)
    parser.add_argument("--outdir", type=Path, default=OUTDIR, help="directory for its files (default: %(default)s)")
    outdir = parser.parse_args(argv).outdir
    files = tokenizer_files(grammar_words())
    write_files(files, outdir)
    print(f"{outdir}: {len(json.loads(files['vocab.json']))} tokens")


if __name__ == "__main__":
    main()
