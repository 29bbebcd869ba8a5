"""The text encoder: its values, the names of its weights, and the places of its tokenizer."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from ldm.modules.encoders.modules import FrozenCLIPEmbedder

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests/goldens"
SHAPES_TOKENIZER = ROOT / "models/ldm/shapes/tokenizer"
PREFIX = "cond_stage_model."
POSITION_IDS = "transformer.text_model.embeddings.position_ids"
CONFIG = json.loads((GOLDENS / "clip_text_tiny.json").read_text())
SMALL = {**CONFIG, "vocab_size": 624, "bos_token_id": 622, "eos_token_id": 623, "pad_token_id": 623}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDENS / "clip_text_tiny.safetensors")


@pytest.fixture
def weights(golden):
    return {key.removeprefix(PREFIX): value for key, value in golden.items() if key.startswith(PREFIX)}


@pytest.fixture
def offline(monkeypatch):
    """A hub that cannot be reached and fails the test when a download is begun all the same."""

    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    def must_not_be_called(*args, **kwargs):
        pytest.fail("a download was begun although the hub does not answer")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(huggingface_hub, "get_session", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", must_not_be_called)


def small(**options):
    return FrozenCLIPEmbedder(text_config=SMALL, **options)


def assert_reference(embedder, golden):
    expected = golden["last_hidden_state"]
    error = (embedder.transformer(golden["input_ids"]) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5


def test_equals_the_reference(golden, weights):
    embedder = FrozenCLIPEmbedder(text_config=CONFIG)
    embedder.load_state_dict(weights)
    assert_reference(embedder, golden)


def test_state_dict_has_the_names_of_2022(weights):
    state = FrozenCLIPEmbedder(text_config=CONFIG).state_dict()
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
        key: (value.shape, value.dtype) for key, value in weights.items()
    }


def test_default_version_is_the_text_tower_of_sd_v1():
    embedder = FrozenCLIPEmbedder(device="meta")
    keys = json.loads((GOLDENS / "sd_v1_state_dict.json").read_text())["keys"]
    expected = {key.removeprefix(PREFIX): value for key, value in keys.items() if key.startswith(PREFIX)}
    state = embedder.state_dict()
    assert len(expected) == 197
    assert expected == {
        key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in state.items()
    }


def test_fills_from_todays_names_on_the_meta_device(golden, weights):
    renamed = {key.replace("text_model.", ""): value for key, value in weights.items() if key != POSITION_IDS}
    embedder = FrozenCLIPEmbedder(text_config=CONFIG, device="meta")
    embedder.load_state_dict(renamed, assign=True)
    assert_reference(embedder, golden)


def test_position_ids_of_half_precision_files_become_integers(golden, weights):
    weights[POSITION_IDS] = weights[POSITION_IDS].half() + 0.5
    embedder = FrozenCLIPEmbedder(text_config=CONFIG, device="meta")
    embedder.load_state_dict(weights, assign=True)
    assert torch.equal(embedder.state_dict()[POSITION_IDS], torch.arange(77)[None])
    assert_reference(embedder, golden)


def test_loading_is_strict_about_the_rest(weights):
    del weights["transformer.text_model.final_layer_norm.bias"]
    with pytest.raises(RuntimeError, match=r"text_model\.final_layer_norm\.bias"):
        FrozenCLIPEmbedder(text_config=CONFIG).load_state_dict(weights)


def test_frozen_by_default():
    embedder = small()
    embedder.train()
    assert not any(module.training for module in embedder.modules())
    assert not any(parameter.requires_grad for parameter in embedder.parameters())


def test_trainable_passes_gradients_to_the_embeddings():
    embedder = small(trainable=True, tokenizer=SHAPES_TOKENIZER).train()
    assert embedder.transformer.training
    embedder(["a red circle"]).square().sum().backward()
    gradient = embedder.transformer.text_model.embeddings.token_embedding.weight.grad
    used = set(embedder.tokenize(["a red circle"]).flatten().tolist())
    assert set(gradient.abs().sum(dim=1).nonzero().flatten().tolist()) == used


def test_encode_pads_to_max_length():
    embedder = small(tokenizer=SHAPES_TOKENIZER, max_length=9)
    tokens = embedder.tokenize(["a red circle", ""])
    start, end = 622, 623
    assert tokens.shape == (2, 9)
    assert tokens[0, 0] == start and tokens[0, 4:].tolist() == [end] * 5 and end not in tokens[0, 1:4]
    assert tokens[1].tolist() == [start] + [end] * 8
    assert embedder.encode(["a red circle", ""]).shape == (2, 9, SMALL["hidden_size"])
    assert torch.equal(embedder.encode("a red circle"), embedder(["a red circle"]))


def test_a_prompt_is_tokenized_once_by_each_tokenizer(monkeypatch):
    embedder, split = small(tokenizer=SHAPES_TOKENIZER, max_length=9), []
    own = embedder._split
    monkeypatch.setattr(embedder, "_split", lambda *args: split.append(args[1]) or own(*args))
    first = embedder.tokenize(["a ring", "a star", "a ring"])
    assert sorted(split) == ["a ring", "a star"] and torch.equal(first[0], first[2])
    assert torch.equal(embedder.tokenize(["a star", "a ring"]), first[1:]) and len(split) == 2
    for change in (embedder.set_tokenizer, lambda folder: embedder.set_tokenizer_candidates([folder])):
        change(SHAPES_TOKENIZER)
        assert torch.equal(embedder.tokenize(["a ring"]), first[:1])
    assert len(split) == 4


def test_long_prompt_is_cut_with_one_warning(caplog):
    embedder = small(tokenizer=SHAPES_TOKENIZER, max_length=6)
    with caplog.at_level(logging.WARNING):
        tokens = embedder.tokenize(["a red circle left of a blue star"] * 2)
        embedder.tokenize(["a red circle"])
    assert tokens[0, -1] == 623
    assert embedder.tokenizer.decode(tokens[0, 1:-1].tolist()) == "a red circle left"
    assert [record.getMessage().count("'of a blue star'") for record in caplog.records] == [1]


def test_prompts_must_be_text():
    for prompts in ([], [1], ["a", None]):
        with pytest.raises(ValueError, match="list of prompts"):
            small(tokenizer=SHAPES_TOKENIZER).encode(prompts)


def test_candidates_are_tried_in_order(tmp_path):
    shutil.copytree(SHAPES_TOKENIZER, tmp_path / "second")
    embedder = small()
    embedder.set_tokenizer_candidates([tmp_path / "first", tmp_path / "second"])
    assert len(embedder.tokenizer) == 624


def test_set_tokenizer_goes_before_candidates(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    embedder = small()
    embedder.set_tokenizer_candidates([tmp_path])
    embedder.set_tokenizer(SHAPES_TOKENIZER)
    assert len(embedder.tokenizer) == 624


def test_single_file_tokenizer(tmp_path):
    embedder = small(tokenizer=SHAPES_TOKENIZER)
    embedder.tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    expected = embedder.tokenize(["two é 🙂"])
    embedder.set_tokenizer(tmp_path)
    assert torch.equal(embedder.tokenize(["two é 🙂"]), expected)


def test_offline_error_says_what_to_put_where(offline):
    embedder = FrozenCLIPEmbedder(device="meta")
    embedder.set_tokenizer_candidates([Path("models/somewhere/tokenizer")])
    with pytest.raises(FileNotFoundError) as error:
        embedder.encode(["a"])
    message = str(error.value)
    for part in ("no network", "vocab.json and merges.txt", "models/somewhere/tokenizer", "--tokenizer DIR"):
        assert part in message
    assert "\n" not in message


def test_other_text_models_do_not_ask_the_hub_for_vit_l(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="--tokenizer DIR"):
        small().encode(["a"])


def test_name_without_owner_is_not_asked_of_the_hub(monkeypatch):
    for function in ("try_to_load_from_cache", "get_session", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, function, lambda *args, **kwargs: pytest.fail("asked the hub"))
    for version in ("dsdiff-shapes", "gpt2"):
        with pytest.raises(FileNotFoundError, match="--tokenizer DIR") as error:
            small(version=version).encode(["a"])
        assert "cannot be downloaded" not in str(error.value), version


def test_cached_files_of_the_hub_are_used(monkeypatch):
    cached = {"vocab.json", "merges.txt"}
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repo, name: str(SHAPES_TOKENIZER / name) if repo == "some/clip" and name in cached else None,
    )
    assert len(FrozenCLIPEmbedder("some/clip", text_config=SMALL).tokenizer) == 624


def test_directory_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        small(tokenizer=tmp_path)


def test_tokenizer_of_a_larger_model_is_refused():
    with pytest.raises(ValueError, match="624 tokens, the text model 120"):
        FrozenCLIPEmbedder(text_config=CONFIG, tokenizer=SHAPES_TOKENIZER).encode(["a"])


def test_bad_arguments():
    for options, message in (
        ({"version": "some/clip"}, "give text_config"),
        ({"text_config": {"hiden_size": 24}}, "no field 'hiden_size'"),
        ({"text_config": {"output_attentions": True}}, "output_attentions True is not supported"),
        ({"text_config": SMALL | {"hidden_act": "relu"}}, "hidden_act 'relu' is unknown: use quick_gelu or gelu"),
        ({"text_config": SMALL | {"num_attention_heads": 5}}, "multiple of num_attention_heads 5"),
        ({"text_config": SMALL | {"num_hidden_layers": 0}}, "num_hidden_layers must be a whole number"),
        ({"text_config": SMALL, "max_length": 78}, r"max_length 78 must lie in 2\.\.77"),
        ({"text_config": SMALL, "max_length": 1}, "max_length 1"),
    ):
        with pytest.raises(ValueError, match=message):
            FrozenCLIPEmbedder(**options)


def test_importing_the_encoder_imports_neither_transformers_nor_lightning():
    code = "import sys, ldm.modules.encoders.modules; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    slow = {"transformers", "pytorch_lightning", "huggingface_hub", "torchvision", "omegaconf"}
    assert "tokenizers" in done.stdout.split() and slow.isdisjoint(done.stdout.split())
