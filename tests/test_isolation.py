"""That no test finds what another one set: threads, dtype, gradients, environment, folder, seeds, caches."""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from illava.attention.backend import kernels_on
from tests.support.isolation import isolated_process, own_temporary_folder

CPU = torch.device("cpu")


def state():
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
    }


def test_what_a_test_sets_is_put_back(tmp_path):
    os.environ["GIVEN"] = "before"  # put back in its turn by the fixture around this test
    before = state()
    with isolated_process():
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        os.environ["LEFT"] = "behind"
        os.environ["ILLAVA_KERNELS"] = "no such word"
        del os.environ["GIVEN"]
        os.chdir(tmp_path)
        assert all(one != other for one, other in zip(before.values(), state().values(), strict=True))
    assert state() == before
    assert kernels_on(CPU) == "torch"


def test_a_decision_that_was_cached_is_taken_anew(monkeypatch):
    for word in ("torch", "auto"):
        monkeypatch.setenv("ILLAVA_KERNELS", word)
        with isolated_process():
            assert kernels_on.cache_info().currsize == 0
            kernels_on(CPU)
        assert kernels_on.cache_info().currsize == 0


def test_every_test_draws_the_same_numbers():
    drawn = []
    for _ in range(2):
        with isolated_process():
            drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]


def test_hypothesis_draws_the_same_examples_and_asks_for_no_seconds():
    drawn = []

    @given(st.integers())
    def slow_once(number):
        if not drawn:
            time.sleep(0.3)  # longer than Hypothesis allows by itself
        drawn.append(number)

    slow_once()
    first = drawn.copy()
    drawn.clear()
    slow_once()
    assert drawn == first


def test_every_test_is_isolated(request):
    assert "_isolated_process" in request.fixturenames


def test_every_process_of_tests_has_a_temporary_folder_of_its_own():
    """Else a test that counts what is left behind finds what another process's test is just using."""
    command = [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"]
    folder = tempfile.gettempdir()
    assert folder == os.environ["TMPDIR"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == folder
    with own_temporary_folder() as other:
        assert other != Path(folder)
        assert tempfile.gettempdir() == str(other)
    assert not other.exists()
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == folder
