"""What belongs to the whole process is the same before every test, whichever ran before it."""

from __future__ import annotations

import csv
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, settings

from illava.attention import packed as attention
from illava.attention.backend import check_cudnn, kernels_on
from illava.devices import has_native_bfloat16

# A shell that puts the suite into the background lets it ignore SIGINT, and so all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: more threads than cores wait for each other
    torch.set_num_threads(1)
# Hypothesis draws the same examples each time, and asks for no seconds: by itself an example that takes 0.2 s, or ten
# that take 1 s to draw, fail a test, as a busy machine or one pass of the garbage collector makes them.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
_NUM_THREADS = torch.get_num_threads()
_CSV_FIELD_CHARS = csv.field_size_limit()
# They keep what was read from the environment or tried on the device; all other caches hold what depends on nothing.
_CACHES = (kernels_on, check_cudnn, attention._varlen_arguments, has_native_bfloat16)


@contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """Points TMPDIR at a folder of this process alone: what a test finds there, no other process has left.

    Its path is short, since Ray's sockets stand below it and a socket's path may have 107 characters.
    """
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = None
            del os.environ["TMPDIR"]
            if before is not None:
                os.environ["TMPDIR"] = before


@contextmanager
def isolated_process() -> Iterator[None]:
    """Seeds the shared generators and forgets what was cached; at the end puts back all that may have been set.

    A job that runs in the test's process sets the threads of its model, and a local Ray cluster the environment; the
    number of threads alone moves last digits in whatever test comes next.
    """
    environment, folder = dict(os.environ), Path.cwd()
    _forget()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_num_threads(_NUM_THREADS)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        csv.field_size_limit(_CSV_FIELD_CHARS)
        os.chdir(folder)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        _forget()


def _forget() -> None:
    for cache in _CACHES:
        cache.cache_clear()
