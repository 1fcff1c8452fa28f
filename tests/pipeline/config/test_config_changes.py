"""One changed key of a job, for every key there is: what can change a row is refused by name, all else resumes."""

from __future__ import annotations

import json
import re

import pytest

from pipeline.errors import RefusedError
from pipeline.runs.run import open_run
from pipeline.storage import storage
from tests.support.runs.config_changes import (
    EXECUTION_VALUES,
    KINDS,
    ROWS_VALUES,
    config_with,
    leaves,
    with_another_value,
)
from tests.support.runs.run_folders import complete

LEAVES = list(leaves())
ROWS = [leaf for leaf in LEAVES if leaf.affects == "rows"]
ANOTHER_RUN = {"output.uri", "output.items_per_shard"}  # where a run stands, and what it is cut into
EXECUTION = [leaf for leaf in LEAVES if leaf not in ROWS and leaf.key not in ANOTHER_RUN]


@pytest.fixture
def folder(tmp_path):
    """Three pictures, each with a question: items for every task. The manifest is there twice."""
    lines = []
    for number in range(3):
        storage.write_atomic(str(tmp_path / f"{number}.png"), b"x" * (100 + number))
        lines.append(json.dumps({"uri": str(tmp_path / f"{number}.png"), "question": "What?"}))
    for name in ("items.jsonl", "copy.jsonl"):
        (tmp_path / name).write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def config_of(model_folder, folder):
    source, output = {"manifest": f"{folder}/items.jsonl"}, {"uri": f"{folder}/out"}
    return lambda leaf: config_with(model_folder, leaf, input=source, output=output)


def test_every_key_has_another_value_and_there_is_none_without_a_key() -> None:
    """A key declared as what it is not would stand in the other table."""
    assert {leaf.key for leaf in ROWS} == ROWS_VALUES.keys() | {f"{section}.kind" for section in KINDS}
    assert {leaf.key for leaf in LEAVES} - {leaf.key for leaf in ROWS} == EXECUTION_VALUES.keys()
    assert {leaf.owner for leaf in LEAVES} >= {owner for kinds in KINDS.values() for owner in kinds}


@pytest.mark.parametrize("leaf", ROWS, ids=str)
def test_what_can_change_a_row_is_refused_by_name_with_both_values(config_of, folder, leaf) -> None:
    config = config_of(leaf)
    complete(open_run(config))  # a run without a part would be taken over
    with pytest.raises(RefusedError, match=rf"\n  {re.escape(leaf.key)}: .* there, .* here\n") as caught:
        open_run(with_another_value(config, leaf, folder))
    assert caught.value.exit_code == 4
    assert "Choose a new output.uri" in str(caught.value)


@pytest.mark.parametrize("leaf", EXECUTION, ids=str)
def test_what_only_affects_execution_resumes(config_of, folder, leaf) -> None:
    config = config_of(leaf)
    changed = with_another_value(config, leaf, folder)
    assert changed != config
    first, again = open_run(config), open_run(changed)
    assert again.resumed
    assert (again.fingerprint, again.config_fingerprint.digest) == (first.fingerprint, first.config_fingerprint.digest)


def test_another_shard_size_is_refused_by_name_and_another_folder_is_another_run(config_of, folder) -> None:
    where, size = (next(leaf for leaf in LEAVES if leaf.key == key) for key in ("output.uri", "output.items_per_shard"))
    config = config_of(size)
    complete(open_run(config))
    with pytest.raises(RefusedError, match=r"output.items_per_shard: 4 there, 5 here"):
        open_run(with_another_value(config, size, folder))
    assert not open_run(with_another_value(config, where, folder)).resumed
