"""Draws what is kept of a job's items: per item the figures of the paper, as PNG files and one HTML page.

Figure 2: attention maps layer by layer, of the unreduced model. Figures 3 and 6: the input, the tokens kept after each
block of the tower, the tokens kept in the language model. For any family, method and modality.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from illava.families import load_preprocessor
from illava.requests import Generation, Request, SamplingParams
from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError
from pipeline.execution.runner import build_loader
from pipeline.execution.worker import load_vlm
from pipeline.inputs.build_manifest import build_manifest
from pipeline.inputs.passwords import read_passwords
from pipeline.records import LoadedItem
from pipeline.report.draw_page import Section, render_page
from pipeline.report.picture import Picture, Tile
from pipeline.report.plan_text import plan_lines
from pipeline.report.raster import Sheet, draw_cells, draw_heat, png, sheets_of, side_by_side
from pipeline.report.token_maps import GONE, PatchCells, cells_of
from pipeline.runs.earlier_runs import done_ids
from pipeline.storage import storage
from pipeline.tasks.asking import request_of
from pipeline.tasks.build import build_task

if TYPE_CHECKING:
    from illava import VLM

PAGE = "kept_tokens.html"
_DEFAULT_ITEMS = 4


def draw_job(config: JobConfig) -> list[str]:
    """Draw the first items of a job, four unless `input.limit` says otherwise.

    Returns the URIs of what was written.

    Raises:
        PipelineError, ILLaVAError: the job cannot be opened, or an item not be loaded or answered.
    """
    check_drawable(config)
    items = build_manifest(config, done_ids=done_ids(config)).items[: config.input.limit or _DEFAULT_ITEMS]
    preprocessor = load_preprocessor(
        config.model.model_id, revision=config.model.revision, pixel_limits=config.media.pixel_limits
    )
    with closing(build_loader(config, preprocessor)) as loader:
        loaded = [loader.load(item) for item in read_passwords(config).give(items)]
    vlm, task, sampling = load_vlm(config), build_task(config.task), config.sampling
    params = SamplingParams(sampling.max_new_tokens, sampling.temperature, sampling.top_p, config.seed)
    written, sections, base = [], [], config.output.uri.rstrip("/")
    asked = [(one, *turn) for one in loaded for turn in enumerate(task.requests(one.item, one.media))]
    for number, (one, window, content) in enumerate(asked):
        request = request_of(config.task, one.item.item_id, content, params, trace=True)
        section = draw_request(vlm, config, request, title=_title(one) + f", window {window + 1}" * bool(window))
        sections.append(section)
        for order, picture in enumerate(section.pictures):
            name = re.sub(r"[^a-z0-9]+", "-", picture.caption.split(":")[0].lower()).strip("-")
            written.append(f"{base}/{number:03d}-{order:02d}-{name}.png")
            storage.write_atomic(written[-1], png(side_by_side([tile.pixels_HW3 for tile in picture.tiles])))
    written.append(f"{base}/{PAGE}")
    storage.write_atomic(written[-1], render_page(f"{config.name}: what is kept", sections).encode())
    return written


def draw_request(vlm: VLM, config: JobConfig, request: Request, *, title: str) -> Section:
    """Answer one request under the job's plan, and draw its figures.

    Raises:
        ILLaVAError: the model cannot answer it, or the plan makes no sense for it.
    """
    from illava.analysis.attention_maps import attention_maps

    (done,) = vlm.generate([request], plan=config.reduction)
    if done.trace is None or done.usage is None:
        raise RuntimeError(f"request {request.request_id!r} was answered without the trace it asked for")
    (whole,) = vlm.generate([replace(request, trace=False)], errors="return")
    tiles = [part.tiles for part in request.content if not isinstance(part, str)]
    sheets = sheets_of(done.trace.patch_coords.numpy(), tiles)
    pictures = [_of_cells(sheets, cells) for cells in cells_of(done.trace)]
    whole_trace, maps = attention_maps(vlm, request)
    whole_sheets = sheets_of(whole_trace.patch_coords.numpy(), tiles)
    for stage, name in (("vision_block", "attention in the tower"), ("decoder_layer", "attention in the decoder")):
        own = [one for one in maps if one.stage == stage]
        if own:
            pictures.append(_of_maps(whole_sheets, name, [(one.layer, one.value_P.numpy()) for one in own]))
    return Section(title, _facts(config, request, done, whole), tuple(pictures))


def check_drawable(config: JobConfig) -> None:
    """Refuse plans whose patches do not lie on the pictures as they were loaded."""
    for step in config.reduction.steps:
        if step.stage == "media" and not step.reducer.drops_cells:
            raise ConfigError(
                f"reduction: {step.reducer.kind!r} makes other pictures before there are patches, so there is no grid "
                "to draw it on; take the step out of the plan to draw the others"
            )


def _of_cells(sheets: Sequence[Sheet], cells: PatchCells) -> Picture:
    """All sheets behind one step; the pictures of one item differ in the cells only."""
    gone = int((cells.representative_P == GONE).sum())
    parts = [f"{cells.num_tokens - cells.num_separators} visual tokens of {cells.representative_P.size} patches"]
    parts += [_several(cells.num_separators, "separator")] * bool(cells.num_separators)
    parts += [f"{_several(gone, 'patch', 'patches')} gone"] * bool(gone)
    parts += [f"{_several(cells.num_shared, 'token')} of patches that weigh more in another"] * bool(cells.num_shared)
    images = draw_cells(sheets, cells.representative_P)
    tiles = [Tile(sheet.number, image) for sheet, image in zip(sheets, images, strict=True)]
    return Picture(f"{cells.title}: {', '.join(parts)}", tiles)


def _several(count: int, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def _of_maps(sheets: Sequence[Sheet], name: str, maps: Sequence[tuple[int, np.ndarray]]) -> Picture:
    """A map a layer, of the item's first tile or frame; each layer has its own scale."""
    first = sheets[0]
    tiles = [
        Tile(f"layer {layer}", draw_heat(first, value_P, float(np.quantile(value_P[first.patch_RC], 0.98))))
        for layer, value_P in maps
    ]
    return Picture(f"{name}: layer by layer, unreduced, first tile or frame", tiles)


def _facts(config: JobConfig, request: Request, done: Generation, whole: Generation) -> tuple[tuple[str, str], ...]:
    prompt = " ".join(part for part in request.content if isinstance(part, str))
    return (
        ("prompt", prompt),
        ("answer under the plan", done.text),
        ("answer of the unreduced model", whole.text if whole.error is None else str(whole.error)),
        ("plan", "\n".join(plan_lines(config.reduction))),
    )


def _title(one: LoadedItem) -> str:
    return " ".join(uri.rsplit("/", 1)[-1] for uri in one.item.uris)
