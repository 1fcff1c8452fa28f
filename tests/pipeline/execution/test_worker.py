"""Tests `VLMWorker` alone: rows, errors of one item, seconds by state, and a real model's counts."""

from __future__ import annotations

import pytest

from illava.errors import (
    CacheTooSmallError,
    NumericalError,
    PlanError,
    PreprocessError,
    ReductionDidNotFireError,
    RequestError,
    RequestTooLargeError,
)
from illava.families import load_preprocessor
from pipeline.execution.rows import RunInfo, classify
from pipeline.execution.worker import VLMWorker
from pipeline.records import MediaItem
from tests.support.runs.fakes import FakeLoader, FakeVLM, job_config
from tests.support.timing import holds_in_one_of_three

RUN = RunInfo("recipe", "fingerprint")


def worker(tmp_path, vlm=None, **options) -> VLMWorker:
    return VLMWorker(job_config(tmp_path / "out", {"uri": "x/"}), RUN, vlm=vlm or FakeVLM(**options))


def loaded(number: int, **options):
    return FakeLoader(**options).load(MediaItem(f"item-{number}", (f"{number}.mp4",), "video", (1,), ("",)))


def run_all(subject: VLMWorker) -> dict:
    rows = {}
    while subject.pending:
        rows |= {outcome.row.item_id: outcome.row for outcome in subject.step()}
    return rows


def test_rows_carry_the_answer_the_counts_and_where_they_belong(tmp_path) -> None:
    subject = worker(tmp_path)
    for number in (7, 11):
        subject.add(loaded(number), attempts=number, shard_index=3)
    assert subject.pending == 2
    rows = run_all(subject)
    assert {row.text for row in rows.values()} == {"7", "11"}
    row = rows["item-7"]
    assert (row.status, row.attempts, row.shard_index, row.finish_reason) == ("ok", 7, 3, "stop")
    assert (row.num_vision_tokens, row.num_vision_tokens_kept) == (98, 50)
    assert row.kept_ratio == pytest.approx(50 / 98)
    assert (row.recipe_digest, row.run_fingerprint, row.decoder, row.num_frames) == ("recipe", "fingerprint", "fake", 2)


def test_an_error_of_one_request_is_its_row_and_its_neighbour_is_unharmed(tmp_path) -> None:
    subject = worker(tmp_path, broken="7")
    for number in (7, 11):
        subject.add(loaded(number), attempts=1, shard_index=0)
    rows = run_all(subject)
    assert (rows["item-7"].status, rows["item-7"].error_type) == ("failed", "internal_error")
    assert "ValueError: a defect of this request alone" in rows["item-7"].error_message
    assert rows["item-11"].text == "11"


@pytest.mark.parametrize(
    ("error", "error_type"),
    [
        (RequestTooLargeError("x"), "prompt_too_long"),
        (CacheTooSmallError("x"), "cache_too_small"),
        (RequestError("x"), "bad_request"),
        (PreprocessError("x"), "bad_request"),
        (NumericalError("x"), "numerical_error"),
        (ReductionDidNotFireError("x"), "reduction_did_not_fire"),
        (MemoryError(), "out_of_memory"),
        (KeyError("x"), "internal_error"),
    ],
)
def test_errors_of_the_model_side_have_their_place_on_the_closed_list(error, error_type) -> None:
    assert classify(error)[0] == error_type
    assert classify(error)[1], "a failed row always says something"


class _Refusing(FakeVLM):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def submit(self, request, *, plan=None) -> None:
        raise self._error


def test_a_refused_request_is_a_row_but_a_senseless_plan_is_nobodys_row(tmp_path) -> None:
    subject = worker(tmp_path, _Refusing(RequestError("placeholder in the text")))
    subject.add(loaded(1), attempts=1, shard_index=0)
    assert run_all(subject)["item-1"].error_type == "bad_request"
    with pytest.raises(PlanError):
        worker(tmp_path, _Refusing(PlanError("no layer 99"))).add(loaded(2), attempts=1, shard_index=0)


@pytest.mark.parametrize("state", ["vision_s", "prefill_s", "decode_s"])
def test_a_known_sleep_appears_in_its_state_only(tmp_path, state) -> None:
    @holds_in_one_of_three
    def attempt(number) -> None:
        subject = worker(tmp_path, sleeps={state: 0.4})
        subject.add(loaded(5), attempts=1, shard_index=0)
        row = run_all(subject)["item-5"]
        seconds = {name: getattr(row, name) for name in ("queue_s", "vision_s", "prefill_s", "decode_s")}
        assert 0.4 <= seconds.pop(state) < 0.6
        assert max(seconds.values()) < 0.2
        assert row.latency_s >= 0.4


def test_busy_idle_and_start_seconds_make_up_the_wall_time(tmp_path) -> None:
    import time

    @holds_in_one_of_three
    def attempt(number) -> None:
        subject = worker(tmp_path, sleeps={"decode_s": 0.3})
        subject.add(loaded(5), attempts=1, shard_index=0)
        time.sleep(0.3)
        row = run_all(subject)["item-5"]
        usage = subject.usage()
        assert usage.idle_s >= 0.3
        assert usage.busy_s == pytest.approx(row.gpu_s)
        assert usage.busy_s + usage.idle_s + usage.start_s == pytest.approx(usage.wall_s, rel=0.02)


def test_a_real_model_makes_the_rows_a_direct_call_makes(tmp_path, onevision_folder) -> None:
    """Counts, text and the same kept tokens as `VLM.generate`, and seconds that sum to the latency."""
    from illava import VLM, Request, SamplingParams

    config = job_config(
        tmp_path / "out",
        {"uri": "x/"},
        model={"model_id": str(onevision_folder)},
        sampling={"max_new_tokens": 6},
        reduction={
            "steps": [{"stage": "decoder_layer", "layers": [1], "reducer": {"kind": "illava", "keep_ratio": 0.5}}]
        },
    )
    preprocessor = load_preprocessor(str(onevision_folder))
    items = [loaded(number, side=preprocessor.geometry.tile_px) for number in (3, 4, 5)]
    subject = VLMWorker(config, RUN)

    def answer() -> dict:
        for item in items:
            subject.add(item, attempts=1, shard_index=0)
        return run_all(subject)

    rows = answer()
    vlm = VLM.from_pretrained(str(onevision_folder), dtype="float32", device="cpu")
    requests = [
        Request(i.item.item_id, (*i.media, config.task.prompt), SamplingParams(max_new_tokens=6)) for i in items
    ]
    for generation in vlm.generate(requests, plan=config.reduction):
        row = rows[generation.request_id]
        assert row.status == "ok", row.error_message
        assert row.text == generation.text
        for name in ("num_patches", "num_vision_tokens", "num_vision_tokens_kept", "num_decoder_tokens_kept"):
            assert getattr(row, name) == getattr(generation.usage, name), name
        assert row.num_decoder_tokens_kept < row.num_vision_tokens_kept

    @holds_in_one_of_three
    def attempt(number) -> None:
        """Of three batches in one: a busy machine puts a whole batch aside, and seconds left out lack in each."""
        rows = [row for _ in range(3) for row in answer().values()]
        sums = [(row.queue_s + row.vision_s + row.prefill_s + row.decode_s, row.latency_s) for row in rows]
        assert any(seconds_s == pytest.approx(latency_s, rel=0.02, abs=0.01) for seconds_s, latency_s in sums), sums
