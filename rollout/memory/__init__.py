"""The memory planner: what a run will hold, from the model's config alone."""

from .plan import Line, Plan, RunSizes, plan_run
from .shape import ModelShape, Unplannable

__all__ = ["Line", "ModelShape", "Plan", "RunSizes", "Unplannable", "plan_run"]
