"""Logits not finite, answers without end or without words, memory that ends: rows that say so, run verified."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from illava.errors import NumericalError
from pipeline.execution.runner import run_job
from pipeline.execution.worker import VLMWorker
from tests.support.models import misbehaving_models
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config, numbered_items, read_rows, violations


class StrangeVLM(fakes.FakeVLM):
    """Item 2: not finite. Item 3: cut off at its limit. Item 4: ends at once."""

    def step(self):
        [answer] = super().step()
        if answer.text == "2":
            return [replace(answer, text="", finish_reason=None, usage=None, error=NumericalError("logits not finite"))]
        if answer.text == "3":
            return [replace(answer, text="and and and", finish_reason="length")]
        return [replace(answer, text="")] if answer.text == "4" else [answer]


def rows_of(tmp_path, make_vlm, *, loader=None, num_items=6) -> dict[str, dict]:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, num_items))
    run_job(
        config,
        worker_factory=lambda config, run_info: VLMWorker(config, run_info, vlm=make_vlm()),
        loader_factory=partial(fakes.fake_loader, **(loader or {})),
    )
    assert violations(tmp_path / "out") == []
    return {row["item_id"]: row for row in read_rows(tmp_path / "out")}


def test_each_is_a_row_that_says_so_and_its_neighbours_are_unharmed(tmp_path) -> None:
    rows = rows_of(tmp_path, StrangeVLM)
    assert (rows["item-2"]["status"], rows["item-2"]["error_type"]) == ("failed", "numerical_error")
    assert (rows["item-3"]["status"], rows["item-3"]["finish_reason"]) == ("ok", "length")
    assert (rows["item-4"]["status"], rows["item-4"]["finish_reason"], rows["item-4"]["text"]) == ("ok", "stop", "")
    assert [rows[f"item-{n}"]["text"] for n in (0, 1, 5)] == ["0", "1", "5"]


def test_a_job_on_a_device_too_small_for_its_batches_finishes_all_items(tmp_path) -> None:
    made = []

    def small() -> misbehaving_models.SmallDeviceVLM:
        made.append(misbehaving_models.SmallDeviceVLM(fits=3 * 2 * 56 * 56 * 3))
        return made[-1]

    rows = rows_of(tmp_path, small, num_items=24)
    assert {item_id: row["text"] for item_id, row in rows.items()} == {f"item-{n}": str(n) for n in range(24)}
    assert (made[0].num_failed, made[0].most_inside) == (2, 2), "8, 4, then 2 at a time for the rest of the job"


def test_items_too_large_even_alone_are_rows_of_the_closed_list(tmp_path) -> None:
    rows = rows_of(tmp_path, partial(misbehaving_models.SmallDeviceVLM, fits=1))
    assert {row["error_type"] for row in rows.values()} == {"out_of_memory"}
    assert all("even alone" in row["error_message"] for row in rows.values())
