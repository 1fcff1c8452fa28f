"""The Triton kernels: their logic under the interpreter in its own process, and when they or references are chosen."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from illava.attention import backend as kernels
from illava.attention.backend import kernels_on
from illava.decoder.cuda_graphs import DecodeGraphs, bucket_of, can_capture
from illava.errors import ModelLoadError

HERE = Path(__file__).resolve().parents[2] / "support" / "kernels"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _decide_anew(monkeypatch):
    monkeypatch.delenv("ILLAVA_KERNELS", raising=False)


@pytest.mark.long
def test_kernels_under_the_interpreter_are_their_references_and_a_decode_step_is_static():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / "interpreted.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
def test_kernels_compile_without_a_gpu_within_its_shared_memory(capability):
    """A100, A10 and 3090, L4 and 4090, H100 and H200, B200; compiled.py knows how much a block of each may have."""
    command = [sys.executable, HERE / "compiled.py", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    scores = ["_log_sum_exp", *["_sum_received"] * 3]
    layers = ["_add_norm", "_rotate_write", "_greedy_split", "_greedy_join", "_silu_mul"]
    assert [name for name, *_ in compiled] == [*["_attend_split"] * 2, "_join_splits", *scores, *scores, *layers]
    for name, dtype, registers, spilled_bytes, two_byte_loads, _shared_bytes in compiled:
        # four blocks of 128 threads share a multiprocessor's 65,536 registers up to 128 each
        assert name != "_attend_split" or int(registers) <= 128, (name, registers)
        # cards of 8.6 and 8.9 spill a little of what sums scores in float32, in which no card runs a published model
        most = 512 if dtype == "fp32" and capability in (86, 89) else 0
        assert int(spilled_bytes) <= most, (name, dtype)
        assert two_byte_loads == "0", (name, dtype)


def test_kernels_are_chosen_by_capability_and_never_on_cpu_by_themselves(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert (kernels_on(CPU), kernels_on(GPU)) == ("torch", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels_on.cache_clear()
    assert kernels_on(CPU) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    kernels_on.cache_clear()
    assert kernels_on(GPU) == "torch"


def test_what_is_forced_happens_or_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("ILLAVA_KERNELS", "torch")
    assert kernels_on(GPU) == "torch"
    for word, reason in {"triton": "on CPU they run under Triton's interpreter only", "fast": "not one of"}.items():
        monkeypatch.setenv("ILLAVA_KERNELS", word)
        kernels_on.cache_clear()
        with pytest.raises(ModelLoadError, match=reason):
            kernels_on(CPU)
    monkeypatch.setenv("ILLAVA_KERNELS", "triton")
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels_on.cache_clear()
    with pytest.raises(ModelLoadError, match="triton is not installed"):
        kernels_on(GPU)


def test_decode_graphs_are_refused_where_they_cannot_be_captured(monkeypatch):
    assert not can_capture(CPU)
    with pytest.raises(ModelLoadError, match=r"cannot be captured on cpu.*decode_graphs=None"):
        DecodeGraphs(SimpleNamespace(device=CPU), None, None, draw=None, max_batch=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert can_capture(GPU)
    monkeypatch.setenv("ILLAVA_KERNELS", "torch")
    kernels_on.cache_clear()
    assert not can_capture(GPU)  # the reference reads lengths on the host


def test_buckets_cover_every_batch_and_waste_less_than_eight_rows():
    for num_rows in range(1, 31):
        bucket = bucket_of(num_rows, 30)
        assert num_rows <= bucket < num_rows + 8
    assert {bucket_of(n, 30) for n in range(1, 31)} == {1, 2, 4, 8, 16, 24, 30}
