"""LoRA files: against what diffusers and peft compute with files that they wrote, and by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.diffusers_names import unet_names
from ldm.lora import layer_shapes, merge_lora, read_lora
from ldm.lora_names import TEXT, UNET
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.low_rank import BranchedLayer, LowRankBranch
from ldm.util import instantiate_from_config

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
FILES = {
    "lora_kohya": GOLDENS / "lora_kohya.safetensors",
    "lora_diffusers": GOLDENS / "lora_diffusers.safetensors",
    "lora_peft": GOLDENS / "lora_peft" / "adapter_model.safetensors",
}
SCALES = {"lora_kohya": 0.7, "lora_diffusers": 0.7, "lora_peft": 1.0}
PROJ, QUERY = f"{UNET}input_blocks.1.1.proj_in", f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"


class Model(nn.Module):
    """The part of a LatentDiffusion that a LoRA changes."""

    def __init__(self):
        super().__init__()
        unet = instantiate_from_config(OmegaConf.load(GOLDENS / "q_unet.yaml"))
        weights = torch.load(GOLDENS / "q_cali_w4a8.pth", weights_only=True)
        unet.load_state_dict({name: weights[f"model.{name}"] for name in unet.state_dict()})
        self.model = nn.Module()
        self.model.diffusion_model = unet
        config = json.loads((GOLDENS / "clip_text_tiny.json").read_text())
        self.cond_stage_model = FrozenCLIPEmbedder("tiny", text_config=config)
        text = load_file(GOLDENS / "clip_text_tiny.safetensors")
        tensors = {
            f"transformer.text_model.{n.split('text_model.', 1)[1]}": t for n, t in text.items() if "text_model." in n
        }
        self.cond_stage_model.load_state_dict(tensors)
        self.eval()

    @property
    def shapes(self):
        return layer_shapes(self.model.diffusion_model, self.cond_stage_model)

    @torch.no_grad()
    def outputs(self, golden):
        unet = self.model.diffusion_model(golden["x"], golden["t"], context=golden["context"])
        return {"unet": unet, "text": self.cond_stage_model.transformer(golden["ids"])}


@pytest.fixture
def model():
    return Model()


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDENS / "lora.safetensors")


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def factors(shape, rank, *, generator=None):
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    return torch.randn(rank, *shape[1:], generator=generator), up


def write(folder, tensors, name="lora.safetensors", **metadata):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name, metadata=metadata or None)
    return folder / name


# --- against diffusers and peft ----------------------------------------------------------------------------


def test_merged_files_give_what_diffusers_and_peft_compute(golden):
    before = {part: golden[f"none/{part}"] for part in ("unet", "text")}
    plain = Model().outputs(golden)
    assert all(relative(plain[part], before[part]) < 1e-5 for part in before)
    for name, path in FILES.items():
        model = Model()
        changes = read_lora(path, model.shapes)
        merge_lora(model, changes, SCALES[name])
        outputs = model.outputs(golden)
        for part in before:
            if f"{name}/{part}" in golden:
                expected = golden[f"{name}/{part}"]
                assert relative(before[part], expected) > 0.05, "the LoRA changes something"
                assert relative(outputs[part], expected) < 2e-5, (name, part)
        unet = {layer for layer in model.shapes if layer.startswith(UNET)}
        assert unet <= set(changes), "convolutions, shortcuts and time embeddings included"


@pytest.mark.slow
def test_all_names_of_a_unet_are_those_of_diffusers(model):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )
    ours = {name.rpartition(".")[0] for name in model.model.diffusion_model.state_dict()}
    theirs = {name.rpartition(".")[0] for name in unet.state_dict()}
    assert sorted(unet_names(ours).values()) == sorted(theirs)


def test_names_of_stable_diffusion_v1():
    keys = json.loads((GOLDENS / "sd_v1_state_dict.json").read_text())["keys"]
    modules = {key.removeprefix(UNET).rpartition(".")[0] for key in keys if key.startswith(UNET)}
    names = unet_names(modules)
    assert len(set(names.values())) == len(modules)
    expected = {
        "input_blocks.1.1.transformer_blocks.0.ff.net.2": "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
        "input_blocks.9.0.op": "down_blocks.2.downsamplers.0.conv",
        "input_blocks.11.0.in_layers.2": "down_blocks.3.resnets.1.conv1",
        "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks.11.1.proj_out": "up_blocks.3.attentions.2.proj_out",
        "output_blocks.11.0.skip_connection": "up_blocks.3.resnets.2.conv_shortcut",
    }
    assert {name: names[name] for name in expected} == expected


# --- by hand -----------------------------------------------------------------------------------------------


def test_spellings_of_a_layer_mean_the_same(model, tmp_path):
    """Old processors of diffusers, CompVis's names, kohya's names of the text encoder, an adapter's name."""
    (down, up), prefix = factors((32, 32), 2), "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    text = "text_model.encoder.layers.1.self_attn"
    spellings = (
        (QUERY, f"unet.{prefix}.processor.to_q_lora.down.weight", f"unet.{prefix}.processor.to_q_lora.up.weight"),
        (QUERY, f"{prefix}.processor.to_q_lora.down.weight", f"{prefix}.processor.to_q_lora.up.weight"),
        (QUERY, f"unet.{prefix}.to_q.lora.down.weight", f"unet.{prefix}.to_q.lora.up.weight"),
        (QUERY, f"{prefix}.to_q.lora_A.default.weight", f"{prefix}.to_q.lora_B.default.weight"),
        (QUERY, *(f"lora_unet_{QUERY.removeprefix(UNET).replace('.', '_')}.lora_{p}.weight" for p in ("down", "up"))),
        (
            QUERY.replace("to_q", "to_out.0"),
            f"{prefix}.processor.to_out_lora.down.weight",
            f"{prefix}.processor.to_out_lora.up.weight",
        ),
    )
    for layer, *keys in spellings:
        (name, change), *rest = read_lora(
            write(tmp_path, dict(zip(keys, (down, up), strict=True))), model.shapes
        ).items()
        assert (name, change.strength, rest) == (layer, 1.0, [])
        assert torch.equal(change.delta(), up @ down)
    down, up = factors((24, 24), 2)
    for stem, ends in (
        (f"lora_te_{text.replace('.', '_')}_v_proj", ("lora_down", "lora_up")),
        (f"lora_te1_{text.replace('.', '_')}_v_proj", ("lora_down", "lora_up")),
        (f"text_encoder.{text}.v_proj", ("lora_linear_layer.down", "lora_linear_layer.up")),
        (f"text_encoder.{text}", ("to_v_lora.down", "to_v_lora.up")),
        (f"text_encoder.{text.removeprefix('text_model.')}.v_proj", ("lora_A", "lora_B")),
    ):
        tensors = {f"{stem}.{end}.weight": tensor for end, tensor in zip(ends, (down, up), strict=True)}
        assert list(read_lora(write(tmp_path, tensors), model.shapes)) == [f"{TEXT}{text}.v_proj"], stem


def test_alpha_mid_factors_and_pointwise_layers(model, tmp_path):
    resnet, name = f"{UNET}input_blocks.1.0.in_layers.2", "lora_unet_down_blocks_0_resnets_0_conv1"
    down, up = factors((32, 32, 1, 1), 3)
    mid = torch.randn(3, 3, 3, 3)
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(6.0),
    }
    x = torch.randn(1, 32, 5, 5, dtype=torch.float64)
    change = read_lora(write(tmp_path, tensors), model.shapes)[resnet]
    expected = x
    for factor, padding in ((down, 0), (mid, 1), (up, 0)):
        expected = nn.functional.conv2d(expected, factor.double(), padding=padding)
    found = nn.functional.conv2d(x, change.delta().double(), padding=1)
    assert relative(found, 2 * expected) < 1e-5
    # A 1x1 convolution as a linear layer, and a linear layer as a 1x1 convolution.
    proj = "lora_unet_down_blocks_0_attentions_0_proj_in"
    down, up = factors((32, 32), 2)
    tensors = {f"{proj}.lora_down.weight": down, f"{proj}.lora_up.weight": up}
    assert torch.equal(read_lora(write(tmp_path, tensors), model.shapes)[PROJ].delta()[:, :, 0, 0], up @ down)
    query = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{query}.lora_down.weight": down[..., None, None], f"{query}.lora_up.weight": up[..., None, None]}
    assert torch.equal(read_lora(write(tmp_path, tensors), model.shapes)[QUERY].delta(), up @ down)


def test_the_config_of_peft_tells_alpha(model, tmp_path, caplog):
    prefix = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    tensors = {}
    for name in ("to_q", "to_k"):
        down, up = factors((32, 32), 4)
        tensors |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    path = write(tmp_path, tensors, "adapter_model.safetensors")
    strengths = {}
    for config in (
        None,
        {"lora_alpha": 8},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 8, "alpha_pattern": {"to_k": 2}},
    ):
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        changes = read_lora(path, model.shapes)
        strengths[str(config)] = [changes[QUERY].strength, changes[QUERY.replace("to_q", "to_k")].strength]
    assert list(strengths.values()) == [[1.0, 1.0], [2.0, 2.0], [8 / math.sqrt(4)] * 2, [2.0, 0.5]]
    assert caplog.text.count("alpha is taken to be the rank") == 1
    for config, word in (
        ({"lora_alpha": "much"}, "alpha of"),
        ({"lora_alpha": 10**400}, "alpha of"),
        ({"lora_alpha": 1, "use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_alpha": 1, "init_lora_weights": "pissa_niter_4"}, "PiSSA"),
        ({"lora_alpha": 1, "alpha_pattern": {".*to_k$": 2}}, "alpha_pattern"),
        ({"lora_alpha": 1, "alpha_pattern": [1]}, "alpha_pattern"),
        ([], "it holds a list, no object"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=word):
            read_lora(path, model.shapes)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read_lora(path, model.shapes)
    kohya = write(
        tmp_path,
        {
            f"lora_unet_{k}": t
            for k, t in zip(
                ("conv_in.lora_down.weight", "conv_in.lora_up.weight"), factors((32, 4, 3, 3), 1), strict=True
            )
        },
    )
    assert len(read_lora(kohya, model.shapes)) == 1, "a config beside another file is not its own"


def test_a_torch_file_is_read_and_runs_no_code(model, tmp_path):
    tensors = {
        f"unet.{k}": t
        for k, t in zip(("conv_in.lora_A.weight", "conv_in.lora_B.weight"), factors((32, 4, 3, 3), 2), strict=True)
    }
    for name in ("pytorch_lora_weights.bin", "lora.pt"):
        torch.save(tensors, tmp_path / name)
        assert list(read_lora(tmp_path / name, model.shapes)) == [f"{UNET}input_blocks.0.0"]
    torch.save({"conv_in": nn.Linear(1, 1)}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="wants to run code"):
        read_lora(tmp_path / "lora.pt", model.shapes)


# --- refused -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name(model, tmp_path):
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    layer = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    assert model.shapes[layer] == (32, 24)
    down, up = factors((32, 24), 2)
    good = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    assert list(read_lora(write(tmp_path, good), model.shapes)) == [layer]
    nan = down.clone()
    nan[0, 0] = float("nan")
    cases = (
        ({f"{stem}.lora_down.weight": nan}, f"{stem} .down. holds NaN"),
        ({f"{stem}.lora_up.weight": up * float("inf")}, f"{stem} .up. holds NaN or inf"),
        ({f"{stem}.alpha": torch.tensor(float("inf"))}, f"{stem} .alpha. holds NaN or inf"),
        ({f"{stem}.alpha": torch.ones(2)}, "where one is needed"),
        ({f"{stem}.lora_down.weight": down.to(torch.int8)}, "is int8"),
        (
            {f"{stem}.lora_down.weight": torch.randn(2, 1024)},
            r"\[2, 1024\] for a weight \[32, 24\].*Stable Diffusion 2",
        ),
        ({f"{stem}.lora_down.weight": torch.randn(2, 2048)}, "Stable Diffusion XL"),
        ({f"{stem}.lora_up.weight": torch.randn(33, 2)}, r"\[33, 2\]"),
        ({f"{stem}.lora_up.weight": torch.randn(32, 3)}, r"\[32, 3\]"),
        ({f"{stem}.lora_mid.weight": torch.randn(3, 3, 1, 1)}, "lora_mid"),
        (
            {f"{stem}.lora_down.weight": torch.zeros(0, 24), f"{stem}.lora_up.weight": torch.zeros(32, 0)},
            "does not fit",
        ),
        ({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": down}, "twice"),
        ({"lora_unet_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3)}, "lora_unet_conv_in has no up factor"),
        ({"lora_unet_conv_on.alpha": torch.tensor(1.0)}, r"no layer of this model: lora_unet_conv_on.alpha$"),
        ({"lora_te2_x.alpha": torch.tensor(1.0)}, "Stable Diffusion XL"),
        ({"lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_2.alpha": torch.tensor(1.0)}, "Stable Diffusion XL"),
        ({"lora_te_text_model_encoder_layers_22_mlp_fc1.alpha": torch.tensor(1.0)}, "Stable Diffusion 2"),
        ({f"{stem}.hada_w1_a": down}, "LoHa"),
        ({f"{stem}.lokr_w1": down}, "LoKr"),
        ({f"{stem}.dora_scale": down}, "DoRA"),
        ({f"{stem}.diff": down}, "whole differences"),
        ({"lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(1.0)}, "Flux"),
        ({"model.diffusion_model.conv_in.weight": down}, "--ckpt"),
    )
    for change, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            read_lora(write(tmp_path, good | change), model.shapes)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="a, b, c, d and 1 more"):
        read_lora(write(tmp_path, {name: torch.ones(1) for name in "abcde"}), model.shapes)
    with pytest.raises(FileNotFoundError, match="no LoRA"):
        read_lora(tmp_path / "nothing.safetensors", model.shapes)
    with pytest.raises(ValueError, match="is a folder"):
        read_lora(tmp_path, model.shapes)


# --- beside a layer ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_branch_is_the_change_of_the_weight(tmp_path):
    cases = (
        (nn.Linear(12, 8), torch.randn(2, 5, 12), None),
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), torch.randn(2, 6, 9, 7), {"stride": 2, "padding": 1, "dilation": 1}),
        (nn.Conv1d(6, 8, 1), torch.randn(2, 6, 9), {"stride": 1, "padding": 0, "dilation": 1}),
    )
    for layer, x, options in cases:
        shape = tuple(layer.weight.shape)
        stems = ("lora_unet_input_blocks_0_0",)
        changes = []
        for rank, alpha in ((3, 1.5), (2, 5.0)):
            down, up = factors(shape, rank)
            tensors = {f"{stems[0]}.lora_down.weight": down, f"{stems[0]}.lora_up.weight": up}
            tensors[f"{stems[0]}.alpha"] = torch.tensor(alpha)
            changes.append(
                read_lora(write(tmp_path, tensors), {f"{UNET}input_blocks.0.0": shape})[f"{UNET}input_blocks.0.0"]
            )
        branch = LowRankBranch.of([(changes[0], 0.7), (changes[1], -0.3)], options)
        weight = layer.weight.double() + 0.7 * changes[0].delta().double() - 0.3 * changes[1].delta().double()
        expected = (
            nn.functional.linear(x.double(), weight, layer.bias.double())
            if options is None
            else getattr(nn.functional, f"conv{weight.ndim - 2}d")(x.double(), weight, layer.bias.double(), **options)
        )
        assert relative(BranchedLayer(layer, branch)(x).double(), expected) < 1e-6
        parts = (
            branch.part(slice(4))(x[:, :4] if options else x[..., :4]),
            branch.part(slice(4, None))(x[:, 4:] if options else x[..., 4:]),
        )
        assert relative(parts[0] + parts[1], branch(x)) < 1e-5
