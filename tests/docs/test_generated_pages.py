"""Pages and tables that are made from code or from result files say what these say now."""

from __future__ import annotations

import pytest
import yaml

from benchmarks.tables import readme_tables
from docs import generate
from docs.generators import configuration, errors, parsers, rows
from pipeline.config.schema import JobConfig
from pipeline.records import ROW_ERROR_TYPES
from tests.support.docs_pages import ROOT

# Made from tiny models of every family: tests/illava/families/test_family_matrix.py holds it, cell by cell.
SLOW_TABLES = {"families"}


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_generated_page_says_what_the_code_says(name) -> None:
    """Else run: python docs/generate.py --write."""
    assert (ROOT / name).read_text("utf-8") == generate.PAGES[name]()


@pytest.mark.parametrize("name", readme_tables.PAGES)
def test_tables_are_those_of_the_result_files(name) -> None:
    """Else run: python benchmarks/tables/readme_tables.py --write."""
    text = (ROOT / name).read_text("utf-8")
    assert readme_tables.rendered(name, text, without=SLOW_TABLES) == text


def test_a_column_without_a_text_is_named(monkeypatch) -> None:
    group = dict(rows.GROUPS["What came out"])
    del group["score"]
    monkeypatch.setitem(rows.GROUPS, "What came out", group)
    with pytest.raises(SystemExit, match="score"):
        rows.page()


def test_a_text_that_calls_a_column_never_null_is_held_to_the_schema(monkeypatch) -> None:
    group = rows.GROUPS["What came out"]
    monkeypatch.setitem(rows.GROUPS, "What came out", group | {"score": group["score"]._replace(empty="never")})
    with pytest.raises(SystemExit, match="score is nullable=True"):
        rows.page()


def test_an_error_type_without_a_text_is_named(monkeypatch) -> None:
    monkeypatch.setattr(errors, "ROW_ERROR_TYPES", (*ROW_ERROR_TYPES, "new_error"))
    with pytest.raises(SystemExit, match="new_error"):
        errors.page()


def test_a_key_without_a_meaning_is_named(monkeypatch) -> None:
    meanings = {key: text for key, text in configuration.MEANINGS.items() if key != ("JobConfig", "seed")}
    meanings.pop(("PricesConfig", "gpu_hour_usd"))
    monkeypatch.setattr(configuration, "MEANINGS", meanings)
    with pytest.raises(SystemExit, match="gpu_hour_usd"):
        configuration.page()


def test_an_example_has_every_key_of_its_section() -> None:
    """`tests/docs/test_examples.py` validates it, as every block of a page."""
    for key, text in configuration.EXAMPLES.items():
        section, name = dict(configuration.sections(JobConfig))[key], key.partition(":")[0]
        given = {one for example in yaml.safe_load_all(text) for one in example[name]}
        assert given == section.model_fields.keys()
    for key, texts in configuration.ALTERNATIVES.items():
        section, (outer, inner) = dict(configuration.sections(JobConfig))[key], key.split(".")
        found = [name for text in texts for name in yaml.safe_load(text)[outer][inner]]
        assert found == list(section.model_fields)


def test_a_parser_is_taken_as_the_command_builds_it() -> None:
    job = parsers.parser_of_script("jobs/caption_videos.py")
    assert job.parse_args(["--config", "x.yaml", "--budget", "3h"]).budget == "3h"
    with pytest.raises(SystemExit):
        job.parse_args(["--config", "x.yaml", "--no-such-flag"])
    assert "retry" in parsers.parser_of_module("pipeline").format_help()
