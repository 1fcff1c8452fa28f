"""Captures the encoding of media as CUDA graphs, one for each shape of media under a plan, and replays them.

A plan fixes how many tokens each step leaves, so nothing that the host does on the way depends on a pixel: tower,
projector and layout are the same operations on the same places. Where data decide (an error bound, a random draw, cells
left out before the tower) nothing is captured, and `TowerGraphs.refused` says why.

Pixels are copied into fixed tensors before a replay, and what it leaves is copied out, since the next replay writes
there again. What the host brings to the device on the way is that of the first run (`illava.host_copies.FixedCopies`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from illava.errors import ModelLoadError
from illava.families.side_copies import PixelCopies
from illava.host_copies import FixedCopies
from illava.plan import ReductionPlan
from illava.preprocess import VisualInput
from illava.visual_tokens import EncodedVisual

Run = Callable[[], list[EncodedVisual]]
Capture = Callable[[Run], tuple[Callable[[], None], list[EncodedVisual]]]  # gives a replay, and where its results lie

_LOG = logging.getLogger(__name__)
_MAX_GRAPHS = 8  # shapes of media and plan; what a graph reads and gives beside the weights stays allocated


class _Encoder(Protocol):
    copies: PixelCopies

    def encode(self, media: Sequence[VisualInput], plan: ReductionPlan, *, trace: bool) -> list[EncodedVisual]: ...


@dataclass(frozen=True, slots=True)
class _Captured:
    pixels: list[Tensor]
    copies: FixedCopies
    replay: Callable[[], None]
    encoded: list[EncodedVisual]


class _FixedPixels:
    """Gives the fixed tensors that stand for media's pixels."""

    def __init__(self, media: Sequence[VisualInput], pixels: Sequence[Tensor]) -> None:
        self._pixels = {id(mm_item.tiles): own for mm_item, own in zip(media, pixels, strict=True)}

    def begin(self, arrays: Iterable[np.ndarray]) -> None:
        raise RuntimeError("nothing is copied ahead within a captured run")

    def take(self, array: np.ndarray) -> Tensor:
        return self._pixels[id(array)]


class TowerGraphs:
    """Holds the captured encodings of one encoder, those used last.

    Args:
        encoder: is run, captured and replayed.
        capture: captures a run, as `CudaCapture` does.

    Attributes:
        refused: by plan and shape of media, why nothing was captured.
    """

    def __init__(self, encoder: _Encoder, capture: Capture) -> None:
        self._encoder, self._capture = encoder, capture
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self.refused: dict[Hashable, str] = {}

    def encode(self, media: Sequence[VisualInput], plan: ReductionPlan) -> list[EncodedVisual] | None:
        """Encode by a replay; None where that cannot be, which is logged once."""
        key = plan, tuple(map(_shape, media))
        if key in self.refused or not media:
            return None
        captured = self._captured.get(key)
        if captured is None:
            why = obstacle(media, plan)
            try:
                captured = None if why is not None else self._run_and_capture(media, plan)
            except RuntimeError as error:  # a wait for the device, or a copy that is another one each time
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                why = str(error).splitlines()[0]
            if captured is None:
                self.refused[key] = str(why)
                _LOG.info("the encoding of %s is not captured: %s", ", ".join(m.kind for m in media), why)
                return None
            self._captured[key] = captured
            if len(self._captured) > _MAX_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        for own, mm_item in zip(captured.pixels, media, strict=True):
            own.copy_(self._encoder.copies.take(mm_item.tiles))
        captured.replay()
        return [_copied(mm_item) for mm_item in captured.encoded]

    def _run_and_capture(self, media: Sequence[VisualInput], plan: ReductionPlan) -> _Captured:
        pixels, copies = [self._encoder.copies.take(mm_item.tiles).clone() for mm_item in media], FixedCopies()

        def run() -> list[EncodedVisual]:
            before, self._encoder.copies = self._encoder.copies, _FixedPixels(media, pixels)
            try:
                with copies.run():
                    return self._encoder.encode(media, plan, trace=False)
            finally:
                self._encoder.copies = before

        return _Captured(pixels, copies, *self._capture(run))


class CudaCapture:
    """Captures a run as a CUDA graph; all graphs share one pool of memory, since they run one at a time.

    Raises:
        ModelLoadError: the model is on no CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ModelLoadError(f"encodings cannot be captured on {device}: that takes CUDA; pass tower_graphs=False")
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> tuple[Callable[[], None], list[EncodedVisual]]:
        """Run twice on a stream of its own, so that libraries compile and allocate; then capture.

        Raises:
            RuntimeError: the second run waits for the device, or copies other numbers to it than the first.
        """
        current, warming, mode = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
        warming.wait_stream(current)
        with torch.cuda.stream(warming):
            run()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(warming)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            encoded = run()
        return graph.replay, encoded


def obstacle(media: Sequence[VisualInput], plan: ReductionPlan) -> str | None:
    """Why the encoding of these media under a plan is not the same operations for all pixels; None where it is."""
    if any(mm_item.representative is not None for mm_item in media):
        return "stage media left cells out, other ones in each picture"
    if len({id(mm_item.tiles) for mm_item in media}) < len(media):
        return "two of the media are the same pixels"
    for step in plan.steps:
        if step.stage not in ("vision_block", "vision_output"):
            continue
        if "seed" in step.reducer.evidence(step.stage):
            return f"{step.reducer.kind!r} draws at random"
        if step.reducer.num_kept(1_000) is None:
            return f"the data decide how many tokens {step.reducer.kind!r} keeps"
    return None


def _shape(mm_item: VisualInput) -> Hashable:
    """What an encoding depends on beside the pixels."""
    return mm_item.kind, mm_item.tiles.shape, mm_item.tiles.dtype.str, mm_item.original_size


def _copied(encoded: EncodedVisual) -> EncodedVisual:
    """The same in memory of its own."""
    own = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
    tensors: dict[str, Any] = {name: value.clone() for name, value in own.items() if isinstance(value, Tensor)}
    return replace(encoded, **tensors, deepstack=tuple(layer.clone() for layer in encoded.deepstack))
