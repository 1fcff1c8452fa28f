"""Estimates before spending, and the end of the money: on whole runs in one process."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from pipeline.cost import Spending
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.execution import budget as budgets
from pipeline.execution.budget import Budget, BudgetGuard, parse_budget
from pipeline.execution.reporting.summary import RunStats, RunSummary, render_line, render_summary
from pipeline.execution.rows import RunInfo
from pipeline.execution.runner import run_job
from pipeline.execution.worker import VLMWorker, WorkerUsage
from pipeline.exit_codes import guarded
from pipeline.planning.probe import Probe, probe, render_probe
from pipeline.planning.probe import _estimated as estimated_of
from pipeline.records import MediaItem
from pipeline.runs.run import open_run
from pipeline.runs.sessions import Session, other_sessions
from tests.support.runs import fakes
from tests.support.runs.fakes import fake_loader, job_config, read_rows, violations
from tests.support.timing import holds_in_one_of_three

PRICES = {"gpu_hour_usd": 3600.0, "cpu_hour_usd": 36.0, "storage_request_usd": 0.001}


class CostlyVLM(fakes.FakeVLM):
    """Its device seconds depend on the item alone: 1.0 .. 2.9 s, an image a tenth of it. Nobody waits for them."""

    def step(self):
        (generation,) = super().step()
        value = int(generation.text)
        device_s = (1.0 + value * 7 % 20 / 10) * (0.1 if value % 3 == 0 else 1.0)
        return [replace(generation, timing=replace(generation.timing, device_s=device_s))]


def costly_worker(config, run_info) -> VLMWorker:
    return VLMWorker(config, run_info, vlm=CostlyVLM())


def mixed_items(folder, num_items) -> dict:
    """Videos, and every third an image."""
    lines = [json.dumps({"id": f"item-{n}", "uri": f"{n}.{'png' if n % 3 == 0 else 'mp4'}"}) for n in range(num_items)]
    (folder / "items.jsonl").write_text("\n".join(lines))
    return {"manifest": str(folder / "items.jsonl")}


def config_of(tmp_path, num_items, *, out="out", **sections):
    sections = {"prices": PRICES, "runtime": {"gpus_per_actor": 1}, **sections}
    return job_config(tmp_path / out, mixed_items(tmp_path, num_items), **sections)


def run(config, **options):
    return run_job(config, worker_factory=costly_worker, loader_factory=fake_loader, **options)


def question_items(folder) -> dict:
    """238 questions about 64 media, 1 to 6 on each or 9, which is more than one batch; every third an image."""
    numbers = [9 if mm_item % 16 == 5 else mm_item * 7 % 6 + 1 for mm_item in range(64)]
    uris = [
        f"{mm_item}.{'png' if mm_item % 3 == 0 else 'mp4'}"
        for mm_item, count in enumerate(numbers)
        for _ in range(count)
    ]
    lines = [json.dumps({"id": f"item-{n}", "uri": uri}) for n, uri in enumerate(uris)]
    (folder / "items.jsonl").write_text("\n".join(lines))
    return {"manifest": str(folder / "items.jsonl")}


def estimated(tmp_path, source, **sections):
    """Sixteen probes under each of twenty seeds, how often cost and device seconds lay inside, and the actual cost."""
    run(job_config(tmp_path / "out", source, **sections))
    rows = read_rows(tmp_path / "out")
    actual_usd, actual_s = sum(row["cost_usd"] for row in rows), sum(row["gpu_s"] for row in rows)
    probes = []
    for seed in range(20):
        asked = job_config(tmp_path / "never", source, **sections).model_copy(update={"seed": seed})
        probes.append(probe(asked, 16, worker_factory=costly_worker, loader_factory=fake_loader))
    assert not (tmp_path / "never").exists()
    assert {(found.num_items, found.num_groups, found.num_failed) for found in probes} == {(len(rows), 16, 0)}
    inside_usd = sum(found.items_usd.low <= actual_usd <= found.items_usd.high for found in probes)
    inside_s = sum(found.device_s.low <= actual_s <= found.device_s.high for found in probes)
    return probes, inside_usd, inside_s, actual_usd


def test_sixteen_probes_foretell_the_cost_of_a_mixed_set(tmp_path) -> None:
    source = mixed_items(tmp_path, 210)
    probes, inside_usd, inside_s, _ = estimated(tmp_path, source, prices=PRICES, runtime={"gpus_per_actor": 1})
    assert inside_usd >= 18
    assert inside_s >= 18
    assert "16 of 210 items were run, 0 failed" in render_probe(probes[-1])


def test_sixteen_probes_foretell_the_cost_of_many_questions_on_one_medium(tmp_path) -> None:
    # A load costs 10 USD and is shared by a medium's questions, each of which costs 0.1 to 2.9 USD.
    sections = {"prices": PRICES | {"cpu_hour_usd": 36e6}, "runtime": {"gpus_per_actor": 1, "cpus_per_actor": 0}}
    probes, inside_usd, inside_s, actual_usd = estimated(tmp_path, question_items(tmp_path), **sections)
    assert inside_usd >= 18
    assert inside_s >= 18
    assert sum(found.items_usd.total for found in probes) / 20 == pytest.approx(actual_usd, rel=0.1)
    assert f"{probes[0].num_probed} of 238 items were run, all about 16 media" in render_probe(probes[0])


def test_a_probe_says_what_it_cannot_do(tmp_path) -> None:
    config = config_of(tmp_path, 12)
    with pytest.raises(ConfigError, match="--estimate 3: this input needs at least 4, two of each kind of media"):
        probe(config, 3)
    run(config)
    with pytest.raises(InputError, match="nothing is left to do"):
        probe(config, 16)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_probe_ends_with_the_interrupts_own_code(tmp_path, capsys, number, exit_code) -> None:
    def signalling(config, run_info) -> VLMWorker:
        worker = costly_worker(config, run_info)
        step = worker.step
        worker.step = lambda: signal.raise_signal(number) or step()
        return worker

    config = config_of(tmp_path, 20, model={"max_batch_requests": 1})
    command = partial(probe, config, 16, worker_factory=signalling, loader_factory=fake_loader)
    assert guarded(command, debug=False) == exit_code
    assert "the estimate was interrupted after 0 of 16 items; nothing is estimated" in capsys.readouterr().err


def test_failed_probes_are_counted_and_unset_prices_are_said(tmp_path) -> None:
    config = config_of(tmp_path, 20, prices={"gpu_hour_usd": 0, "cpu_hour_usd": 0, "storage_request_usd": 0})
    failing = {f"item-{n}": "corrupt_media" for n in range(20)}

    def loader(config, preprocessor):
        return fake_loader(config, preprocessor, failing=failing)

    found = probe(config, 8, worker_factory=costly_worker, loader_factory=loader)
    assert (found.num_probed, found.num_failed) == (8, 8)
    said = render_probe(found)
    assert "no prices set" in said
    assert "failures       8 corrupt_media" in said
    name, _, message = found.failures[0]
    assert f"{name}: corrupt_media: {message}" in said
    assert said.count("corrupt_media: ") == 3, "the first few by name"


def found_of(config, workers, *, wall_s, num_items=40) -> Probe:
    """An estimate from eight items of 1 s on the device and 0.5 s of reading, of 40 such items."""
    row = {"gpu_s": 1.0, "fetch_s": 0.2, "load_s": 0.2, "preprocess_s": 0.1, "cost_usd": 0.01, "status": "ok"}
    summary = RunSummary(0, "job", "out", 8, 0, RunStats(num_rows=8), wall_s, None, workers)
    return estimated_of(config, num_items, [num_items], [[[row]] * 8], summary)


def test_the_estimate_scales_what_the_items_took_and_takes_the_rest_once(tmp_path) -> None:
    config = config_of(tmp_path, 1, runtime={"gpus_per_actor": 1, "cpus_per_actor": 0})
    # 18 s to start and 15 s of work, where the items' own seconds are 12: the executor takes turns
    found = found_of(config, (WorkerUsage(wall_s=33.0, start_s=18.0, busy_s=8.0),), wall_s=35.0)
    assert found.fixed_s == pytest.approx(20.0)
    assert found.wall_s.total == pytest.approx(20.0 + 15.0 * 5)
    assert found.wall_s.high / found.wall_s.low == pytest.approx(2.0)
    assert found.wall_s.low < found.wall_s.total < found.wall_s.high
    # on the one actor: 18 s of start, 75 s of work of which the items have 40
    assert found.load_usd == pytest.approx(18.0)
    assert found.total_usd.total == pytest.approx(40 * 0.01 + 18.0 + 75.0 - 40.0)


def test_on_ray_the_slower_side_counts_and_actors_share_it(tmp_path) -> None:
    runtime = {"executor": "ray", "gpus_per_actor": 1, "num_vlm_actors": {"min": 1, "max": 4}, "num_reader_actors": 1}
    config = config_of(tmp_path, 1, runtime=runtime)
    # two of the four actors had work, 4 s of their own each, and were 6 s at it
    usage = WorkerUsage(wall_s=16.0, start_s=10.0, busy_s=4.0)
    found = found_of(config, (usage, usage, replace(usage, busy_s=0.0)), wall_s=30.0)
    assert found.wall_s.total == pytest.approx(24.0 + 1.5 * max(40 / 4, 20 / 1))  # the one reader is slower


def test_warming_up_answers_the_first_request_twice_and_no_row_has_it(tmp_path) -> None:
    class Slow(fakes.FakeVLM):
        num_steps = 0

        def step(self):
            self.num_steps += 1
            if self.num_steps == 1:
                time.sleep(0.5)  # as a model's first steps do
            return super().step()

    @holds_in_one_of_three
    def attempt(_number) -> None:
        vlm = Slow()
        worker = VLMWorker(config_of(tmp_path, 1), RunInfo("recipe", "run"), vlm=vlm)
        worker.warm_up_first()
        for number in (3, 4):
            item = MediaItem(f"item-{number}", (f"{number}.mp4",), "video", (1,), ("",))
            worker.add(fakes.FakeLoader().load(item), attempts=1, shard_index=0)
        rows = []
        while worker.pending:
            rows += [outcome.row for outcome in worker.step()]
        assert (vlm.num_steps, [row.text for row in rows]) == (3, ["3", "4"])
        usage = worker.usage()
        assert usage.start_s >= 0.5
        assert usage.busy_s == pytest.approx(sum(row.gpu_s for row in rows))
        assert usage.wall_s == pytest.approx(usage.start_s + usage.busy_s + usage.idle_s, rel=0.05)


def test_a_job_stops_at_its_budget_and_the_same_command_goes_on(tmp_path) -> None:
    # Readers' CPU seconds alone are priced: 0.001 s an item of the fake loader, at 36 USD an hour 0.00001 USD.
    prices = {"gpu_hour_usd": 0.0, "cpu_hour_usd": 36.0, "storage_request_usd": 0.0}
    runtime = {"gpus_per_actor": 0, "cpus_per_actor": 0, "max_open_shards": 1}
    config = config_of(tmp_path, 80, prices=prices, runtime=runtime)
    first = run(config, budget=parse_budget("0.0004USD", config))
    assert (first.exit_code, first.budget_spent) == (6, True)
    made = first.stats.num_rows
    assert made == 40
    assert first.num_left == 80 - made
    said = render_summary(first)
    assert "stopped at its budget of $0.0004 for this command, $0.0004 spent; " in said
    assert "40 items begun and finished, 40 of 80 items are left" in said
    assert "the same command resumes" in render_summary(first)
    second = run(config)
    assert (second.exit_code, second.num_done_before, second.stats.num_rows) == (0, made, 80 - made)
    assert violations(tmp_path / "out") == []


def test_a_budget_of_the_run_counts_every_command_that_has_begun_on_it(tmp_path) -> None:
    """Ended, killed, or at work: what each has spent is no longer there for the next."""
    config = config_of(tmp_path, 80, runtime={"max_open_shards": 1})
    first = run(config, budget=parse_budget("0.001s", config))
    assert first.exit_code == 6
    made = first.stats.num_rows
    killed = Session(open_run(config))
    killed.note(Spending(wall_s=3000.0, total_usd=2.0))
    again = run(config, budget=parse_budget("50m/run", config))
    assert (again.exit_code, again.stats.num_rows, again.num_left) == (6, 0, 80 - made)
    assert "stopped at its budget of 3000.0 s for the whole run, 30" in render_summary(again)
    assert "; nothing begun, " in render_summary(again)
    assert run(config, budget=parse_budget("50m", config)).exit_code == 0, "of one command nothing was spent"


def test_what_a_command_spent_that_an_error_ended_counts(tmp_path) -> None:
    def failing(config, run_info) -> VLMWorker:
        worker = costly_worker(config, run_info)

        def step():
            raise PipelineError("the model's device is gone")

        worker.step = step
        return worker

    config = config_of(tmp_path, 4)
    with pytest.raises(PipelineError, match="device is gone"):
        run_job(config, worker_factory=failing, loader_factory=fake_loader)
    [session] = other_sessions(str(tmp_path / "out"))
    assert session.ended
    assert session.spent.wall_s > 0
    assert Budget(1.0, "usd", "run").used_by([session]) == session.spent.total_usd > 0


def test_two_commands_that_both_spend_are_seen(tmp_path, monkeypatch, caplog) -> None:
    config = config_of(tmp_path, 4)
    opened = open_run(config)
    other = Session(opened)
    monkeypatch.setattr(budgets, "LOOK_EVERY_S", 0.0)
    with caplog.at_level("WARNING", logger="pipeline"):
        for text, said in (("1h/run", "--budget counts both"), ("1h", "counts this command alone; /run counts both")):
            began_s = time.perf_counter()
            listed = partial(other_sessions, opened.uri)
            guard = BudgetGuard(config, parse_budget(text, config), RunStats(), began_s=began_s, others=listed)
            other.note(Spending(wall_s=5.0))
            assert guard.allows_more(0)
            assert guard.allows_more(0)
            assert caplog.messages == [], "one that was killed says no more"
            other.note(Spending(wall_s=3000.0, total_usd=0.25))
            assert guard.allows_more(0)
            (message,) = caplog.messages
            assert "another command spends on this run" in message
            assert "3000 s and $0.2500 so far" in message
            assert said in message
            caplog.clear()
            other.note(Spending(wall_s=4000.0))
            assert guard.allows_more(0) is (text == "1h")
            assert caplog.messages == []
            other.note(Spending(wall_s=5.0))


def test_a_command_notes_what_it_has_spent_while_it_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(budgets, "LOOK_EVERY_S", 0.0)
    seen = []

    def noted(session, spent) -> None:
        seen.append(spent)

    monkeypatch.setattr(Session, "note", noted)
    run(config_of(tmp_path, 3))
    assert seen[-1].wall_s > 0
    assert seen[-1].total_usd > 0


def test_an_ample_budget_changes_nothing(tmp_path) -> None:
    config = config_of(tmp_path, 10)
    summary = run(config, budget=parse_budget("2h", config))
    assert (summary.exit_code, summary.budget_spent, summary.num_left) == (0, False, 0)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("25USD", Budget(25, "usd", "command")),
        ("1.5 usd", Budget(1.5, "usd")),
        ("90m", Budget(5400, "s")),
        ("3h/command", Budget(10800, "s")),
        ("3h/run", Budget(10800, "s", "run")),
        ("25 USD / run", Budget(25, "usd", "run")),
    ],
)
def test_budgets_are_money_or_time_of_a_command_or_a_run(tmp_path, text, budget) -> None:
    assert parse_budget(text, config_of(tmp_path, 1)) == budget


@pytest.mark.parametrize("text", ["25", "0USD", "EUR", "-3h", "3 weeks", "3h/night"])
def test_anything_else_is_refused(tmp_path, text) -> None:
    with pytest.raises(ConfigError, match="give money such as 25USD, or time"):
        parse_budget(text, config_of(tmp_path, 1))


def test_money_without_prices_is_refused(tmp_path) -> None:
    config = config_of(tmp_path, 1, prices={"gpu_hour_usd": 0, "cpu_hour_usd": 0, "storage_request_usd": 0})
    with pytest.raises(ConfigError, match="no prices are set"):
        parse_budget("25USD", config)


def test_what_is_in_work_counts_before_it_is_done(tmp_path, monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(budgets, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    stats = RunStats(num_rows=1)
    budget_guard = BudgetGuard(config_of(tmp_path, 1), Budget(200.0, "s"), stats, began_s=0.0)
    assert budget_guard.allows_more(0)  # the first row after 100 s of start-up, which count
    clock[0], stats.num_rows = 190.0, 91  # then one a second
    assert budget_guard.allows_more(9)
    assert not budget_guard.allows_more(10)


def test_one_line_fits_a_cron_mail(tmp_path) -> None:
    config = config_of(tmp_path, 5)
    line = render_line(run(config))
    assert "\n" not in line
    assert "5 of 5 items in" in line
    assert "5 ok, 0 partial, 0 failed; $" in line
    assert line.endswith(str(tmp_path / "out"))
    nightly = config_of(tmp_path, 5, out="next", input={"exclude_runs": str(tmp_path / "out")})
    summary = run(nightly)
    assert summary.exit_code == 0
    assert "nothing new, 5 items were done by earlier runs" in render_line(summary)
