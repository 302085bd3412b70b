# %% [markdown]
# # An energy of your own
#
# A Langevin chain of any callable from (N, …) to (N,), here a mixture of three Gaussians in the plane: what runs, if
# the chain has arrived, and what the step size does.

# %%
import torch
from PIL import Image

import mgebm_fast as mg

means = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.5]])


def energy(x):  # (N, 2) -> (N,): Gaussians of deviation 0.7
    return -torch.logsumexp(-((x[:, None] - means) ** 2).sum(-1) / (2 * 0.7**2), 1)


chain = mg.Langevin(steps=400, step_size=0.25)
start = torch.zeros(1000, 2)
print(chain.explain(energy, start))

# %% [markdown]
# A stretch of chains, from one point to the three modes.


# %%
def density(x, side=64):
    """Dark where points are, on [-4.5, 4.5] squared."""
    cells = ((x + 4.5) / 9 * side).long().clamp(0, side - 1)
    counts = torch.bincount(cells[:, 1] * side + cells[:, 0], minlength=side**2).reshape(1, 1, side, side)
    return (255 * torch.exp(-counts.float() / 2)).to(torch.uint8)


states = [density(x) for _, x in chain.trajectory(energy, start, seed=0, every=80)]
Image.fromarray(mg.pictures.image_grid(torch.cat([density(start), *states]), columns=6, scale=2))

# %% [markdown]
# Has it arrived? A third of the points belongs to each mode, and each has variance 0.49; the step makes it a little
# larger: 0.49 / (1 − drift/(2·0.49)), with drift = step_size²/2.

# %%
for step_size in (0.5, 0.25):
    x = mg.langevin_sample(energy, start, steps=int(100 / step_size**2), step_size=step_size, seed=0)
    nearest = torch.cdist(x, means).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / len(x)
    spread = torch.stack([x[nearest == k, 1].var() for k in (0, 1)]).mean().item()
    drift = step_size**2 / 2
    print(f"step {step_size}: shares {[round(s, 2) for s in shares.tolist()]}, variance {spread:.3f}, "
          f"expected {0.49 / (1 - drift / 0.98):.3f}")  # fmt: skip

# %% [markdown]
# `MALA` corrects each step, so that there is no such bias.

# %%
exact = mg.MALA(steps=200, step_size=0.5)(energy, start, seed=0)
nearest = torch.cdist(exact.x, means).argmin(1)
print(f"variance {torch.stack([exact.x[nearest == k, 1].var() for k in (0, 1)]).mean().item():.3f}")
