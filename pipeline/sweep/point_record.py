"""Records what the figures of a sweep's point depend on, and says where two such records differ in meaning.

A later key has its default in an earlier record, as in `pipeline.runs.run_record`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from illava import __version__
from pipeline.config.placement import place_here
from pipeline.config.schema import JobConfig
from pipeline.runs.config_fingerprint import digest_of, resolve_config_fingerprint
from pipeline.runs.run_record import config_diff, recorded_config_fingerprint
from pipeline.sweep.config import Point, SpeedConfig, SweepConfig

_BARE_CONFIG = {"input": {"uri": "-"}, "output": {"uri": "-"}}  # what a job must have and no fingerprint holds


@dataclass(frozen=True, slots=True)
class PointRecord:
    """Holds what a point's figures depend on.

    Attributes:
        digest: as the first sweeps have it, whose rows record nothing else.
        config_fingerprint: of the job that the point stands for.
        measured: how it is measured, and since figures are times, by which release and on what. JSON types.
    """

    digest: str
    config_fingerprint: dict[str, Any]
    measured: dict[str, Any]

    @property
    def text(self) -> str:
        """As a row of the results has it."""
        return json.dumps({"recipe": self.config_fingerprint, "measured": self.measured}, sort_keys=True)

    def difference(self, there: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Map each key that differs to its value there and here, of what a row of the results was measured under."""
        fields = recorded_config_fingerprint({"recipe": there["recipe"], "config": _BARE_CONFIG})
        return config_diff(fields, self.config_fingerprint) | config_diff(_todays(there["measured"]), self.measured)


def point_record(config: SweepConfig, point: Point, manifest_digest: str) -> PointRecord:
    """Record what this point's figures depend on, here and now."""
    job = config.job(point.model, point.plan)
    config_fingerprint, computes = resolve_config_fingerprint(job).fields, _computes(job)
    speed = config.speed.model_dump(mode="json")
    # Both digests are composed as the first sweeps did.
    job_digest = digest_of(config_fingerprint | computes | {"schema_version": 2})
    digest = digest_of([job_digest, manifest_digest, config.quality, speed, config.num_threads])
    others = {"manifest": manifest_digest, "quality": config.quality, "speed": speed, "num_threads": config.num_threads}
    return PointRecord(digest, config_fingerprint, others | computes)


def _computes(job: JobConfig) -> dict[str, Any]:
    device = place_here(job).model.device
    attention = os.environ.get("ILLAVA_ATTENTION", "auto")  # both: see `illava.attention.backend`
    if attention == "auto":
        attention = "varlen" if device == "cuda" else "sdpa"
    computes = {"model.device": device, "attention_backend": attention}
    if device == "cuda":
        computes["kernels"] = os.environ.get("ILLAVA_KERNELS", "auto")
    return computes | {"versions.illava": __version__}


def _todays(measured: Mapping[str, Any]) -> dict[str, Any]:
    try:
        speed = SpeedConfig.model_validate(measured["speed"]).model_dump(mode="json")
    except ValidationError:  # of a later version; given as it stands, so that a refusal names it
        return dict(measured)
    return {**measured, "speed": speed}
