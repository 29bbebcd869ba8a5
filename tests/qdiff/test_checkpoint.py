"""Our own format of a calibrated model: what is in a file, what it gives back, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.util import instantiate_from_config
from qdiff import QuantConfig, QuantModel
from qdiff.checkpoint import (
    CaliHeader,
    check_settings,
    fingerprint,
    load_cali_ckpt,
    read_cali_header,
    save_cali_ckpt,
)

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
SPLIT = "model.output_blocks.0.0.skip_connection"
LAST = "model.out.2"  # [4, 32, 3, 3]


def inputs(golden, name="A"):
    return golden[f"in_{name}/x"], golden[f"in_{name}/t"], golden[f"in_{name}/context"]


NAMES = {"dsdiff": "x.safetensors", "qdiff": "x.pth"}


@pytest.fixture(scope="module")
def unet_config():
    return OmegaConf.load(GOLDENS / "q_unet.yaml")


@pytest.fixture(scope="module")
def loaded(unet_config, golden_tensors, golden_ckpt):
    """The golden W4A8 model, one for all tests: to be left as it is."""
    unet = instantiate_from_config(unet_config)
    unet.load_state_dict({name: golden_tensors[f"model.{name}"] for name in unet.state_dict()})
    qnn = QuantModel(unet.eval(), QuantConfig())
    load_cali_ckpt(qnn, golden_ckpt)
    return qnn


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory):
    """Its file."""
    path = tmp_path_factory.mktemp("saved") / "w4a8.safetensors"
    save_cali_ckpt(loaded, path)
    return path


@pytest.fixture(scope="module")
def make_small(unet_config):
    """(**settings) -> a calibrated UNet of a few blocks, all quantizers on, its weights always the same."""

    def make(params=None, **settings):
        small = {"channel_mult": [1], "attention_resolutions": [1], **(params or {})}
        unet = instantiate_from_config(OmegaConf.merge(unet_config, {"params": small})).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.normal_(std=0.1, generator=generator)
        return calibrate(QuantModel(unet, QuantConfig(**settings)))

    return make


def calibrate(qnn, scale=1.0):
    """Ranges of the weights as they are, and `scale` times some that differ for the activations; all on."""
    qnn.fit_weights()
    for i, quantizer in enumerate(qnn.act_quantizers().values()):
        low, high = (0.0, 1.0) if quantizer.always_zero else (-3.0, 2.0)
        quantizer.set_range(torch.tensor(low), torch.tensor(high + i / 64) * scale)
    qnn.set_quant_state(True, qnn.config.quant_act)
    return qnn


@pytest.fixture(scope="module")
def small_file(make_small, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_cali_ckpt(make_small(), path)
    return path


def content_of(path):
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["dsdiff_cali"])


def assert_same_content(path, expected_path):
    (actual, metadata), (expected, expected_metadata) = content_of(path), content_of(expected_path)
    assert actual.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(actual[key], value)] == []
    assert metadata == expected_metadata


def rewrite(source, target, edit):
    """Copy a file, with `edit(tensors, header)` applied, and other ranges: loading any of it would show."""
    tensors, header = content_of(source)
    tensors = {key: value * 1.5 if key.endswith(".delta") else value for key, value in tensors.items()}
    header = edit(tensors, header) or json.dumps(header)
    save_file(tensors, target, metadata={"dsdiff_cali": header})
    return target


@pytest.fixture(scope="module")
def small(make_small, witness):
    """The witness of all tests that must not change a model."""
    return witness(make_small())


# --- there and back ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_are_bit_equal_in_a_fresh_model(make_qnn, loaded, saved, golden):
    qnn = make_qnn()
    load_cali_ckpt(qnn, saved)
    for name in ("A", "R", "B1"):
        assert torch.equal(qnn(*inputs(golden, name)), loaded(*inputs(golden, name)))


@torch.no_grad()
def test_outputs_of_other_settings_are_bit_equal(make_small, golden, tmp_path, subtests):
    for settings in [
        {"weight_bit": 8},
        {"weight_bit": 2, "act_bit": 8, "sm_abit": 8},
        {"weight_bit": 3, "act_bit": 2, "sm_abit": 4},
        {"weight_bit": 16, "act_bit": 16, "sm_abit": 2},
        {"quant_act": False},
        {"split": False},
        {"act_symmetric": True},
        {"mixed_act": {f"{LAST}.act_quantizer": 12}},
    ]:
        with subtests.test(settings=settings):
            first, second = make_small(**settings), make_small(**settings)
            calibrate(second, scale=1.5)  # to be forgotten
            save_cali_ckpt(first, tmp_path / "x.safetensors")
            load_cali_ckpt(second, tmp_path / "x.safetensors")
            assert torch.equal(second(*inputs(golden)), first(*inputs(golden)))
            for name, part in parts(first):
                assert torch.equal(second.get_submodule(name).codes(), first.get_submodule(name).codes(part)), name


def parts(qnn):
    """The name of each weight quantizer, and what it quantizes."""
    for layer_name, layer in qnn.layers().items():
        for part_name, part in layer.weight_parts().items():
            yield f"{layer_name}.{part_name}", part


def test_all_quantizers_are_on_after_loading(make_small, small_file):
    qnn = make_small()
    qnn.set_quant_state(False, False)
    load_cali_ckpt(qnn, small_file)
    assert all(quantizer.enabled for quantizer in (qnn.weight_quantizers() | qnn.act_quantizers()).values())


def test_loading_runs_nothing(make_small, small_file, golden):
    qnn, called = make_small(), []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: called.append(module))
    try:
        load_cali_ckpt(qnn, small_file)
        assert called == []
        with torch.no_grad():
            qnn(*inputs(golden))
        assert called  # the hook does see forward passes
    finally:
        hook.remove()


def test_roundings_still_open_are_written_as_they_stand(make_qnn, golden_ckpt, saved, tmp_path):
    qnn = make_qnn()
    load_cali_ckpt(qnn, golden_ckpt, freeze=False)
    save_cali_ckpt(qnn, tmp_path / "x.safetensors")
    assert_same_content(tmp_path / "x.safetensors", saved)


def test_conversion_to_the_other_format_and_back_keeps_everything(make_qnn, saved, tmp_path):
    qnn = make_qnn()
    load_cali_ckpt(qnn, saved)
    save_cali_ckpt(qnn, tmp_path / "there.pth", format="qdiff")
    qnn = make_qnn()
    load_cali_ckpt(qnn, tmp_path / "there.pth")
    save_cali_ckpt(qnn, tmp_path / "back.safetensors")
    assert_same_content(tmp_path / "back.safetensors", saved)


# --- what is in a file -------------------------------------------------------------------------------------


def test_codes_are_those_of_the_golden_roundings(saved, golden_tensors):
    tensors, _ = content_of(saved)
    alphas = [key.removesuffix(".alpha") for key in golden_tensors if key.endswith(".alpha")]
    assert {key.removesuffix(".codes") for key in tensors if key.endswith(".codes")} == set(alphas)
    for name in alphas:
        layer, part = name.rsplit(".", 1)
        alpha, delta, zero_point = (golden_tensors[f"{name}.{what}"] for what in ("alpha", "delta", "zero_point"))
        weight = golden_tensors[f"{layer}.weight"]
        width = alpha.shape[1]  # of a part, if the layer is split
        weight = weight[:, -width:] if part.endswith("_0") else weight[:, :width]
        codes = ((weight / delta).floor() + (alpha >= 0) + zero_point).clamp(0, 15).flatten(1)
        packed = tensors[f"{name}.codes"].int()
        unpacked = torch.stack([packed % 16, packed // 16], dim=2).flatten(1)  # the first code in the low half
        assert torch.equal(unpacked[:, : codes.shape[1]], codes.int()), name
        assert not unpacked[:, codes.shape[1] :].any(), name
        assert torch.equal(tensors[f"{name}.delta"], delta), name
        assert torch.equal(tensors[f"{name}.zero_point"], zero_point), name


def test_codes_take_their_width_up_to_the_padding_of_rows(make_small, tmp_path, subtests):
    for bits, first_row in [(2, 10), (3, 15), (4, 20), (16, 72)]:
        with subtests.test(bits=bits, first_row=first_row):
            qnn = make_small(weight_bit=bits)
            save_cali_ckpt(qnn, tmp_path / "x.safetensors")
            tensors, _ = content_of(tmp_path / "x.safetensors")
            for name, part in parts(qnn):
                codes = tensors[f"{name}.codes"]
                assert codes.dtype == torch.uint8
                if name == "model.input_blocks.0.0.weight_quantizer":  # 36 codes a row, padded to 40
                    assert tuple(codes.shape) == (32, first_row)
                else:
                    assert part[0].numel() % 8 == 0
                    assert codes.numel() == part.numel() * bits // 8, name


def test_file_is_a_sixth_of_the_float_weights(loaded, saved):
    tensors, _ = content_of(saved)
    codes = sum(value.numel() for key, value in tensors.items() if key.endswith(".codes"))
    ranges = sum(value.numel() for key, value in tensors.items() if key.endswith(".delta"))
    header = 8 + int.from_bytes(saved.read_bytes()[:8], "little")
    floats = 4 * sum(parameter.numel() for parameter in loaded.model.parameters())
    assert saved.stat().st_size == header + codes + 8 * ranges  # a step size and a zero point, in float32
    # 12.4 % codes, 1.7 % ranges, and 2.3 % names: these two shrink with the size of the model.
    assert codes < 0.1237 * floats
    assert codes + 8 * ranges < 0.141 * floats
    assert saved.stat().st_size < 0.165 * floats


def test_file_holds_no_float_weights(saved):
    tensors, _ = content_of(saved)
    assert {key.rsplit(".", 1)[1] for key in tensors} == {"codes", "delta", "zero_point"}
    assert all("quantizer" in key for key in tensors)


DETAILS = {
    "merge": {"ratio": 0.5, "max_downsample": 2, "merge_mlp": True},
    "calibration": {"samples": 128, "iters_w": 20000, "lr": 4e-4, "note": "naïve"},
    "source": {"ckpt": "models/ldm/shapes/model.safetensors", "step": 3},
}


@pytest.fixture(scope="module")
def detailed(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("detailed") / "x.safetensors"
    save_cali_ckpt(small.qnn, path, **DETAILS)
    return path


def test_header_round_trip(small, detailed):
    header = read_cali_header(detailed)
    assert header == CaliHeader(
        config=QuantConfig(weight_bit=4, act_bit=8, sm_abit=16),
        splits={"model.output_blocks.0.0.skip_connection": 32, "model.output_blocks.1.0.skip_connection": 32},
        merge=DETAILS["merge"],
        calibration=DETAILS["calibration"],
        source={"fingerprint": fingerprint(small.qnn), **DETAILS["source"]},
        format="dsdiff",
        inferred=(),
    )


def test_header_without_details(loaded, saved):
    header = read_cali_header(saved)
    assert (header.merge, header.calibration) == (None, {})
    assert header.source == {"fingerprint": fingerprint(loaded)}
    assert header.splits == {f"model.output_blocks.{i}.0.skip_connection": h for i, h in enumerate((64, 64, 64, 32))}


def test_header_round_trip_of_all_settings(make_small, tmp_path):
    settings = {"weight_bit": 3, "act_bit": 6, "sm_abit": 10, "split": False, "act_symmetric": True}
    settings |= {"scale_method": "max_scale", "act_scale_method": "mse", "mixed_act": {f"{LAST}.act_quantizer": 12}}
    save_cali_ckpt(make_small(**settings), tmp_path / "x.safetensors")
    header = read_cali_header(tmp_path / "x.safetensors")
    assert header.config == QuantConfig(**settings)
    assert header.splits == {}


def test_loading_returns_the_header(make_small, detailed):
    assert load_cali_ckpt(make_small(), detailed) == read_cali_header(detailed)


# --- writing -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["dsdiff", "qdiff"])
def failing_write(request, monkeypatch):
    """The format; its file breaks off half way."""

    def write_half(tensors, path, *args):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise OSError("no space left on device")

    target = "qdiff.checkpoint.save_tensors" if request.param == "dsdiff" else "torch.save"
    monkeypatch.setattr(target, write_half)
    return request.param


def test_failed_save_keeps_the_old_file(small, tmp_path, failing_write):
    path = tmp_path / NAMES[failing_write]
    path.write_bytes(b"the old content")
    with pytest.raises(OSError, match="no space left"):
        save_cali_ckpt(small.qnn, path, format=failing_write)
    assert path.read_bytes() == b"the old content"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_save_leaves_nothing(small, tmp_path, failing_write):
    with pytest.raises(OSError, match="no space left"):
        save_cali_ckpt(small.qnn, tmp_path / NAMES[failing_write], format=failing_write)
    assert list(tmp_path.iterdir()) == []


def test_save_replaces_the_old_file_and_leaves_no_other(small, tmp_path, subtests):
    for format in ["dsdiff", "qdiff"]:
        with subtests.test(format=format):
            path = tmp_path / NAMES[format]
            path.write_bytes(b"the old content")
            save_cali_ckpt(small.qnn, path, format=format)
            assert read_cali_header(path).format == format
            assert list(tmp_path.iterdir()) == [path]
            path.unlink()


def test_uncalibrated_model_is_not_saved(make_qnn, tmp_path, subtests):
    for format in ["dsdiff", "qdiff"]:
        with subtests.test(format=format):
            with pytest.raises(ValueError, match=r"quantizers have no range yet, such as model\..*: calibrate first"):
                save_cali_ckpt(make_qnn(), tmp_path / NAMES[format], format=format)
            assert list(tmp_path.iterdir()) == []


def test_model_that_lacks_a_single_range_is_not_saved(make_small, tmp_path):
    qnn = make_small()
    qnn.get_submodule(f"{LAST}.act_quantizer").delta.fill_(float("nan"))
    with pytest.raises(ValueError, match=rf"^1 quantizers .* {LAST}\.act_quantizer:"):
        save_cali_ckpt(qnn, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_unknown_format_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="format is 'onnx': it must be dsdiff or qdiff"):
        save_cali_ckpt(small.qnn, tmp_path / "x.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_saving_leaves_the_model_as_it_is(small, tmp_path):
    save_cali_ckpt(small.qnn, tmp_path / "x.safetensors")
    small.assert_unchanged()


# --- other settings, other models --------------------------------------------------------------------------


def test_flags_that_agree_with_the_file(small_file, subtests):
    for given in [{}, {"weight_bit": 4, "act_bit": 8, "sm_abit": 16}, {"weight_bit": None}]:
        with subtests.test(given=given):
            check_settings(read_cali_header(small_file), given, "x")


def test_flag_that_contradicts_the_file_is_refused(small_file, subtests):
    for name, value, stored in [("weight_bit", 8, 4), ("act_bit", 6, 8), ("sm_abit", 8, 16), ("split", False, True)]:
        with (
            subtests.test(name=name, value=value, stored=stored),
            pytest.raises(ValueError, match=rf"^{name} {value} contradicts 'x\.file', which .* with {name} {stored}: "),
        ):
            check_settings(read_cali_header(small_file), {name: value}, "x.file")


def test_bits_that_contradict_the_file_are_refused_with_its_name(small_file):
    assert read_cali_header(small_file, weight_bit=4).config.weight_bit == 4
    with pytest.raises(ValueError, match=r"weight_bit 3 contradicts '.*small\.safetensors', which .* weight_bit 4"):
        read_cali_header(small_file, weight_bit=3)


def test_model_of_other_settings_is_refused(make_small, witness, small_file, subtests):
    for name, value, stored in [("weight_bit", 8, 4), ("act_bit", 6, 8), ("sm_abit", 8, 16), ("split", False, True)]:
        with subtests.test(name=name, value=value, stored=stored):
            seen = witness(make_small(**{name: value}))
            seen.assert_refuses(small_file, rf"the model has {name} {value}, but .* was made with {name} {stored}")


def test_mixed_bits_are_those_of_the_file_or_refused(make_small, witness, small_file, tmp_path):
    mixed = {"mixed_act": {f"{LAST}.act_quantizer": 12}}
    qnn = make_small(**mixed)
    assert qnn.input_quantizers()[f"{LAST}.act_quantizer"].high == 4095
    witness(qnn).assert_refuses(small_file, r"the model has mixed_act .* was made with mixed_act \{\}")
    with pytest.raises(ValueError, match="one width for all activations"):
        save_cali_ckpt(qnn, tmp_path / "x.pth", format="qdiff")
    with pytest.raises(ValueError, match=r"mixed_act names model\.in, which is no layer's input"):
        make_small(mixed_act={"model.in": 12})
    before = qnn.config
    with pytest.raises(ValueError, match="no layer's input"):
        qnn.mix_act({"model.input_blocks.1.1.transformer_blocks.0.attn1.act_quantizer_q": 12})
    assert qnn.config == before
    make_small(mixed_act={"model.in": 12}, quant_act=False)  # without activations it has no effect


def test_another_source_model_is_refused(make_small, witness, small_file, subtests):
    for parameter in ["time_embed.0.weight", "out.0.bias", "output_blocks.1.0.skip_connection.weight"]:
        with subtests.test(parameter=parameter):
            qnn = make_small()
            with torch.no_grad():
                qnn.model.get_parameter(parameter).view(-1)[3] += 0.01
            witness(qnn).assert_refuses(small_file, "was made from another model with other weights than this model's")


def test_source_model_that_would_fit_is_named(make_small, witness, detailed):
    qnn = make_small()
    with torch.no_grad():
        qnn.model.out[0].bias[0] += 0.01
    witness(qnn).assert_refuses(detailed, r"made from models/ldm/shapes/model\.safetensors with other weights")


def test_fingerprint_covers_all_parameters(make_small):
    qnn = make_small()
    seen = {fingerprint(qnn)}
    parameters = list(qnn.model.parameters())[::4]
    for parameter in parameters:
        with torch.no_grad():
            parameter.view(-1)[0] += 0.01
        seen.add(fingerprint(qnn))
    assert len(seen) == 1 + len(parameters) > 10


def test_fingerprint_does_not_depend_on_the_precision_of_the_file(make_unet, make_qnn):
    expected = fingerprint(make_qnn())
    # Rounded to float16 when the file was written, and cast back when it was read; and kept in float16.
    assert fingerprint(QuantModel(make_unet().half().float(), QuantConfig())) == expected
    assert fingerprint(make_qnn().half()) == expected


def test_fingerprint_does_not_depend_on_the_quantizers(make_qnn, loaded):
    assert fingerprint(loaded) == fingerprint(make_qnn()) == fingerprint(make_qnn(weight_bit=8, quant_act=False))


def test_file_serves_the_source_model_in_float16(make_unet, saved):
    qnn = QuantModel(make_unet().half(), QuantConfig())
    load_cali_ckpt(qnn, saved)
    expected, _ = content_of(saved)
    for name, quantizer in qnn.weight_quantizers().items():
        assert torch.equal(quantizer.packed, expected[f"{name}.codes"])
        assert quantizer(qnn.get_submodule(name.rsplit(".", 1)[0]).weight).dtype == torch.float16
        assert quantizer.delta.dtype == torch.float32


def test_another_architecture_is_refused(make_small, witness, small_file, subtests):
    for params, match in [
        ({"num_res_blocks": 2}, "splits other layers than this model"),
        (
            {"transformer_depth": 2},
            r"lacks model\..*transformer_blocks\.1\..*and \d+ more: it is of another architecture",
        ),
        ({"attention_resolutions": []}, r"has unknown model\..*: it is of another architecture"),
    ]:
        with subtests.test(params=params, match=match):
            witness(make_small(params)).assert_refuses(small_file, match)


# --- broken files ------------------------------------------------------------------------------------------


def test_missing_file(small, tmp_path):
    small.assert_refuses(tmp_path / "none.safetensors", r"No such file: .*none\.safetensors", FileNotFoundError)


def test_truncated_file_is_refused(small, small_file, tmp_path, subtests):
    for left in [0, 7, 1000, 50_000, -1]:
        with subtests.test(left=left):
            (tmp_path / "x.safetensors").write_bytes(small_file.read_bytes()[:left])
            small.assert_refuses(tmp_path / "x.safetensors", r"x\.safetensors' is no readable safetensors file")


def test_a_bit_that_was_turned_over_is_refused(small, small_file, tmp_path, subtests):
    content, path = small_file.read_bytes(), tmp_path / "bit.safetensors"
    header = int.from_bytes(content[:8], "little")
    for place in (8 + header, (8 + header + len(content)) // 2, len(content) - 1):
        with subtests.test(place=place):
            path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
            small.assert_refuses(path, "its checksum is wrong")


def test_text_is_refused(small, tmp_path):
    (tmp_path / "x.safetensors").write_text("not a checkpoint\n" * 100)
    small.assert_refuses(tmp_path / "x.safetensors", r"x\.safetensors' is no readable safetensors file")


def test_foreign_safetensors_are_refused(small, tmp_path, subtests):
    for metadata in [None, {"format": "pt"}]:
        with subtests.test(metadata=metadata):
            save_file({"weight": torch.ones(2)}, tmp_path / "x.safetensors", metadata=metadata)
            small.assert_refuses(tmp_path / "x.safetensors", r"x\.safetensors' is no cali_ckpt")


def header(**changes):
    def edit(tensors, metadata):
        for name, value in changes.items():
            metadata.update({name: value})

    return edit


def header_without(name):
    def edit(tensors, metadata):
        del metadata[name]

    return edit


def config(**changes):
    def edit(tensors, metadata):
        metadata["config"] |= changes

    return edit


def raw(text):
    """The whole header, as it stands in the file."""
    return lambda tensors, metadata: text


def put(key, change):
    return lambda tensors, _: tensors.update({key: change(tensors.get(key))})


def drop(key):
    def edit(tensors, metadata):
        del tensors[key]

    return edit


DAMAGES = {
    "newer version": (header(version=2), "is of version 2, this program reads 1"),
    "no version": (header_without("version"), "damaged header: 'version'"),
    "header cut": (raw('{"version": 1, "config'), "damaged header"),
    "header a list": (raw("[1]"), "damaged header"),
    "header nested without end": (raw("[" * 100000), "damaged header"),
    "config no settings": (header(config=None), "damaged header"),
    "config gone": (header_without("config"), "damaged header: 'config'"),
    "config of impossible width": (config(weight_bit=40), "damaged header: weight_bit is 40"),
    "config of an unknown setting": (config(group_size=64), "damaged header: QuantConfig knows no group_size"),
    "splits a number": (header(splits=3), "damaged header"),
    "splits elsewhere": (header(splits={SPLIT: 63}), "splits other layers"),
    "merge a number": (header(merge=3), "damaged header"),
    "calibration a list": (header(calibration=[1]), "damaged header"),
    "source gone": (header_without("source"), "damaged header: 'source'"),
    "source without fingerprint": (header(source={}), "other weights than this model's"),
    "codes too short": (
        put(f"{LAST}.weight_quantizer.codes", lambda x: x[:, 1:].contiguous()),
        r"damaged: codes .*143",
    ),
    "codes of a row missing": (
        put(f"{LAST}.weight_quantizer.codes", lambda x: x[1:].clone()),
        r"damaged: codes .*\(3,",
    ),
    "codes as floats": (put(f"{LAST}.weight_quantizer.codes", lambda x: x.float()), "damaged: codes .*float32"),
    "codes missing": (drop(f"{LAST}.weight_quantizer.codes"), rf"lacks {LAST}\.weight_quantizer\.codes: "),
    "range missing": (drop(f"{LAST}.act_quantizer.delta"), rf"lacks {LAST}\.act_quantizer\.delta: "),
    "last activation out of range": (put(f"{LAST}.act_quantizer.delta", torch.zeros_like), "damaged: delta must be"),
    "half of a split layer missing": (drop(f"{SPLIT}.weight_quantizer_0.codes"), r"lacks .*weight_quantizer_0\.codes"),
    "unknown tensor": (put("model.extra.codes", lambda _: torch.ones(1)), r"has unknown model\.extra\.codes: "),
    "one range for all channels": (
        put(f"{LAST}.weight_quantizer.delta", lambda x: x[0, 0, 0, 0]),
        r"delta has shape \(\)",
    ),
    "zero points of other shape": (
        put(f"{LAST}.weight_quantizer.zero_point", lambda x: x.flatten()),
        r"damaged: delta \(4, 1, 1, 1\) and zero_point \(4,\)",
    ),
    "step size NaN": (put(f"{LAST}.weight_quantizer.delta", lambda x: x * float("nan")), "damaged: delta must be"),
    "step size 0": (put(f"{LAST}.weight_quantizer.delta", torch.zeros_like), "damaged: delta must be positive"),
    "zero point a fraction": (
        put(f"{LAST}.weight_quantizer.zero_point", lambda x: x + 0.5),
        "damaged: zero_point must",
    ),
    "activation with many ranges": (
        put(f"{LAST}.act_quantizer.delta", lambda x: x.expand(3).clone()),
        r"delta has .*3,",
    ),
}


def test_damaged_file_is_refused(small, small_file, tmp_path, subtests):
    for damage in DAMAGES:
        with subtests.test(damage=damage):
            edit, match = DAMAGES[damage]
            small.assert_refuses(rewrite(small_file, tmp_path / "x.safetensors", edit), match)


def test_copy_without_damage_is_loaded(make_small, small_file, tmp_path):
    """What `rewrite` does to a file besides the damage is no reason to refuse it."""
    path = rewrite(small_file, tmp_path / "x.safetensors", lambda tensors, metadata: None)
    qnn = make_small()
    load_cali_ckpt(qnn, path)
    name = f"{LAST}.act_quantizer"
    assert torch.equal(qnn.get_submodule(name).delta, 1.5 * load_file(small_file)[f"{name}.delta"])


def test_a_name_of_the_other_format_is_refused(small, tmp_path, subtests):
    for format, name in [("dsdiff", "x.pth"), ("qdiff", "x.safetensors")]:
        with subtests.test(format=format, name=name):
            with pytest.raises(ValueError, match="name of the other format"):
                save_cali_ckpt(small.qnn, tmp_path / name, format=format)
            assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_told(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="No such directory"):
        save_cali_ckpt(small.qnn, tmp_path / "missing" / "x.safetensors")


def test_two_saves_are_equal_byte_for_byte(small, tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        save_cali_ckpt(small.qnn, path, calibration={"b": 1, "a": 2}, merge={"ratio": 0.5}, source={"ckpt": "x"})
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_file_with_activations_serves_a_model_without(make_qnn, golden_ckpt, golden, tmp_path, assert_close):
    full = make_qnn()
    load_cali_ckpt(full, golden_ckpt)
    save_cali_ckpt(full, tmp_path / "x.safetensors")
    weights_only = make_qnn(quant_act=False)
    load_cali_ckpt(weights_only, tmp_path / "x.safetensors")
    with torch.no_grad():
        output = weights_only(golden["in_R/x"], golden["in_R/t"], golden["in_R/context"])
    assert_close(output, golden["resumed_qa0/R"])


def test_signed_activations_are_not_confused_with_unsigned(make_qnn, golden_ckpt, tmp_path):
    signed = make_qnn(act_symmetric=True)
    with pytest.raises(ValueError, match="unsigned activations"):
        load_cali_ckpt(signed, golden_ckpt)
    unsigned = make_qnn()
    load_cali_ckpt(unsigned, golden_ckpt)
    save_cali_ckpt(unsigned, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="act_symmetric"):
        load_cali_ckpt(signed, tmp_path / "x.safetensors")
