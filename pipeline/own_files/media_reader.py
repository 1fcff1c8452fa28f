"""Reads files of one's own, pictures and arrays to what a `Request` takes (`read_media`), as a job's readers do.

Files are decoded in the disposable process without credentials (`pipeline.loading.sandbox`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np

from illava.families import load_preprocessor
from illava.preprocess import Preprocessor
from pipeline.config.load import parse_as
from pipeline.config.schema import MediaConfig
from pipeline.errors import ConfigError, ItemError
from pipeline.inputs.columns import kind_of
from pipeline.loading.decoding.pictures import is_picture, rgb_of
from pipeline.loading.loader import Loader
from pipeline.records import MediaItem
from pipeline.storage.uris import is_local, local_path

if TYPE_CHECKING:
    from PIL.Image import Image

    from illava import VLM
    from illava.preprocess import VisualInput
    from pipeline.records import MediaKind

    Source: TypeAlias = (
        "str | os.PathLike[str] | np.ndarray | Image | Sequence[str | os.PathLike[str] | Image | np.ndarray]"
    )

_KINDS = ("video", "image", "document")


class MediaReader:
    """Reads one medium after another for one model. Use it as a context manager, or call `close`.

    Args:
        model: folder or hub id; or a loaded `VLM`, or a `Preprocessor`, whose sizes of pictures hold then.
        revision: hub commit.
        pages_per_request: pages of a document that one request is to show; None for all of them.
        media: keys of a job's section ``media``, such as ``num_frames``, ``page_dpi`` or ``load_timeout_s``.

    Raises:
        ConfigError: a key that ``media`` does not have, or a wrong value.
        ModelLoadError: no such model, or one of an unsupported family.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | VLM | Preprocessor,
        *,
        revision: str | None = None,
        pages_per_request: int | None = None,
        **media: Any,
    ) -> None:
        self._media = parse_as(MediaConfig, dict(media), source="read_media")
        self._pages_per_request = pages_per_request
        if isinstance(model, (str, os.PathLike)):
            limits = self._media.pixel_limits
            self._preprocessor = load_preprocessor(os.fspath(model), revision=revision, pixel_limits=limits)
        else:
            self._preprocessor = _loaded_preprocessor(model, self._media)
        self._loaders: dict[bool, Loader] = {}

    def read(self, source: Source, *, kind: MediaKind | None = None) -> tuple[VisualInput, ...]:
        """Read one medium.

        Args:
            source: path, ``s3://`` or ``gs://`` address of a video, picture, PDF or TIFF; a picture of Pillow; an array
                of uint8, [H, W, 3] for a picture and [F, H, W, 3] for a video's frames; or a list of pictures, given in
                any of these ways.
            kind: ``video``, ``image`` or ``document``, for a file whose name does not say it.

        Returns:
            One visual input of a video or picture; one of each page or of each picture of a list.

        Raises:
            ItemError: the file is missing, damaged, encrypted or over a budget of ``media``.
            PreprocessError: an array of another dtype or shape.
            TypeError: a source of another type.
        """
        if isinstance(source, np.ndarray):
            return self._array(source)
        if isinstance(source, (str, os.PathLike)):
            return self._files([source], kind)
        if is_picture(source):
            return self._preprocessor.images([rgb_of(source)])
        if isinstance(source, Sequence) and source:
            if all(isinstance(one, (str, os.PathLike)) for one in source):
                return self._files(source, kind)
            if all(isinstance(one, np.ndarray) or is_picture(one) for one in source):
                return self._preprocessor.images(
                    [one if isinstance(one, np.ndarray) else rgb_of(one) for one in source]
                )
        raise TypeError(
            f"cannot read a {type(source).__name__} as media: give a path, a picture of Pillow, an array of uint8 "
            "([H, W, 3], or [F, H, W, 3] for a video), or a list of pictures, all paths or none"
        )

    def kind(self, source: str | os.PathLike[str]) -> MediaKind:
        """Say what a file is, by its name. Raises as `read`."""
        return _kind([_address(source)], None)

    def close(self) -> None:
        """End the decoder process. Another `read` starts it again."""
        for loader in self._loaders.values():
            loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _array(self, frames: np.ndarray) -> tuple[VisualInput, ...]:
        if frames.ndim == 4:
            return (self._preprocessor.video(frames),)
        return self._preprocessor.images([frames])

    def _files(self, paths: Sequence[Any], given: MediaKind | None) -> tuple[VisualInput, ...]:
        uris = [_address(path) for path in paths]
        kind = _kind(uris, given)
        item = MediaItem(uris[0], tuple(uris), kind, (-1,) * len(uris), ("",) * len(uris))
        loaded = self._loader(kind == "document").load(item)
        if loaded.partial:
            warnings.warn(f"{uris[0]}: {loaded.partial}", stacklevel=4)  # the caller of `read_media`
        return loaded.media

    def _loader(self, of_documents: bool) -> Loader:
        if of_documents not in self._loaders:
            per_request = self._pages_per_request if of_documents else None
            self._loaders[of_documents] = Loader(self._media, self._preprocessor, pages_per_request=per_request)
        return self._loaders[of_documents]


def read_media(
    source: Source,
    model: str | os.PathLike[str] | VLM | Preprocessor,
    *,
    kind: MediaKind | None = None,
    **options: Any,
) -> tuple[VisualInput, ...]:
    """Read one medium to what a request takes: ``Request("a", (*read_media("clip.mp4", model), "What happens?"))``.

    Starts a decoder process for a file and ends it; `MediaReader` keeps one for many files. A warning says what is
    missing of a damaged file.

    Args:
        source: as `MediaReader.read` takes it.
        model: as `MediaReader` takes it.
        kind: as `MediaReader.read` takes it.
        options: as `MediaReader` takes them, such as ``revision="..."``, ``num_frames=8`` or ``page_dpi=200``.

    Raises:
        ItemError, PreprocessError, TypeError, ConfigError, ModelLoadError: as `MediaReader` raises them.
    """
    with MediaReader(model, **options) as reader:
        return reader.read(source, kind=kind)


def _loaded_preprocessor(model: Any, media: MediaConfig) -> Preprocessor:
    found = model if isinstance(model, Preprocessor) else getattr(getattr(model, "family", None), "preprocessor", None)
    if not isinstance(found, Preprocessor):
        raise TypeError(
            f"cannot read media for a {type(model).__name__}: give a model's folder or hub id, a VLM, or a Preprocessor"
        )
    if media.pixel_limits.named:
        raise ConfigError(
            f"read_media: {', '.join(media.pixel_limits.named)}: a loaded model has its limits already; give "
            "pixel_limits=PixelLimits(...) where it is loaded, or the model's folder here"
        )
    return found


def _address(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    return os.path.abspath(os.path.expanduser(text)) if is_local(text) and not text.startswith("file:") else text


def _kind(uris: Sequence[str], given: MediaKind | None) -> MediaKind:
    if given is not None and given not in _KINDS:
        raise ConfigError(f"read_media: kind is one of {', '.join(_KINDS)}; got {given!r}")
    for uri in filter(is_local, uris):
        if not Path(local_path(uri)).exists():
            raise ItemError("not_found", f"{uri}: there is no such file")
    kinds = {given} if given is not None else {kind_of(uri) for uri in uris}
    (kind, *others) = kinds
    if kind is None or others:
        raise ConfigError(
            f"read_media: the name of {uris[0]} does not say what the file is; give kind='video', 'image' or 'document'"
            if not others
            else "read_media: a list is of pictures; read videos and documents one by one"
        )
    if len(uris) > 1 and kind != "image":
        raise ConfigError(
            f"read_media: {len(uris)} files of kind {kind}; a list is of pictures: read the others singly"
        )
    return "images" if len(uris) > 1 else kind
