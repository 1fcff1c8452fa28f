"""Applies stage ``media`` of a plan: reduces a request's pictures to the parts that the tower will see.

The result for a visual input is an ordinary visual input. It has fewer frames or fewer pixels, and the model reads it
as if it had been given no more; or its `VisualInput.representative` is set, and the tower leaves cells out while all
others keep their true coordinates. Each visual input is reduced by itself, on the model's device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from illava.errors import PreprocessError, ReductionDidNotFireError, RequestError
from illava.families.base import Family
from illava.host_copies import to_device
from illava.plan import ReductionPlan
from illava.preprocess import VisualCells, VisualInput
from illava.reducers import Evidence, Reducer
from illava.reducers.base import TextScorer
from illava.reduction.content_kind import content_kind
from illava.reduction.grid_representatives import destinations
from illava.requests import ContentKind, Request
from illava.tokens import Assignment, Tokens

if TYPE_CHECKING:
    from illava.families.text_scorer import RelevanceModel

DOCUMENT_TOLERANCE = 0.5  # of epsilon


class MediaPhase:
    """Applies the ``media`` steps of plans for one model, and holds the text scorers that the plans name.

    Args:
        family: the loaded model; cells are compared and scored on its device, scorers loaded in its dtype.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._scorers: dict[TextScorer, RelevanceModel] = {}

    def check(self, plan: ReductionPlan) -> None:
        """Let the family check the plan, and load the scorer that the plan names. See `route` for `budget: auto`.

        Raises:
            PlanError: the plan makes no sense for this model.
            ModelLoadError: the scorer cannot be loaded.
        """
        self._family.check(plan)
        reducer = plan.at("media")
        scorer = None if reducer is None else reducer.text_scorer
        if scorer is not None and scorer not in self._scorers:
            from illava.families.text_scorer import RelevanceModel  # imported only where a plan needs it

            self._scorers[scorer] = RelevanceModel(
                scorer, device=self._family.decoder.device, dtype=self._family.decoder.dtype
            )

    def route(self, plan: ReductionPlan, media: Sequence[VisualInput]) -> tuple[ReductionPlan, ContentKind | None]:
        """Choose the plan of a request with these media; with `budget: auto` returns the content kind that chose it.

        Raises:
            PlanError: the plan chosen makes no sense for this model.
        """
        if plan.epsilon is None:
            return plan, None
        content = content_kind(self._family.preprocessor, media)
        chosen = plan_for(content, plan.epsilon)
        self._family.check(chosen)
        return chosen, content

    def apply(self, request: Request, plan: ReductionPlan) -> Request:
        """Reduce the request to what the tower will see.

        Raises:
            RequestError: a visual input cannot be reduced so, or there is no text to compare it with.
            ReductionDidNotFireError: the step removed nothing from this request.
        """
        reducer = plan.at("media")
        media = request.media
        if reducer is None or not media:
            return request
        name = f"request {request.request_id!r}: {reducer.kind!r} at media"
        text = " ".join(part.strip() for part in request.text_beside_media).strip()
        if reducer.text_scorer is not None and not text:
            raise RequestError(f"{name} compares pictures with a text, but there is none; ask something")
        try:
            reduced = request.map_media(lambda mm_item: self._reduced(mm_item, reducer, text))
        except PreprocessError as error:
            raise RequestError(f"{name}: {error}") from error
        touched = [mm_item for mm_item in media if mm_item.kind in reducer.media_kinds]
        if all(before is after for before, after in zip(media, reduced.media, strict=True)) and not (
            reducer.may_keep_all and touched
        ):
            kinds = " and ".join(sorted({mm_item.kind for mm_item in media}))
            raise ReductionDidNotFireError(
                f"{name} took nothing off its {kinds}; lower its budget, or leave the step out of the plan"
            )
        return reduced

    def _reduced(self, mm_item: VisualInput, reducer: Reducer, text: str) -> VisualInput:
        """The reduced visual input; the given object itself where nothing is removed."""
        if mm_item.kind not in reducer.media_kinds:
            return mm_item
        if reducer.resolution < 1:
            return self._family.preprocessor.shrink(mm_item, reducer.resolution)
        cells = self._family.preprocessor.cells(mm_item)
        tokens = Tokens(
            to_device(torch.from_numpy(cells.pixels_TX), self._family.decoder.device),
            cells.lengths,
            to_device(torch.from_numpy(np.ascontiguousarray(cells.coord_T3)), self._family.decoder.device),
        )
        assignment = reducer.assign(tokens, self._evidence(mm_item, cells, reducer, text), "media")
        if assignment.num_kept == assignment.num_tokens:
            return mm_item
        return self._without(mm_item, cells, assignment)

    def _evidence(self, mm_item: VisualInput, cells: VisualCells, reducer: Reducer, text: str) -> Evidence:
        kinds, relevance_T, padding_T = reducer.evidence("media"), None, None
        if "padding" in kinds:
            padding_T = to_device(torch.from_numpy(cells.padding_T), self._family.decoder.device)
        if reducer.text_scorer is not None:
            frames, rows, cols = (int(axis) + 1 for axis in cells.coord_T3.max(0))
            shown = torch.tensor(mm_item.tiles[:: -(-len(mm_item.tiles) // frames)])  # the first of each pair
            relevance_T = self._scorers[reducer.text_scorer].relevance(shown, text, rows, cols).flatten()
        return Evidence(
            text_relevance_T=relevance_T,
            padding_T=padding_T,
            packet_bytes_T=self._packet_bytes(mm_item, cells) if "packet_bytes" in kinds else None,
        )

    def _packet_bytes(self, mm_item: VisualInput, cells: VisualCells) -> torch.Tensor:
        """The bytes of each cell's frame; frames that share a temporal patch add theirs up."""
        num_frames, sizes = int(cells.coord_T3[:, 0].max()) + 1, mm_item.packet_bytes
        if len(sizes) != len(mm_item.tiles):
            raise PreprocessError(
                "how many bytes of a file code each of the video's frames is not known: frames in memory have no file, "
                "and the sizes of pictures that are all key frames (MJPEG), or whose order the file does not give, "
                "do not tell what changes; read the video from its file (a job does, and `pipeline.read_media`), or "
                "leave `by` out of the step"
            )
        depth = -(-len(sizes) // num_frames)
        of_frame = torch.tensor([sum(sizes[n : n + depth]) for n in range(0, len(sizes), depth)])
        return to_device(of_frame[torch.from_numpy(cells.coord_T3[:, 0])], self._family.decoder.device)

    def _without(self, mm_item: VisualInput, cells: VisualCells, assignment: Assignment) -> VisualInput:
        """The visual input without the dropped cells; a video loses the frames of which no cell is left."""
        kept_K, row_T = assignment.kept_K.cpu().numpy(), destinations(assignment).cpu().numpy()
        representative = np.where(row_T >= 0, kept_K[row_T.clip(min=0)], -1)
        frame_T = cells.coord_T3[:, 0]
        frames = np.unique(frame_T[kept_K])
        if len(frames) <= frame_T.max():
            if mm_item.kind != "video":
                raise RuntimeError("nothing is left of a tile; a method must keep a cell of each")
            stays_T = np.isin(frame_T, frames)
            new_index = np.cumsum(stays_T) - 1
            representative = representative[stays_T]
            representative = np.where(
                (representative >= 0) & stays_T[representative.clip(min=0)], new_index[representative.clip(min=0)], -1
            )
            mm_item = self._family.preprocessor.with_frames(mm_item, frames.tolist())
        if (representative == np.arange(len(representative))).all():
            return mm_item
        return replace(mm_item, representative=representative)


@lru_cache(maxsize=64)
def plan_for(content: ContentKind, epsilon: float) -> ReductionPlan:
    """The plan that `{budget: auto, epsilon: E}` means for this content kind (see `reduction.content_kind`).

    It keeps the fewest tokens whose restoration error stays under E (`reducers.bounded_error`), for every visual input
    by itself:

    - ``document``: half the error, E / 2; the tower runs unreduced, since glyphs need it.
    - ``image``: the error E.
    - ``video``: cells that repeat the last one to the bit enter the tower once; then the error E.
    """
    tolerance = epsilon * DOCUMENT_TOLERANCE if content == "document" else epsilon
    bound = {"stage": "decoder_input", "reducer": {"kind": "bounded_error", "epsilon": tolerance}}
    steps: list[dict[str, Any]] = [bound]
    if content == "video":
        steps.insert(0, {"stage": "media", "reducer": {"kind": "pixel_dedup"}})
    return ReductionPlan.model_validate({"steps": steps})
