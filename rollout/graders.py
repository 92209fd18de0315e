"""Who grades a pool: the verifier, or reward functions, which a command line names and a fingerprint records."""

import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..verifier import math_reward
from ..verifier.verifier import Verifier, shared_verifier
from .data import Problem
from .episode import TurnGrade
from .files import text_hash
from .sample import Answer, GradeFunction

if TYPE_CHECKING:
    from .rewards import RewardFunctions

REWARD_FUNCTIONS = "reward functions"
"""How a fingerprint names a grader that is not the verifier."""


def load_reward_functions(names: Sequence[str] | None) -> list[Any]:
    """Reward functions by their names on a command line.

    Args:
        names (`Sequence[str]`, *optional*):
            `module.function` each, looked for in the present folder too; `math_reward` is the grader, and so is no name at all.

    Raises:
        ValueError: If a module or a function cannot be found, or is none; the message names the fix.
    """
    return [_load(name) for name in names or ["math_reward"]]


def _load(name: str) -> Any:
    if name == "math_reward":
        return math_reward
    module, dot, attribute = name.rpartition(".")
    if not dot:
        raise ValueError(
            f"`{name}` in --reward_funcs is neither math_reward nor module.function, such as my_rewards.{name}."
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.split(".")[0]):
            raise  # the module is there, and something that it imports is not
        raise ValueError(
            f"--reward_funcs {name}: there is no module `{module}` (looked in {here} and among the installed packages)."
        ) from None
    except AttributeError:
        raise ValueError(f"--reward_funcs {name}: the module `{module}` has no `{attribute}`.") from None
    if not callable(function):
        raise ValueError(f"--reward_funcs {name}: `{attribute}` is no function but a {type(function).__name__}.")
    return function


def graded_by(functions: Sequence[Any], weights: Sequence[float]) -> dict[str, Any]:
    """Reward functions as a pool's fingerprint names them: by module and qualified name, with a hash of their source."""
    return {
        "reward_functions": [qualified_name(function) for function in functions],
        "reward_sources": [_source_of(function) for function in functions],
        "reward_weights": [float(weight) for weight in weights],
    }


def grader_fingerprint(functions: Sequence[Any], names: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    """What a pool's fingerprint says of its grader where that is not the verifier.

    Args:
        functions (`Sequence[Any]`):
            The reward functions.
        names (`Sequence[str]`):
            Their short names.
        weights (`Sequence[float]`):
            Their weights.
    """
    weights = [float(weight) for weight in weights]
    return {"verifier": f"{REWARD_FUNCTIONS} {', '.join(names)}, {weights}", **graded_by(functions, weights)}


def reward_grader(
    functions: "RewardFunctions", row_of: Callable[[Problem], dict[str, Any]], trainer_state: Any = None
) -> GradeFunction:
    """Reward functions as the grader of a pool.

    Args:
        functions ([`RewardFunctions`]):
            The functions.
        row_of (`Callable`):
            A problem as the row that the functions see: `prompt`, `solution` and other columns.
        trainer_state ([`~transformers.TrainerState`], *optional*):
            For functions that look at it.
    """

    def grade(sampled: Sequence[Answer]) -> list[TurnGrade]:
        from .rewards import Answer as Rewarded

        # Truncated answers are the pool's business, which knows the rule too.
        answers = [Rewarded(row_of(one.problem), one.text, list(one.token_ids), False) for one in sampled]
        weighted = functions(answers, require_eos=False, trainer_state=trainer_state).weighted_N.tolist()
        return [TurnGrade("no_signal", None) if r != r else TurnGrade("rewarded", r) for r in weighted]

    return grade


def pool_grader(
    functions: "RewardFunctions", row_of: Callable[[Problem], dict[str, Any]], trainer_state: Any = None
) -> tuple[Verifier | GradeFunction, dict[str, Any]]:
    """The grader of a pool, and what a fingerprint says of it besides the verifier's name.

    Args:
        functions ([`RewardFunctions`]):
            The functions; `math_reward` alone is the verifier.
        row_of (`Callable`):
            A problem as the row that the functions see.
        trainer_state ([`~transformers.TrainerState`], *optional*):
            For functions that look at it.
    """
    if functions.functions == [math_reward]:
        return shared_verifier(), {}
    said = grader_fingerprint(functions.functions, functions.names, functions.weights_F.tolist())
    return reward_grader(functions, row_of, trainer_state), said


def row_of_problem(problem: Problem, is_text: bool = False) -> dict[str, Any]:
    """A problem as a row of a training set: `prompt`, `solution`, and the other columns of its data set."""
    prompt: Any = problem.question if is_text else [dict(message) for message in problem.messages]
    return {**problem.columns, "prompt": prompt, "solution": problem.gold}


def qualified_name(function: Any) -> str:
    """A reward function's module and name, as a pool's fingerprint has it."""
    if isinstance(function, str):
        return f"model {function}"
    if hasattr(function, "config"):
        return f"model {function.config._name_or_path}"
    function = getattr(function, "func", function)  # functools.partial
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    module = named.__module__
    if module == "__main__":  # the script has another name for whoever imports it
        module = Path(str(getattr(sys.modules["__main__"], "__file__", "__main__"))).stem
    return f"{module}.{named.__qualname__}"


def _source_of(function: Any) -> str | None:
    function = getattr(function, "func", function)
    try:
        return text_hash(inspect.getsource(function if inspect.isroutine(function) else type(function)))
    except (OSError, TypeError):
        return None
