"""Fixtures shared by both packages' tests, and the process as every test finds it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.isolation import isolated_process, own_temporary_folder
from tests.support.models.onevision import make_onevision

# Ray reads its token once a process and keeps it: one for all tests. Given none, it leaves one in the home folder.
os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
# ``dtype: auto``, and the products of bfloat16, are the same whatever processor the suite runs on.
os.environ["ILLAVA_NATIVE_BFLOAT16"] = "0"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one of pytest-xdist's processes; those that start a Ray cluster share the group "ray"."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory):
    tmp_path_factory.getbasetemp()  # kept where pytest looks for the last three
    with own_temporary_folder():
        yield


@pytest.fixture(autouse=True)
def _isolated_process(_own_temporary_folder):
    with isolated_process():
        yield


@pytest.fixture(scope="session")
def onevision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA-OneVision (7 x 7 patches, 8 vision blocks, 4 decoder layers), built once a session."""
    return make_onevision(tmp_path_factory.mktemp("onevision"))
