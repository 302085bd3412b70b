"""TorchEBM, each way: our chain on their model and their sampler's arguments, and their samplers on our gradient.

pip install torchebm
python examples/torchebm_adapter.py
"""

import torch
from torch import Tensor
from torchebm.core import BaseModel, DoubleWellModel
from torchebm.integrators import EulerMaruyamaIntegrator
from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics

import mgebm_fast as mg


def langevin(sampler: LangevinDynamics, n_steps: int) -> mg.Langevin:
    """The chain of `sampler.sample(n_steps=n_steps)`: x − η ∇E + √(2η) s ε; schedulers become a value for each step."""
    if type(sampler.integrator) is not EulerMaruyamaIntegrator:
        raise ValueError(f"{type(sampler.integrator).__name__} is no Langevin step: only EulerMaruyamaIntegrator is")
    drift, noise_std = [], []
    sampler.reset_schedulers()
    for _ in range(n_steps):
        drift.append(sampler.get_scheduled_value("step_size"))
        noise_std.append((2 * drift[-1]) ** 0.5 * sampler.get_scheduled_value("noise_scale"))
        sampler.step_schedulers()
    sampler.reset_schedulers()
    return mg.Langevin(n_steps, drift=drift, noise_std=noise_std, clamp=sampler.clamp)


class Energy(BaseModel):
    """An energy (N, ...) -> (N,) for TorchEBM's samplers and losses, its gradient in x computed by mgebm_fast."""

    def __init__(self, energy, precision: str = "fp32", device: torch.device | str | None = None) -> None:
        super().__init__(device=device)
        self.energy, self.precision = energy, precision

    def forward(self, x: Tensor) -> Tensor:
        return self.energy(x)

    def gradient(self, x: Tensor, model_kwargs: dict | None = None) -> Tensor:
        energy = (lambda y: self.energy(y, **model_kwargs)) if model_kwargs else self.energy
        return mg.gradient.energy_gradient(energy, x.float(), precision=self.precision).to(x.dtype)


def main() -> None:
    torch.manual_seed(0)
    theirs, start = DoubleWellModel(), torch.randn(1000, 2)
    sampler = LangevinDynamics(theirs, step_size=0.01, noise_scale=1.0)
    ours = langevin(sampler, n_steps=500)
    for name, x in (("TorchEBM", sampler.sample(x=start, n_steps=500)), ("mg.Langevin", ours(theirs, start))):
        print(f"{name} on their double well: energy {float(theirs(x).mean()):.2f} ± {float(theirs(x).std()):.2f}")

    net = mg.nets.multigrid_net(8, channels=1, norm="none", variant="compact", width=0.5)
    model, x = Energy(net), torch.rand(16, 1, 8, 8)
    print(
        f"our gradient is {float((model.gradient(x) - BaseModel.gradient(model, x)).abs().max()):.0e} from autograd's"
    )
    vectors = Energy(lambda v: net(v.unflatten(1, (1, 8, 8))))  # all that their HMC takes
    hmc = HamiltonianMonteCarlo(vectors, step_size=0.2, n_leapfrog_steps=5)
    _, facts = hmc.sample(x=x.flatten(1), n_steps=20, return_diagnostics=True)
    print(f"their HMC on our net accepts {float(facts['acceptance_rate'].mean()):.0%}")


if __name__ == "__main__":
    main()
