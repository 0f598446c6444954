"""Files that are whole or absent, output directories that are not used twice, and disks that have room."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flow_finetune.errors import InputError

# Of a directory that a model was trained or averaged into; written last.
SUMMARY_FILE = "train/summary.json"


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` if the block ends well, else it is removed.

    A file is synced before it is renamed, so a crash leaves the old file or the new one. The temporary path may also
    be made a directory.
    """
    path = behind_link(Path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    _remove(temporary)
    try:
        with disk_space_errors(path):
            yield temporary
            _sync(temporary)
            if path.is_dir():
                if not temporary.is_dir():
                    raise InputError(f"{path} is a directory, which is not replaced by a file; choose another name")
                shutil.rmtree(path)
            os.replace(temporary, path)
            _sync_entry(path.parent)
    finally:
        _remove(temporary)


def behind_link(path: Path) -> Path:
    """What a symbolic link stands for, such as a directory on another disk: a link cannot be removed and made again."""
    return path.resolve() if path.is_symlink() else path


@contextmanager
def disk_space_errors(path: Path | str) -> Iterator[None]:
    """Turn "no space left on device" while writing `path` into a message."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"no disk space left while writing {path}; free some or choose another output, then run the same command "
            "again to continue"
        ) from error


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


class DirectoryLock:
    """Keeps other processes out of a directory that one works in, until `release` or the process's end.

    The lock is on the directory itself: no file is left, and a killed process holds nothing.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, path: Path, *, wait: bool = False) -> bool:
        """Lock the directory `path`, in place of what was locked before; `InputError` if another process has it.

        With `wait` it is waited for; returns whether that process had removed it, so that it was made again.
        """
        self.release()
        try:
            import fcntl
        except ImportError:  # Windows
            return False
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(f"another process works in {path}; wait for it, or choose another directory") from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        # Whoever had it may have removed the directory, and another may stand in its place by now.
        if wait and not (path.is_dir() and os.path.samestat(os.fstat(descriptor), path.stat())):
            path.mkdir(parents=True, exist_ok=True)
            self.take(path, wait=True)
            return True
        return False

    def release(self) -> None:
        """Let others in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def exclusive(path: Path, *, wait: bool = False, is_lock: bool = False) -> Iterator[None]:
    """Work in the directory `path`, which is made if need be, alone; one that is left empty is not left behind.

    Another process that works there is an `InputError`, or waited for with `wait`. What `is_lock` and nothing else does
    not stay even if a killed process has left it.
    """
    lock, is_new = DirectoryLock(), not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    # Not in the try: a directory that another process has locked, which may have made it meanwhile, is not ours to remove.
    is_new = lock.take(path, wait=wait) or is_new or is_lock
    try:
        yield
    finally:
        # Before the lock goes: another process would lock a directory that is being removed.
        if is_new and path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        lock.release()


@contextmanager
def exclusive_file(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Make `path`, a file or a directory that is put in place whole, alone; the lock is a hidden directory beside it.

    Another process that makes it is an `InputError`, or waited for with `wait`.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(path.with_name(f".{path.name}.lock"), wait=wait, is_lock=True))
        except InputError:
            raise InputError(f"another process makes {path}; wait for it, or choose another name") from None
        yield


def describe_file(path: Path) -> dict[str, object]:
    """What `is_described` knows a file by, wherever it lies."""
    stat = path.stat()
    return {"name": path.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(path)}


def is_described(path: Path, stored: dict[str, object]) -> bool:
    """Whether `path` has the content that was described; it is read only where it is another time's."""
    stat = path.stat()
    if (path.name, stat.st_size) != (stored["name"], stored["bytes"]):
        return False
    return stat.st_mtime_ns == stored["mtime_ns"] or _sha256(path) == stored["sha256"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_used(path: Path) -> bool:
    """Whether `path` holds anything; empty folders and what a killed call had begun to write count as nothing."""
    if not path.is_dir():
        return path.exists()
    return any((f.is_symlink() or not f.is_dir()) and not _is_partial(f.relative_to(path)) for f in path.rglob("*"))


def _is_partial(path: Path) -> bool:
    """Whether `path` is, or is in, what `atomic_path` had not finished."""
    return any(part.startswith(".") and part.endswith(".partial") for part in path.parts)


def require_writable(path: Path) -> None:
    """Raise `InputError` unless `path` is a directory that can be written to, or can become one; nothing is made."""
    path = path.absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is a file; {path} is to be a directory with several files")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} may not be written to; choose another output")


def used_error(path: Path) -> InputError:
    """What to raise where `path` `is_used` by something else."""
    return InputError(f"{path} is used by something else; choose an empty or new directory")


def require_same_run(path: Path, found: dict, wanted: dict) -> None:
    """Raise `InputError` unless the identity `found` in `path` is the one `wanted`."""
    different = differences(found, wanted)
    if different:
        raise InputError(f"{path} holds another run (its {', '.join(different)} differ); choose another directory")


# Options of a training that its weights do not depend on: it may be continued with others.
_RECORDING = {"train.log_every", "train.checkpoint_every", "train.track_distance"}


def differences(found: dict, wanted: dict, prefix: str = "") -> list[str]:
    """Dotted names of the entries in which two identities differ, but for how a training is recorded."""
    names = []
    for name in sorted({*found, *wanted}):
        if prefix + name in _RECORDING:
            continue
        a, b = found.get(name), wanted.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            names.append(prefix + name)
    return names


def refuse_own_source(output: Path, source: str) -> None:
    """Raise `InputError` where replacing `output` would remove the model that its training starts from."""
    place = Path(source).expanduser()
    if place.exists() and output.resolve() in (place.resolve(), *place.resolve().parents):
        raise InputError(
            f"--overwrite would remove {source}, which this training starts from, before it is done; choose another output"
        )


def require_disk_space(path: Path, num_bytes: int) -> None:
    """Raise `InputError` unless the disk that holds `path` has `num_bytes` free."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise InputError(
            f"{path} needs about {num_bytes / 2**20:,.0f} MiB of disk space but {free / 2**20:,.0f} MiB are free; "
            "free some or choose another output"
        )


def fingerprint(parts: Iterable[bytes]) -> str:
    """16 hex digits of SHA-256 over length-prefixed parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def _sync(path: Path) -> None:
    """Sync a file, or a directory that was made here with all that is in it."""
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        _sync_entry(entry)


def _sync_entry(path: Path) -> None:
    """Sync one file, or the names in one directory: what else lies there is others'."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
