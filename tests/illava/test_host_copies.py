"""Numbers brought to a device: nothing waits there, and counts that come again are copied once."""

import warnings

import numpy as np
import torch

from benchmarks.common.stand_in_cuda import DEVICE, StandInCuda
from illava.host_copies import array_on, constant_on, on_device, to_device

CPU = torch.device("cpu")


def test_nothing_waits_and_a_constant_is_copied_once():
    with StandInCuda(values=True) as device, device.recorded() as work:
        first = constant_on((3, 1), DEVICE)
        assert constant_on([3, 1], DEVICE) is first
        there = on_device([1.5], DEVICE), to_device(torch.arange(2), DEVICE), to_device(first, DEVICE)
        assert all(value.is_cuda for value in there)
        assert (work.num_blocking, work.copies) == (0, 3)
        assert first.cpu().tolist() == [3, 1]


def test_a_read_only_array_is_taken_without_a_warning():
    array = np.arange(3)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert array_on(array, CPU).tolist() == [0, 1, 2]


def test_numbers_of_one_value_and_two_types_are_two_constants():
    assert constant_on((1, 2), CPU).dtype == torch.int64
    assert constant_on((1.0, 2.0), CPU).dtype == torch.float32
    assert constant_on((), CPU).dtype == torch.int64
    assert constant_on((1, 2), CPU, torch.int32).dtype == torch.int32
