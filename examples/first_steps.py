# %% [markdown]
# # First steps
#
# A model that comes with the package: draw from it, score images, fill a hidden half, on a CPU in seconds.

# %%
import torch
from PIL import Image

import mgebm_fast as mg

model = mg.load("digits", device="cpu")
print(type(model).__name__, "at sizes", model.sizes)


# %%
def show(images, columns):
    """A grid of uint8 images (N, C, H, W)."""
    return Image.fromarray(mg.pictures.image_grid(images, columns=columns, scale=4))


samples = model.sample(12, seed=0, return_grids=True)  # every grid, coarse to fine
show(model.to_uint8(samples[-1]), columns=12)

# %% [markdown]
# The chains of each size begin at the enlarged result of the size before.

# %%
coarse = torch.cat([grid[:12].repeat_interleave(8 // grid.shape[-1], 2).repeat_interleave(8 // grid.shape[-1], 3)
                    for grid in samples])  # fmt: skip
show(model.to_uint8(coarse), columns=12)

# %% [markdown]
# Energies are low where images look like the data: held-out digits against the same digits, pixels in random order.

# %%
digits = torch.from_numpy(mg.data.load("digits", size=8, channels=1, split="held_out").images[:200])
shuffled = digits.flatten(1)[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))].reshape(digits.shape)
for name, images in (("digits", digits), ("shuffled", shuffled)):
    energy = model.energy(images)
    print(f"{name}: energy {energy.mean().item():+.3f} ± {energy.std().item():.3f}")

# %% [markdown]
# The lower half is hidden, and filled by the chains: known pixels keep their bits. Each row has noise of its own.

# %%
known = model.from_uint8(digits[:12])
hidden = torch.zeros(known.shape, dtype=torch.bool)
hidden[:, :, 4:] = True
filled = [model.to_uint8(model.sample(12, seed=seed, mask=hidden, known=known)) for seed in (0, 1)]
show(torch.cat([digits[:12], torch.where(hidden, 127, digits[:12]), *filled]), columns=12)
