"""One writer at a time."""

from pathlib import Path

from filelock import FileLock, Timeout

LOCK = "writer.lock"


def lock_pool(folder: Path) -> FileLock:
    """Take the write lock of a pool's folder; call `release` on it in the end.

    The operating system holds the lock, so that it ends with its process: what a killed one leaves is an empty file.

    Raises:
        ValueError: If another writer holds it.
    """
    lock = FileLock(folder / LOCK, thread_local=False)  # a writer may be closed by another thread than opened it
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"Another job is writing to the pool in `{folder}`. Wait for it, stop it, or choose another --output_dir."
        ) from error
    return lock
