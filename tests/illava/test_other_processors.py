"""The numeric tests once more, under other kernels, other numbers of threads, and in another order.

A suite that is green on one processor may hang on what that processor rounds where. In 160 s of `make test-long`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "own": {},
    "MKL as on any processor": {"MKL_CBWR": "COMPATIBLE"},
    "ATen without vectors": {"ATEN_CPU_CAPABILITY": "default"},
}
RUN = """
import sys, pytest, torch
print("vectors:", torch.backends.cpu.get_cpu_capability(), "threads:", torch.get_num_threads(), flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_numeric_tests_pass(kernels, num_threads):
    order = ("-p", "randomly", "--randomly-seed=20261130", "--randomly-dont-reset-seed")
    which = (ROOT / "tests" / "illava", "-m", "numeric and not long", "-p", "no:cacheprovider", "--maxfail=5")
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = outer | KERNELS[kernels] | {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", RUN, *order, *which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"threads: {num_threads}\n" in done.stdout
    assert ("vectors: DEFAULT" in done.stdout) == ("ATEN_CPU_CAPABILITY" in KERNELS[kernels])
