"""One writer at a time: a lock file that names its owner, and outlives no dead one."""

import fcntl
import json
import os
import socket
import uuid
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
        self._content = json.dumps(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": _started(os.getpid()),
                "key": uuid.uuid4().hex,
            }
        )
        mine = folder / f".{LOCK}.{os.getpid()}.tmp"
        mine.write_text(self._content, encoding="utf-8")
        guard = os.open(folder, os.O_RDONLY)
        try:
            # Only one process of this host at a time looks at a lock and takes it over; a link is whole or not there.
            fcntl.flock(guard, fcntl.LOCK_EX)
            if self._path.exists():
                self._refuse_living_owner()
                self._path.unlink()
            os.link(mine, self._path)
        finally:
            os.close(guard)
            mine.unlink()

    def _refuse_living_owner(self) -> None:
        try:
            owner = json.loads(self._path.read_text(encoding="utf-8"))
            pid, host, started = int(owner["pid"]), str(owner["host"]), owner["started"]
        except (ValueError, KeyError, TypeError):
            return  # no lock of ours is ever half written
        if host != socket.gethostname() or _started(pid) == started:
            raise ValueError(
                f"Another job is writing to the pool in `{self._path.parent}`: process {pid} on {host}. Wait for it, stop it, "
                f"or choose another --output_dir. If it is gone for certain, delete `{self._path}`."
            )

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        try:
            if self._path.read_text(encoding="utf-8") == self._content:
                self._path.unlink()
        except FileNotFoundError:
            pass


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None when there is none. Tells a pid from its reuse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
