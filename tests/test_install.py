"""What an installation needs and holds: chains run on torch and numpy alone, without torch's compiler, and the package
says that it is typed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Refuses every installed package but torch, numpy and what these two require.
PROGRAM = """
import re, sys
from importlib import metadata

allowed, todo = set(), ["torch", "numpy"]
while todo:
    name = re.sub(r"[-_.]+", "-", re.match(r"[\\w.-]+", todo.pop())[0]).lower()
    if name not in allowed:
        allowed.add(name)
        try:
            todo += [line for line in metadata.requires(name) or [] if "extra ==" not in line]
        except metadata.PackageNotFoundError:
            pass
owners = metadata.packages_distributions()

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes"):
            raise SystemExit("torch's compiler is imported, which takes seconds")
        found = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(name.partition(".")[0], [])}
        if found and not found & allowed and name.partition(".")[0] != "mgebm_fast":
            raise ModuleNotFoundError(f"refused: {name}", name=name)

sys.meta_path.insert(0, Refuse())
import mgebm_fast as mg
import torch

try:
    import rich
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the hook lets everything through")
stack = mg.nets.multigrid_net(4, channels=1, norm="none", variant="compact", width=0.1)
for energy in (stack, mg.energies.Sum(stack, lambda x: x.square().sum((1, 2, 3)))):
    for steps in (2, 20):
        x = mg.langevin_sample(energy, torch.rand(3, 1, 4, 4), steps=steps, step_size=0.1, clamp=(0, 1))
        assert x.shape == (3, 1, 4, 4) and bool(torch.isfinite(x).all())
    str(mg.Langevin(20, step_size=0.1).explain(energy, x))
mg.MALA(steps=2, step_size=0.1)(stack, x)
read = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1), torch.nn.Flatten(0))
for energy in (read, lambda x: read(x) + (x * x.exp()).sum(1)):
    mg.langevin_sample(energy, torch.rand(3, 2), steps=30, step_size=0.1)
mg.ops.pyramid(mg.ops.upsample(x, 2), [2])
"""


def test_chains_need_torch_and_numpy_alone():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "mgebm_fast" / "py.typed").is_file()
    data = re.search(r"\[tool.setuptools.package-data\]\n((?:.+\n)+)", (ROOT / "pyproject.toml").read_text())
    assert data is not None and '"mgebm_fast" = ["py.typed"]' in data[1]
