"""The folder in which rounds are kept, and through which a sampler and a trainer work apart.

    rounds/rounds.json         what all rounds share
    rounds/round-0000/pool     what was sampled for round 0, by the reference
    rounds/round-0001/adapter  the policy that round 1 begins with
    rounds/round-0001/pool     what was sampled for round 1, by the adapter of round 1 - lag

Whatever is there under its name is whole: adapters are renamed into place, a pool counts once all its samples are there. So neither
side needs to know whether the other one is running, and either may be killed and started again.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import changed_fields, write_json
from .fingerprint import model_identity
from .pool import PoolManifest, ReferencePool

logger = logging.getLogger(__name__)

PLAN = "rounds.json"
POLL_S = 0.5
"""How often a part looks for what the other one makes."""
SPEAK_S = 60.0
"""How often it says that it is still waiting."""


def adapter_round(number: int, lag: int) -> int:
    """The round whose adapter samples a round; 0 is the reference, which has none."""
    return max(0, number - lag)


@dataclass(frozen=True, slots=True)
class RoundFolder:
    """Where rounds are kept.

    Attributes:
        path (`Path`):
            The folder.
        first (`Path`, *optional*):
            A reference pool made beforehand, which is round 0's.
    """

    path: Path
    first: Path | None = None

    def adapter(self, number: int) -> Path:
        """The adapter that a round begins with; there is one when it is there."""
        return self.path / f"round-{number:04d}" / "adapter"

    def pool(self, number: int) -> Path:
        """The pool of a round."""
        if number == 0 and self.first is not None:
            return self.first
        return self.path / f"round-{number:04d}" / "pool"

    def is_sampled(self, number: int) -> bool:
        """Whether all samples of a round are there, or recorded as failed. A pool made beforehand is nobody's to continue here."""
        if number == 0 and self.first is not None:
            return True
        folder = self.pool(number)
        return (folder / "manifest.json").is_file() and PoolManifest.load(folder).is_settled

    def delete(self) -> None:
        """Delete all rounds and what they share; a pool made beforehand stays, and whatever else lies in the folder."""
        for path in self.path.glob("round-*"):
            shutil.rmtree(path)
        (self.path / PLAN).unlink(missing_ok=True)

    def sampled_by(self, number: int, lag: int) -> dict[str, Any]:
        """What the fingerprint of a round's pool says of it: its number, and the policy that samples it.

        Raises:
            ValueError: If that adapter is not there.
        """
        by = adapter_round(number, lag)
        if by == 0:
            return {"adapter": None, "round": number, "adapter_round": 0}
        if not self.adapter(by).is_dir():
            raise ValueError(
                f"Round {number} is sampled by the adapter of round {by}, and `{self.adapter(by)}` is not there."
            )
        identity = model_identity(str(self.adapter(by)), None, ("adapter_*",))
        return {"adapter": identity, "round": number, "adapter_round": by}

    def open_pool(self, number: int, lag: int) -> ReferencePool:
        """The pool of a round, which must have been sampled by the policy that this round is sampled by.

        Raises:
            ValueError: If it was sampled by another policy, for another round, or with a longer lag.
        """
        pool = ReferencePool.open(self.pool(number))
        made = pool.manifest.fingerprint
        if number == 0 and self.first is not None:
            if made.get("adapter") is not None:
                raise ValueError(
                    f"The pool in `{self.first}` was sampled with an adapter. Round 0 is sampled by the reference, which is the model "
                    "with the adapter off: name a pool that was sampled without one, or leave --pool out."
                )
            pool.turn_rewards()  # refuses an unfinished one
            return pool
        found = {name: made.get(name) for name in ("adapter", "round", "adapter_round")}
        wanted = self.sampled_by(number, lag)
        if found == wanted:
            return pool
        by = found["adapter_round"]
        if isinstance(by, int) and found["round"] == number and number - by > lag:
            raise ValueError(
                f"The pool of round {number} in `{pool.folder}` was sampled by the adapter of round {by}, and --lag {lag} allows none older "
                f"than that of round {wanted['adapter_round']}. Delete that pool, and it is sampled again; or set --lag {number - by}."
            )
        raise ValueError(
            f"The pool of round {number} in `{pool.folder}` was sampled by another policy than the adapter of round "
            f"{wanted['adapter_round']} in `{self.path}`, so the regression would be on another reference. Delete that pool, and it is "
            "sampled again."
        )


def agree(folder: RoundFolder, asked: dict[str, Any]) -> None:
    """Write what all rounds share, or check that it is what is asked for: two parts of a run must not differ in it.

    Raises:
        ValueError: If the folder holds rounds of another run; the message names every field in which it differs.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    path = folder.path / PLAN
    if not path.is_file():
        scratch = folder.path / f".{PLAN}.{os.getpid()}"
        write_json(scratch, asked)
        try:
            os.link(scratch, path)  # unlike a rename, it fails where the other part was faster
        except FileExistsError:
            pass
        except OSError:
            # No hard links here, as on mounted drives. Then two parts that come in the same moment do not see each other.
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    stored = json.loads(path.read_text(encoding="utf-8"))
    changed = changed_fields(stored, json.loads(json.dumps(asked)))
    if changed:
        lines = "\n".join(f"  {name}: {stored.get(name)!r} there, {asked.get(name)!r} asked for" for name in changed)
        raise ValueError(
            f"`{folder.path}` holds the rounds of another run:\n{lines}\nSet these back, choose another --output_dir (--rounds_dir), or "
            "delete that folder."
        )


def wait_for(is_there: Callable[[], bool], what: str) -> None:
    """Wait until something is there, and say so now and then."""
    spoken: float | None = None
    while not is_there():
        now = time.monotonic()
        if spoken is None or now - spoken >= SPEAK_S:
            logger.warning("waiting for %s", what)  # as loud as a warning, so that a command says it
            spoken = now
        time.sleep(POLL_S)
