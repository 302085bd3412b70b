"""Plans for ∇E(x): how the gradient of an energy is computed, and why so."""

from .holding import frozen_parameters
from .plan import PRECISIONS, GradientPlan, energy_gradient, plan

__all__ = ["PRECISIONS", "GradientPlan", "energy_gradient", "frozen_parameters", "plan"]
