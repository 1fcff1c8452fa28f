"""The stand-in for a CUDA device: it refuses what a GPU refuses, counts what waits, and tells the truth if asked to."""

import numpy as np
import pytest
import torch

from benchmarks.common.stand_in_cuda import DEVICE, StandInCuda
from illava.families.side_copies import SideCopies


@pytest.fixture(params=[False, True], ids=["shapes", "values"])
def stand_in(request):
    with StandInCuda(values=request.param) as device:
        yield device


def test_tensors_of_two_devices_are_refused(stand_in):
    there = torch.arange(3, device=DEVICE)
    assert there.is_cuda
    assert there.device == DEVICE
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
        there + torch.arange(3)
    assert (there + torch.tensor(1)).is_cuda  # a number may lie on the host


def test_products_of_two_dtypes_are_refused(stand_in):
    there = torch.ones(2, 2, device=DEVICE)
    with pytest.raises(RuntimeError, match="dtype"):
        there @ there.bfloat16()


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: torch.tensor([1, 2], device=DEVICE),
        lambda x: torch.ones(2).to(DEVICE),
        lambda x: x.new_tensor([1.0]),
        lambda x: x[[0, 1]],
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: (x > 0).nonzero(),
        lambda x: x.copy_(torch.ones(4)),
    ],
    ids=["list", "to", "new_tensor", "list index", "cpu", "tolist", "bool", "nonzero", "copy_"],
)
def test_what_waits_is_counted_once(stand_in, asks):
    there = torch.ones(4, device=DEVICE)
    with stand_in.recorded() as work:
        asks(there)
    assert work.num_blocking == 1


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: torch.ones(4).to(DEVICE, non_blocking=True),
        lambda x: torch.full((4,), 2.0, device=DEVICE),
        lambda x: x[1:3] + x[0] * 2.0,
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.long, device=DEVICE), output_size=4),
    ],
    ids=["non_blocking", "full", "slices", "repeats of known size"],
)
def test_what_does_not_wait_is_not(stand_in, asks):
    there = torch.ones(4, device=DEVICE)
    with stand_in.recorded() as work:
        asks(there)
    assert work.num_blocking == 0


def test_views_are_no_kernels_and_bytes_are_what_lies_in_memory(stand_in):
    there = torch.ones(4, 8, device=DEVICE)
    with stand_in.recorded() as work:
        there.view(8, 4).t()[:2].expand(3, 2, 8).split(1)
    assert work.num_kernels == 0
    with stand_in.recorded() as work:
        there + there[:1].expand(4, 8)
    assert (work.num_kernels, work.elementwise_bytes) == (1, (32 + 8 + 32) * 4)
    with stand_in.recorded() as work:
        torch.nn.functional.linear(there, there)
    assert (work.num_kernels, work.elementwise_bytes) == (1, 0)


def test_with_values_what_is_read_back_is_the_truth():
    with StandInCuda(values=True) as device:
        module = device.to_device(torch.nn.Linear(2, 2))
        given = torch.tensor([[1.0, 2.0]])
        with torch.inference_mode():
            there = module(given.to(DEVICE))
        assert there.is_cuda
        there[:, 0] = 7
        told = there.cpu()
    assert told[0, 0] == 7
    assert torch.equal(told[0, 1], (given @ module.weight.twin.T + module.bias.twin)[0, 1])
    assert torch.arange(3)[1:].tolist() == [1, 2]  # the host is as it was


def test_what_another_stream_made_is_waited_for_and_recorded(stand_in):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        there = torch.ones(4).to(DEVICE, non_blocking=True)
        done = side.record_event()
        there.add(1)  # on its own stream it may be read at once
        later = torch.ones(4).to(DEVICE, non_blocking=True)
    with pytest.raises(RuntimeError, match="not waited for"):
        there.add(1)
    torch.cuda.current_stream().wait_event(done)
    with pytest.raises(RuntimeError, match="record_stream"):
        there.add(1)
    there.record_stream(torch.cuda.current_stream())
    there.add(1).add(1)
    later.record_stream(torch.cuda.current_stream())
    with pytest.raises(RuntimeError, match="not waited for"):  # it was made behind the event
        later.add(1)


@pytest.mark.parametrize("taken", [True, False])
def test_pixels_are_copied_ahead_on_a_stream_of_their_own(stand_in, taken):
    copies, arrays = SideCopies(DEVICE), [np.full((2, 3), n, np.uint8) for n in range(3)]
    with stand_in.recorded() as work:
        copies.begin(arrays[:2])
    assert (work.copies, work.side_copies, work.num_blocking) == (2, 2, 0)
    with stand_in.recorded() as work:
        copies.begin(arrays[1:] if taken else arrays[2:])  # one is there already; what is not asked for any more goes
        there = [copies.take(array) + 0 for array in arrays]
    assert (work.copies, work.side_copies, work.num_blocking) == ((2, 1, 0) if taken else (3, 1, 0))
    if stand_in.values:
        assert [int(value.cpu()[0, 0]) for value in there] == [0, 1, 2]
    assert not copies._begun
