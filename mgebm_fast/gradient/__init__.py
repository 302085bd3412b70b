"""Plans for ∇E(x): how the gradient of an energy is computed, and why so."""

from .base import GradientPlan, PlanReport
from .holding import frozen_parameters
from .plan import PRECISIONS, energy_gradient, plan

__all__ = ["PRECISIONS", "GradientPlan", "PlanReport", "energy_gradient", "frozen_parameters", "plan"]
