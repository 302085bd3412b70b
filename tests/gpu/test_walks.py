"""What chains, cascades and training ask of a GPU, on fake tensors: launches, copies, synchronisations, captures."""

import contextlib
import dataclasses
import math
import types

import numpy as np
import pytest
import torch
from helpers.fake_cuda import count, illegal, tally, to_cuda

from mgebm_fast import noise, ops
from mgebm_fast.data import ImageData
from mgebm_fast.evaluation import features
from mgebm_fast.gradient import verify
from mgebm_fast.gradient.plan import plan
from mgebm_fast.gradient.stack import read
from mgebm_fast.learning import MultiGridTrainer, apply_overrides, build_model, load_preset
from mgebm_fast.learning.methods.contrast import contrast
from mgebm_fast.models import MultiGrid
from mgebm_fast.nets import multigrid_net
from mgebm_fast.ops import state
from mgebm_fast.ops.conv_chain import resident, resident_layout
from mgebm_fast.sampling import Langevin, coupling, graphs

DYNAMICS = Langevin(3, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))


def net_of(size, norm, variant="B"):
    return to_cuda(multigrid_net(size, 3, norm=norm, variant=variant))


def images(n, size):
    return torch.rand(n, 3, size, size, device="cuda")


def names(events, kind):
    return [event.name for event in events if event.kind == kind]


def test_reference_noise_stays_on_its_device(world):
    """Words made of numbers on the host would mix devices at the first operator."""
    assert noise.integers(100, 8, seed=1, step=0, stream=3, device="cuda:0").device.type == "cuda"
    ops.noise((4, 3, 8, 8), seed=2**63 + 1, step=2, device="cuda:0", backend="reference")
    x, grad = images(4, 8), images(4, 8)
    ops.langevin_step_(x, grad, step_size=0.3, seed=1, backend="reference")
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    ops.langevin_step_(x, grad, step_size=0.3, seed=1, step=step, backend="reference")
    assert not [event for event in world.take() if event.kind in ("sync", "copy")]


# size, norm, variant, batch: kernels of three steps in a graph, by name
CHAINS = [
    (64, "batch", "B", 128, {"edge_step": 3, "dense_chain": 0, "bias_act": 0}),
    (16, "none", "B", 128, {"edge_step": 3, "dense_chain": 0, "bias_act": 12, "bias_act_backward": 9}),
    (4, "none", "B", 128, {"edge_step": 0, "dense_chain": 1, "bias_act": 0}),
    (4, "batch", "B", 128, {"edge_step": 0, "dense_chain": 1, "bias_act": 0}),
    (4, "batch", "B", 1056, {"edge_step": 3, "dense_chain": 0, "bias_act": 0}),
    (8, "none", "compact", 64, {"edge_step": 3, "dense_chain": 0}),
    (2, "none", "compact", 64, {"edge_step": 0, "dense_chain": 1}),
]


@pytest.mark.parametrize("size, norm, variant, batch, kernels", CHAINS)
def test_a_chain_is_captured_and_replayed_with_one_host_sync_a_call(world, size, norm, variant, batch, kernels):
    net, x = net_of(size, norm, variant), images(batch, size)
    for _ in range(3):
        world.take()
        DYNAMICS(net, x, seed=1)
        events = world.take()
        assert not illegal(events)
        if count(events, "capture"):
            launched = tally([event for event in events if event.captured])
            assert {name: launched.get(name, 0) for name in kernels} == kernels
            if norm == "batch" and not kernels["dense_chain"]:
                assert sum(n for name, n in launched.items() if "norm" in name or name.endswith("statistics")) > 0
    assert count(events, "replay") == 1 and count(events, "sync") == 1 and not count(events, "copy")
    # Before a replay its inputs and weights are written: a few small launches a layer, no more.
    assert sum(event.launches for event in events) <= 50


def test_a_new_plan_of_the_same_shape_copies_no_table_to_the_device(world):
    """Annealed chains make new plans at every update: the edge kernel's table must not be sent, and waited for."""
    net, x = net_of(8, "none", "compact"), images(16, 8)
    for factor in (1.0, 0.9, 0.8):
        world.take()
        Langevin(2, step_size=0.3, noise_scale=factor)(net, x, seed=1)
        events = world.take()
    assert not count(events, "capture") and not count(events, "copy")


def test_masks_ids_and_counters_on_the_device(world):
    net, x = net_of(8, "none", "compact"), images(6, 8)
    zero = torch.zeros((), dtype=torch.int64, device="cuda")
    ids = torch.arange(6, device="cuda")
    mask = torch.zeros(6, 1, 8, 8, dtype=torch.bool, device="cuda")
    for _ in range(3):
        world.take()
        DYNAMICS(net, x, seed=zero, first_step=zero, first_sample=ids, mask=mask)
        events = world.take()
        assert not illegal(events) and not names(events, "copy")[1:]
    assert count(events, "replay") == 1


@pytest.mark.parametrize("norm, variant, sizes", [("batch", "B", (1, 4, 16)), ("none", "compact", (1, 4, 8))])
def test_a_cascade_is_one_replay_and_a_pipeline_one_sync(world, norm, variant, sizes):
    model = MultiGrid(sizes, channels=3, norm=norm, variant=variant, batch_size=32, langevin=DYNAMICS)
    model = to_cuda(model)
    model.colours = torch.rand(40, 3, device="cuda")
    start = torch.rand(32, 3, 1, 1, device="cuda")
    for step in range(3):
        world.take()
        model.cascade(start, seed=1, first_step=3 * step)
        events = world.take()
        assert not illegal(events)
    assert (count(events, "replay"), count(events, "sync"), count(events, "copy")) == (1, 1, 0)
    for _ in range(2):
        world.take()
        model.sample(64, seed=1, pipeline=True)
        events = world.take()
        assert not illegal(events)
    assert (count(events, "replay"), count(events, "sync")) == (2 * len(model.nets), 1)
    for step in range(2):
        world.take()
        model.cascade(start, seed=1, first_step=3 * step, cycles=sizes[1:2])
        events = world.take()
        assert not illegal(events)
    assert count(events, "replay") == 2  # the way up after each way down is its own
    known, mask = images(32, sizes[-1]), torch.zeros(32, 3, sizes[-1], sizes[-1], dtype=torch.bool, device="cuda")
    for _ in range(2):
        world.take()
        model.cascade(start, seed=1, known=known, mask=mask)
        events = world.take()
        assert not illegal(events)
    assert count(events, "replay") == 1


@pytest.fixture
def built(world, monkeypatch):
    """The world of a module with CUDA kernels, in which resident chains may run."""

    def layout(stages, samples):  # tables are numbers, not tensors without values
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            sizes = [dataclasses.replace(stage, weight=torch.empty(stage.weight.shape)) for stage in stages]
            made = resident_layout.Layout(sizes, samples)
        for part in made.parts:
            part.swizzle = torch.empty(len(part.swizzle), dtype=torch.int64)
        return made

    world.archs = "90"
    monkeypatch.delenv("MGEBM_RESIDENT")
    monkeypatch.setattr(resident, "Layout", layout)
    monkeypatch.setattr(state, "why_not_plain", lambda tensor, **_: "")
    return world


def test_small_nets_are_one_launch_a_chain_and_a_cascade(built):
    net, x = net_of(8, None, "residual"), images(2, 8)
    model = to_cuda(MultiGrid((1, 4, 8), channels=3, norm="none", variant="compact", langevin=DYNAMICS))
    start = torch.rand(2, 3, 1, 1, device="cuda")
    for run in (lambda: DYNAMICS(net, x, seed=1), lambda: model.cascade(start, seed=1)):
        for _ in range(2):
            built.take()
            run()
            events = built.take()
            assert not illegal(events)
        captured = [event.name for event in events if event.captured and event.kind in ("native", "triton")]
        assert captured == ["conv_chain"], captured
        run()
        assert count(built.take(), "replay") == 1
    assert plan(net, x).explain().plan == "resident"


def test_what_is_no_resident_chain_says_why(built):
    def explained(net, size, precision="auto"):
        found = plan(net, images(2, size), precision).explain()
        return found.plan, " ".join(found.why_not_faster)

    name, why = explained(net_of(4, "batch"), 4)
    assert name == "dense" and "its own samples alone, and layer layers.0 normalises by batch statistics" in why
    assert "for at most 528 samples" in str(plan(net_of(4, "batch"), images(2, 4)).explain())
    name, why = explained(net_of(16, None, "residual"), 16)
    assert name == "autograd" and "take 810 KiB of shared memory, of 227" in why
    name, why = explained(net_of(8, None, "residual"), 8, "fp32")
    assert name == "autograd" and "its weights and maps are fp16, not fp32" in why


def test_a_reading_is_compared_with_its_own_code_in_float32(world, monkeypatch):
    """TF32, torch's default for convolutions, moves gradients of the published nets by 2 to 6 %: none was trusted."""
    seen = []

    class Watched(verify.AutogradPlan):
        def gradient(self, x):
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return torch.zeros_like(x)

    monkeypatch.setattr(verify, "AutogradPlan", Watched)
    net, x = net_of(4, "batch"), images(2, 4)
    verify.why_not_trusted(net, read(net, x), x)
    assert seen == ["ieee"]


def test_energies_are_compared_in_float32_to_find_out_whether_samples_are_coupled(world, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    coupling._asked(lambda x: seen.append(torch.backends.cudnn.conv.fp32_precision) or x.sum((1, 2, 3)), images(4, 4))
    assert seen == ["ieee"] * 4


def test_captures_of_a_lane_share_one_stream_and_a_failed_one_gives_the_callers_back(world):
    """torch's own stream of captures is of the device captured on first, and stays current where a capture fails."""
    streams, current = set(), torch.cuda.current_stream()
    for size in (8, 16):
        net, x = net_of(size, "none", "compact"), images(4, size)
        for _ in range(2):
            DYNAMICS(net, x, seed=1)
        streams |= {event.detail for event in world.take() if event.kind == "capture"}
        assert torch.cuda.current_stream() is current
    assert len(streams) == 1 and "stream" in streams.pop()
    world.fail_captures = True
    net, x = net_of(8, "none", "compact"), images(5, 8)
    for _ in range(3):
        DYNAMICS(net, x, seed=1)
        assert torch.cuda.current_stream() is current
    slots = graphs._slots[net].values()
    assert ["capture failed" in slot.refusal for slot in slots] == [True]


def trainer_of(preset, *changes):
    config = apply_overrides(load_preset(preset), ["batch_size=8", "langevin.steps=2", *changes])
    size = config.sizes[-1]
    pixels = np.random.default_rng(0).integers(0, 256, (40, config.channels, size, size)).astype(np.uint8)
    return config, ImageData(pixels, name="random"), build_model(config)


@pytest.fixture
def rule_of(world, monkeypatch):
    """The rule of a preset on the device, and a batch in main memory."""

    def make(preset, *changes):
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            config, data, model = trainer_of(preset, *changes)
        model = to_cuda(model)
        monkeypatch.setattr(MultiGridTrainer, "_colours", lambda self: types.SimpleNamespace(numpy=lambda: np.zeros(3)))
        monkeypatch.setattr(type(model), "set_colours", lambda self, colours: None)
        model.colours = torch.rand(40, config.channels, device="cuda")
        monkeypatch.setattr(type(model), "check_storable", lambda self: None)  # fake tensors are not
        monkeypatch.setattr(torch.autograd, "grad", lambda loss, inputs, *_, **__: (
            [torch.empty_like(x) for x in inputs] if isinstance(inputs, (list, tuple)) else [torch.empty_like(inputs)]
        ))  # fmt: skip
        batch = torch.zeros(8, config.channels, *[config.sizes[-1]] * 2, dtype=torch.uint8)
        return MultiGridTrainer(model, data, config, quiet=True).rule, batch

    return make


def test_a_training_update_without_a_graph(world, rule_of):
    """Nothing waits inside an update but its one read at the end, plus those of chains that are not captured."""
    rule, batch = rule_of("digits")
    for iteration in range(3):
        world.take()
        rule.update(batch, iteration, detail=False)
        events = world.take()
        assert not illegal(events)
    own = [event.place for event in events if event.kind == "sync" and event.place.startswith("learning")]
    assert len(own) == 1, own
    assert count(events, "replay") >= 1  # chains are replayed, annealed ones too


# preset, updates, log_every, most launches in a graph, but for those of the backward pass of learning, which fake
# tensors do not make. Without a graph digits has 231 and 10 copies beside its chains.
CAPTURED = [
    ("digits", 12, 5, 315),
    pytest.param("cifar10", 5, 2, 440, marks=pytest.mark.slow),
    ("multigrid-released", 2, 1, 624),  # with what records have
    # The same, of which stiffness is nine gradients a net.
    ("digits multigrid.bank_size=16 multigrid.bank_share=0.5 learning_precision=bf16", 2, 1, 1850),
]


@pytest.mark.parametrize("preset, updates, every, launches", CAPTURED)
def test_training_updates_are_one_graph_each_with_one_read_every_log_every(
    world, rule_of, preset, updates, every, launches
):
    rule, batch = rule_of(*preset.split(), f"log_every={every}")
    captures, reads = [], []
    for iteration in range(updates):
        world.take()
        rule.launch(batch, iteration, detail=iteration % every == every - 1)
        events = world.take()
        assert not illegal(events)
        captures.append(count(events, "capture"))
        if iteration:
            # the batch goes to the device, and at the beginning of a window the table of its numbers
            assert not count(events, "sync") and count(events, "replay") == 1
            assert count(events, "copy") == 1 + (iteration % every == 0), [e for e in events if e.kind == "copy"]
            assert sum(event.launches for event in events) <= 2
            if every == 1 or iteration % every < every - 1:  # without what records have
                (replay,) = [event.detail for event in events if event.kind == "replay"]
                assert int(replay.removesuffix(" launches")) <= launches
        found, made = rule.collect(iteration + 1, wait=iteration % every == every - 1)
        assert made == iteration + 1
        if found:
            events = world.take()
            reads.append((len(found), count(events, "sync"), count(events, "copy")))
            assert not {event.name for event in events if event.launches}
    assert captures[0] == min(every, 2) and not any(captures[1:])  # without and with what records have
    assert reads == [(every, 1, 0)] * 2


def test_the_feature_net_of_evaluate_is_trained_and_runs_on_the_device(world, monkeypatch):
    """One copy each of a batch's images and labels a step, nothing that waits, in float32 that is float32."""
    data = ImageData(np.zeros((70, 1, 24, 24), np.uint8), np.arange(70) % 3, ("a", "b", "c"), "random")
    monkeypatch.setattr(ImageData, "batch", lambda _, rows: torch.zeros(len(rows), 1, 24, 24, dtype=torch.uint8))
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        net = features.SmallConvNet(1, 24, 3)
    net, seen = to_cuda(net), []
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional,
        "conv2d",
        lambda x, *rest: seen.append((x.device.type, torch.backends.cudnn.conv.fp32_precision)) or convolve(x, *rest),
    )

    def backward(loss):  # which fake tensors have not
        seen.append((loss.device.type, torch.backends.cudnn.conv.fp32_precision))
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    world.take()
    features._fit(net, data, np.arange(3), 5 * 64, "cuda")
    events = world.take()
    assert seen == [("cuda", "ieee")] * 4 * 5
    assert count(events, "copy") == 2 * 5 and not count(events, "sync")
    assert len([e for e in events if "bmm" in e.name]) >= 5  # pooling by products
    features._in_chunks(net.features, data.images, 64, "cuda")
    assert seen[20:] == [("cuda", "ieee")] * 3 * 2


# precision, learning_precision, how float32 is multiplied, bytes of a number in convolutions behind the first
LEARNT = [
    ("auto", "auto", "tf32", 4), ("fp32", "auto", "ieee", 4), ("fp16", "fp32", "ieee", 4), ("fp32", "bf16", "tf32", 2),
]  # fmt: skip


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_nets_learn_in_the_precision_that_is_asked_for(world, monkeypatch, norm):
    net, x, seen = net_of(8, norm, "compact"), images(4, 8), []

    def grad(loss, parameters, **_):
        seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.allow_tf32))
        return [torch.empty_like(parameter) for parameter in parameters]

    monkeypatch.setattr(torch.autograd, "grad", grad)
    before = torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()
    for precision, learning_precision, kind, size in LEARNT:
        world.take()
        contrast(net, list(net.parameters()), x, x, 0.0, precision, learning_precision)
        made = [e.tensors.values() for e in world.take() if e.name.startswith("aten.convolution")]
        widths = [{taken // math.prod(shape) for shape, taken in tensors} for tensors in made]
        forwards, layers = (2 if norm == "batch" else 1), len(net.convolutions)
        assert widths == [{4}, *[{size}] * (layers - 1)] * forwards
        assert seen.pop() == (kind, kind == "tf32")
    assert (torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()) == before


def test_the_compiled_baseline_is_one_graph_a_chain(world, monkeypatch):
    """A graph a step, with its result copied out, would handicap what this package is compared with."""
    from mgebm_fast.benchmarks.loops import CompiledLoop

    monkeypatch.setattr(CompiledLoop, "graphs", {})
    monkeypatch.setattr(CompiledLoop, "compiled", {})
    monkeypatch.setattr(CompiledLoop, "_compile", lambda self, net, device: (net, lambda x, numbers: x + numbers[0]))
    net, x = to_cuda(torch.nn.Linear(2, 1)), images(4, 8)
    for _ in range(2):
        world.take()
        CompiledLoop(torch.bfloat16)(net, x, DYNAMICS)
        events = world.take()
        assert not illegal(events)
    assert count(events, "replay") == 1 and not tally(events).get("aten.add.Tensor")
    assert tally(events)["aten.clone.default"] == 2  # x in channels-last and the result, not the state of every step
