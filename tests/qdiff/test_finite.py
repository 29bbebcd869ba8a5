"""NaN and infinity that arise while a model is calibrated: noticed, named, and what was finished is kept."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qdiff.calibrate import calibrate
from qdiff.calibration_set import CalibrationSet, from_qdiffusion
from qdiff.capture import Cache, capture
from qdiff.config import MixConfig, ReconConfig
from qdiff.finite import check_error, is_finite, named
from qdiff.observers import fit_activations
from qdiff.optimization import AdamSettings, Samples, mean_error, minimize
from qdiff.resume import ProgressFolder

CPU = torch.device("cpu")
HUGE = 1e25  # finite, as a weight that passes all checks of loading; its square is not


@pytest.fixture(scope="module")
def data():
    tensors = load_file(Path(__file__).resolve().parents[1] / "goldens" / "q_cali_data.safetensors")
    return CalibrationSet(tensors["xs"][:6], tensors["ts"][:6], tensors["cs"][:6])


@pytest.fixture
def make_overflowing(make_qnn):
    """(layer, **settings) -> a quantized model, in which the weights of the layer are huge."""

    def make(layer, **settings):
        qnn = make_qnn(**settings)
        qnn.layers()[layer].weight.data.fill_(1e12 * HUGE)
        return qnn

    return make


def test_a_sum_tells():
    for value, finite in (
        (0.0, True),
        (HUGE, True),
        (float("inf"), False),
        (-float("inf"), False),
        (float("nan"), False),
    ):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert is_finite(torch.tensor([1.0, value, 2.0], dtype=dtype)) == finite, (value, dtype)
    assert not is_finite(torch.tensor([float("inf"), -float("inf")]))
    assert check_error(1.0, "it") == 1.0
    with pytest.raises(ValueError, match="a: b: it is nan: numbers overflow"), named("a"), named("b"):
        check_error(float("nan"), "it")


def test_the_step_that_diverges_is_named():
    samples = Samples(inputs=[torch.ones(4, 1)], target=torch.full((4, 1), 1000.0), device=CPU)
    p = torch.zeros(1, requires_grad=True)  # learned to be smaller: the output is infinite after one step of size 1
    settings = AdamSettings(steps=5, lr=1.0, p=2.0, batch_size=2, seed=0)
    with pytest.raises(
        ValueError, match="the loss is NaN or infinite at step 2 of 5: use a smaller learning rate than 1"
    ):
        minimize(lambda x: x * (-1000 * p).exp(), samples, [p], settings)
    q = torch.zeros(1, requires_grad=True)
    once = AdamSettings(steps=1, lr=1.0, p=2.0, batch_size=2, seed=0)

    def penalty(step):
        return (q * float("nan")).sum()

    with pytest.raises(ValueError, match="the result is NaN or infinite at step 1 of 1"):  # seen in no loss
        minimize(lambda x: x * q, samples, [q], once, regularizer=penalty)
    with pytest.raises(ValueError, match="the error of the outputs is inf"):
        mean_error(lambda x: x * HUGE, samples, 2.0, 2)


def test_data_names_the_sample_and_its_file(data, tmp_path):
    for name in ("x", "t", "context"):
        tensors = {"x": data.x.clone(), "t": data.t.clone().float(), "context": data.context.clone()}
        tensors[name][3] = float("inf") if name != "t" else float("nan")
        with pytest.raises(ValueError, match=rf"NaN or infinite values: {name} of sample 3 of 6 \(timestep"):
            CalibrationSet(**tensors)
    content = {"xs": [data.x[:2], data.x[2:4].clone()], "ts": [data.t[:2], data.t[2:4]]}
    content["xs"][1][1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'file\.pt': .* x of sample 3 of 4"):
        from_qdiffusion(content, "file.pt")


def test_a_captured_sample_is_named(make_qnn, data, tmp_path):
    qnn = make_qnn()
    x = data.x.clone()
    x[3] = 3e38
    wild = CalibrationSet(x, data.t, data.context)
    for output, what in ((False, "input"), (True, "output")):
        with pytest.raises(ValueError, match=rf"its {what} is NaN or infinite for sample 3 of 6 \(timestep "):
            capture(qnn, qnn.units()["model.input_blocks.1.0"], wild, 4, Cache(10**9, tmp_path), output=output)


def test_samples_whose_sums_overflow_only_together_are_named(make_qnn, data, tmp_path):
    half = torch.full_like(data.x, 2e38 / data.x[0].numel())  # two of them are more than float32 holds
    wild = CalibrationSet(half, data.t, data.context)
    qnn = make_qnn()
    with pytest.raises(ValueError, match="its input is NaN or infinite for sample 0 of 6"):
        capture(qnn, qnn.units()["model.input_blocks.0.0"], wild, 4, Cache(10**9, tmp_path))


def test_an_activation_is_named(make_qnn, data):
    qnn = make_qnn()
    qnn.fit_weights()
    x = data.x.clone()
    x[4] = 3e38
    wild = CalibrationSet(x, data.t, data.context)
    for running in (False, True):
        with pytest.raises(ValueError, match=r"^model\.\S+: its input is NaN or infinite in one of sample \d"):
            fit_activations(qnn, wild, 2, running=running)


def test_units_before_are_kept(make_overflowing, data, tmp_path):
    """In each phase: its name and that of the unit or layer, and a run that goes on comes to the same place."""
    learned = {"iters_w": 1, "iters_a": 1, "batch_size": 4, "samples_w": 4}
    adaround, gptq = ReconConfig(**learned), ReconConfig(rounding="gptq", **learned)
    first, middle = "model.input_blocks.0.0", "model.input_blocks.1.0.out_layers.3"
    for case, (layer, recon, mix, says, kept) in enumerate(
        (
            (first, adaround, None, r"weights, input_blocks\.\S+: its output is NaN or infinite for sample 0", 3),
            (middle, adaround, None, r"weights, input_blocks\.1\.0: ", 4),
            (middle, gptq, None, r"weights: input_blocks\.\S+: ", 4),
            (middle, None, None, r"ranges: model\.\S+: ", 1),
            (middle, None, MixConfig(amount=1, samples=2, probes=1), r"mixing: model\.\S+: ", 1),
        )
    ):
        folder = ProgressFolder(tmp_path / str(case))
        folder.begin({})
        for _ in range(2):
            steps = calibrate(
                make_overflowing(layer), data, recon, mix=mix, cache=Cache(10**9, tmp_path), batch_size=4, folder=folder
            )
            with pytest.raises(ValueError, match=f"^{says}"):
                list(steps)
            assert folder.finished() == kept, case


def test_a_range_of_weights_that_overflows_is_named(make_qnn, data, tmp_path):
    qnn = make_qnn(scale_method="mse")
    weight = qnn.layers()["model.out.2"].weight.data.view(-1)
    weight[0], weight[1] = 3e38, -3e38
    with pytest.raises(ValueError, match=r"^fitting: out\.2: "):
        list(calibrate(qnn, data, None, cache=Cache(10**9, tmp_path)))
