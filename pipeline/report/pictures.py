"""Reads frames again and computes traces again, to show what the model saw of an item and what it kept.

Media are read through the loader, in its sandbox process. Where a picture cannot be had, the reason stands in its
place; nothing here ends a report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from illava.errors import ILLaVAError
from illava.families import load_preprocessor
from pipeline.config.schema import JobConfig
from pipeline.errors import PipelineError
from pipeline.loading.load_report import ItemLoader
from pipeline.records import LoadedItem, MediaItem
from pipeline.report.draw import check_drawable
from pipeline.report.picture import Picture, Tile
from pipeline.report.raster import draw_cells, sheets_of, shrink
from pipeline.report.token_maps import GONE, PatchCells, cells_of

if TYPE_CHECKING:
    from illava import VLM
    from illava.preprocess import VisualInput
    from illava.requests import Generation

_MAX_SEEN, _SEEN_PX = 8, 176
_MAX_SHEETS = 4


def item_pictures(
    config: JobConfig, items: Sequence[MediaItem], texts: Sequence[str], *, num_overlays: int
) -> Iterator[list[Picture]]:
    """Make the pictures of each item, in order.

    Args:
        config: of the run.
        items: of its manifest.
        texts: what their rows say, to be compared with what comes out here.
        num_overlays: for so many of the first items the model is run again, here.
    """
    try:
        preprocessor = load_preprocessor(
            config.model.model_id, revision=config.model.hub_revision, pixel_limits=config.media.pixel_limits
        )
    except (ILLaVAError, OSError) as error:
        yield from (
            [Picture("frames", reason=f"the model's preprocessor cannot be loaded here: {error}")] for _ in items
        )
        return
    from pipeline.execution.runner import build_loader

    tracer = _Tracer(config, num_overlays)
    with closing(build_loader(config, preprocessor)) as loader:
        for item, text in zip(items, texts, strict=True):
            loaded = _load(loader, item)
            if isinstance(loaded, Picture):
                yield [loaded]
            else:
                yield [_seen(loaded), *tracer.overlays(loaded, text)]


def _load(loader: ItemLoader, item: MediaItem) -> LoadedItem | Picture:
    try:
        return loader.load(item)
    except (PipelineError, ILLaVAError, OSError) as error:
        return Picture("frames", reason=f"the media cannot be read again: {error}")


def _seen(loaded: LoadedItem) -> Picture:
    """Some of a video's frames; else every picture or page whole, with its number."""
    if loaded.item.media_kind == "video":
        frames = [tile for visual in loaded.media for tile in visual.tiles]
        times_s = [f"{at_s:.2f} s" for at_s in loaded.frame_timestamps_s] or [""] * len(frames)
        labels = [f"{number} · {at}" if at else f"{number}" for number, at in enumerate(times_s, 1)]
        shown = _spread(list(zip(labels, frames, strict=True)), _MAX_SEEN)
        tiles = [Tile(label, shrink(frame, _SEEN_PX)) for label, frame in shown]
        return Picture(f"{len(shown)} of {len(frames)} frames, as the model got them", tiles)
    name = "page" if loaded.item.media_kind == "document" else "picture"
    left_out = {page.page for page in loaded.failed_pages}
    numbers = [number for number in range(len(loaded.media) + len(left_out)) if number not in left_out]
    shown = _spread(list(zip(numbers, loaded.media, strict=True)), _MAX_SEEN)
    tiles = [Tile(_numbered(name, number, visual), _whole(visual)) for number, visual in shown]
    caption = f"{len(shown)} of {_several(len(numbers), name)}, at the model's size"
    missing = ", ".join(str(number + 1) for number in sorted(left_out))
    return Picture(caption + (f"; could not be shown to it: {missing}" if missing else ""), tiles)


def _several(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _numbered(name: str, number: int, visual: VisualInput) -> str:
    return f"{name} {number + 1}" + (f" · {len(visual.tiles)} tiles" if len(visual.tiles) > 1 else "")


def _whole(visual: VisualInput) -> np.ndarray:
    """The first tile of several is the whole picture squeezed into a square: it gets its shape back."""
    height, width = visual.original_size if len(visual.tiles) > 1 else visual.tiles[0].shape[:2]
    return shrink(visual.tiles[0], _SEEN_PX, shape=(height, width))


class _Tracer:
    """Runs the job's model again, with a trace; the model is loaded for the first item."""

    def __init__(self, config: JobConfig, num_overlays: int) -> None:
        self._config, self._left = config, num_overlays
        self._vlm: VLM | None = None

    def overlays(self, loaded: LoadedItem, text: str) -> list[Picture]:
        """Draw what entered the language model and what its last layer still had; nothing where that is not wanted."""
        if not self._left:
            return []
        self._left -= 1
        try:
            self._vlm = self._vlm or self._load()
        except Exception as error:  # a model that runs on the cluster may fail here in any way; the report goes on
            self._left = 0  # said once, beside the first item
            return [Picture("kept tokens", reason=f"the model cannot be run here: {type(error).__name__}: {error}")]
        try:
            return self._trace(self._vlm, loaded, text)
        except Exception as error:  # of this item alone; the next one may well be drawn
            return [Picture("kept tokens", reason=f"cannot be drawn: {type(error).__name__}: {error}")]

    def _load(self) -> VLM:
        from pipeline.execution.worker import load_vlm

        check_drawable(self._config)
        return load_vlm(self._config)

    def _trace(self, vlm: VLM, loaded: LoadedItem, text: str) -> list[Picture]:
        """Of the item's first request: the row's text is the answer to all of them."""
        from illava.requests import SamplingParams
        from pipeline.tasks.asking import request_of
        from pipeline.tasks.build import build_task

        config = self._config
        drawn = config.sampling
        params = SamplingParams(drawn.max_new_tokens, drawn.temperature, drawn.top_p, config.seed)
        content, *further = build_task(config.task).requests(loaded.item, loaded.media)
        request = request_of(config.task, loaded.item.item_id, content, params, trace=True)
        (done,) = vlm.generate([request], plan=config.reduction)
        tiles = [part.tiles for part in content if not isinstance(part, str)]
        return list(_drawn(tiles, done, text=None if further or config.task.refine else text))


def _drawn(tiles: Sequence[np.ndarray], done: Generation, *, text: str | None) -> Iterator[Picture]:
    if done.trace is None:
        raise RuntimeError(f"request {done.request_id!r} was answered without the trace it asked for")
    sheets = sheets_of(done.trace.patch_coords.numpy(), tiles)
    steps = done.trace.steps
    num_before = next((n for n, step in enumerate(steps) if step.stage == "decoder_layer"), len(steps))
    ends = {"into the language model": num_before, "in its last layer": len(steps)}
    for name, upto in ends.items():
        # Only the states that are drawn are composed.
        cells = cells_of(replace(done.trace, steps=steps[:upto]))[-1]
        drawn = zip(sheets, draw_cells(sheets, cells.representative_P), strict=True)
        shown = _spread([Tile(sheet.number, image) for sheet, image in drawn], _MAX_SHEETS)
        yield Picture(f"kept tokens {name}: {_counted(cells)}", shown)
    if text is not None and done.text.strip() != text.strip():
        yield Picture("the answer here differs from the row's", reason=done.text)


def _counted(cells: PatchCells) -> str:
    gone = int((cells.representative_P == GONE).sum())
    tail = f", {gone} patches gone" if gone else ""
    return f"{cells.num_tokens - cells.num_separators} of {cells.representative_P.size} patches{tail}"


def _spread(values: Sequence, most: int) -> list:
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[place] for place in places]
