"""Resolves and digests everything that can change a row's content: the config fingerprint (``recipe`` in run.json).

Runs with the same config fingerprint may be compared, and one may continue the other; `pipeline.runs.run` adds manifest
and shard size. Neither torch nor ray is loaded: versions come from the installed metadata. A version counts only for
the kinds of media whose pixels or tokens the package can change.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from illava.devices import cpu_dtype
from illava.families import require_supported
from illava.model_files import declared_dtype
from illava.plan import ReductionPlan
from illava.preprocess import resize_digest
from illava.reducers.out_of_tree import package_of
from pipeline.config.preflight import runs_on_cpu
from pipeline.config.schema import AdapterConfig, JobConfig, result_fields
from pipeline.errors import ConfigError
from pipeline.phases import phase
from pipeline.records import MediaKind
from pipeline.storage import local_files

_SETTLED_S = 3.0
_IGNORED_ENDINGS = (".md", ".gitattributes", ".lock")
# Package -> the kinds of media whose pixels or tokens it makes. Pillow decodes pictures (a document may be a TIFF). Of
# a video it only resizes the frames, so there `illava.preprocess.resize_digest` counts, and not its release.
MEDIA_KINDS: frozenset[str] = frozenset(get_args(MediaKind))
_RESIZE = "pillow_resize"
_FILES = ("model.files", "model.adapter.files")
_PACKAGES: dict[str, frozenset[str]] = {
    "torch": MEDIA_KINDS,
    "transformers": MEDIA_KINDS,
    "decord": frozenset({"video"}),
    "av": frozenset({"video"}),
    "pillow": MEDIA_KINDS - {"video"},
    _RESIZE: frozenset({"video"}),
    "pypdfium2": frozenset({"document"}),
}
# Changes of this program that give other rows under an unchanged configuration: name -> 1, 2, ... A fingerprint that
# lacks a name was made before that change. The release number itself decides nothing: CONTRIBUTING.md, "Change what a
# run records", says when an entry is due.
BEHAVIOUR: dict[str, int] = {}
# The same, of one kind of job: name -> the number, and whether a job is of that kind. ``metric: auto`` is not, though a
# row may name yes_no: few such runs have it in any row.
_BEHAVIOUR_OF: dict[str, tuple[int, Callable[[JobConfig], bool]]] = {
    "yes_no": (1, lambda config: config.task.kind == "question" and config.task.metric == "yes_no"),
}


@dataclass(frozen=True, slots=True)
class ConfigFingerprint:
    """Holds everything that a row's content depends on.

    Attributes:
        digest: 32 hex digits over the fields.
        fields: dotted config keys that affect rows, ``auto`` resolved, then hashes of local files (``model.files``,
            ``model.adapter.files``), ``versions.*`` and ``behaviour.*``; JSON types. The dtype is among them. The
            device is not: it changes last bits only, as batch composition does, but in float8, which some cards
            multiply as such and others do not.
    """

    digest: str
    fields: dict[str, Any]

    def of_kinds(self, kinds: Collection[str]) -> ConfigFingerprint:
        """Return the fingerprint of a job over media of these kinds: without the packages that touch none of them."""
        fields = concerning(self.fields, kinds)
        return ConfigFingerprint(digest_of(fields), fields)


def concerning(fields: Mapping[str, Any], kinds: Collection[str], *, there: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Return the fields that can change a row about media of these kinds.

    Args:
        fields: of a fingerprint.
        kinds: of media.
        there: a fingerprint to compare with. One that an earlier version made does not say how Pillow resizes, so that
            Pillow's release stands for it.
    """
    away = {f"versions.{name}" for name, touched in _PACKAGES.items() if touched.isdisjoint(kinds)}
    if "video" in kinds and f"versions.{_RESIZE}" not in there:
        away -= {"versions.pillow"} & there.keys()
    return {key: value for key, value in fields.items() if key not in away}


def resolve_dtype(config: JobConfig) -> Literal["bfloat16", "float16", "float32"]:
    """Resolve ``model.dtype``. A run records what came out when it first started, and goes on with it anywhere.

    On CPU ``auto`` is bfloat16 where this machine's processor multiplies it natively, else float32; this machine
    decides for all of a job's actors. On a GPU, and on a Ray cluster whose devices are not known yet, it is the
    checkpoint's own dtype: bfloat16 for float16, in which several published models overflow, and float32 for a
    checkpoint that names none.

    Raises:
        ModelLoadError: the model's config.json cannot be read.
        DeviceError: as `illava.devices.has_native_bfloat16`.
    """
    model = config.model
    if model.dtype != "auto":
        return model.dtype
    if runs_on_cpu(config):
        return cpu_dtype()
    declared = declared_dtype(model.model_id, revision=model.hub_revision)
    return "bfloat16" if declared in {"bfloat16", "float16"} else "float32"


def resolve_config_fingerprint(config: JobConfig) -> ConfigFingerprint:
    """Resolve the config fingerprint of a job on this machine's installed versions, whatever kinds of media it has.

    Raises:
        ConfigError: the model is neither a local folder nor a hub id with a pinned revision.
        ModelLoadError: the folder holds a quantised model or an adapter, or ``model.dtype`` is ``auto`` and the model's
            config.json cannot be read.
    """
    files = _model_files(config)  # before the dtype, which may ask the hub
    fields = result_fields(config) | {"model.dtype": resolve_dtype(config), "model.files": files}
    if config.model.adapter is not None:
        fields["model.adapter.files"] = _adapter_files(config.model.adapter)
    has_grammar = config.sampling.grammar or (config.task.kind == "document" and config.task.has_grammar)
    others = {
        "llguidance": has_grammar,
        "torchao": config.model.quantization != "none",
        "peft": config.model.adapter is not None,
    }
    packages = (*_PACKAGES, *(name for name, counts in others.items() if counts))
    fields |= {f"versions.{name}": resize_digest() if name == _RESIZE else _version(name) for name in packages}
    fields |= {f"versions.{name}": version for name, version in plan_packages(config.reduction).items()}
    fields |= {f"behaviour.{name}": number for name, number in BEHAVIOUR.items()}
    fields |= {f"behaviour.{name}": number for name, (number, concerns) in _BEHAVIOUR_OF.items() if concerns(config)}
    return ConfigFingerprint(digest_of(fields), dict(sorted(fields.items())))


def plan_packages(plan: ReductionPlan) -> dict[str, str]:
    """Return the packages whose reducers a plan has, with their versions; this project's own are none."""
    return dict(filter(None, (package_of(step.reducer) for step in plan.steps)))


def is_fact(key: str) -> bool:
    """Whether a key was read from the machine; a fingerprint without the key says nothing about it."""
    return key in _FILES or key.startswith("versions.")


def in_config(key: str) -> bool:
    """Whether a fingerprint's key is a key of the configuration."""
    return not is_fact(key) and not key.startswith("behaviour.")


def digest_of(value: Any) -> str:
    """Return 32 hex digits of a JSON value; the order of its keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _model_files(config: JobConfig) -> str | None:
    model_id, revision = config.model.model_id, config.model.revision
    if os.path.isdir(model_id):
        require_supported(model_id)  # before gigabytes are hashed
        with phase(f"hashing the files of {model_id}, once"):
            return folder_digest(model_id)
    if revision is None and (model_id.startswith((".", "/", "~")) or model_id.count("/") > 1):
        raise ConfigError(f"model.model_id: there is no folder {model_id} (working directory: {os.getcwd()})")
    if revision is None:
        raise ConfigError(
            f"model.model_id: {model_id!r} is no folder here, and a hub id needs model.revision (40 hex digits), "
            "so that the same job always runs the same weights"
        )
    return None


def _adapter_files(adapter: AdapterConfig) -> str | None:
    if os.path.isdir(adapter.id):
        return folder_digest(adapter.id)
    if adapter.revision is None:
        raise ConfigError(
            f"model.adapter.id: {adapter.id!r} is no folder here (working directory: {os.getcwd()}), and a hub id "
            "needs model.adapter.revision (40 hex digits), so that the same job always runs the same adapter"
        )
    return None


@lru_cache(maxsize=32)
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def folder_digest(folder: str) -> str:
    """Return 32 hex digits over names and contents of all files below a folder; hidden files and ``.md`` are left out.

    Hashes are cached by resolved path, size and mtime, so that gigabytes of weights are read once. The hash of a file
    that changed within the last seconds is not cached, since its mtime may not show the next change.
    """
    known, fresh, digest = _known_hashes(), {}, hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.endswith(_IGNORED_ENDINGS) or any(p.startswith(".") for p in name.split("/")):
            continue
        key, settled = _file_key(path)
        content = known.get(key) or _content_hash(path)
        if settled and key not in known:
            fresh[key] = content
        digest.update(f"{name}\0{content}\n".encode())
    if fresh:
        _remember(known | fresh)
    return digest.hexdigest()[:32]


def _content_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_key(path: Path) -> tuple[str, bool]:
    real = path.resolve()
    found = real.stat()
    return f"{real}|{found.st_size}|{found.st_mtime_ns}", abs(time.time() - found.st_mtime) > _SETTLED_S


def _cache_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "illava" / "file_hashes.json"


def _known_hashes() -> dict[str, str]:
    try:
        known = json.loads(_cache_path().read_bytes())
    except (OSError, ValueError):
        return {}  # only ever saves time
    return known if isinstance(known, dict) else {}


def _remember(known: dict[str, str]) -> None:
    try:
        local_files.write(str(_cache_path()), json.dumps(known).encode())
    except OSError:
        return  # a read-only home: hashed again next time
