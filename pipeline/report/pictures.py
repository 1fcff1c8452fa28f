"""Reads frames again and computes traces again, to show what the model saw of an item and what it kept.

Media are read through the loader, in its sandbox process. Where a picture cannot be had, the reason stands in its
place; nothing here ends a report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from illava.errors import ILLaVAError
from illava.families import load_preprocessor
from pipeline.config.schema import JobConfig
from pipeline.errors import PipelineError
from pipeline.loading.load_report import ItemLoader
from pipeline.records import LoadedItem, MediaItem
from pipeline.report.draw import check_drawable
from pipeline.report.raster import draw_cells, png, sheets_of, side_by_side
from pipeline.report.token_maps import GONE, PatchCells, cells_of

if TYPE_CHECKING:
    from illava import VLM
    from illava.requests import Generation

_MAX_FRAMES, _FRAME_PX = 8, 128
_MAX_SHEETS = 4


@dataclass(frozen=True, slots=True)
class Picture:
    """Holds a picture, or the reason why there is none.

    Attributes:
        caption: what it shows.
        png: None where it cannot be had.
        reason: why not.
    """

    caption: str
    png: bytes | None = None
    reason: str = ""


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
            config.model.model_id, revision=config.model.revision, pixel_limits=config.media.pixel_limits
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
                yield [_frames(loaded), *tracer.overlays(loaded, text)]


def _load(loader: ItemLoader, item: MediaItem) -> LoadedItem | Picture:
    try:
        return loader.load(item)
    except (PipelineError, ILLaVAError, OSError) as error:
        return Picture("frames", reason=f"the media cannot be read again: {error}")


def _frames(loaded: LoadedItem) -> Picture:
    tiles = [tile for visual in loaded.media for tile in visual.tiles]
    shown = _spread(tiles, _MAX_FRAMES)
    caption = f"{len(shown)} of {len(tiles)} frames or tiles as the model got them"
    small = [tile[:: -(-max(tile.shape[:2]) // _FRAME_PX), :: -(-max(tile.shape[:2]) // _FRAME_PX)] for tile in shown]
    return Picture(caption, png(side_by_side(small, per_row=4)))


class _Tracer:
    """Runs the job's model again, with a trace; the model is loaded for the first item."""

    def __init__(self, config: JobConfig, num_overlays: int) -> None:
        self._config, self._left = config, num_overlays
        self._vlm: VLM | None = None
        self._reason = ""

    def overlays(self, loaded: LoadedItem, text: str) -> list[Picture]:
        """Draw what entered the language model and what its last layer still had."""
        if not self._left and not self._reason:
            self._reason = "not asked for; --overlays N loads the model here and computes it for the first N items"
        if self._reason:
            return [Picture("kept tokens", reason=self._reason)]
        self._left -= 1
        try:
            self._vlm = self._vlm or self._load()
        except Exception as error:  # a model that runs on the cluster may fail here in any way; the report goes on
            self._reason = f"the model cannot be run here: {type(error).__name__}: {error}"
            return [Picture("kept tokens", reason=self._reason)]
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
    sheets = _spread(sheets_of(done.trace.patch_coords.numpy(), tiles), _MAX_SHEETS)
    steps = done.trace.steps
    num_before = next((n for n, step in enumerate(steps) if step.stage == "decoder_layer"), len(steps))
    ends = {"into the language model": num_before, "in its last layer": len(steps)}
    for name, upto in ends.items():
        # Only the states that are drawn are composed.
        cells = cells_of(replace(done.trace, steps=steps[:upto]))[-1]
        image = side_by_side([draw_cells(sheet, cells.representative_P) for sheet in sheets], per_row=2)
        yield Picture(f"kept tokens {name}: {_counted(cells)}", png(image))
    if text is not None and done.text.strip() != text.strip():
        yield Picture("the answer here differs from the row's", reason=done.text)


def _counted(cells: PatchCells) -> str:
    gone = int((cells.representative_P == GONE).sum())
    tail = f", {gone} patches gone" if gone else ""
    return f"{cells.num_tokens - cells.num_separators} of {cells.representative_P.size} patches{tail}"


def _spread(values: Sequence, most: int) -> list:
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[place] for place in places]
