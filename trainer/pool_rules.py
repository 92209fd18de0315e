"""Whether a reference pool was made under the rules of the training that uses it.

V* belongs to a model, its prompts, a length, a temperature and a grader. Where training differs in one of them its V* is that of
another problem: nothing fails, the advantages are just wrong. So what a pool says of itself, in its manifest or in the `info` of the
data set that `ReferencePool.to_dataset` made of it, is compared with the run field by field.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..rollout.episode import SINGLE, EpisodeKind
from ..rollout.files import text_hash
from ..rollout.fingerprint import model_identity, tokenizer_identity, verifier_name
from ..rollout.graders import REWARD_FUNCTIONS, graded_by, qualified_name
from ..verifier import math_reward
from .config import completion_length
from .policy import options_of

if TYPE_CHECKING:
    from .config import AStarPOConfig

logger = logging.getLogger(__name__)


def training_rules(
    model: str,
    revision: str | None,
    tokenizer: Any,
    kind: EpisodeKind,
    functions: Sequence[Any],
    weights: Sequence[float],
    args: "AStarPOConfig",
) -> dict[str, Any]:
    """What a pool must share with a run, by the names of a pool's fingerprint; what its kind of episode decides is under `kind`.

    Args:
        model (`str`):
            Hub id or folder of the reference; empty where it is not known.
        revision (`str`, *optional*):
            Its branch, tag or commit.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        kind ([`EpisodeKind`]):
            What an episode is.
        functions (`Sequence[Any]`):
            The reward functions.
        weights (`Sequence[float]`):
            Their weights.
        args ([`AStarPOConfig`]):
            Temperature, lengths, arguments of the chat template.
    """
    return {
        "model": model_identity(model, revision) if model else None,
        # A script may have given the tokenizer a padding token, which decides no sample.
        "tokenizer": {tokenizer_identity(one) for one in _paddings(tokenizer)},
        "chat_template": text_hash(str(tokenizer.chat_template)),
        "chat_template_kwargs": options_of(args.chat_template_kwargs),
        "max_completion_length": completion_length(args),
        "temperature": args.temperature,
        "require_eos": args.require_eos,
        "verifier": verifier_name(),
        **graded_by(functions, weights),
        "kind": kind.fingerprint(),
    }


def refuse_other_rules(made: Mapping[str, Any], rules: Mapping[str, Any], where: str, accept_undeclared: bool) -> None:
    """Raise a `ValueError` for the first field in which a pool and a run differ; the message names the fix.

    Args:
        made (`Mapping[str, Any]`):
            The pool's fingerprint.
        rules (`Mapping[str, Any]`):
            From [`training_rules`].
        where (`str`):
            How messages name the pool.
        accept_undeclared (`bool`):
            Whether an imported pool need not say what it was made with.
    """
    if made.get("undeclared") and not accept_undeclared:
        raise ValueError(
            f"{where} was imported and does not say which {', '.join(made['undeclared'])} it was sampled with. V* is only right if "
            "they are those of this run. Declare them with `astarpo pool import`, or set --accept_undeclared true."
        )
    if made.get("adapter") is not None:
        raise ValueError(
            f"{where} was sampled with an adapter, so its V* belongs to that policy and not to the reference, "
            "which is the model with the adapter off. Merge the adapter into the model and sample that, or sample without."
        )
    _refuse_another_model(made.get("model"), rules["model"], where)
    if "chat_template" in made:  # sampled by a job; one without further arguments of the template does not name them
        made = {"chat_template_kwargs": {}, **made}
    for name, advice in _ADVICE.items():
        if name in made and made[name] is not None and not _same(made[name], rules.get(name)):
            raise ValueError(
                f"{where} was sampled with {name}={_shown(made[name])}, training is set to {name}={_shown(rules.get(name))}: {advice}."
            )
    _refuse_another_episode(made, rules["kind"], where)
    _refuse_another_grader(made, rules, where)


_OWN = "V* would belong to another reward. Set it as in the pool, or sample another pool"
_ADVICE = {
    "temperature": _OWN,
    "max_completion_length": _OWN,
    "require_eos": _OWN,
    "tokenizer": "its prompts would be other tokens. Use the model's own tokenizer, or sample another pool",
    "chat_template": "the model would see other prompts. Use the chat template of the pool, or sample another",
    "chat_template_kwargs": "the model would see other prompts. Set --chat_template_kwargs as in the pool, or sample another",
}


def _same(made: Any, wanted: Any) -> bool:
    return made in wanted if isinstance(wanted, set) else made == wanted


def _shown(value: Any) -> str:
    text = str(min(value) if isinstance(value, set) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_another_model(made: str | None, wanted: str | None, where: str) -> None:
    if made is None:
        return
    if wanted is None or made.startswith("local ") != wanted.startswith("local "):
        logger.warning(
            "%s was sampled from %s, training starts from %s. Whether that is the same model cannot be told from its name.",
            *(where, made, wanted or "a model without a name"),
        )
        return
    one, _, commit = made.partition("@")
    other, _, present = wanted.partition("@")
    if made == wanted or (one == other and not (_is_commit(commit) and _is_commit(present))):
        return
    raise ValueError(
        f"{where} was sampled with model={made}, training starts from model={wanted}: V* would belong to another reference. Train that "
        "model (--model_name_or_path, --model_revision), or sample another pool."
    )


def _is_commit(text: str) -> bool:
    return len(text) == 40 and set(text) <= set("0123456789abcdef")


def _refuse_another_episode(made: Mapping[str, Any], kind: Mapping[str, Any], where: str) -> None:
    """Completions can take the first turns of any pool: their kind decides nothing."""
    for name, wanted in kind.items():
        found = made.get(name, SINGLE.name if name == "episode" else None)
        if found != wanted:
            raise ValueError(
                f"{where} was sampled with {name}={found!r}, training is set to {name}={wanted!r}: its values would belong to other "
                f"episodes. Sample another with `astarpo-rollout --episode {kind['episode']}` and this {name}, or set it as in the pool."
            )


def _refuse_another_grader(made: Mapping[str, Any], rules: Mapping[str, Any], where: str) -> None:
    grader = str(made.get("verifier") or "")
    own = [qualified_name(math_reward)]
    if not grader or (grader.startswith(REWARD_FUNCTIONS) and "reward_functions" not in made):
        return  # imported, or older than the names: what it was graded by is not known
    functions = made.get("reward_functions", own)
    if functions != rules["reward_functions"]:
        raise ValueError(
            f"{where} was graded by reward_functions={', '.join(functions)}, training is set to {', '.join(rules['reward_functions'])}: V* "
            "would belong to another reward. Train with those, or let the trainer sample a pool with these (leave the pool out)."
        )
    if len(functions) > 1 and made.get("reward_weights", rules["reward_weights"]) != rules["reward_weights"]:
        raise ValueError(
            f"{where} was graded with reward_weights={made['reward_weights']}, training is set to {rules['reward_weights']}: V* would "
            "belong to another reward. Set --reward_weights as in the pool, or sample another."
        )
    if functions == own and not grader.startswith(REWARD_FUNCTIONS) and grader != rules["verifier"]:
        raise ValueError(
            f"{where} was graded by verifier={grader}, training grades by {rules['verifier']}: the same answer may earn another reward. "
            f"Grade it again, without sampling: `astarpo pool regrade FOLDER`."
        )
    for name, before, now in zip(functions, made.get("reward_sources", []), rules["reward_sources"], strict=False):
        if before != now:
            logger.warning(
                "%s: the source of the reward function %s has changed since the pool was graded.", where, name
            )


def _paddings(tokenizer: Any) -> list[Any]:
    """The tokenizer with each padding token that it may have had when the pool was sampled."""
    tokenizers = []
    for pad_token in dict.fromkeys((tokenizer.pad_token, None, tokenizer.eos_token)):
        one = copy.deepcopy(tokenizer)
        one.pad_token = pad_token
        tokenizers.append(one)
    return tokenizers
