"""Folders of diffusers: against what diffusers and transformers compute with pipelines that they saved, both ways."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.diffusers_config import config_of_folder
from ldm.diffusers_folder import choose_weights, files_read, read_vae
from ldm.diffusers_names import PREFIXES, weight_names
from ldm.diffusers_save import save_folder
from ldm.modules.diffusionmodules.util import guidance_embedding
from ldm.util import instantiate_from_config, load_model_from_config

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "models/ldm/shapes/tokenizer"
TOLERANCE = 1e-4
# An ordinary UNet, one of a single level, and one with heads of equal size and linear projections.
UNETS = {
    "usual": {},
    "one level": {"block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",)},
    "heads": {"attention_head_dim": (2, 4), "use_linear_projection": True, "layers_per_block": 1},
    "guided": {"time_cond_proj_dim": 8, "norm_num_groups": 16},
}


def their_unet(**more):
    sizes = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    } | more
    kinds = [kind.replace("Down", "Up") for kind in reversed(sizes["down_block_types"])]
    return diffusers.UNet2DConditionModel(up_block_types=kinds, **sizes)


def their_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        scaling_factor=0.3,
    )


def their_text(kind="CLIPTextModel", **more):
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPTextConfig(vocab_size=624, projection_dim=24, **sizes | more)
    if kind == "CLIPModel":
        vision = {**sizes, "image_size": 8, "patch_size": 4}
        config = transformers.CLIPConfig(text_config=config.to_dict(), vision_config=vision, projection_dim=24)
    return getattr(transformers, kind)(config)


def randomise(network):
    """Let no weight be zero, so that each of them changes the output."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return network.eval()


def their_pipeline(text="CLIPTextModel", scheduler=None, **unet):
    scheduler = scheduler or diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    return diffusers.StableDiffusionPipeline(
        unet=randomise(their_unet(**unet)),
        vae=randomise(their_vae()),
        text_encoder=randomise(their_text(text)),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(TOKENIZER),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def pipeline():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return their_pipeline()


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def load(folder, **more):
    return load_model_from_config(config_of_folder(folder, "theirs"), folder, **more)


@torch.no_grad()
def assert_alike(model, theirs, tolerance=TOLERANCE):
    """Compare all three networks of a LatentDiffusion with those of a pipeline."""
    unet = model.model.diffusion_model
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 700]), torch.randn(2, 5, 24)
    guidance = torch.tensor([1.5, 7.5]) if unet.time_cond_proj_dim else None
    embedded = None if guidance is None else guidance_embedding(guidance, unet.time_cond_proj_dim)
    wanted = theirs.unet(x, t, context, timestep_cond=embedded).sample
    assert (unet(x, t, context, guidance=guidance) - wanted).abs().max() < tolerance
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = theirs.vae.encode(pictures).latent_dist
    assert (model.first_stage_model.encode(pictures).mean - posterior.mean).abs().max() < tolerance
    wanted = theirs.vae.decode(posterior.mean).sample
    assert (model.first_stage_model.decode(posterior.mean) - wanted).abs().max() < tolerance
    ids = torch.randint(0, 600, (2, 77))
    text = getattr(theirs.text_encoder, "text_model", theirs.text_encoder)
    wanted = text(ids).last_hidden_state
    assert (model.cond_stage_model.transformer(ids) - wanted).abs().max() < tolerance


# --- reading ----------------------------------------------------------------------------------------------


def test_networks_of_a_pipeline_give_its_outputs(tmp_path):
    for name, unet in UNETS.items():
        theirs = their_pipeline(**unet)
        theirs.save_pretrained(tmp_path / name)
        assert_alike(load(tmp_path / name), theirs)


def test_text_encoders_with_projections_and_whole_clips(tmp_path):
    for kind in ("CLIPTextModelWithProjection", "CLIPModel"):
        theirs = their_pipeline()
        theirs.save_pretrained(tmp_path / kind)
        theirs.text_encoder = randomise(their_text(kind))
        shutil.rmtree(tmp_path / kind / "text_encoder")
        theirs.text_encoder.save_pretrained(tmp_path / kind / "text_encoder")
        assert_alike(load(tmp_path / kind), theirs)


def test_files_of_every_kind(pipeline, folder, tmp_path):
    """Half precision, variants, shards, .bin; a plain file of whole precision comes first."""
    kinds = {"fp16": {"variant": "fp16"}, "bin": {"safe_serialization": False}, "shards": {"max_shard_size": "40KB"}}
    for name, arguments in kinds.items():
        place = tmp_path / name
        shutil.copytree(folder, place)
        for network in PREFIXES:
            for path in files_read(folder, (network,)) if network != "vae" else files_read(folder / "vae", ("vae",)):
                (place / network / path.name).unlink()
            getattr(pipeline, network).save_pretrained(place / network, **arguments)
        assert_alike(load(place), pipeline)
    assert any(".index.json" in path.name for path in (tmp_path / "shards/unet").iterdir())
    assert any("fp16" in path.name for path in (tmp_path / "fp16/unet").iterdir())


def test_which_file_is_read():
    stem = "diffusion_pytorch_model"
    for names, wanted in (
        ([f"{stem}.fp16.safetensors", f"{stem}.safetensors", f"{stem}.bin"], f"{stem}.safetensors"),
        ([f"{stem}.non_ema.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bin"], f"{stem}.fp16.safetensors"),
        ([f"{stem}.bin", f"{stem}.fp16.bin", "config.json"], f"{stem}.bin"),
        ([f"{stem}-00001-of-00002.safetensors", f"{stem}.safetensors.index.json"], f"{stem}.safetensors.index.json"),
        ([f"{stem}.safetensors.index.fp16.json"], f"{stem}.safetensors.index.fp16.json"),
        (["config.json", "flax_model.msgpack", "model.onnx"], None),
    ):
        assert choose_weights("unet", names) == wanted, names
    assert choose_weights("text_encoder", ["pytorch_model.bin", "model.fp16.safetensors"]) == "model.fp16.safetensors"


def test_attention_of_old_autoencoders(pipeline, folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(path).items():
        for today, before in old.items():
            name = name.replace(f"attentions.0.{today}.", f"attentions.0.{before}.")
        tensors[name] = tensor
    save_file(tensors, path)
    assert any("proj_attn" in name for name in tensors)
    assert_alike(load(folder), pipeline)


def test_sd_v1_is_described_as_by_compvis(tmp_path):
    """Names and shapes of the folder of Stable Diffusion v1's sizes are those of the public checkpoint."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        widths = (128, 256, 512, 512)
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = diffusers.AutoencoderKL(block_out_channels=widths, layers_per_block=2, **kinds)
    for name, network in (("unet", unet), ("vae", vae)):
        network.save_config(tmp_path / name)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder/config.json").write_text('{"model_type": "clip_text_model", "hidden_act": "quick_gelu"}')
    config = config_of_folder(tmp_path, "sd")
    with torch.device("meta"):
        model = instantiate_from_config(config["model"])
    expected = json.loads((ROOT / "tests/goldens/sd_v1_state_dict.json").read_text())["keys"]
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == {
        key: entry["shape"] for key, entry in expected.items()
    }
    for name, theirs in (("unet", unet), ("vae", vae)):
        ours = {k.removeprefix(PREFIXES[name]) for k in expected if k.startswith(PREFIXES[name])}
        assert sorted(weight_names(name, ours).values()) == sorted(theirs.state_dict())
    assert config["sampling"]["height"] == 512


# --- configs ----------------------------------------------------------------------------------------------


def edited(folder, part, **entries):
    path = folder / part
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_scheduler_becomes_the_process_of_noise(pipeline, folder):
    for schedule, prediction in (
        ("linear", "v_prediction"),
        ("scaled_linear", "epsilon"),
        ("squaredcos_cap_v2", "epsilon"),
    ):
        kind = {"prediction_type": prediction, "rescale_betas_zero_snr": prediction == "v_prediction"}
        theirs = diffusers.DDIMScheduler(beta_schedule=schedule, beta_end=0.013, **kind)
        theirs.save_pretrained(folder / "scheduler")
        model = load(folder)
        assert model.parameterization == {"epsilon": "eps", "v_prediction": "v"}[prediction]
        assert (model.alphas_cumprod - theirs.alphas_cumprod).abs().max() < 1e-6, schedule
        assert model.scale_factor == 0.3
    for entry in ({"prediction_type": "sample"}, {"trained_betas": [0.1]}):
        theirs.save_pretrained(folder / "scheduler")
        edited(folder, "scheduler/scheduler_config.json", **entry)
        with pytest.raises(ValueError, match=f"scheduler: {next(iter(entry))}.* is not supported"):
            load(folder)


def test_other_architectures_are_refused_by_name(folder):
    original = {part: (folder / part).read_text() for part in ("unet/config.json", "model_index.json")}
    for part, entries, what in (
        ("unet/config.json", {"cross_attention_dim": 1024}, "Stable Diffusion 2"),
        ("unet/config.json", {"addition_embed_type": "text_time", "cross_attention_dim": 2048}, "Stable Diffusion XL"),
        ("unet/config.json", {"in_channels": 9}, "an inpainting model"),
        ("unet/config.json", {"in_channels": 8}, "by instructions"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "Stable Diffusion XL"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "Stable Diffusion 3"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "Flux"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type 'fourier' is not supported"),
        ("unet/config.json", {"block_out_channels": [32, 65]}, "channels are not supported"),
        ("unet/config.json", {"block_out_channels": None}, "cannot be read"),
    ):
        edited(folder, part, **entries)
        with pytest.raises(ValueError, match=what) as caught:
            load(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        for name, text in original.items():
            (folder / name).write_text(text)


def test_damaged_folders(folder):
    for part, content, what in (
        ("unet/config.json", "{", "is damaged"),
        ("vae/config.json", "[]", "is damaged"),
        ("text_encoder/config.json", None, "no config.json in"),
        ("unet/diffusion_pytorch_model.safetensors", None, "no weights in"),
        ("unet/diffusion_pytorch_model.safetensors", "", "is empty"),
    ):
        kept = (folder / part).read_bytes()
        (folder / part).unlink()
        if content is not None:
            (folder / part).write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=what):
            load(folder)
        (folder / part).write_bytes(kept)
    index = folder / "unet/diffusion_pytorch_model.safetensors"
    index.rename(folder / "elsewhere.safetensors")
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}})
    )
    with pytest.raises(ValueError, match="files beside it"):
        load(folder)


# --- another autoencoder ----------------------------------------------------------------------------------


def test_autoencoder_of_another_file_in_every_layout(pipeline, folder, tmp_path):
    other = randomise(their_vae())
    other.save_pretrained(tmp_path / "vae")
    model = load(folder, vae_ckpt=tmp_path / "vae")
    state = model.first_stage_model.state_dict()
    save_file(state, tmp_path / "alone.safetensors")
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(())}}, tmp_path / "alone.ckpt")
    save_file({f"first_stage_model.{k}": v for k, v in state.items()}, tmp_path / "whole.safetensors")
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(tmp_path / "vae", tmp_path / "pipeline/vae")
    theirs = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        wanted = other.decode(z).sample
        for path in ("vae", "alone.safetensors", "alone.ckpt", "whole.safetensors", "pipeline", theirs):
            decoded = load(folder, vae_ckpt=tmp_path / path).first_stage_model.decode(z)
            assert (decoded - wanted).abs().max() < TOLERANCE, path
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="holds no autoencoder"):
        read_vae(tmp_path / "none.safetensors", model)
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="another autoencoder than the model's"):
        load(folder, vae_ckpt=tmp_path / "other.safetensors")


# --- writing ----------------------------------------------------------------------------------------------


def test_written_folder_gives_our_outputs_in_diffusers(folder, tmp_path):
    model = load(folder, tokenizer=TOKENIZER)
    config = config_of_folder(folder, "theirs")
    ddconfig = config["model"]["params"]["first_stage_config"]["params"]["ddconfig"]
    save_folder(model, ddconfig, tmp_path / "ours")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert_alike(model, theirs)
    assert (theirs.scheduler.alphas_cumprod - model.alphas_cumprod).abs().max() < 1e-6
    assert theirs.scheduler.config.prediction_type == "epsilon"
    prompt = "a red circle above a blue square"
    tokens = theirs.tokenizer(prompt, padding="max_length", max_length=theirs.tokenizer.model_max_length)["input_ids"]
    assert tokens == model.cond_stage_model.tokenize([prompt])[0].tolist()
    ends = [theirs.text_encoder.config.bos_token_id, theirs.text_encoder.config.eos_token_id]
    assert ends == [tokens[0], theirs.tokenizer.eos_token_id]
    again = load(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="is there already"):
        save_folder(model, ddconfig, tmp_path / "ours")


def test_a_failed_write_leaves_nothing(folder, tmp_path):
    model = load(folder, tokenizer=TOKENIZER)
    with pytest.raises(KeyError):
        save_folder(model, {}, tmp_path / "ours")
    with pytest.raises(ValueError, match="averaging"):
        save_folder(model, {"attn_resolutions": [8]}, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
