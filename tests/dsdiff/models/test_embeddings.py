"""Embeddings of textual inversion: the layouts that are read, and what is refused."""

import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from dsdiff import EmbeddingOptions, Pipeline
from dsdiff.models.embeddings import read_embedding, read_embeddings

WIDTH = 128  # of the small model's text encoder


@pytest.fixture
def vectors():
    return torch.randn(3, WIDTH)


def of_web_ui(vectors):
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "old", "step": 100}


def test_each_layout_gives_name_and_vectors(tmp_path, vectors):
    parameter = torch.nn.Parameter(vectors)
    torch.save(of_web_ui(parameter), tmp_path / "style.pt")
    torch.save({"string_to_param": torch.nn.ParameterDict({"*": parameter})}, tmp_path / "first.pt")
    torch.save({"<cat>": vectors[0]}, tmp_path / "learned_embeds.bin")
    save_file({"<dog>": vectors}, tmp_path / "dog.safetensors")
    save_file({"emb_params": vectors.half()}, tmp_path / "bad-hands.safetensors")
    cases = {
        "style.pt": ("style", vectors),
        "first.pt": ("first", vectors),
        "learned_embeds.bin": ("<cat>", vectors[:1]),
        "dog.safetensors": ("<dog>", vectors),
        "bad-hands.safetensors": ("bad-hands", vectors.half().float()),
    }
    for file, (name, expected) in cases.items():
        found, rows = read_embedding(EmbeddingOptions(path=tmp_path / file))
        assert found == name and torch.equal(rows, expected) and not rows.requires_grad, file
        assert read_embedding(EmbeddingOptions(path=tmp_path / file, name="own"))[0] == "own", file


def test_what_is_no_embedding_of_the_model_is_refused(tmp_path, spec, vectors):
    class Code:
        def __reduce__(self):
            return (print, ("code was run",))

    (tmp_path / "code.pt").write_bytes(pickle.dumps({"string_to_param": Code()}))
    torch.save({"string_to_param": Code()}, tmp_path / "code2.pt")
    torch.save([vectors], tmp_path / "list.pt")
    torch.save({"a": vectors, "b": vectors}, tmp_path / "two.pt")
    torch.save({"a": torch.full((1, WIDTH), torch.nan)}, tmp_path / "nan.pt")
    torch.save({"a": torch.zeros(1, 1, WIDTH)}, tmp_path / "cube.pt")
    save_file({"clip_l": vectors, "clip_g": vectors + 1}, tmp_path / "xl.safetensors")
    save_file({"a": torch.randn(2, 768)}, tmp_path / "wide.safetensors")
    save_file({"a": torch.randn(31, WIDTH)}, tmp_path / "many.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    save_file({"a": vectors}, tmp_path / "a b.safetensors")
    torch.save(of_web_ui(vectors), tmp_path / "a b.pt")
    cases = {
        "code.pt": "is damaged, or holds more than vectors",
        "code2.pt": "is damaged, or holds more than vectors",
        "list.pt": "holds a list, not named vectors",
        "two.pt": "has 2 entries with vectors",
        "nan.pt": "holds NaN or infinite values",
        "cube.pt": "holds (1, 1, 128) numbers, which are no vectors",
        "xl.safetensors": "Stable Diffusion XL",
        "wide.safetensors": f"vectors of width 768, the model's text encoder has {WIDTH}",
        "many.safetensors": "has 31 vectors: a prompt of this model has room for 30",
        "damaged.safetensors": "cannot be read",
        "a b.pt": "cannot have the name 'a b': use one word",
        "none.pt": "is not there",
        ".": "is a folder",
    }
    for file, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
            read_embeddings([EmbeddingOptions(path=tmp_path / file)], spec)
        assert "\n" not in str(error.value), file
    twice = [EmbeddingOptions(path=tmp_path / "a b.safetensors"), EmbeddingOptions(path=tmp_path / "a b.pt", name="A")]
    with pytest.raises(ValueError, match="two embeddings are called 'A'"):
        read_embeddings(twice, spec)


def test_options_are_parsed(tmp_path):
    parse = EmbeddingOptions.parse
    assert parse("a.pt") == EmbeddingOptions(path=type(tmp_path)("a.pt"))
    assert parse("a.pt:<cat>") == EmbeddingOptions(path=type(tmp_path)("a.pt"), name="<cat>")
    assert parse("x:y/a.pt").name is None
    (tmp_path / "a:b").write_text("")
    assert parse(str(tmp_path / "a:b")).name is None


def test_a_pipeline_draws_by_the_name(tmp_path, spec, vectors):
    save_file({"<dog>": 10 * vectors}, tmp_path / "dog.safetensors")
    plain, own = (
        Pipeline(spec, device="cpu"),
        Pipeline(spec, device="cpu", embeddings=[(tmp_path / "dog.safetensors", "dog")]),
    )
    (record,) = own.embeddings
    assert (record.name, record.vectors) == ("dog", 3)
    from dsdiff import DrawOptions

    options = DrawOptions(height=32, width=48, steps=2, vae="float32")
    with_name = [next(pipeline.draw("a dog", options=options)).image.tobytes() for pipeline in (plain, own)]
    without = [next(pipeline.draw("a ring", options=options)).image.tobytes() for pipeline in (plain, own)]
    assert with_name[0] != with_name[1] and without[0] == without[1]
    assert own.resolve(options).embeddings == (record,)
    with pytest.raises(ValueError, match="width 768"):
        save_file({"a": torch.randn(2, 768)}, tmp_path / "wide.safetensors")
        Pipeline(spec, device="cpu", embeddings=[tmp_path / "wide.safetensors"])
