"""Plans for ∇E(x): how the gradient of an energy is computed, and why so."""

from .plan import PRECISIONS, GradientPlan, energy_gradient, frozen_parameters, plan

__all__ = ["PRECISIONS", "GradientPlan", "energy_gradient", "frozen_parameters", "plan"]
