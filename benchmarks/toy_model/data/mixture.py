"""Registers the kinds of samples; `make(kind, seed)` makes every sample."""

from __future__ import annotations

import zlib

import numpy as np

from benchmarks.toy_model.data import charts, documents, scenes, videos
from benchmarks.toy_model.data.samples import Sample

STILLS = {
    "scene": scenes.make_scene,
    "chart": charts.make_chart,
    "table": documents.make_table,
    "lines": documents.make_lines,
    "pair": scenes.make_pair,
}
CLIPS = {
    "motion": videos.make_motion,
    "order": videos.make_order,
    "flashes": videos.make_flashes,
}
KINDS = (*STILLS, *CLIPS)


def make(kind: str, seed: int, *, split: str = "train", num_frames: int = 8) -> Sample:
    """The sample that a kind, a split and a seed name: the same one on every machine.

    Args:
        kind: one of `KINDS`.
        seed: number of the sample within its split.
        split: ``train``, ``validation`` or ``test``: disjoint streams.
        num_frames: frames of a clip.
    """
    rng = np.random.default_rng([zlib.crc32(f"{split}/{kind}".encode()), seed])
    if kind in STILLS:
        return STILLS[kind](rng)
    return CLIPS[kind](rng, num_frames)
