"""The model loader: every layout of a checkpoint, no second copy of the weights, and what it refuses."""

import json
import logging
import os
import pickle
import shutil
import stat
import tracemalloc
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

from ldm import checkpoint
from ldm.checkpoint import SCHEDULE_KEYS, read_weights, save_checkpoint
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import default, exists, get_obj_from_str, instantiate_from_config, load_model_from_config

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests/goldens"
SHAPES_TOKENIZER = ROOT / "models/ldm/shapes/tokenizer"
UNET_KEY = "model.diffusion_model.out.2.weight"
TEXT_CONFIG = {**json.loads((GOLDENS / "clip_text_tiny.json").read_text()), "vocab_size": 624}


@pytest.fixture
def config():
    return OmegaConf.load(GOLDENS / "tiny_ldm.yaml")


@pytest.fixture(scope="module")
def golden():
    """The tiny model's state dict in float32. Do not write into it: `dict(golden)` is a copy of the names."""
    return {key: value.float() for key, value in load_file(GOLDENS / "tiny_ldm.safetensors").items()}


def half(state):
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


def ema_name(key):
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def assert_holds(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert value.dtype == torch.float32, key
        torch.testing.assert_close(value, expected[key], rtol=1e-6 if key in SCHEDULE_KEYS else 0, atol=0)


# --- what can be read -------------------------------------------------------------------------------------


def test_every_layout_gives_the_same_model(config, golden, tmp_path):
    for name, write in (
        ("model.ckpt", lambda state, path: torch.save({"state_dict": state, "global_step": 7}, path)),
        ("model.pth", torch.save),
        ("model.pt", lambda state, path: torch.save({"state_dict": state}, path)),
        ("model.safetensors", save_file),
    ):
        for precision in ("float32", "float16"):
            write(half(golden) if precision == "float16" else golden, tmp_path / name)
            model = load_model_from_config(config, tmp_path / name)
            assert_holds(model, golden)  # the golden weights are exact in float16, the schedule is computed
            assert not model.training, (name, write, precision)
            assert model.device == torch.device("cpu"), (name, write, precision)


def test_content_tells_the_format_whatever_the_name(config, golden, tmp_path):
    for name, write in (("m.ckpt", save_file), ("m.safetensors", torch.save), ("m", save_file)):
        write(golden, tmp_path / name)
        assert_holds(load_model_from_config(config, tmp_path / name), golden)


def test_only_keys_that_are_names_are_read(config, golden, tmp_path):
    torch.save({**golden, 7: torch.zeros(1), ("a", 1): torch.zeros(1)}, tmp_path / "m.ckpt")
    assert_holds(load_model_from_config(config, tmp_path / "m.ckpt"), golden)


def test_model_node_alone_is_enough(config, golden):
    assert_holds(load_model_from_config(config.model, GOLDENS / "tiny_ldm.safetensors"), golden)


def test_plain_dict_config(config, golden):
    plain = OmegaConf.to_container(config)
    assert_holds(load_model_from_config(plain, GOLDENS / "tiny_ldm.safetensors"), golden)


def save_old(content, path):
    """Write a file as torch before 1.6 did."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def test_files_of_torch_before_1_6(config, golden, tmp_path):
    trained = {"state_dict": golden, "callbacks": {ModelCheckpoint: {"best": np.float64(2.0)}}, "epoch": 3}
    for name, content in (("m.ckpt", golden), ("m.bin", {"state_dict": golden}), ("last.ckpt", trained)):
        save_old(content, tmp_path / name)
        assert_holds(load_model_from_config(config, tmp_path / name), golden)


def test_old_files_run_no_code(config, golden, tmp_path):
    path, target = tmp_path / "m.ckpt", tmp_path / "executed"
    save_old({"state_dict": golden, "callbacks": _Exploit(target)}, path)
    assert "wants to run code (posix.system)" in refused(config, path)
    save_old(torch.nn.Linear(2, 2), path)  # torch's own, but no tensor
    assert "wants to run code" in refused(config, path)
    save_old(_Harmful(), path)
    assert "cannot be read" in refused(config, path)
    save_old(golden, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read" in refused(config, path)
    assert not target.exists()


def test_leftovers_of_other_trainers_and_the_rest_of_clip_are_ignored(config, golden, tmp_path):
    extra = (
        "denoiser.sigmas",
        "log_sigmas",
        "snr",
        "embedding_manager.string_to_param_dict.*",
        "embedding_manager.initial_embeddings.*",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.transformer.visual_projection.weight",
        "cond_stage_model.transformer.logit_scale",
        "cond_stage_model.transformer.vision_model.embeddings.class_embedding",
    )
    torch.save({"state_dict": golden | {name: torch.zeros(2) for name in extra}}, tmp_path / "m.ckpt")
    assert_holds(load_model_from_config(config, tmp_path / "m.ckpt"), golden)


def test_a_measured_factor_of_latents_must_be_the_configs(config, golden, tmp_path):
    own = config.model.params.get("scale_factor", 1.0)
    torch.save({"state_dict": golden | {"scale_factor": torch.tensor(own).half()}}, tmp_path / "m.ckpt")
    assert_holds(load_model_from_config(config, tmp_path / "m.ckpt"), golden)
    line = refused_state(config, golden | {"scale_factor": torch.tensor(1.1 * own)}, tmp_path)
    assert f"trained with scale_factor {1.1 * own:g}, and the config has {own:g}" in line
    for odd in (torch.ones(2), torch.tensor(float("nan"))):
        assert "scale_factor" in refused_state(config, golden | {"scale_factor": odd}, tmp_path)


def test_pointwise_convolutions_saved_as_matrices(config, golden, tmp_path):
    state, changed = dict(golden), 0
    for key, value in golden.items():
        if (".attn_1." in key and ".norm." not in key) or ".proj_in." in key:
            state[key] = value[:, :, 0, 0].clone() if value.ndim == 4 else value[:, None, None].clone()
            changed += 1
    assert changed > 8
    save_file(state, tmp_path / "m.safetensors")
    assert_holds(load_model_from_config(config, tmp_path / "m.safetensors"), golden)
    key = "first_stage_model.decoder.mid.attn_1.q.weight"
    assert key in refused_state(config, state | {key: state[key][:, :-1].clone()}, tmp_path)


def test_weights_that_are_not_finite_are_refused(config, golden, tmp_path):
    for key in (UNET_KEY, "first_stage_model.decoder.conv_out.bias"):
        for number in (float("nan"), float("inf"), -float("inf")):
            weight = golden[key].clone()
            weight.view(-1)[1] = number
            assert f"NaN or infinite numbers in {key}" in refused_state(config, golden | {key: weight}, tmp_path)


def test_schedule_need_not_be_in_the_file(config, golden, tmp_path):
    save_file({key: value for key, value in golden.items() if key not in SCHEDULE_KEYS}, tmp_path / "m.safetensors")
    assert_holds(load_model_from_config(config, tmp_path / "m.safetensors"), golden)


def test_dtype_is_that_of_the_weights_and_not_of_the_schedule(config):
    model = load_model_from_config(config, GOLDENS / "tiny_ldm.safetensors", dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert {getattr(model, key).dtype for key in SCHEDULE_KEYS} == {torch.float32}


def test_training_checkpoint_of_lightning(config, golden, tmp_path):
    trainer_state = {
        "epoch": 3,
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(1.0), "best": np.float64(2.0)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3), "step": np.int64(4)}}}],
        "lr_schedulers": defaultdict(list, {"base_lrs": [1e-4]}),
        "hyper_parameters": OmegaConf.create({"a": [1, {"b": 2}]}),
        "state_dict": golden,
    }
    torch.save(trainer_state, tmp_path / "last.ckpt")
    assert_holds(load_model_from_config(config, tmp_path / "last.ckpt"), golden)


def test_training_only_keys_are_ignored_by_name(config, golden, tmp_path, caplog):
    extra = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5, dtype=torch.int32),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "lvlb_weights": torch.zeros(1000),
        "logvar": torch.zeros(1000),
    }
    torch.save({"state_dict": golden | extra}, tmp_path / "m.ckpt")
    with caplog.at_level(logging.INFO):
        assert_holds(load_model_from_config(config, tmp_path / "m.ckpt", verbose=True), golden)
    assert all(key in caplog.text for key in extra)


# --- averaged weights -------------------------------------------------------------------------------------


@pytest.fixture
def averages(golden):
    return {key: value + 1 for key, value in golden.items() if key.startswith("model.")}


def test_full_set_of_averages_is_used(config, golden, averages, tmp_path):
    stored = {ema_name(key): value for key, value in averages.items()} | {"model_ema.decay": torch.tensor(0.999)}
    torch.save({"state_dict": golden | stored}, tmp_path / "m.ckpt")
    assert_holds(load_model_from_config(config, tmp_path / "m.ckpt"), golden | averages)
    assert_holds(load_model_from_config(config, tmp_path / "m.ckpt", use_ema=False), golden)


def test_averages_without_the_weights_themselves_are_the_weights(config, golden, averages, tmp_path):
    kept = {key: value for key, value in golden.items() if key not in averages}
    torch.save(kept | {ema_name(key): value for key, value in averages.items()}, tmp_path / "m.ckpt")
    for use_ema in (True, False):
        assert_holds(load_model_from_config(config, tmp_path / "m.ckpt", use_ema=use_ema), golden | averages)


def test_incomplete_averages_are_not_used(config, golden, averages, tmp_path, caplog):
    stored = {ema_name(key): value for key, value in averages.items() if key != UNET_KEY}
    torch.save({"state_dict": golden | stored}, tmp_path / "m.ckpt")
    with caplog.at_level(logging.WARNING):
        assert_holds(load_model_from_config(config, tmp_path / "m.ckpt"), golden)
    assert f"averages not used, those of {UNET_KEY} are missing" in caplog.text


def test_checkpoint_of_our_own_training(config, golden, tmp_path):
    """The names under which LitEma keeps averages are those that the loader looks for."""
    with torch.device("meta"):
        training = instantiate_from_config(
            {"target": config.model.target, "params": {**config.model.params, "use_ema": True}}
        )
    state = {key: torch.zeros(value.shape) for key, value in training.state_dict().items()} | golden
    averages = {key: torch.full_like(value, 2.0) for key, value in golden.items() if key.startswith("model.")}
    for key, value in averages.items():
        assert ema_name(key) in state
        state[ema_name(key)] = value
    torch.save({"state_dict": state}, tmp_path / "m.ckpt")
    config.model.params.use_ema = True
    assert_holds(load_model_from_config(config, tmp_path / "m.ckpt"), golden | averages)


# --- memory -----------------------------------------------------------------------------------------------


def mapped_ranges(path):
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_float32_weights_are_used_where_they_lie_in_the_file(config, golden, tmp_path):
    for name in ("model.safetensors", "model.ckpt"):
        path = tmp_path / name
        (save_file if name.endswith("safetensors") else torch.save)(golden, path)
        model = load_model_from_config(config, path)
        ranges = mapped_ranges(path.resolve())
        for key, parameter in model.named_parameters():
            assert any(start <= parameter.data_ptr() < end for start, end in ranges), key


def test_conversion_keeps_no_second_copy(config, golden, tmp_path, monkeypatch):
    """Nothing of a converted file stays alive beside the model."""
    save_file(half(golden), tmp_path / "m.safetensors")
    alive = []

    def remember(path):
        tensors = read_weights(path)
        alive.extend(StorageWeakRef(value.untyped_storage()) for value in tensors.values())
        return tensors

    monkeypatch.setattr("ldm.util.read_weights", remember)
    model = load_model_from_config(config, tmp_path / "m.safetensors")
    assert alive
    assert all(reference.expired() for reference in alive)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


# --- the text encoder and its tokenizer -------------------------------------------------------------------


@pytest.fixture
def with_text(config, golden, tmp_path):
    """A config with a text encoder, and a checkpoint with the newer names of its weights."""
    config.model.params.cond_stage_config = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"text_config": TEXT_CONFIG},
    }
    text = FrozenCLIPEmbedder(text_config=TEXT_CONFIG).state_dict()
    renamed = {
        "cond_stage_model." + key.replace("text_model.", ""): value
        for key, value in text.items()
        if not key.endswith("position_ids")
    }
    save_file(golden | renamed, tmp_path / "model.safetensors")
    return config, tmp_path / "model.safetensors"


def test_tokenizer_beside_the_checkpoint(with_text):
    config, path = with_text
    for place in ("tokenizer", "."):
        shutil.copytree(SHAPES_TOKENIZER, path.parent / place, dirs_exist_ok=True)
        model = load_model_from_config(config, path)
        assert model.get_learned_conditioning(["a red circle"]).shape == (1, 77, 24), place
        (path.parent / place / "vocab.json").unlink()  # so that the next place is needed


def test_tokenizer_of_ones_own(with_text):
    config, path = with_text
    model = load_model_from_config(config, path, tokenizer=SHAPES_TOKENIZER)
    assert model.get_learned_conditioning(["a red circle"]).isfinite().all()
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_model_from_config(config, path, tokenizer=path.parent / "nowhere")


def test_tokenizer_for_a_model_without_one(config):
    with pytest.raises(ValueError, match="Identity takes none"):
        load_model_from_config(config, GOLDENS / "tiny_ldm.safetensors", tokenizer=SHAPES_TOKENIZER)


# --- files that do not fit --------------------------------------------------------------------------------


def refused(config, path, error=ValueError):
    with pytest.raises(error) as caught:
        load_model_from_config(config, path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def refused_state(config, state, tmp_path):
    save_file(state, tmp_path / "m.safetensors")
    return refused(config, tmp_path / "m.safetensors")


def test_missing_and_unexpected_keys_are_named(config, golden, tmp_path):
    state = dict(golden) | {"model.diffusion_model.extra": torch.zeros(1)}
    del state[UNET_KEY]
    message = refused_state(config, state, tmp_path)
    assert f"missing keys: 1 ({UNET_KEY})" in message
    assert "unexpected keys: 1 (model.diffusion_model.extra)" in message


def test_many_keys_are_counted(config, golden, tmp_path):
    vae = [key for key in golden if key.startswith("first_stage_model.")]
    message = refused_state(config, {key: golden[key] for key in golden if key not in vae}, tmp_path)
    assert f"missing keys: {len(vae)} (" in message
    assert f"and {len(vae) - 4} more" in message


def test_other_shape_is_named_with_both_shapes(config, golden, tmp_path):
    message = refused_state(config, golden | {UNET_KEY: torch.zeros(4, 9, 3, 3)}, tmp_path)
    for part in (UNET_KEY, "[4, 9, 3, 3]", "[4, 32, 3, 3]"):
        assert part in message


def test_context_weight_with_another_number_of_dimensions(config, golden, tmp_path):
    for shape in ((), (32,), (32, 24, 1)):
        key = next(key for key in golden if key.endswith("attn2.to_k.weight"))
        assert key in refused_state(config, golden | {key: torch.zeros(shape)}, tmp_path), shape


def test_weights_must_be_floating_point(config, golden, tmp_path):
    for key in (UNET_KEY, "first_stage_model.decoder.conv_out.bias"):
        for dtype in (torch.int64, torch.bool, torch.complex64):
            torch.save(golden | {key: golden[key].to(dtype)}, tmp_path / "m.ckpt")
            kinds = f"{key} is {str(dtype).removeprefix('torch.')}, not float32"
            assert f"does not fit the config: {kinds}" in refused(config, tmp_path / "m.ckpt"), (key, dtype)


def test_integers_of_the_model_must_be_integers():
    model = torch.nn.BatchNorm1d(3)  # counts its batches
    state = model.state_dict()
    state["num_batches_tracked"] = state["num_batches_tracked"].float()
    with pytest.raises(ValueError, match="num_batches_tracked is float32, not int64"):
        checkpoint.fill(model, state, "m.ckpt")


def test_weights_under_todays_names_must_be_floating_point_too():
    model = FrozenCLIPEmbedder(text_config=TEXT_CONFIG)
    state = {key.replace("text_model.", ""): value.int() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"token_embedding\.weight is int32, not float32"):
        checkpoint.fill(model, state, "m.ckpt")


STRANGE = {
    "sparse": lambda: torch.ones(4, 8).to_sparse(),
    "csr": lambda: torch.ones(4, 8).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4, 8), 0.1, 0, torch.qint8),
    "empty": lambda: torch.ones(4, 8, device="meta"),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, about these kinds of tensors
def test_tensors_must_be_plain(config, golden, tmp_path):
    for key in (UNET_KEY, "alphas_cumprod"):
        for kind in STRANGE:
            torch.save(golden | {key: STRANGE[kind]()}, tmp_path / "m.ckpt")
            assert key in refused(config, tmp_path / "m.ckpt"), (key, kind)


def test_schedule_must_be_floating_point(config, golden, tmp_path):
    for dtype in (torch.int64, torch.bool, torch.complex64):
        torch.save(golden | {"alphas_cumprod": golden["alphas_cumprod"].to(dtype)}, tmp_path / "m.ckpt")
        assert "alphas_cumprod are no floating-point numbers" in refused(config, tmp_path / "m.ckpt"), dtype


def test_schedule_of_nan_is_another_one(config, golden, tmp_path):
    schedule = torch.full_like(golden["alphas_cumprod"], torch.nan)
    assert "another noise schedule" in refused_state(config, golden | {"alphas_cumprod": schedule}, tmp_path)


def misfit(config, golden, tmp_path, metadata):
    path = tmp_path / "m.safetensors"
    save_checkpoint(golden | {UNET_KEY: torch.zeros(1)}, path, metadata=metadata)
    return refused(config, path)


HINT = "it was written for 'configs/shapes/txt2img.yaml', give it with --config"


def test_config_in_the_header_of_a_misfit_is_named(config, golden, tmp_path):
    message = misfit(config, golden, tmp_path, {"config": "configs/shapes/txt2img.yaml", "steps": 3})
    assert message.endswith(HINT) and "does not fit the config" in message


def test_config_in_the_header_is_named_for_another_schedule(config, golden, tmp_path):
    config.model.params.linear_end = 0.02
    save_checkpoint(golden, tmp_path / "m.safetensors", metadata={"config": "configs/shapes/txt2img.yaml"})
    message = refused(config, tmp_path / "m.safetensors")
    assert message.endswith(HINT) and "another noise schedule" in message


def test_header_without_config_gives_no_hint(config, golden, tmp_path):
    for metadata in (None, {"steps": 3}, {"config": ""}):
        assert "--config" not in misfit(config, golden, tmp_path, metadata), metadata


def test_config_in_use_is_no_hint(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    own = OmegaConf.load("configs/shapes/txt2img.yaml")
    own.model.params.cond_stage_config.params.tokenizer = str(SHAPES_TOKENIZER.resolve())
    assert "--config" not in misfit(own, golden, tmp_path, {"config": "configs/shapes/txt2img.yaml"})


def test_any_config_in_the_header_leaves_one_line(config, golden, tmp_path):
    for name in ("two\nlines.yaml", "no\0name.yaml", "x" * 5000 + ".yaml", "tests/goldens"):
        assert f"written for {name!r}, give" in misfit(config, golden, tmp_path, {"config": name}), name


def test_config_in_the_header_that_cannot_be_used(config, golden, tmp_path):
    for text in ("", "[1]", "model: 3", "{", "model: {params: {timesteps: 5}}", "\0"):
        (tmp_path / "c.yaml").write_text(text)
        assert "c.yaml', give it with" in misfit(config, golden, tmp_path, {"config": tmp_path / "c.yaml"}), text


def test_other_architectures_are_recognised(config, tmp_path):
    for key, what in (
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers"),
        ("decoder.mid.block_1.conv1.weight", "autoencoder alone: give it with --vae_ckpt"),
        ("text_model.encoder.layers.0.mlp.fc1.bias", "text encoder alone"),
        ("string_to_param", "embedding of textual inversion"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("conditioner.embedders.0.model.positional_embedding", "refiner"),
        ("model.diffusion_model.double_blocks.0.x", "Flux"),
        ("cond_stage_model.model.positional_embedding", "Stable Diffusion 2"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"),
        ("lora_unet_down.alpha", "LoRA"),
        ("model.out.2.weight_quantizer.alpha", "cali_ckpt"),
    ):
        assert what in refused_state(config, {key: torch.zeros(1)}, tmp_path), (key, what)


def test_context_of_another_text_encoder_is_recognised(config, golden, tmp_path):
    wide = {key: torch.zeros(len(value), 1024) for key, value in golden.items() if key.endswith("attn2.to_k.weight")}
    assert "text encoder has 1024 channels, the config's 24" in refused_state(config, golden | wide, tmp_path)


def test_models_that_take_more_than_latents_are_recognised(config, golden, tmp_path):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    for channels, what in ((9, "inpainting"), (8, "by instructions"), (5, "depth")):
        assert what in refused_state(config, golden | {key: torch.zeros(32, channels, 3, 3)}, tmp_path), channels


def test_other_schedule_is_refused(config, golden, tmp_path):
    config.model.params.linear_end = 0.02
    assert "another noise schedule" in refused_state(config, golden, tmp_path)


# --- files that cannot be read ----------------------------------------------------------------------------


class _Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class _Harmful:
    """Call a function of torch that makes no tensor."""

    def __reduce__(self):
        return torch.hub.set_dir, ("elsewhere",)


def test_hostile_pickle_is_refused_and_not_run(config, golden, tmp_path):
    path, target = tmp_path / "m.ckpt", tmp_path / "executed"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "callbacks": _Exploit(target)}, path)
    assert "wants to run code (posix.system)" in refused(config, path)
    assert not target.exists()


def test_bare_pickle_is_refused_and_not_run(config, tmp_path):
    path, target = tmp_path / "m.ckpt", tmp_path / "executed"
    path.write_bytes(pickle.dumps(_Exploit(target)))
    assert "no torch zip file" in refused(config, path)
    assert not target.exists()


def test_whole_pickled_model_is_refused(config, tmp_path):
    torch.save(FrozenCLIPEmbedder(text_config=TEXT_CONFIG, device="meta"), tmp_path / "m.pt")
    assert "wants to run code" in refused(config, tmp_path / "m.pt")


def test_truncated_file(config, golden, tmp_path):
    for keep in (0, 100, 0.5, 0.999):
        for name in ("m.ckpt", "m.safetensors"):
            path = tmp_path / name
            (save_file if name.endswith("safetensors") else torch.save)({UNET_KEY: golden[UNET_KEY]}, path)
            whole = path.read_bytes()
            path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
            assert ("is empty" if keep == 0 else "truncated") in refused(config, path), (keep, name)


def test_files_that_would_take_more_memory_than_they_are(config, golden, tmp_path):
    whole = tmp_path / "whole.ckpt"
    torch.save(golden, whole)
    packed, huge, header = (tmp_path / name for name in ("packed.ckpt", "huge.ckpt", "header.safetensors"))
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name) + (bytes(10**8) if name.endswith("data.pkl") else b""))
    with zipfile.ZipFile(huge, "w") as other:
        other.writestr("archive/data.pkl", bytes(65 * 2**20))
    header.write_bytes((17 * 2**20).to_bytes(8, "little") + b"{" + bytes(100))
    for path, message in ((packed, "compressed"), (huge, "pickle of more than 64 MB"), (header, "more than 16 MB")):
        tracemalloc.start()
        assert message in refused(config, path)
        assert tracemalloc.get_traced_memory()[1] < 2 * 10**6, path
        tracemalloc.stop()


def test_a_hole_of_zeros_in_a_file_is_found(config, golden, tmp_path):
    path = tmp_path / "hole.ckpt"
    torch.save(golden, path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    path.write_bytes(content)
    assert "checksum" in refused(config, path)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # such files have wrong sums everywhere, and are whole
    try:
        torch.save(golden, path)
    finally:
        torch.serialization.set_crc32_options(before)
    load_model_from_config(config, path)


def test_arbitrary_bytes(config, tmp_path):
    for name in ("m.ckpt", "m.safetensors"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 40)
        assert "corrupt" in refused(config, tmp_path / name), name


def test_zip_that_is_no_checkpoint(config, tmp_path):
    with zipfile.ZipFile(tmp_path / "m.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "cannot be read" in refused(config, tmp_path / "m.ckpt")


def test_file_without_named_tensors(config, tmp_path):
    for content, message in (
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({0: torch.zeros(1)}, "holds no tensors"),
        ([torch.zeros(1)], "holds a list"),
    ):
        torch.save(content, tmp_path / "m.pth")
        assert message in refused(config, tmp_path / "m.pth"), (content, message)


def test_paths_that_are_no_checkpoint(config, tmp_path):
    (tmp_path / "weights.dat").write_bytes(b"x")
    (tmp_path / "folder.ckpt").mkdir()
    assert "no checkpoint at" in refused(config, tmp_path / "absent.ckpt", FileNotFoundError)
    assert "not a file" in refused(config, tmp_path / "folder.ckpt")
    assert "must end in .ckpt, .pt, .pth, .bin, .safetensors" in refused(config, tmp_path / "weights.dat")


# --- writing ----------------------------------------------------------------------------------------------


def test_saved_model_can_be_loaded(config, golden, tmp_path):
    path = tmp_path / "new" / "m.safetensors"
    save_checkpoint(load_model_from_config(config, GOLDENS / "tiny_ldm.safetensors"), path, metadata={"steps": 3})
    stored = load_file(path)
    assert {value.dtype for key, value in stored.items() if key not in SCHEDULE_KEYS} == {torch.float16}
    assert {stored[key].dtype for key in SCHEDULE_KEYS} == {torch.float32}
    with safe_open(path, "pt") as file:
        assert file.metadata()["steps"] == "3"
    assert_holds(load_model_from_config(config, path), golden)


def test_model_can_be_saved_over_its_own_file(config, golden, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(golden, path)
    model = load_model_from_config(config, path)
    save_checkpoint(model, path, dtype=torch.float32)
    assert_holds(model, golden)
    assert_holds(load_model_from_config(config, path), golden)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o007, 0o660)):
        before = os.umask(umask)
        try:
            save_checkpoint({"w": torch.ones(1)}, tmp_path / "m.safetensors")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == mode, (umask, mode)


def test_integers_stay_integers(tmp_path):
    save_checkpoint({"ids": torch.arange(5), "w": torch.ones(2, 3).T}, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")
    assert stored["ids"].tolist() == [0, 1, 2, 3, 4]
    assert (stored["w"].dtype, stored["w"].shape) == (torch.float16, (3, 2))


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_checkpoint({"w": torch.ones(1)}, path)

    def full_disk(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint({"w": torch.zeros(1)}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]
    assert load_file(path)["w"].item() == 1


def test_only_safetensors_are_written(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_checkpoint({"w": torch.ones(1)}, tmp_path / "m.ckpt")


# --- configs ----------------------------------------------------------------------------------------------


def test_sd_v1_has_the_keys_of_its_public_checkpoint():
    config = OmegaConf.load(ROOT / "configs/stable-diffusion/v1-inference.yaml")
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    expected = json.loads((GOLDENS / "sd_v1_state_dict.json").read_text())["keys"]
    assert len(expected) == 1143
    assert expected == {
        key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in model.state_dict().items()
    }


def test_instantiate_passes_nested_nodes_on():
    layer = instantiate_from_config({"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 2}})
    assert layer.weight.shape == (2, 3)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity", "params": None}), torch.nn.Identity)
    unet = OmegaConf.load(GOLDENS / "q_unet.yaml")
    target = "ldm.models.diffusion.ddpm.DiffusionWrapper"
    nested = instantiate_from_config(
        OmegaConf.create({"target": target, "params": {"unet_config": unet, "conditioning_key": "crossattn"}})
    )
    assert nested.diffusion_model.model_channels == unet.params.model_channels


def test_bad_configs():
    for config, message in (
        ("torch.nn.Identity", "got str"),
        ({"params": {}}, "has no 'target'"),
        ({"target": "ldm.no_such_module.Thing"}, "no module named 'ldm.no_such_module'"),
        *(
            ({"target": target}, "is no class of ldm or of torch.nn: refused")
            for target in (
                *("Identity", "no_such_package.Thing", "os.system", "builtins.dict", None, 3, ["ldm.util.exists"]),
                *("ldm.fileio.Path", "ldm.util.exists", "torch.nn.functional.relu", "torch.nnx.Thing"),
            )
        ),
        ({"target": "ldm.checkpoint.torch.load"}, "no module named 'ldm.checkpoint.torch'"),
        ({"target": "torch.nn.Linear", "params": {"in_features": "1", "out_features": 1}}, "in_features is '1'"),
        ({"target": "torch.nn.NoSuchLayer"}, "has no 'NoSuchLayer'"),
        ({"target": "torch.nn.Linear", "params": [1]}, "must be a mapping"),
        ({"target": "torch.nn.Linear", "params": {"in_features": 1}}, "'out_features'"),
        ({"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1, "size": 2}}, "'size'"),
    ):
        with pytest.raises(ValueError, match=message):
            instantiate_from_config(config)


def test_small_helpers():
    assert exists(0) and not exists(None)
    assert (default(None, 3), default(None, lambda: 4), default(0, 3)) == (3, 4, 0)
    assert get_obj_from_str("torch.nn.Identity") is torch.nn.Identity
    with pytest.raises(ValueError, match="not a dotted path"):
        get_obj_from_str("Identity")
