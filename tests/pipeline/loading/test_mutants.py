"""Tests mutants of media in whole runs: benchmarks/reliability/fuzz_media.py, which replays a failing seed."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from benchmarks.reliability import fuzz_media, media_mutants
from pipeline.records import ROW_ERROR_TYPES
from tests.support.runs import fakes


def check(seeds, folder) -> None:
    before = set(psutil.Process().children())
    outcome = fuzz_media.play_all(seeds, folder)
    replay = "replay: python benchmarks/reliability/fuzz_media.py --seeds SEED --keep FOLDER"
    assert not outcome.violations, "\n".join([*outcome.violations, replay])
    assert outcome.results.total() == len(seeds)
    assert set(outcome.results) <= {"ok", "partial", *ROW_ERROR_TYPES} - {"internal_error"}
    assert set(psutil.Process().children()) <= before, "no child is left"


def test_sixty_mutants_have_their_rows(tmp_path) -> None:
    check(range(60), tmp_path)


def test_mutants_that_once_found_a_defect_have_their_rows(tmp_path) -> None:
    check([116, 1265, 1588, 2785, 4543, 8513], tmp_path)


@pytest.mark.long
def test_a_thousand_mutants_have_their_rows(tmp_path) -> None:
    check(range(1000), tmp_path)


@pytest.mark.xdist_group("ray")
@pytest.mark.long
def test_on_ray_no_mutant_ends_a_reader_or_the_driver(tmp_path) -> None:
    outcome = fuzz_media.play(range(60), tmp_path, "ray")
    assert outcome.violations == []
    assert outcome.num_deaths == {"reader": 0, "vlm": 0, "driver": 0}
    assert outcome.results.total() == 60


def test_a_seed_is_the_same_mutant_wherever_it_is_played() -> None:
    assert media_mutants.mutant(30) == media_mutants.mutant(30)
    different = {media_mutants.mutant(seed)[1] for seed in range(60)}
    assert len(different) == 60
    assert not different & set(media_mutants.originals().values())
    assert {media_mutants.mutant(seed)[0] for seed in range(200)} == {
        Path(name).suffix for name in media_mutants.originals()
    }


def test_a_lost_row_and_a_defect_are_found(tmp_path, monkeypatch) -> None:
    read_rows = fakes.read_rows

    def spoiled(output):
        _, second, *rest = read_rows(output)
        return [{**second, "status": "failed", "error_type": "internal_error", "error_message": "made up"}, *rest]

    monkeypatch.setattr(fakes, "read_rows", spoiled)
    found = fuzz_media.play(range(4), tmp_path / "spoiled").violations
    assert found == ["seed 0: no row", "seed 1: made up"]


def test_a_run_that_dies_is_found(tmp_path, monkeypatch) -> None:
    def died(*_, **__):
        raise RuntimeError("the reader is gone")

    monkeypatch.setattr(fuzz_media, "run_job", died)
    assert fuzz_media.play(range(2), tmp_path).violations == [
        "seeds 0..1: the run died of RuntimeError: the reader is gone"
    ]
