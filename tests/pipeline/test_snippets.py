"""Tests that the snippets of README and docs read a run on a disk and on S3, however its address is written.

Takes 8 s of the five minutes.
"""

from __future__ import annotations

import re

import pytest

from pipeline.inspection.status import run_status
from pipeline.runs.run import open_run
from pipeline.storage import storage
from pipeline.storage.uris import without_extra_slashes
from tests.support.docs_pages import ROOT, blocks
from tests.support.runs.run_folders import complete, put_media

READING = [block for block in blocks("python") if block.mark == "finished-run"]


@pytest.fixture
def run(config, root):
    """A finished run whose ``output.uri`` has slashes too many."""
    put_media(storage.join(root, "in"), 6)
    opened = open_run(config(input={"uri": storage.join(root, "in")}, output={"uri": f"{root}//captions//night/"}))
    complete(opened)
    return opened


def test_the_snippets_read_a_run_on_either_store(run, root, capsys):
    assert run.uri == storage.join(root, "captions", "night"), "the address that the summary prints"
    assert len(READING) >= 6
    for block in READING:
        names = {"RUN": run.uri, "__name__": "snippet"}
        exec(compile(block.text, block.where, "exec", dont_inherit=True), names)
        assert len(names["rows"]) == 6, block.where
    [inline] = re.findall(r"`(pandas\.read_parquet\(\"runs/first/data\"\))`", (ROOT / "README.md").read_text("utf-8"))
    import pandas

    assert len(eval(inline.replace("runs/first", run.uri), {"pandas": pandas})) == 6


def test_an_address_has_one_normal_form_wherever_it_is_given(config, run, root):
    for written in (f"{root}/captions/night", f"{root}/captions//night/", f"{root}/./captions/night//"):
        assert open_run(config(input={"uri": storage.join(root, "in")}, output={"uri": written})).resumed
        assert run_status(written).uri == run.uri
    assert storage.list_names(storage.join(root, "captions")) == ["night/"]


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("s3://bucket/a/", "s3://bucket/a"),
        ("s3://bucket//a//b//", "s3://bucket/a/b"),
        ("s3://bucket/", "s3://bucket"),
        ("gs://bucket/./a/.", "gs://bucket/a"),
        ("/a//b/", "/a/b"),
        ("file:///a/b/", "/a/b"),
        ("runs/first/", "runs/first"),
        ("./runs//first", "runs/first"),
        (".", "."),
        ("/", "/"),
        ("file://runs/first", "file://runs/first"),  # refused later, in words
    ],
)
def test_the_normal_form(config, written, normal):
    assert without_extra_slashes(written) == normal == without_extra_slashes(normal)
    assert config(output={"uri": written}).output.uri == normal
