"""Write the tokenizer of the embedded model: a CLIP byte-pair vocabulary that knows one small language.

    python scripts/make_tokenizer.py [--outdir models/ldm/shapes/tokenizer]

Byte-pair encoding (Sennrich et al. 2016, algorithm 1) is run over the words of the caption grammar until every
word is one token, and no further. The 256 byte letters stay in the vocabulary, each within a word and at its
end (`</w>`), so that any text can be encoded. The result depends on the grammar alone, not on chance.
"""

# ruff: noqa: E402
import json
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

from dsdiff.cli.console import ArgumentParser, command
from ldm.data.shapes import COLORS, RELATIONS, SHAPES, SIZES, TEXTURES
from ldm.fileio import check_writable, write_atomically

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
OUTDIR = ROOT / "models/ldm/shapes/tokenizer"
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


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--outdir", type=Path, default=OUTDIR, metavar="DIR", help="for its files (default: %(default)s)"
    )
    outdir = parser.parse_args(argv).outdir
    check_writable(outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    files = tokenizer_files(grammar_words())
    for name, text in files.items():
        write_atomically(outdir / name, lambda path, text=text: path.write_text(text, encoding="utf-8", newline="\n"))
    print(f"{outdir}: {len(json.loads(files['vocab.json']))} tokens")


if __name__ == "__main__":
    main()
