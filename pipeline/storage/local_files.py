"""Reads and writes whole files on a local disk; a write is complete or leaves nothing.

The functions are those of `object_store.ObjectStore`. They raise plain `OSError`, which `storage.storage` translates.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.records import ObjectInfo
from pipeline.storage.errors import ObjectChangedError

_TEMPORARY_SUFFIX = ".tmp"


def info(path: str) -> ObjectInfo:
    """Return size and modification time of one regular file; a pipe would block its reader, and a device has no end."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a regular file", path)
    return _info(path, found)


def find(root: str) -> list[ObjectInfo]:
    """List every regular file below a folder, or the file itself; links to folders are not followed."""
    if os.path.isfile(root):
        return [info(root)]
    found, pending = [], [root]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.is_file() and not is_temporary(entry.name):
                    found.append(_info(entry.path, entry.stat()))
    return found


def names(root: str) -> list[str]:
    """List the names directly below a folder; folders end in a slash."""
    try:
        with os.scandir(root) as entries:
            return [entry.name + "/" * entry.is_dir() for entry in entries]
    except FileNotFoundError:
        return []


def read(path: str, start: int = 0, end: int | None = None) -> bytes:
    """Read the bytes ``start`` up to, not including, ``end``."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read() if end is None else file.read(end - start)


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """Pins one state of a file by its time of modification; an ``etag`` of "" accepts the state found first."""

    path: str
    etag: str

    def copy(self, target: str, *, verify_md5: bool = True) -> int:
        """Copy the whole content into another file; return its bytes. A local file has no MD5 to verify."""
        with open(self.path, "rb") as source, open(target, "wb") as file:
            etag = self._check(source, self.etag)
            while chunk := source.read(1 << 20):
                file.write(chunk)
            self._check(source, etag)
        return os.path.getsize(target)

    def read_ranges(self, ranges: Sequence[tuple[int, int]], *, size: int) -> list[bytes]:
        """Read the bytes of each half-open range of a file that has ``size`` bytes."""
        with open(self.path, "rb") as source:
            etag = self._check(source, self.etag)
            found = [os.pread(source.fileno(), end - start, start) for start, end in ranges]
            self._check(source, etag)
            if os.fstat(source.fileno()).st_size != size or any(
                len(data) != end - start for data, (start, end) in zip(found, ranges, strict=True)
            ):
                raise ObjectChangedError(f"expected a file of {size} bytes")
        return found

    def _check(self, file: BinaryIO, etag: str) -> str:
        found = _info(self.path, os.fstat(file.fileno())).etag
        if etag not in {"", found}:
            raise ObjectChangedError(f"expected etag {etag}, found {found}")
        return found


def pinned(path: str, etag: str) -> PinnedFile:
    """Pin one state of a file."""
    return PinnedFile(path, etag)


def write(path: str, data: bytes) -> None:
    """Write a temporary file in the same folder, fsync, rename, and fsync the folder."""
    write_stream(path, (data,))


def write_stream(path: str, chunks: Iterable[bytes]) -> None:
    """Write chunks one after the other, as `write` does a whole file."""
    temporary = _write_temporary(path, chunks)
    try:
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(os.path.dirname(path))


def create(path: str, data: bytes) -> bool | None:
    """Link a complete temporary file to its name: True if this call created the name, False if it existed.

    Returns None where the file system has no hard links, so that nothing is decided.
    """
    temporary = _write_temporary(path, (data,))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}:
            return None
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(os.path.dirname(path))
    return True


def delete(path: str) -> None:
    """Remove one file."""
    os.unlink(path)


def temporaries(root: str) -> list[str]:
    """List the temporary files below a folder, whoever wrote them."""
    return sorted(str(path) for path in Path(root).rglob(f".*{_TEMPORARY_SUFFIX}") if is_temporary(path.name))


def sweep(root: str) -> list[str]:
    """Remove the temporary files that dead processes of this host left below a folder; return their paths."""
    removed = [path for path in temporaries(root) if _writer_is_dead(os.path.basename(path))]
    for path in removed:
        Path(path).unlink(missing_ok=True)
    return removed


def is_temporary(name: str) -> bool:
    """Whether a file of this name is an unfinished write."""
    return name.startswith(".") and name.endswith(_TEMPORARY_SUFFIX)


def _info(path: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(path, found.st_size, f"mtime:{found.st_mtime_ns}")


def _write_temporary(path: str, chunks: Iterable[bytes]) -> str:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    writer = f"{socket.gethostname()}~{os.getpid()}~{secrets.token_hex(4)}"
    temporary = os.path.join(folder, f".{name}~{writer}{_TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return temporary


def _writer_is_dead(name: str) -> bool:
    parts = name.removesuffix(_TEMPORARY_SUFFIX).split("~")
    if len(parts) < 4 or parts[-3] != socket.gethostname() or not parts[-2].isdigit():
        return False
    try:
        os.kill(int(parts[-2]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _sync_folder(folder: str) -> None:
    handle = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
