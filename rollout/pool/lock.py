"""One writer at a time: a lock file that names its owner, and outlives no dead one."""

import json
import os
import socket
from pathlib import Path

LOCK = "writer.lock"


class PoolLock:
    """Holds the lock of a pool's folder until [`PoolLock.release`].

    A lock whose owner died (on this host) is taken over. One of another host is respected: nobody here can tell whether
    its owner lives.

    Args:
        folder (`Path`):
            The pool's folder.

    Raises:
        ValueError: If somebody else is writing there; the message says who.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK
        self._held = False
        while not self._held:
            try:
                descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._remove_if_dead()
                continue
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}, file)
            self._held = True

    def _remove_if_dead(self) -> None:
        try:
            owner = json.loads(self._path.read_text(encoding="utf-8"))
            pid, host, started = int(owner["pid"]), str(owner["host"]), owner["started"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            pid, host, started = 0, socket.gethostname(), None  # its writer was killed before it wrote its name
        if host != socket.gethostname() or (_started(pid) == started and pid):
            raise ValueError(
                f"Another job is writing to the pool in `{self._path.parent}`: process {pid} on {host}. Wait for it, stop it, "
                f"or choose another --output_dir. If it is gone for certain, delete `{self._path}`."
            )
        stale = self._path.with_name(f"{LOCK}.{os.getpid()}.stale")
        try:
            os.rename(self._path, stale)  # of several heirs only one gets it
        except FileNotFoundError:
            return
        stale.unlink()

    def release(self) -> None:
        """Give the lock back."""
        if self._held:
            self._held = False
            self._path.unlink(missing_ok=True)


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None when there is none. Tells a pid from its reuse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
