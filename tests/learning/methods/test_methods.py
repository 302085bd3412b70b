"""The registry of methods: what a configuration may say of them, and what is told where it can't."""

from __future__ import annotations

import dataclasses

import pytest
import tomllib
from helpers.training import tiny_config, tiny_data

from mgebm_fast.errors import ConfigError
from mgebm_fast.learning import (
    METHODS,
    MultiGridTrainer,
    TrainConfig,
    apply_overrides,
    build_model,
    describe_keys,
    load_config,
    load_preset,
    merge,
)
from mgebm_fast.learning.config.values import from_dict
from mgebm_fast.models import EnergyModel


def test_every_entry_is_whole():
    for name, method in METHODS.items():
        config = merge(load_preset("digits"), {"method": name})
        assert method.name == name and method.about
        assert config.options == (None if method.table is None else method.table())
        model = method.build_model(tiny_config(method=name))
        assert type(model) is method.model is type(build_model(tiny_config(method=name)))
        assert method.rule(model, tiny_config(method=name), images=20).model is model


def test_a_table_survives_toml_and_is_described():
    config = apply_overrides(load_preset("digits"), ["method=pcd", "pcd.bank_size=100", "pcd.restart=0.05"])
    assert (config.options.bank_size, config.options.restart) == (100, 0.05)
    written = tomllib.loads(config.to_toml())
    assert written["method"] == "pcd" and written["pcd"] == {"bank_size": 100, "restart": 0.05}
    assert from_dict(written) == config
    keys = {name for name, *_ in describe_keys()}
    for name, method in METHODS.items():
        assert {f"{name}.{f.name}" for f in dataclasses.fields(method.table)} <= keys if method.table else True


def test_another_method_leaves_the_table_of_the_old_one_behind():
    config = merge(TrainConfig(), {"method": "pcd", "pcd": {"restart": 0.5}})
    assert apply_overrides(config, ["method=cd", "cd.sample_steps=7"]).options.sample_steps == 7
    assert merge(config, {"method": "multigrid"}).options == METHODS["multigrid"].table()
    assert merge(config, {"steps": 3}).options.restart == 0.5
    assert TrainConfig(method="pcd").options == METHODS["pcd"].table()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=pdc"], r"method must be one of multigrid, .*, got 'pdc' \(did you mean 'pcd'\?\)"),
        (["pcd.restart=0.1"], "pcd holds keys of the method 'pcd', the method of this run is 'multigrid'"),
        (["method=cd", "pcd.restart=0.1"], "the method of this run is 'cd'"),
        (["method=pcd", "pcd.restart=2"], "pcd.restart must be a number >= 0 and <= 1, got 2"),
        (["method=pcd", "pcd.banksize=2"], "did you mean 'pcd.bank_size'"),
        (["method=pcd", "pcd=2"], "pcd is a table of keys"),
        (["cd.sample_steps=0"], "cd.sample_steps must be a whole number >= 1"),
    ],
)
def test_wrong_keys_of_a_method(overrides, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(load_preset("digits"), overrides)


def test_a_file_may_be_based_on_a_preset(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nbase = "digits"\nmethod = "pcd"\n[langevin]\nsteps = 7\n[pcd]\nrestart = 0.25\n')
    mine, digits = load_config(path), load_preset("digits")
    assert (mine.name, mine.method, mine.langevin.steps, mine.options.restart) == ("mine", "pcd", 7, 0.25)
    assert mine.langevin.noise_std == digits.langevin.noise_std and mine.stabilise == digits.stabilise
    assert (mine.description, mine.time) == ("", TrainConfig().time)
    path.write_text('base = "digts"\n')
    with pytest.raises(ConfigError, match=r"mine.toml: base must be one of .*, got 'digts' \(did you mean 'digits'"):
        load_config(path)
    path.write_text('base = "digits"\n[langevin]\nstepz = 7\n')
    with pytest.raises(ConfigError, match=r"mine.toml: unknown key 'langevin.stepz'"):
        load_config(path)
    path.write_text('base = "digits"\n[langevin]\nstep_size = 0.1\n')  # replaces the base's drift and noise_std
    assert load_config(path).dynamics()[0].step_size == 0.1


def test_a_model_of_another_class_is_refused():
    config = tiny_config()
    model = build_model(config)
    with pytest.raises(ValueError, match="method 'cd' trains a SingleGrid, got a MultiGrid"):
        MultiGridTrainer(model, tiny_data(), tiny_config(method="cd"), quiet=True)
    with pytest.raises(ValueError, match="method 'multigrid' trains a MultiGrid, got a SingleGrid"):
        MultiGridTrainer(build_model(tiny_config(method="cd")), tiny_data(), config, quiet=True)


def test_a_model_of_ones_own_trains_by_a_named_method():
    model = build_model(tiny_config(method="short-run"))
    trainer = MultiGridTrainer(model, tiny_data(), method="short-run", steps=2, quiet=True)
    trainer.fit()
    assert trainer.iteration == 2 and trainer.model is model and isinstance(model, EnergyModel)
