"""The kernels of `ward`: their logic under Triton's interpreter, their compilation, and what one cut asks of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common.stand_in_cuda import DEVICE, StandInCuda
from illava.reducers import Evidence, Ward
from illava.tokens import Tokens, merge, merged_sizes

HERE = Path(__file__).resolve().parents[2] / "support" / "kernels"
MOST_KERNELS = 57  # of a cut: the choice, the means and the sizes; a sort counts once
MOST_OF_A_LONG_SEGMENT = 1200


@pytest.mark.long
def test_the_kernels_under_the_interpreter_are_their_references():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "interpreted_ward.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_without_a_gpu(capability):
    """What it spills are addresses, outside its loops."""
    command = [sys.executable, HERE / "compiled_ward.py", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in compiled] == ["_agglomerate", "_agglomerate", "_contrast"]
    assert all(int(spilled_bytes) <= 64 for _, _, _, spilled_bytes, *_ in compiled), done.stdout


def asked_of_a_gpu(reducer, lengths, stage="vision_block"):
    """The second cut of these shapes, and what is made of it."""
    num_tokens = sum(lengths)
    with StandInCuda() as stand_in, torch.inference_mode():
        hidden_TD = torch.empty(num_tokens, 1152, dtype=torch.bfloat16, device=DEVICE)
        coord_T3 = torch.empty(num_tokens, 3, dtype=torch.long, device=DEVICE)
        score_T, size_T = torch.empty(2, num_tokens, device=DEVICE).unbind()
        evidence = Evidence(attention_received_T=score_T, size_T=size_T)
        for _ in range(2):
            with stand_in.recorded() as work:
                assignment = reducer.assign(Tokens(hidden_TD, lengths, coord_T3), evidence, stage)
                merge(assignment, hidden_TD)
                merged_sizes(assignment, size_T)
    return work


@pytest.mark.parametrize(
    ("reducer", "lengths"),
    [
        (Ward(keep_ratio=0.5, contrast=1), (729,) * 32),
        (Ward(keep_ratio=0.5, contrast=1), (365,) * 32),
        (Ward(keep_ratio=0.25, contrast=1), (196,) * 32),
        (Ward(keep_ratio=0.1), (729,) * 5),
        (Ward(keep_ratio=0.5, alpha=0.5), (729,) * 32),
    ],
    ids=["first cut of ward-video-25", "second cut", "before the LLM", "many rounds", "weighted by attention"],
)
def test_a_cut_is_few_kernels_whatever_its_rounds_and_waits_for_nothing(reducer, lengths):
    """It was 1,212 kernels in 11 rounds, and 2,273 in 22."""
    work = asked_of_a_gpu(reducer, lengths)
    assert work.num_kernels <= MOST_KERNELS + (reducer.alpha > 0), work.kernels
    assert work.kernels["_agglomerate"] == work.kernels["bmm"] == 1
    assert work.kernels["_contrast"] == (reducer.contrast > 0)
    assert work.num_blocking == work.copies == 0, work.blocking


def test_segments_of_several_lengths_pay_for_their_padding_alone():
    work = asked_of_a_gpu(Ward(keep_ratio=0.25, contrast=1), (729, 364, 500))
    assert work.num_kernels <= MOST_KERNELS + 10, work.kernels
    assert work.num_blocking == work.copies == 0, work.blocking


def test_a_segment_of_more_points_than_the_kernel_takes_is_compared_by_blocks():
    work = asked_of_a_gpu(Ward(keep_ratio=0.5), (2304,), "decoder_input")
    assert "_agglomerate" not in work.kernels
    assert work.num_kernels <= MOST_OF_A_LONG_SEGMENT, work.kernels.total()
    assert work.num_blocking == 0, work.blocking
