"""`ray job submit --working-dir .` from a clean clone, on a cluster of our own that is ended by pid."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipeline.execution import rows
from tests.support.runs.fakes import read_rows, violations

pytestmark = pytest.mark.xdist_group("ray")  # one local cluster at a time

ROOT = Path(__file__).resolve().parents[3]
RAY = str(Path(sys.executable).with_name("ray"))
MAX_UPLOAD_BYTES = 20_000_000


def _free_ports(count: int) -> list[int]:
    """Return ports below those that the system hands out by itself: no other process gets one before Ray binds it."""
    first_handed_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = []
    for port in random.Random(os.getpid()).sample(range(first_handed_out - 8192, first_handed_out), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports[:count]


@pytest.fixture
def ray_folder():
    """A short path: Ray's sockets stand in it, and a socket's path may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(ray_folder):
    """Environment of a client of a one-machine cluster with two CPUs and a token."""
    (ray_folder / "token").write_text(secrets.token_hex(32))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(ray_folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # off, it listens on loopback only
    }
    gcs, dashboard, agent, grpc, client = _free_ports(5)
    options = {
        "port": gcs,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": grpc,
        "ray-client-server-port": client,
        "dashboard-host": "127.0.0.1",
        "node-ip-address": "127.0.0.1",
        "temp-dir": ray_folder / "t",
        "num-cpus": 2,
        "object-store-memory": 200_000_000,
    }
    command = [RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    with open(ray_folder / "log", "wb") as log:
        head = subprocess.Popen(
            command,
            env=environment,
            cwd=ray_folder,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_up(address, head, ray_folder / "log")
        yield {**environment, "RAY_API_SERVER_ADDRESS": address}
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def _wait_until_up(address: str, head: subprocess.Popen, log: Path) -> None:
    deadline_s = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, and asks for the token
        except OSError:
            if head.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"ray start failed: {log.read_text()}") from None
            time.sleep(0.2)


def test_a_submitted_job_runs_the_uploaded_code_and_writes_every_row(cluster, tmp_path) -> None:
    clone, output = tmp_path / "clone", tmp_path / "out"
    subprocess.run(["git", "clone", "-q", "--local", str(ROOT), str(clone)], check=True)
    ignored = [line.strip("/") for line in (clone / ".rayignore").read_text().splitlines() if not line.startswith("#")]
    assert all((clone / path).is_dir() for path in ignored)
    sent = [p for p in clone.rglob("*") if not any(p.is_relative_to(clone / path) for path in (".git", *ignored))]
    upload = sum(p.stat().st_size for p in sent if p.is_file())
    assert upload < MAX_UPLOAD_BYTES
    # The project may also be installed on this machine; a mark shows whose code the actors run.
    mark = "\n_ROW_AS_WRITTEN = RowMaker._row\n\n\ndef _marked(self, *args, **measured):\n"
    mark += "    return _ROW_AS_WRITTEN(self, *args, **{**measured, 'answer': 'from the clone'})\n\n\n"
    mark += "RowMaker._row = _marked\n"
    with open(clone / Path(rows.__file__).relative_to(ROOT), "a") as source:
        source.write(mark)
    job = ["python", "jobs/caption_videos.py", "--config", "configs/demo.yaml", "--set", f"output.uri={output}"]
    done = subprocess.run(
        [RAY, "job", "submit", "--working-dir", ".", "--", *job],
        cwd=clone,
        env=cluster,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "8 ok, 0 partial, 0 failed" in done.stdout
    made = read_rows(output)
    assert len(made) == 8
    assert {row["answer"] for row in made} == {"from the clone"}
    assert violations(str(output)) == []
