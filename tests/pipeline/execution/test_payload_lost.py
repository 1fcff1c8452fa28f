"""Tests loaded media that are lost before their call begins: recognised by Ray's errors, and loaded again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import ActorDiedError, ObjectLostError, OwnerDiedError, RayTaskError

from pipeline.errors import StorageError
from pipeline.execution.ray.actor_pool import CALLS_PER_ACTOR
from pipeline.execution.ray.actors import ActorLostError, PayloadLostError, RayCluster, StepResult
from pipeline.execution.ray.executor import RayExecutor
from pipeline.execution.rows import RowMaker, RunInfo
from pipeline.execution.scheduler import Scheduler
from pipeline.execution.worker import WorkerUsage
from pipeline.loading.load_report import LoadReport
from pipeline.records import LoadStats, MediaItem, ResultRow, Shard
from tests.support.runs.actors_without_ray import Answer, Cluster
from tests.support.runs.fakes import job_config

GONE = ("ab" * 28, None, "")  # of an object: its id, its owner, where it was made


@pytest.mark.parametrize(
    ("raised", "meant"),
    [
        (ObjectLostError(*GONE), PayloadLostError),
        (OwnerDiedError(*GONE), PayloadLostError),
        (RayTaskError("advance", "traceback", ObjectLostError(*GONE)), PayloadLostError),
        (RayTaskError("advance", "traceback", RuntimeError("CUDA error")), ActorLostError),
        (RayTaskError("load", "traceback", StorageError("the bucket is gone")), StorageError),
        (ActorDiedError(), ActorLostError),
    ],
    ids=lambda value: "" if isinstance(value, type) else type(getattr(value, "cause", None) or value).__name__,
)
def test_what_ray_raises_is_told_apart(monkeypatch, raised, meant) -> None:
    def get(reference):
        raise raised

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(meant):
        RayCluster().result("reference")


class LosesMedia(Cluster):
    """Answers all items but those of the first calls, as many as an actor may have queued, whose media are lost."""

    def __init__(self, rows: RowMaker) -> None:
        super().__init__()
        self._rows = rows
        self.loads: list[str] = []
        self.lost: list[list[str]] = []

    def spawn_vlm(self, config, make_worker):
        actor = super().spawn_vlm(config, make_worker)
        actor.advance = SimpleNamespace(remote=self._advance)
        return actor

    def load(self, reader, item: MediaItem):
        self.loads.append(item.item_id)
        return Answer(LoadReport(0.0, LoadStats(), nbytes=10)), object()

    def _advance(self, inputs, *payloads) -> Answer:
        if inputs and len(self.lost) < CALLS_PER_ACTOR:
            self.lost.append([one.item.item_id for one in inputs])
            return Answer(PayloadLostError("the node is gone"))
        return Answer(StepResult(tuple((self._row(one), 0.0) for one in inputs), WorkerUsage()))

    def _row(self, one) -> ResultRow:
        row = self._rows.failed(one.item, "not_found", "", attempts=one.attempts, shard_index=one.shard_index)
        return replace(row, status="ok", error_type=None)


def test_media_that_are_lost_before_their_call_are_loaded_again(tmp_path) -> None:
    config = job_config(tmp_path, {"uri": "unused"})
    cluster, rows = LosesMedia(RowMaker(config, RunInfo("recipe", "run"))), {}
    items = tuple(MediaItem(f"item-{n}", (f"{n}.mp4",), "video", (1,), ("",)) for n in range(4))
    scheduler = Scheduler(
        [0],
        lambda index: Shard(index, items),
        estimate_bytes=lambda item: 10,
        failed_row=lambda lease, error_type, message: pytest.fail(message),
        on_row=lambda row: rows.setdefault(row.item_id, row),
        max_inflight_bytes=100,
        max_open_shards=1,
        max_attempts=3,
    )
    executor = RayExecutor(cluster, config, scheduler, make_loader=None, make_worker=None)
    for _ in range(20):
        executor.poll()
    assert len(rows) == len(items), "an item was forgotten"
    times_lost = Counter(item_id for call in cluster.lost for item_id in call)
    assert len(cluster.lost) == CALLS_PER_ACTOR
    assert Counter(cluster.loads) == Counter(rows.keys()) + times_lost
    assert {item_id: row.attempts - 1 for item_id, row in rows.items()} == {name: times_lost[name] for name in rows}
    assert scheduler.inflight_bytes == 0
