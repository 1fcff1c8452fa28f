"""Finds and reads the JSON files of a model folder or hub id, without its weights.

Imports neither torch nor transformers, so readers, dry runs and config checks may use it. The module finds keys and
says which one is missing; its callers know what the keys mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from illava.checkpoint_check import SIDE_FILES, StoredScheme, check_encoding, stored_scheme
from illava.errors import ModelLoadError, RandomWeightsError

# A folder of made-up weights says so in its config.json: {"illava_random_weights": true}.
RANDOM_WEIGHTS_KEY = "illava_random_weights"
RANDOM_WEIGHTS_REASON = (
    "the model's config.json declares random weights, and random weights say nothing about quality; measure speed "
    "only, or take trained weights"
)
_HUB_S = 10.0  # for the first answer of the hub
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_NAMES = ("config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_TEMPLATE_NAMES = ("chat_template.json", "chat_template.jinja", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class JsonSection:
    """Holds a JSON object and where it was found, so that a missing key is named with its file."""

    where: str
    content: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        if key not in self.content:
            raise ModelLoadError(f"{self.where} has no key {key!r}; is this a complete Hugging Face model folder?")
        return self.content[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.content.get(key, default)

    def section(self, key: str) -> JsonSection:
        """A nested object."""
        return JsonSection(f"{self.where}: {key}", self[key])


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Holds the configuration files of one model.

    Attributes:
        model_id: as given; for messages.
        config: config.json.
        image_processor: preprocessor_config.json, or ``image_processor`` nested in processor_config.json.
        video_processor: video_preprocessor_config.json, or nested likewise, or the image processor's.
        processor: processor_config.json, empty where there is none.

    Raises:
        ModelLoadError: on use of a processor that the folder lacks; other uses do not need its file.
    """

    model_id: str
    folder: Path
    config: JsonSection
    processor: JsonSection

    @property
    def image_processor(self) -> JsonSection:
        found = _nested(self.processor, "image_processor") or _read(self.folder, "preprocessor_config.json")
        if found is None:
            raise ModelLoadError(
                f"{self.folder} has no preprocessor_config.json; the model folder is not complete: download it again"
            )
        return found

    @property
    def video_processor(self) -> JsonSection:
        own = _nested(self.processor, "video_processor") or _read(self.folder, "video_preprocessor_config.json")
        return own or self.image_processor

    def read(self, name: str) -> JsonSection | None:
        """Another JSON file of the folder; None where there is none."""
        return _read(self.folder, name)

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def stored_scheme(self) -> StoredScheme | None:
        """How the weights are quantised; None where they are plain."""
        return stored_scheme(self.config.where, self.config.content)

    @property
    def has_random_weights(self) -> bool:
        """Whether the folder declares that its weights were drawn, not trained."""
        return bool(self.config.get(RANDOM_WEIGHTS_KEY, False))


def load_model_files(model_id: str, *, revision: str | None = None) -> ModelFiles:
    """Read a model's JSON files from a local folder, or from the hub into its cache.

    Args:
        model_id: local folder, or hub id.
        revision: hub commit.

    Raises:
        ModelLoadError: no such folder or hub id, the hub cannot be reached, config.json is missing or not JSON, or the
            weights are an adapter's, or quantised in a way that is not read here.

    Source of the precedence (nested over file of its own): transformers 5.23, image_processing_base.py and
    video_processing_utils.py.
    """
    folder = model_folder(model_id, revision)
    config = _config(folder)
    processor = _read(folder, "processor_config.json") or JsonSection(f"{folder}/processor_config.json", {})
    return ModelFiles(model_id, folder, config, processor)


def declared_dtype(model_id: str, *, revision: str | None = None) -> str | None:
    """The dtype that a model's config.json names for the model, else for its language model; None without either.

    Raises:
        ModelLoadError: as `load_model_files`.
    """
    config = _read(model_folder(model_id, revision), "config.json") or JsonSection("", {})
    text = config.get("text_config") or {}
    for section in (config.content, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):  # the name until transformers 4.56
            if section.get(key):
                return str(section[key])
    return None


def require_trained(model_id: str, *, revision: str | None = None) -> None:
    """Refuse a model whose folder declares random weights, before anything of it is loaded.

    Raises:
        RandomWeightsError: the folder declares random weights.
        ModelLoadError: as `load_model_files`.
    """
    if load_model_files(model_id, revision=revision).has_random_weights:
        raise RandomWeightsError(f"{model_id}: quality is not measured: {RANDOM_WEIGHTS_REASON}")


def is_hub_snapshot(folder: Path) -> bool:
    """Whether a folder is one of the hub's cache, in which a file may come later."""
    return folder.parent.name == "snapshots"


def require_tokenizer(folder: Path) -> None:
    """Refuse a model folder without a tokenizer or without a chat template.

    Raises:
        ModelLoadError: says which files are looked for.
    """
    if is_hub_snapshot(folder):
        return
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelLoadError(
            f"{folder} has no tokenizer (none of {', '.join(_TOKENIZERS)}): copy the files of the published model there"
        )
    settings = _read(folder, "tokenizer_config.json")
    in_settings = settings is not None and settings.get("chat_template") is not None
    if not in_settings and not any((folder / name).is_file() for name in _TEMPLATES):
        raise ModelLoadError(
            f"{folder} has no chat template: neither {', '.join(_TEMPLATES)} nor one in tokenizer_config.json; copy it "
            "from the published model"
        )


def declare_random_weights(folder: str | Path) -> None:
    """Write into a model folder's config.json that its weights are random."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {RANDOM_WEIGHTS_KEY: True}, indent=2) + "\n", encoding="utf-8")


def model_folder(model_id: str, revision: str | None) -> Path:
    """The folder of a model's JSON files: a local one, or the hub's in its cache. Raises ModelLoadError."""
    if Path(model_id).is_dir():
        if revision is not None:
            raise ModelLoadError(
                f"{model_id!r} is a folder here, and revision {revision!r} would be one of the hub, which nobody "
                "compares with the folder: leave revision out, or give the hub id"
            )
        return Path(model_id)
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise ModelLoadError(f"no model folder at {model_id!r} (working directory: {Path.cwd()})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    silence = _hub_silence(model_id, revision)
    patterns = [*_NAMES, *_TEMPLATE_NAMES, *SIDE_FILES]
    try:
        return Path(
            snapshot_download(model_id, revision=revision, allow_patterns=patterns, local_files_only=bool(silence))
        )
    except LocalEntryNotFoundError as error:
        if not silence:
            raise ModelLoadError(_unread(model_id, revision, str(error))) from error
        raise ModelLoadError(
            f"cannot read model {model_id!r} at revision {revision or 'main'}: it is no local folder, the cache has no "
            f"copy, and the hub does not answer ({silence}). Check the network, HF_ENDPOINT and HTTPS_PROXY, or give "
            "the path of a folder that holds the model"
        ) from error
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        raise ModelLoadError(_unread(model_id, revision, str(error))) from error


def _unread(model_id: str, revision: str | None, answer: str) -> str:
    return (
        f"cannot read model {model_id!r} at revision {revision or 'main'}: it is no local folder, and the hub "
        f"answered: {answer.splitlines()[0]}. Check the id and revision, or download it first with: "
        f"hf download {model_id}"
    )


def _hub_silence(model_id: str, revision: str | None) -> str:
    """Ask the hub once, within seconds; return why it gave no answer, or "" where it gave one or must not be asked.

    The hub's client itself tries again for minutes, and then reads the cache all the same.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        return ""
    try:
        HfApi().model_info(model_id, revision=revision, timeout=_HUB_S)
    except (HfHubHTTPError, HFValidationError):
        return ""  # an answer; the download tells it
    except Exception as error:  # of whatever carries the client's requests
        return f"{type(error).__name__} within {_HUB_S} s: {str(error) or 'no answer'}"
    return ""


def _config(folder: Path) -> JsonSection:
    """Read config.json, after checking that it and the files beside it declare weights that can be read."""
    config = _read(folder, "config.json")
    side = {name: found.content for name in SIDE_FILES if (found := _read(folder, name)) is not None}
    check_encoding(folder, {} if config is None else config.content, side)
    if config is None:
        raise ModelLoadError(f"{folder} has no config.json; give a Hugging Face model folder or a hub id")
    return config


def _read(folder: Path, name: str) -> JsonSection | None:
    path = folder / name
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return JsonSection(str(path), content)


def _nested(processor: JsonSection, key: str) -> JsonSection | None:
    return processor.section(key) if processor.get(key) is not None else None
