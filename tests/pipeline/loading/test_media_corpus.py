"""Tests every adversarial file with the real loader and child: exactly its outcome, and the next file unharmed.

A wrong frame is seen: videos carry their frame numbers, pictures four colours in their corners.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from pipeline.config.schema import MediaConfig
from pipeline.errors import ItemError
from pipeline.loading.loader import Loader
from pipeline.records import LoadedItem, MediaItem
from pipeline.storage import storage
from tests.support.media import adversarial_documents, adversarial_pictures, adversarial_videos
from tests.support.media.adversarial_media import MEDIA, AdversarialFile
from tests.support.media.clips import read_barcode, read_frame_number
from tests.support.runs.misbehaving import Thumbnails

NOBODY = ("http://127.0.0.1:9", "/etc/hostname")  # test_ssrf.py has a listener and a secret there
CORPUS = [
    *adversarial_videos.READABLE,
    *adversarial_videos.TURNED,
    *adversarial_videos.BROKEN,
    *adversarial_pictures.READABLE,
    *adversarial_pictures.BROKEN,
    *adversarial_documents.OTHERS,
    *adversarial_documents.PDFS,
    *(
        AdversarialFile(name, lambda path, content=content: path.write_bytes(content), "unsupported_media")
        for name, content in adversarial_documents.outward(*NOBODY).items()
    ),
]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """One loader for all files of the same media settings, as a reader has it."""
    folder, loaders = tmp_path_factory.mktemp("corpus"), {}

    def load_file(file: AdversarialFile) -> LoadedItem:
        settings = {**MEDIA, **file.media}
        loader = loaders.setdefault(pickle.dumps(settings), Loader(MediaConfig(**settings), Thumbnails()))
        file.write(folder / file.name)
        found = storage.stat(str(folder / file.name))
        (folder / "last").write_text(file.name)
        return loader.load(MediaItem(file.name, (found.uri,), file.kind, (found.size,), (found.etag,)))

    yield load_file
    for loader in loaders.values():
        loader.close()


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_outcome(load, file) -> None:
    if file.outcome not in {"ok", "partial"}:
        with pytest.raises(ItemError) as caught:
            load(file)
        assert (caught.value.error_type, file.says in str(caught.value)) == (file.outcome, True), str(caught.value)
        return
    loaded = load(file)
    assert ("partial" if loaded.partial else "ok") == file.outcome, loaded.partial
    assert file.says in (loaded.partial or "")
    assert file.decoder in {"", loaded.stats.decoder}
    assert file.shape in {None, loaded.media[0].original_size}
    if file.kind == "video":
        _check_frames(file, loaded)
    else:
        _check_corners(file, loaded)


def _check_frames(file: AdversarialFile, loaded: LoadedItem) -> None:
    (mm_item,) = loaded.media
    frames = [file.undo(frame) for frame in mm_item.tiles]
    assert len(loaded.frame_timestamps_s) == len(frames)
    assert all(0 <= a < b for a, b in zip(loaded.frame_timestamps_s, loaded.frame_timestamps_s[1:], strict=False))
    numbers = [read_frame_number(frame) for frame in frames]
    assert {read_barcode(frame) for frame in frames} == {file.value}
    if file.outcome == "ok":
        assert tuple(numbers) == file.frames
    else:  # of a cut file, those that are there, at their own times
        assert len(numbers) >= 1
        assert numbers == [round(time_s * 10) for time_s in loaded.frame_timestamps_s]


def _check_corners(file: AdversarialFile, loaded: LoadedItem) -> None:
    (picture,) = loaded.media[0].tiles
    shown = [picture[place] for place in ((2, 2), (2, -3), (-3, -3), (-3, 2))] if file.corners else []
    for colour, expected in zip(shown, file.corners, strict=True):
        assert np.abs(colour.astype(int) - expected).max() <= file.tolerance, (shown, file.corners)


def test_the_corpus_is_large_and_its_names_differ() -> None:
    names = [file.name for file in CORPUS]
    assert len(set(names)) == len(names) >= 80
