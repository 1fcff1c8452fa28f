"""Out of memory in a batch: halved, remembered, finished; a single request too large is that one's error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from illava.engine.oom_backoff import OOMBackoff
from illava.errors import RequestError, is_out_of_memory
from illava.plan import EMPTY_PLAN
from illava.preprocess import VisualInput
from illava.requests import Request
from tests.support.media.clips import barcode_frame
from tests.support.models.misbehaving_models import SmallDeviceVLM
from tests.support.runs import fakes

SIDE = 56
ITEM_BYTES = SIDE * SIDE * 3


def request(value: int, *, side: int = SIDE) -> Request:
    frame = barcode_frame(value, 0, width=side, height=side)
    return Request(f"item-{value}", (VisualInput("video", np.stack([frame]), frame.shape[:2]), "What?"))


def run_all(batch: OOMBackoff, requests) -> dict:
    """Error or text by id; every request ends exactly once."""
    for one in requests:
        batch.submit(one)
    ended = []
    for _ in range(10_000):
        if not batch.has_work:
            break
        ended += batch.step()
    assert len({generation.request_id for generation in ended}) == len(ended) == len(requests)
    return {generation.request_id: generation for generation in ended}


def test_a_batch_too_large_is_halved_until_it_fits_and_the_limit_is_remembered() -> None:
    vlm = SmallDeviceVLM(fits=5 * ITEM_BYTES)
    batch = OOMBackoff(vlm, EMPTY_PLAN)
    first = run_all(batch, [request(n) for n in range(32)])
    assert {name: one.text for name, one in first.items()} == {f"item-{n}": str(n) for n in range(32)}
    assert (batch.limit, vlm.num_failed, vlm.most_inside) == (4, 3, 4)
    run_all(batch, [request(n) for n in range(100, 132)])
    assert vlm.num_failed == 3, "no second lesson"


def test_a_request_too_large_alone_is_its_own_error_and_does_not_slow_the_others() -> None:
    vlm = SmallDeviceVLM(fits=10 * ITEM_BYTES)
    batch = OOMBackoff(vlm, EMPTY_PLAN)
    ended = run_all(batch, [request(n, side=4 * SIDE if n == 5 else SIDE) for n in range(8)])
    failed = {name: generation.error for name, generation in ended.items() if generation.error}
    assert list(failed) == ["item-5"]
    assert isinstance(failed["item-5"], MemoryError)
    assert "even alone" in str(failed["item-5"])
    assert batch.limit is None, "it alone had lowered the limit"
    assert vlm.most_inside >= 2


def test_both_at_once() -> None:
    vlm = SmallDeviceVLM(fits=3 * ITEM_BYTES)
    batch = OOMBackoff(vlm, EMPTY_PLAN)
    ended = run_all(batch, [request(n, side=4 * SIDE if n in (2, 11) else SIDE) for n in range(16)])
    assert {name for name, generation in ended.items() if generation.error} == {"item-2", "item-11"}
    assert vlm.most_inside == 3 or batch.limit in (1, 2, 3)


def test_what_was_lost_is_nobodys_device_time_and_the_wait_is_the_items() -> None:
    vlm = SmallDeviceVLM(fits=2 * ITEM_BYTES, sleeps={"decode_s": 0.02})
    batch = OOMBackoff(vlm, EMPTY_PLAN)
    ended = run_all(batch, [request(n) for n in range(6)])
    assert sum(one.timing.device_s for one in ended.values()) == pytest.approx(batch.busy_s)
    last = max(one.timing.queue_s for one in ended.values())
    assert last >= 4 * 0.02, "it waited outside while others were inside"


def test_other_errors_are_not_mistaken_for_it() -> None:
    class Broken(fakes.FakeVLM):
        def step(self):
            raise RuntimeError("CUDA error: device-side assert triggered")

    batch = OOMBackoff(Broken(), EMPTY_PLAN)
    batch.submit(request(1))
    with pytest.raises(RuntimeError, match="device-side"):
        batch.step()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_how_it_is_recognised(error, expected) -> None:
    assert is_out_of_memory(error) is expected


def raised_while_a_capture_ended(words: str, reason: Exception) -> RuntimeError:
    """As `torch.cuda.graph` leaves its block: memory runs out within, then ending the capture fails, too."""

    class Capture:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise RuntimeError(words)

    try:
        with Capture():
            raise reason
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("words", "reason", "expected"),
    [
        ("CUDA error: operation failed due to a previous error during capture", torch.OutOfMemoryError("full"), True),
        ("CUDA error: capturing stream has unjoined work", RuntimeError("CUDA error: out of memory"), True),
        ("CUDA error: operation failed due to a previous error during capture", RuntimeError("no kernel image"), False),
        ("CUDA error: device-side assert triggered", torch.OutOfMemoryError("full"), False),
    ],
)
def test_out_of_memory_within_a_capture_is_recognised_by_what_the_failed_capture_follows(words, reason, expected):
    assert is_out_of_memory(raised_while_a_capture_ended(words, reason)) is expected
    assert not is_out_of_memory(RuntimeError(words)), "nothing says why"


def test_a_request_refused_late_is_an_answer_and_abandoning_forgets_all() -> None:
    class Picky(SmallDeviceVLM):
        def submit(self, one, *, plan=None) -> None:
            if one.request_id == "item-3":
                raise RequestError("not this one")
            super().submit(one, plan=plan)

    batch = OOMBackoff(Picky(fits=2 * ITEM_BYTES), EMPTY_PLAN)
    run_all(batch, [request(n) for n in range(10, 14)])
    assert batch.limit == 2
    ended = run_all(batch, [request(n) for n in range(5)])
    assert {name for name, one in ended.items() if one.error} == {"item-3"}
    for n in range(5):
        batch.submit(request(n)) if n != 3 else None
    batch.reset()
    assert not batch.has_work


def test_an_abandoned_batch_leaves_no_limit_of_which_nobody_knows_who_had_lowered_it() -> None:
    """One request too large alone: had it been seen alone, the limit would be gone; had all fitted, it would stay."""
    vlm = SmallDeviceVLM(fits=10 * ITEM_BYTES)
    batch = OOMBackoff(vlm, EMPTY_PLAN)
    for n in range(8):
        batch.submit(request(n, side=4 * SIDE if n == 5 else SIDE))
    batch.step()
    assert batch.limit == 4
    batch.reset()
    assert batch.limit is None
    run_all(batch, [request(n) for n in range(10, 18)])
    assert (vlm.num_failed, vlm.most_inside) == (1, 8)
