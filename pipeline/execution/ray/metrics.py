"""Exports a running job's figures as Ray metrics, row by row, for Prometheus and the dashboard in configs/grafana.

The counters count the rows that this driver made, the gauges show where its items are. `_RUN.json` has the totals of
the whole run.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from pipeline.records import ResultRow

STAGES = ("fetch", "load", "preprocess", "queue", "vision", "prefill", "decode", "latency")
_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]

# Name -> what it counts, and the tag beside the job's name. Ray puts "ray_" in front and "_total" behind a counter.
COUNTERS: dict[str, tuple[str, str | None]] = {
    "illava_items": ("Rows made, by status", "status"),
    "illava_failures": ("Failed rows, by error type", "error_type"),
    "illava_vision_tokens": ("Visual tokens the unreduced model would give its LLM", None),
    "illava_vision_tokens_kept": ("Visual tokens that entered the LLM", None),
    "illava_decoder_tokens_kept": ("Visual tokens in the LLM's last layer", None),
    "illava_generated_tokens": ("Tokens generated", None),
    "illava_loops": ("Answers that repeat themselves", None),
    "illava_fetched_bytes": ("Bytes fetched from the store", None),
    "illava_retries": ("Attempts beyond an item's first", None),
    "illava_items_cost_usd": ("Cost of the rows; loading and waiting not included", None),
}
# Name -> what it is at this moment, and the tag beside the job's name.
GAUGES: dict[str, tuple[str, str | None]] = {
    "illava_planned_items": ("Items that this command has to do", None),
    "illava_waiting_items": ("Of these, items that nothing has begun yet", None),
    "illava_in_work_items": ("Of these, items of the open shards that have no row yet", None),
    "illava_actors": ("Actors that have started and stand, by role (vlm, reader)", "role"),
}
STAGE_SECONDS = "illava_stage_seconds"


class MetricMaker(Protocol):
    """Makes metrics: `pipeline.execution.ray.actors.RayCluster`."""

    def metric(
        self, kind: Literal["counter", "gauge", "histogram"], name: str, description: str, **options: Any
    ) -> Any:
        """Make a metric of `ray.util.metrics`."""


class RowMetrics:
    """Counts rows into the cluster's metrics.

    Args:
        cluster: makes the metrics.
        job: value of the tag ``job_name`` of every metric; the tag ``job`` is taken: Prometheus names a target with it.
    """

    def __init__(self, cluster: MetricMaker, *, job: str) -> None:
        self._job = job
        self._counters = {
            name: cluster.metric("counter", name, text, tag_keys=("job_name", *([tag] if tag else [])))
            for name, (text, tag) in COUNTERS.items()
        }
        self._seconds = cluster.metric(
            "histogram",
            STAGE_SECONDS,
            "Seconds of answered items by stage",
            tag_keys=("job_name", "stage"),
            boundaries=_SECONDS,
        )

    def add(self, row: ResultRow) -> None:
        """Count one row."""
        self._count("illava_items", 1, status=row.status)
        if row.status == "failed":
            self._count("illava_failures", 1, error_type=row.error_type or "")
        self._count("illava_vision_tokens", row.num_vision_tokens)
        self._count("illava_vision_tokens_kept", row.num_vision_tokens_kept)
        self._count("illava_decoder_tokens_kept", row.num_decoder_tokens_kept)
        self._count("illava_generated_tokens", row.num_generated_tokens)
        self._count("illava_loops", int(row.finish_reason == "loop"))
        self._count("illava_fetched_bytes", row.bytes_fetched)
        self._count("illava_retries", row.attempts - 1)
        self._count("illava_items_cost_usd", row.cost_usd)
        if row.status != "failed":
            for stage in STAGES:
                self._seconds.observe(getattr(row, f"{stage}_s"), tags={"job_name": self._job, "stage": stage})

    def _count(self, name: str, value: float, **tags: str) -> None:
        if value > 0:  # Ray refuses to count nothing
            self._counters[name].inc(value, tags={"job_name": self._job, **tags})


class JobGauges:
    """Shows a job's present state among the cluster's metrics.

    Args:
        cluster: makes the metrics.
        job: value of the tag ``job_name``.
    """

    def __init__(self, cluster: MetricMaker, *, job: str) -> None:
        self._job = job
        self._gauges = {
            name: cluster.metric("gauge", name, text, tag_keys=("job_name", *([tag] if tag else [])))
            for name, (text, tag) in GAUGES.items()
        }

    def set(self, *, planned: int, waiting: int, in_work: int, actors: dict[str, int]) -> None:
        """Set all gauges."""
        for name, value in (("planned", planned), ("waiting", waiting), ("in_work", in_work)):
            self._gauges[f"illava_{name}_items"].set(value, tags={"job_name": self._job})
        for role, count in actors.items():
            self._gauges["illava_actors"].set(count, tags={"job_name": self._job, "role": role})
