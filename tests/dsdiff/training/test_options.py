"""The options of a run and its config, refused before anything is trained."""

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dsdiff.training.options import InitialWeights, TrainingOptions, read_training_config
from tomesd.options import MergeOptions


def test_the_config_and_what_the_options_change_in_it(configs):
    config = read_training_config(TrainingOptions(config=Path("autoencoder.yaml")))
    assert (config.learning_rate, config.trainer.max_steps, config.data.batch_size) == (1e-3, 2, 4)
    assert config.trainer.export == Path("autoencoder.safetensors") and not config.trainer.init_from
    assert set(config.model) == {"target", "params"}
    options = TrainingOptions(config=Path("txt2img.yaml"), max_steps=7, export="")
    config = read_training_config(options)
    assert (config.trainer.max_steps, config.trainer.export) == (7, None)
    assert config.trainer.init_from == {"first_stage_model.": InitialWeights(file=Path("autoencoder.safetensors"))}
    assert options.last == Path("runs/txt2img/checkpoints/last.ckpt")


def test_a_part_may_begin_with_a_part_of_a_file(configs):
    content = OmegaConf.load("autoencoder.yaml")
    content.trainer.init_from = {"": {"file": "model.safetensors", "prefix": "first_stage_model."}}
    OmegaConf.save(content, "autoencoder.yaml")
    config = read_training_config(TrainingOptions(config=Path("autoencoder.yaml")))
    expected = InitialWeights(file=Path("model.safetensors"), prefix="first_stage_model.")
    assert config.trainer.init_from == {"": expected}


def test_a_config_may_change_another_one(configs):
    OmegaConf.save(
        {"base": "txt2img.yaml", "model": {"params": {"focus": [1, 2, 0.5]}}, "data": {"batch_size": 2}}, "b.yaml"
    )
    base, changed = (read_training_config(TrainingOptions(config=Path(name))) for name in ("txt2img.yaml", "b.yaml"))
    assert changed.data == replace(base.data, batch_size=2) and changed.trainer == base.trainer
    assert changed.model["params"] == {**base.model["params"], "focus": [1, 2, 0.5]}
    OmegaConf.save({"base": "b.yaml"}, "c.yaml")
    for content, message in (
        ({"base": "b.yaml"}, r"the base of config 'c\.yaml' has a base itself"),
        ({"base": ["txt2img.yaml"]}, r"the base of config 'c\.yaml' is \['txt2img\.yaml'\]: it must be the name"),
        ({"base": "d.yaml"}, r"config 'd\.yaml' holds a list: it must hold settings by name"),
    ):
        OmegaConf.save(content, "c.yaml")
        OmegaConf.save(["a"], "d.yaml")
        with pytest.raises(ValueError, match=message):
            read_training_config(TrainingOptions(config=Path("c.yaml")))


def test_textures_are_learned_by_the_network_of_the_first_part(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    options = {
        name: TrainingOptions(config=Path(f"configs/shapes/{name}.yaml"), outdir=tmp_path)
        for name in ("txt2img", "textures")
    }
    first, second = (read_training_config(given) for given in options.values())
    for part in ("unet_config", "first_stage_config", "cond_stage_config", "linear_end"):
        assert second.model["params"][part] == first.model["params"][part], part
    assert second.model["params"]["focus"] == [100, 599, 0.8] and second.data.train == first.data.train
    assert second.trainer.init_from["model."].file == first.trainer.export
    assert second.trainer.merge == MergeOptions(ratio=0.75, sx=4, sy=4, merge_kv=True, proportional=True)


def test_a_bad_config_is_told_in_one_line(configs):
    good = OmegaConf.to_container(OmegaConf.load("autoencoder.yaml"))
    for part, change, message in (
        ("trainer", {"max_step": 5}, "trainer in config 'bad.yaml': unknown max_step "),
        ("data", {"batchsize": 5}, "data in config 'bad.yaml': unknown batchsize "),
        ("model", {"base_learning_rate": None}, "no base_learning_rate"),
        ("trainer", {"max_steps": None}, "trainer in config 'bad.yaml': max_steps is missing"),
        ("data", {"train": None}, "data in config 'bad.yaml': train is missing"),
        ("trainer", {"init_from": {"": {"path": "a"}}}, "init_from in config 'bad.yaml': unknown path "),
        (
            "trainer",
            {"init_from": "a.safetensors"},
            r"init_from in config 'bad\.yaml' is 'a\.safetensors': it must name",
        ),
        ("trainer", {"init_from": {"": 3}}, r"init_from in config 'bad\.yaml': 3 is no mapping"),
        ("trainer", {"init_from": {"": {"file": 3}}}, r"init_from in config 'bad\.yaml': file is 3 and prefix ''"),
        ("trainer", {"max_steps": "many"}, r"trainer in config 'bad\.yaml': max_steps is 'many'"),
        ("trainer", {"checkpoint_every": 0}, r"trainer in config 'bad\.yaml': checkpoint_every is 0"),
        ("trainer", {"log_images_every": -1}, r"trainer in config 'bad\.yaml': log_images_every is -1"),
        ("trainer", {"export": 3}, r"trainer in config 'bad\.yaml': export is 3"),
        ("data", {"batch_size": 0}, r"data in config 'bad\.yaml': batch_size is 0"),
        ("data", {"num_workers": "2"}, r"data in config 'bad\.yaml': num_workers is '2'"),
        ("model", {"base_learning_rate": "fast"}, r"base_learning_rate in config 'bad\.yaml' is 'fast': it must be"),
        ("model", {"base_learning_rate": [1]}, r"base_learning_rate in config 'bad\.yaml' is \[1\]: it must be"),
        ("trainer", {"merge": {"ratio": 2}}, r"merge of the trainer in config 'bad\.yaml': ratio is 2"),
        ("trainer", {"merge": {"rate": 0.5}}, r"merge of the trainer in config 'bad\.yaml': .*'rate'"),
        ("trainer", {"export": "weights.ckpt"}, r"--export weights\.ckpt must end in \.safetensors"),
    ):
        changed = {name: value for name, value in (good[part] | change).items() if value is not None}
        OmegaConf.save(good | {part: changed}, "bad.yaml")
        with pytest.raises(ValueError, match=message) as error:
            read_training_config(TrainingOptions(config=Path("bad.yaml")))
        assert "\n" not in str(error.value), message


def test_bad_options_are_refused():
    for options, message in (({"max_steps": 0}, "max_steps"), ({"devices": 0}, "devices"), ({"seed": -1}, "seed")):
        with pytest.raises(ValueError, match=f"{message} must be"):
            TrainingOptions(config=Path("a.yaml"), **options)
