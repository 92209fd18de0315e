"""The memory planner: what a run will hold, from the model's config alone.

`shape` reads the sizes of a model, `formulas` has the bytes of each thing that a run holds, `plan` adds them up and chooses
what is open. `job` plans a job for the GPU of this machine, `command` is `astarpo-plan`.
"""

from .plan import Line, Plan, RunSizes, describe, plan_run, training_sizes
from .shape import ModelShape, Unplannable

__all__ = ["Line", "ModelShape", "Plan", "RunSizes", "Unplannable", "describe", "plan_run", "training_sizes"]
