"""Configurations: TOML there and back, overrides, and what a wrong key or value is told."""

from __future__ import annotations

import json
import math
import os

import pytest
import tomllib

import mgebm_fast as mg
from mgebm_fast.errors import ConfigError
from mgebm_fast.learning import (
    TrainConfig,
    apply_overrides,
    build_model,
    describe_keys,
    load_config,
    load_preset,
    merge,
    preset_names,
)
from mgebm_fast.learning.config.keys import Auto, Maybe, pick
from mgebm_fast.learning.config.sections import tables
from mgebm_fast.learning.config.toml import written
from mgebm_fast.learning.config.train_config import all_keys
from mgebm_fast.learning.config.values import from_dict

# A value for optional keys that hold nothing by default and need nothing beside them.
EXAMPLE = {
    "activation": {"activation": "relu"}, "start_from": {"start_from": "runs/x"},
    "langevin.reference_std": {"langevin": {"reference_std": 2.0}}, "pcd.bank_size": {"pcd": {"bank_size": 10}},
    "rollback.gap_max": {"rollback": {"gap_max": 5.0}},
}  # fmt: skip

COMMON = ("steps", "seed", "batch_size", "checkpoint_every", "sample_every", "width", "sizes")


def test_presets_are_named_and_the_default_comes_first():
    names = preset_names()
    assert names[0] == "digits" and names[1:] == sorted(names[1:])
    assert {"cifar10", "multigrid-paper", "multigrid-released", "digits-cd", "cifar10-single-grid"} <= set(names)


@pytest.mark.parametrize("name", ["digits", "cifar10", "multigrid-paper", "multigrid-released"])
def test_preset_survives_toml_and_says_its_keys(name):
    config = load_preset(name)
    assert config.name == name and config.description
    assert from_dict(tomllib.loads(config.to_toml())) == config
    from mgebm_fast.learning.config.files import PRESETS

    written = tomllib.loads((PRESETS / f"{name}.toml").read_text())
    assert all(key in written for key in (*COMMON, "data")) and "steps" in written["langevin"]


def test_published_presets_have_the_published_numbers():
    paper, released = load_preset("multigrid-paper"), load_preset("multigrid-released")
    chain = paper.dynamics()[0]
    assert (chain.steps, chain.step_size, chain.noise_scale, chain.reference_std, chain.clamp) == (
        30,
        0.3,
        1.0,
        50.0,
        (0, 255),
    )
    assert (paper.optimiser.name, paper.optimiser.momentum, paper.optimiser.lr) == ("sgd", 0.9, 0.3)
    assert (paper.optimiser.decay_every, paper.optimiser.decay_factor) == (12, 0.94337)
    assert paper.optimiser.per_layer_divide and paper.optimiser.grad_rescale_max == 1.0 and paper.variant == "A"
    chain = released.dynamics()[-1]
    assert (chain.steps, chain.update().noise_std, chain.reference_std, chain.clamp) == (90, 0.0, None, (0, 255))
    assert (released.optimiser.name, released.optimiser.lr, released.optimiser.betas[0]) == ("adam", 0.3, 0.5)
    for config in (paper, released):
        assert (config.sizes, config.batch_size, config.norm, config.width) == ((1, 4, 16, 64), 100, "batch", 1.0)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("steps=12", "steps", 12),
        ("sizes=[1,2,4]", "sizes", (1, 2, 4)),
        ("sizes=1,2,4", "sizes", (1, 2, 4)),
        ("width=2", "width", 2.0),
        ("classes=automobile", "classes", ("automobile",)),
        ('classes=["cat", "dog"]', "classes", ("cat", "dog")),
        ("classes=cat,dog", "classes", ("cat", "dog")),
        ("classes=3", "classes", ("3",)),
        ("flips=true", "flips", True),
        ("data=some where/x=1.zip", "data", "some where/x=1.zip"),
        ("seed=18446744073709551615", "seed", 2**64 - 1),
        ("activation=silu", "activation", "silu"),
        ("activation=none", "activation", "none"),
        ("activation=auto", "activation", None),
    ],
)
def test_override(override, key, value):
    changed = apply_overrides(load_preset("digits"), [override])
    assert getattr(changed, key) == value
    assert from_dict(tomllib.loads(changed.to_toml())) == changed


def test_a_list_of_one_needs_no_brackets():
    changed = apply_overrides(load_preset("frame"), ["frame.scales=2.5", "frame.thresholds=[0.1]"])
    assert (changed.options.scales, changed.options.thresholds) == ((2.5,), (0.1,))
    assert apply_overrides(load_preset("chimes"), ["spatial-temporal.size=4096"]).options.size == (4096,)
    with pytest.raises(ConfigError, match=r"sizes must be a list, each a whole number .*, got 'x'"):
        apply_overrides(changed, ["sizes=x"])


def test_override_of_a_section_and_its_clearing():
    config = apply_overrides(load_preset("digits"), ["langevin.steps=10,20,30", "optimiser.grad_clip_norm=2"])
    assert [chain.steps for chain in config.dynamics()] == [10, 20, 30]
    assert config.optimiser.grad_clip_norm == 2.0
    assert apply_overrides(config, ["optimiser.grad_clip_norm=none"]).optimiser.grad_clip_norm is None


OPTIONAL = [name for name, (_, field) in all_keys().items() if isinstance(field.metadata["kind"], (Auto, Maybe))]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_key_that_is_cleared_stays_so_in_a_file(name):
    """Whatever the key's default: what is written is what is read, by --set, TOML and the state of a checkpoint."""
    section, _, leaf = name.rpartition(".")
    method = section if section in tables() else "multigrid"
    chain = {"step_size": 0.1} if leaf in ("drift", "noise_std") else {"drift": 1.0, "noise_std": 0.1}
    config = from_dict({"method": method, "langevin": chain})
    config = config if leaf in ("drift", "noise_std", "step_size") else merge(config, EXAMPLE.get(name, {}))
    word = "auto" if isinstance(all_keys()[name][1].metadata["kind"], Auto) else "none"
    for cleared in (
        apply_overrides(config, [f"{name}={word}"]),
        merge(config, {section: {leaf: word}} if section else {leaf: word}),
        merge(config, {section: {leaf: None}} if section else {leaf: None}),
    ):
        owner = cleared.options if section in tables() else getattr(cleared, section) if section else cleared
        assert getattr(owner, leaf) is None
        assert from_dict(tomllib.loads(cleared.to_toml())) == cleared
        assert from_dict(json.loads(json.dumps(cleared.to_dict()))) == cleared


def test_none_in_a_file_with_a_base_takes_nothing_else_away():
    config = merge(load_preset("digits"), {"langevin": {"step_size": "none", "grad_clamp": "none"}})
    assert config.langevin.drift == 1.0 and config.langevin.grad_clamp is None
    with pytest.raises(ConfigError, match=r"config: langevin\.drift must be a number > 0, .*, got 'x'"):
        merge(config, {"langevin": {"drift": "x"}})


def test_a_new_form_of_the_chain_replaces_the_old():
    coupled = apply_overrides(load_preset("digits"), ["langevin.step_size=0.2"])
    assert coupled.dynamics()[0].step_size == 0.2 and coupled.langevin.drift is None
    back = merge(coupled, {"langevin": {"drift": 0.5, "noise_std": 0.1}})
    assert back.dynamics()[0].drift == 0.5 and back.langevin.step_size is None


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([1, 4, 8], (2.0, 3.0)), ([1, 2, 4, 8, 16], (1.0, 2.0, 3.0, 3.0)), ([1, 3, 24], (2.0, 3.0)), ([1, 2], (1.0,))],
)
def test_new_sizes_take_values_a_net_along(sizes, expected):
    config = apply_overrides(load_preset("digits"), ["stabilise.data_noise=1,2,3", "langevin.noise_std=[1,2,3]"])
    changed = apply_overrides(config, [f"sizes={sizes}"])
    assert changed.stabilise.data_noise == expected
    assert tuple(chain.noise_std for chain in changed.dynamics()) == expected
    with pytest.raises(ConfigError, match="stabilise.data_noise must be one value, or a list of 1 .*got 3 values"):
        apply_overrides(config, ["sizes=1,2", "stabilise.data_noise=1,2,3"])


def test_every_net_may_have_a_width_of_its_own():
    config = apply_overrides(load_preset("digits"), ["width=[3,2,0.5]"])
    assert config.width == (3.0, 2.0, 0.5)
    channels = [[spec.channels for spec in net.specs] for net in build_model(config).nets]
    assert channels == [[96, 192], [64, 128, 128], [16, 32, 32]]
    assert apply_overrides(config, ["sizes=[1,4,8,16]"]).width == (2.0, 0.5, 0.5)
    assert from_dict(config.to_dict()) == config
    one = merge(config, {"method": "single-grid-cd"})
    assert [spec.channels for spec in build_model(one).nets[0].specs] == [16, 32, 32]
    with pytest.raises(ConfigError, match="width must be one value, or a list of 3 .*got 2 values"):
        merge(config, {"width": [1, 2]})


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([1, 2, 4, 8, 16], (0.6, 0.7, 0.7, 1.0)), ([1, 2, 4], (0.6, 1.0)), ([1, 8], (1.0,)), ([1, 4, 8], (0.7, 1.0))],
)
def test_annealed_noise_goes_by_rank(sizes, expected):
    """A grid that others begin from settles, the finest sharpens, whatever their sizes."""
    config = apply_overrides(load_preset("digits"), ["stabilise.noise_anneal_share=[0.6,0.7,1.0]"])
    assert apply_overrides(config, [f"sizes={sizes}"]).stabilise.noise_anneal_share == expected
    one = apply_overrides(config, ["sizes=1,2", "stabilise.noise_anneal_share=[0.5]"])
    assert apply_overrides(one, [f"sizes={sizes}"]).stabilise.noise_anneal_share == (0.5,) * (len(sizes) - 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepss=3", r"unknown key 'stepss' \(did you mean 'steps'\?\)"),
        ("lr=1", r"did you mean 'optimiser.lr'\?"),
        ("langevn.stps=1", r"did you mean 'langevin.steps'\?"),
        ("optimizer.lr=1", r"did you mean 'optimiser.lr'\?"),
        ("langevin=3", "langevin is a table"),
        ("steps", "must be key=value, got 'steps'"),
        ("steps=-1", "steps must be a whole number >= 0 and <= 1000000000, got -1"),
        ("steps=1.5", "steps must be a whole number >= 0 .* got 1.5"),
        ("steps=true", "steps must be a whole number >= 0 .* got True"),
        ("batch_size=0", "batch_size must be a whole number >= 1 and <= 65536, got 0"),
        ("langevin.steps=0", "langevin.steps must be a whole number >= 1"),
        ("langevin.steps=ten", "got 'ten'"),
        ("langevin.steps=[1,2]", r"langevin.steps must be one value, or a list of 3 .*got 2 values"),
        ("langevin.drift=-1", "langevin.drift must be a number > 0"),
        ("langevin.drift=none", "neither"),
        ("langevin.noise_std=nan", "langevin.noise_std must be a number >= 0"),
        ("optimiser.lr=0", "optimiser.lr must be a number > 0"),
        ("optimiser.betas=[0.9]", "optimiser.betas must be a list of 2"),
        ("optimiser.betas=[0.9, 1.0]", "each a number >= 0 and < 1"),
        ("optimiser.schedule=cosin", r"one of constant, cosine, linear, step, got 'cosin' \(did you mean 'cosine'\?\)"),
        ("stabilise.ema=1", "stabilise.ema must be a number >= 0 and < 1"),
        ("norm=batc", r"did you mean 'batch'\?"),
        ("width=0", "width must be a number > 0"),
        ("seed=-1", "seed must be a whole number >= 0"),
        ("sizes=[1,3,4]", r"each dividing the next.*got \[1, 3, 4\] \(3 does not divide 4\)"),
        ("sizes=[2,4]", "sizes must start at 1"),
        ("stabilise.noise_anneal_share=0", "noise_anneal_share must be a number > 0 and <= 1"),
        ("sizes=8", "sizes must start at 1"),
        ("value_range=[1,0]", r"low < high, got \[1.0, 0.0\]"),
        ("batch_size=1000000000000", "batch_size must be a whole number >= 1 and <= 65536, got 1000000000000"),
        ("frame.orientations=2147483648", "frame.orientations must be .* <= 256"),
        ("spatial-temporal.rate=1e9", "spatial-temporal.rate must be .* <= 192000"),
        ("size=3", r"did you mean 'sizes'\?"),
        (
            "data=" + "x" * 5000,
            "data must be a string, got 'x{199}… .5002 characters., 5000 characters of at most 4096",
        ),
        (".".join("a" * 50_000) + "=3", "unknown key 'a.a.a"),
        ("optimiser.betas={" + ".".join("a" * 50_000) + "=3}", "optimiser.betas must be a list"),
        ("depth=2", "depth must be 1 for the variant 'compact', which has no blocks, got 2"),
        ("flips=maybe", "flips must be true or false, got 'maybe'"),
        ("shifts=8", "shifts must be below the finest size, 8, got 8"),
    ],
)
def test_wrong_override(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(load_preset("digits"), [override])


def test_wrong_changes_in_python():
    config = load_preset("digits")
    for changes, message in (
        ({"sizes": 8}, "sizes must be a list"),
        ({"langevin": 3}, "langevin is a table"),
        ({"langevin": {"stepz": 3}}, r"unknown key 'langevin.stepz' \(did you mean 'langevin.steps'"),
        ({"stepz": 3}, r"did you mean 'steps'"),
    ):
        with pytest.raises(ConfigError, match=message):
            merge(config, changes)


def test_unknown_preset_and_file(tmp_path):
    with pytest.raises(ConfigError, match=r"got 'digit' \(did you mean 'digits'\?\)"):
        load_config("digit")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "nothing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"broken.toml: must be a TOML file, got a syntax error"):
        load_config(broken)
    broken.write_text("[langevin]\nsteps = 4")
    with pytest.raises(ConfigError, match="give step_size"):
        load_config(broken)


SHAPES = {
    "{start=0.1,end=0.01}": mg.Schedule(0.1, 0.01),
    "{start=0.1, end=0.01, shape=cosine}": mg.Schedule(0.1, 0.01, "cosine"),
    '0.2,[0.3,0.2],{start=0.1,end=0.05,shape="linear"}': (0.2, (0.3, 0.2), mg.Schedule(0.1, 0.05)),
}


@pytest.mark.parametrize("text", SHAPES)
@pytest.mark.parametrize("name", ["step_size", "noise_scale", "drift", "noise_std", "reference_std"])
def test_a_schedule_survives_the_command_line_and_a_file(name, text):
    form = {"drift": ["langevin.noise_std=0.1"], "noise_scale": ["langevin.step_size=0.1"]}.get(name, [])
    config = apply_overrides(load_preset("digits"), ["langevin.steps=2", *form, f"langevin.{name}={text}"])
    expected = SHAPES[text]
    assert getattr(config.langevin, name) == expected
    assert from_dict(tomllib.loads(config.to_toml())) == config
    assert merge(config, {"langevin": {name: expected}}) == config
    for index, chain in enumerate(config.dynamics()):
        assert getattr(chain, name) == pick(expected, index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{start=1,ende=2}", r"must be a number >= 0.*got {'start': 1, 'ende': 2}, with the unknown entry 'ende'"),
        ("{start=1}", "without 'end'"),
        ("{start=1,end=-1}", "whose end is not a number >= 0"),
        ("{start=1,end=2,shape=cosin}", "whose shape must be one of .*did you mean 'cosine'"),
        ("{start=1,end=0,shape=geometric}", "whose start and end must be > 0 in a geometric one, got 1 and 0"),
        ("1,[],1", r"got \[1, \[\], 1\]"),
        ("1,[1,2],1", "hold one value a step, 30, or be a Schedule, got 2, at size 4"),
    ],
)
def test_schedules_that_are_refused(text, message):
    with pytest.raises(ConfigError, match=f"^--set: langevin.noise_std .*{message}"):
        apply_overrides(load_preset("digits"), [f"langevin.noise_std={text}"])


def test_annealed_noise_scales_a_schedule_and_each_value_of_a_list():
    given = {"noise_std": [[0.4, 0.2], mg.Schedule(0.4, 0.2, "geometric"), 0.4], "steps": 2}
    chains = merge(load_preset("digits"), {"langevin": given}).dynamics([0.5, 0.5, 0.5])
    assert [chain.noise_std for chain in chains] == [(0.2, 0.1), mg.Schedule(0.2, 0.1, "geometric"), 0.2]


def test_noise_factor_scales_the_form_that_is_used():
    decoupled, coupled = load_preset("digits"), load_preset("multigrid-paper")

    def by_step(chains):
        return [numbers.noise_std for numbers in chains[0].by_step()]

    full = by_step(decoupled.dynamics())
    assert len(full) == 30 and full[0] == pytest.approx(0.06) and full[-1] == 0
    assert by_step(decoupled.dynamics([0.5, 1, 1])) == pytest.approx([0.5 * std for std in full])
    constant = apply_overrides(load_preset("cifar10"), ["langevin.noise_std=0.03"])
    constant = constant.dynamics([0.5, 1, 1, 1])[0].update().noise_std
    assert constant == pytest.approx(0.5 * 0.03)
    assert coupled.dynamics([1, 0.5, 1])[1].update().noise_std == pytest.approx(0.15)
    assert coupled.dynamics([1, 0.5, 1])[0].update().noise_std == pytest.approx(0.3)


def test_no_activation_is_a_value_and_auto_the_variants_own():
    from mgebm_fast.learning import build_model

    config = apply_overrides(load_preset("digits"), ["activation=none"])
    assert 'activation = "none"' in config.to_toml() and build_model(config).nets[-1].activation == "none"
    own = apply_overrides(config, ["activation=auto"])
    assert "activation" not in own.to_toml().split("[")[0] and build_model(own).nets[-1].activation == "leaky_relu"
    assert {name: default for name, _, default, _ in describe_keys()}["activation"] == "auto"
    with pytest.raises(ConfigError, match="elu, none, or auto, got 'tanh'"):
        apply_overrides(config, ["activation=tanh"])


def test_every_key_is_described():
    rows = {name: (expected, default) for name, expected, default, text in describe_keys() if text}
    assert rows["langevin.steps"] == ("a whole number >= 1 and <= 1000000, or a list with one for each net", 30)
    assert len(rows) == len(describe_keys())
    defaults = TrainConfig()
    assert rows["batch_size"][1] == defaults.batch_size


def test_written_toml_is_read_back_as_it_was():
    """By a writer of our own: training needs no package for it."""
    values = {
        "text": 'a "quote", \\ back, \n line, \t tab, \x00 \x1f \x7f, ü 🙂', "empty": "", "yes": True, "no": False,
        "whole": -(2**62), "small": 1e-05, "big": 1e300, "half": 0.5, "up": math.inf, "down": -math.inf,
        "list": [1, 2.5, "x", True], "none": [], "nested": [[1], [2, 3], []], "an odd key": 1, "": 2,
        "table-1": {"a": 1, "b": ["c"]}, "no keys": {},
    }  # fmt: skip
    assert tomllib.loads(written(values)) == values
    assert math.isnan(tomllib.loads(written({"x": math.nan}))["x"])
    assert written({"a": 1, "t": {"b": [1, "x"]}}) == 'a = 1\n\n[t]\nb = [\n    1,\n    "x",\n]\n'
    with pytest.raises(TypeError, match="must hold numbers, text and lists of them, got NoneType"):
        written({"a": None})


def test_every_number_that_memory_or_time_depends_on_is_bounded():
    """Whole numbers have an upper bound, whatever lists and options they stand in."""
    from mgebm_fast.learning.config.keys import Whole
    from mgebm_fast.learning.config.train_config import all_keys

    def leaves(kind):
        return leaves(kind.kind) if hasattr(kind, "kind") else kind

    kinds = {name: leaves(field.metadata["kind"]) for name, (_, field) in all_keys().items()}
    assert [name for name, kind in kinds.items() if isinstance(kind, Whole) and kind.high is None] == []
    with pytest.raises(ConfigError, match="batch_size must leave a batch below 2147483648 pixels, at 1 channels"):
        apply_overrides(load_preset("digits"), ["sizes=[1,4096]", "batch_size=4096"])


def test_files_that_are_no_configuration_are_refused_at_once(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes("steps = 7".encode("utf-8-sig"))
    assert load_config(path).steps == 7
    deep = ".".join("a" * 50_000) + " = 1", " . ".join("a" * 5_000) + " = 1", "a = " + "[" * 9000, "#" * 300_000
    for text in deep:
        path.write_text(text)
        with pytest.raises(ConfigError, match="x.toml: must be a TOML file"):
            load_config(path)
    path.write_bytes(b"steps = \xff")
    with pytest.raises(ConfigError, match="x.toml: must be a TOML file"):
        load_config(path)
    path.unlink()
    os.mkfifo(path)
    for source in (path, "/dev/zero"):
        with pytest.raises(ConfigError, match="must be a TOML file that can be read: must be a regular file"):
            load_config(source)


IDLE = [
    ("digits-abp", "stabilise.energy_l2", 0.1, "0.0, with the method 'abp', which has no energy, got 0.1"),
    ("digits-abp", "stabilise.data_noise", 0.1, "0.0, with the method 'abp'"),
    ("digits-abp", "stabilise.data_noise_clamp", True, "False, with the method 'abp'"),
    ("digits-abp", "optimiser.per_layer_divide", True, "False, with the method 'abp'"),
    ("digits-abp", "precision", "bf16", "'auto', with the method 'abp'"),
    ("fire", "classes", ["a"], r"\[\], with the method 'spatial-temporal', whose recordings have none"),
    ("digits", "multigrid.bank_grids", 2, "'none', without multigrid.bank_size, got 2"),
    ("digits", "multigrid.bank_share", 0.25, "0.5, without multigrid.bank_size, got 0.25"),
    ("digits", "multigrid.bank_renewal", 0.25, "0.1, without multigrid.bank_size"),
    ("photos64", "batch_parts", 4, "1, with multigrid.bank_size, whose chains are of whole batches"),
    ("digits", "optimiser.muon_rms", 0.2, '0.5, without optimiser.name = "muon", got 0.2'),
    ("digits", "optimiser.muon_momentum", 0.5, '0.9, without optimiser.name = "muon", got 0.5'),
    ("multigrid-released", "stabilise.stiffness", 0.8, "0.0, without stabilise.data_noise, which it raises"),
    ("digits", "langevin.reference_mean", 0.5, "0.0, without langevin.reference_std, got 0.5"),
]


@pytest.mark.parametrize(("preset", "name", "value", "words"), IDLE)
def test_a_key_that_nothing_would_read_is_refused_where_it_is_set(preset, name, value, words, tmp_path):
    config, (section, _, leaf) = load_preset(preset), name.rpartition(".")
    text = json.dumps(value)
    with pytest.raises(ConfigError, match=f"--set: {name} must be left at its default, {words}"):
        apply_overrides(config, [f"{name}={text}"])
    with pytest.raises(ConfigError, match=f"{name} must be left at its default, {words}"):
        merge(config, {section: {leaf: value}} if section else {name: value})
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "{preset}"\n' + (f"[{section}]\n" if section else "") + f"{leaf} = {text}\n")
    with pytest.raises(ConfigError, match=f"{name} must be left at its default, {words}"):
        load_config(path)


def test_what_comes_along_and_is_not_read_is_no_error():
    banked = apply_overrides(load_preset("cifar10-32"), ["multigrid.bank_grids=1"])
    alone = apply_overrides(banked, ["multigrid.bank_size=none"])
    assert alone.options.bank_size is None and alone.options.bank_grids == 1
    assert from_dict(alone.to_dict()) == alone
    other = apply_overrides(load_preset("digits"), ["method=abp", "precision=fp32", "stabilise.energy_l2=0"])
    assert other.stabilise.data_noise == (0.03, 0.05, 0.08)
    assert apply_overrides(load_preset("digits"), ["langevin.reference_mean=0.5", "langevin.reference_std=1"])
    assert apply_overrides(load_preset("object"), ["langevin.reference_std=none", "langevin.reference_mean=0.5"])
