"""Every phase before the first row is said, ends in bounded time and is open to signals. About 5 s."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.errors import ClusterError
from pipeline.execution.ray import joining
from pipeline.execution.ray.joining import Joining, check_listens
from pipeline.execution.runner import run_job
from pipeline.execution.signals import Interruption
from pipeline.exit_codes import Terminated, guarded
from pipeline.phases import phase
from pipeline.storage import storage
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config, numbered_items, read_rows, violations
from tests.support.timing import holds_in_one_of_three

ROOT = Path(__file__).resolve().parents[3]
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
CODES = pytest.mark.parametrize(("number", "exit_code"), SIGNALS)


def taken_port() -> socket.socket:
    """A port that is bound, and on which nobody listens."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    return bound


@pytest.fixture
def no_ray(monkeypatch):
    """As in a command that has not imported Ray yet."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)


def test_a_port_where_nobody_listens_is_told_at_once_with_three_ways_out(no_ray, monkeypatch) -> None:
    with taken_port() as bound:
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        for written in (address, f"ray://{address}"):
            monkeypatch.setenv("RAY_ADDRESS", written)
            with pytest.raises(ClusterError) as caught:
                check_listens()
            for words in (written, "refused", "ray status", "unset RAY_ADDRESS", "runtime.executor=local"):
                assert words in str(caught.value)


def test_a_host_that_is_not_known_is_told_as_well(no_ray, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "no-such-host.invalid:6379")
    with pytest.raises(ClusterError, match=r"no-such-host\.invalid:6379 \(RAY_ADDRESS\)"):
        check_listens()


@pytest.mark.parametrize("address", ["auto", "local", None])
def test_an_address_without_a_port_is_left_to_ray(no_ray, monkeypatch, address) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address) if address else monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_listens()


def test_what_never_answers_is_given_up_in_time() -> None:
    answered, one = threading.Event(), Joining()
    with pytest.raises(ClusterError, match=r"no answer within 0\.4 s"):
        one.call(answered.wait, timeout_s=0.4)
    answered.set()
    assert joining.REACH_S == 30.0


@CODES
def test_a_signal_ends_it_although_the_call_goes_on(number, exit_code) -> None:
    answered = threading.Event()

    def hangs() -> None:
        os.kill(os.getpid(), number)
        answered.wait()

    assert guarded(lambda: Joining().call(hangs, timeout_s=60.0) or 0, debug=False) == exit_code
    answered.set()


def test_a_call_s_own_error_is_raised_and_a_good_one_keeps_its_thread_until_the_end() -> None:
    def breaks() -> None:
        raise OSError("from within")

    with pytest.raises(OSError, match="from within"):
        Joining().call(breaks, timeout_s=60.0)
    one, made_on = Joining(), []
    one.call(lambda: made_on.append(threading.current_thread()), timeout_s=60.0)
    assert made_on[0].is_alive(), "processes that the call started end with their thread"
    one.close()
    made_on[0].join(60)
    assert not made_on[0].is_alive()


@pytest.mark.long
def test_a_silent_cluster_is_open_to_a_signal_in_a_process_of_its_own(tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-m", "pipeline", "caption", "--config", "configs/demo.yaml"]
        command += ["--set", f"output.uri={tmp_path}/out"]
        environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{server.getsockname()[1]}"}
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        line = driver.stderr.readline()
        while "reaching the Ray cluster" not in line:
            line = driver.stderr.readline()
            assert line, "it ended before it tried"
        driver.send_signal(signal.SIGTERM)
        _, rest = driver.communicate(timeout=60)
    assert driver.returncode == 143
    assert "interrupted by SIGTERM; the same command resumes" in rest
    assert not (tmp_path / "out").exists()


@CODES
def test_a_signal_while_the_model_is_loaded_ends_the_command(tmp_path, number, exit_code, capsys) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 3))

    def is_interrupted(config, run_info):
        signal.raise_signal(number)
        raise AssertionError("deaf while the model is loaded")

    assert guarded(lambda: run_job(config, worker_factory=is_interrupted).exit_code, debug=False) == exit_code
    assert f"interrupted by {number.name}; the same command resumes" in capsys.readouterr().err
    done = run_job(config, worker_factory=fakes.barcode_worker, loader_factory=fakes.fake_loader)
    assert (done.exit_code, len(read_rows(tmp_path / "out"))) == (0, 3)
    assert violations(tmp_path / "out") == []


@CODES
def test_a_signal_while_the_input_is_listed_ends_the_command(tmp_path, number, exit_code, monkeypatch, capsys) -> None:
    def is_interrupted(uri, pattern):
        signal.raise_signal(number)
        raise AssertionError("deaf while objects are listed")

    monkeypatch.setattr(storage, "list_split", is_interrupted)
    config = job_config(tmp_path / "out", {"uri": str(tmp_path)})
    assert guarded(lambda: run_job(config).exit_code, debug=False) == exit_code
    assert "the same command resumes" in capsys.readouterr().err


def test_the_handler_of_sigterm_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert guarded(lambda: 0, debug=False) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_within_the_loop_the_first_signal_is_remembered_and_the_second_raises() -> None:
    with Interruption() as interruption:
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        assert interruption.signal is None
        interruption.loop_began()
        signal.raise_signal(signal.SIGTERM)
        assert interruption.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_long_phase_is_said_and_said_again_and_a_short_one_is_not(caplog) -> None:
    caplog.set_level(logging.INFO)
    with phase("listing a short folder"):
        pass
    said = threading.Event()

    class Seen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("still"):
                said.set()

    logging.getLogger("pipeline").addHandler(seen := Seen())
    try:
        with phase("listing a long one", after_s=0.01, every_s=0.01):
            assert said.wait(60)
        assert not [thread for thread in threading.enumerate() if thread.name == "phase"], "all is said by now"
    finally:
        logging.getLogger("pipeline").removeHandler(seen)
    assert caplog.messages[0] == "listing a long one"
    assert caplog.messages[1].startswith("still listing a long one, for")
    assert not any("short" in message for message in caplog.messages)


def test_the_phases_of_a_local_run_are_said_before_its_rows(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 3))
    run_job(config, worker_factory=fakes.barcode_worker, loader_factory=fakes.fake_loader)
    assert any(message.startswith("loading the model") for message in caplog.messages)


def test_no_progress_line_of_the_hub_s_or_of_transformers_is_shown() -> None:
    code = (
        "from pipeline.exit_codes import guarded\n"
        "def shown():\n"
        "    from huggingface_hub.utils import are_progress_bars_disabled\n"
        "    return 0 if are_progress_bars_disabled() else 9\n"
        "raise SystemExit(guarded(shown, debug=False))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 0


def test_an_address_where_nobody_listens_takes_seconds(no_ray, monkeypatch) -> None:
    import time

    with taken_port() as bound:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{bound.getsockname()[1]}")

        @holds_in_one_of_three
        def attempt(_number) -> None:
            began_s = time.monotonic()
            with pytest.raises(ClusterError):
                check_listens()
            assert time.monotonic() - began_s < 5
