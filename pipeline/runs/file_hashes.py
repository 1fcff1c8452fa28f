"""Content hashes of a local model folder, remembered so that gigabytes of weights are read once.

A remembered hash holds for (resolved path, size, mtime); a file changed within the last seconds is never remembered,
since its clock may not show the next change. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from pipeline.storage import local_files

_SETTLED_S = 3.0
_IGNORED_ENDINGS = (".md", ".gitattributes", ".lock")


def folder_digest(folder: str) -> str:
    """32 hex digits over the names and contents of every file below a folder; hidden files and ``.md`` left out."""
    known, fresh, digest = _load(), {}, hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.endswith(_IGNORED_ENDINGS) or any(p.startswith(".") for p in name.split("/")):
            continue
        key, settled = _key(path)
        content = known.get(key) or _content_hash(path)
        if settled and key not in known:
            fresh[key] = content
        digest.update(f"{name}\0{content}\n".encode())
    if fresh:
        _save(known | fresh)
    return digest.hexdigest()[:32]


def _content_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(path: Path) -> tuple[str, bool]:
    real = path.resolve()
    found = real.stat()
    return f"{real}|{found.st_size}|{found.st_mtime_ns}", abs(time.time() - found.st_mtime) > _SETTLED_S


def _cache_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "illava" / "file_hashes.json"


def _load() -> dict[str, str]:
    try:
        known = json.loads(_cache_path().read_bytes())
    except (OSError, ValueError):
        return {}  # only ever saves time
    return known if isinstance(known, dict) else {}


def _save(known: dict[str, str]) -> None:
    try:
        local_files.write(str(_cache_path()), json.dumps(known).encode())
    except OSError:
        return  # a read-only home: hashed again next time
