"""dense_chain_ on the published 4×4 net's matrices, 30 steps, against the same products in torch and langevin_step_.

Bytes: the weights streamed twice a step by each tile of 16 samples.
"""

from __future__ import annotations

import pytest
import torch

from mgebm_fast import ops

SIZES, STEPS = (48, 384, 512, 1024), 30


@pytest.mark.parametrize("split", [1, 4, 8, 16])
@pytest.mark.parametrize("samples", [100, 128, 1056])
def bench_dense_chain(report, device, samples, split):
    if device == "cpu":
        pytest.skip("a kernel of GPUs")
    if -(-samples // 16) * split > torch.cuda.get_device_properties(0).multi_processor_count:
        pytest.skip("more programs than multiprocessors")
    generator = torch.Generator().manual_seed(0)
    weights = [(torch.randn(b, a, generator=generator) / a**0.5).to(device) for a, b in zip(SIZES, SIZES[1:])]
    head = torch.randn(SIZES[-1], generator=generator).to(device)
    net = ops.dense_net(
        weights, [None] * 3, head, activations=["leaky_relu"] * 3, slopes=[0.2] * 3, dtype=torch.float16
    )
    x = 255 * torch.rand(samples, 48, generator=generator).to(device)
    update = dict(step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0), seed=1)
    expected = ops.dense_chain_(x.clone(), net, steps=3, backend="reference", **update)
    got = ops.dense_chain_(x.clone(), net, steps=3, split=split, **update)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05)
    low = [weight.half() for weight in weights]

    def torchs():
        for k in range(STEPS):
            h, kept = x.half(), []
            for weight in low:
                h = torch.nn.functional.leaky_relu_(h @ weight.T, 0.2)
                kept.append(h)
            g = head.half().expand_as(h)
            for weight, h in zip(reversed(low), reversed(kept)):
                g = torch.ops.aten.leaky_relu_backward(g, h, 0.2, True) @ weight
            ops.langevin_step_(x, g, step=k, **update)

    moved = STEPS * -(-samples // 16) * 2 * sum(weight.numel() * 2 for weight in net.weights)
    case = f"{samples}x48, {STEPS} steps, split {split}"
    report("dense_chain", case, moved, lambda: ops.dense_chain_(x, net, steps=STEPS, split=split, **update),
           torch_fp16=torchs)  # fmt: skip
