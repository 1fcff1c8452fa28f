"""Compiles the two kernels of `ward` for one compute capability, as compiled.py does; run with it, such as ``90``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from illava.reducers.ops import triton_agglomeration, triton_contrast
from tests.support.kernels import compiled

compiled.NUMBERS.update(
    {
        **dict.fromkeys(("product", "spare", "weight", "floats", "point", "size", "coord", "contrast"), "*fp32"),
        **dict.fromkeys(("count", "integers"), "*i32"),
        **dict.fromkeys(("resolution", "least"), "fp32"),
        "group": "*i64",
    }
)
compiled.POINTERS.discard("weight")

if __name__ == "__main__":
    for num_points in (1024, 256):  # of so400m frames, and of what pooling leaves of them
        compiled.compile_kernel(
            triton_agglomeration._agglomerate, ("num_rounds", "width"), "fp32",
            BLOCK_N=num_points, ROWS=32, COLUMNS=64, num_warps=16,
        )  # fmt: skip
    compiled.compile_kernel(
        triton_contrast._contrast, ("width",), "fp32", ROWS=32, COLUMNS=32, CHANNELS=64, num_warps=4
    )
