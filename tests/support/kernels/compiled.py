"""Compiles the Triton kernels for one compute capability, at LLaVA-OneVision-7B's shapes and alignments; prints lines.

What the interpreter lets pass and the compiler does not shows here, without a GPU. The compiler is told what the JIT
will see of the arguments: pointers and strides that 16 divides. Without it other code is compiled than will run. A
kernel's line has its name, its type, its registers, its spilled bytes, its loads of two bytes, and its shared memory.
Run by test_kernels.py with the capability, such as ``90``.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from illava.attention import triton_paged, triton_scores
from illava.decoder import triton_greedy, triton_layers

CAPABILITY = int(sys.argv[1])
TARGET = GPUTarget("cuda", CAPABILITY, 32)
# Shared memory that one block may have, in KiB: CUDA C++ Programming Guide, "Technical specifications per compute
# capability".
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
NUMBERS = {
    **dict.fromkeys(("partial", "lse", "score", "bias_pool", "top", "mass"), "*fp32"),
    **dict.fromkeys(("table", "length", "blocks", "num_biased", "token", "odd"), "*i32"),
    **dict.fromkeys(("scopes", "slot", "drawn"), "*i64"),
    **dict.fromkeys(("scale", "eps"), "fp32"),
}
POINTERS = {
    "q", "k", "v", "k_pool", "v_pool", "out", "x", "delta", "weight", "total", "normed", "cos", "sin", "gate", "up",
    "logits",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_kernel(kernel: JITFunction, odd: tuple[str, ...] = (), dtype: str = "bf16", **constants: int) -> None:
    """Compile, check and print; ``odd`` names the integers that 16 does not divide."""
    warps, stages = constants.pop("num_warps", 4), constants.pop("num_stages", 2)
    types = {**NUMBERS, **dict.fromkeys(POINTERS, f"*{dtype}")}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divided = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in constants and name not in odd and signature[name] != "fp32"
    }
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, fixed, divided)
    options = make_backend(TARGET).parse_options({"num_stages": stages, "num_warps": warps}).__dict__
    compiled = triton.compile(source, target=TARGET, options=options)
    assert f".target sm_{CAPABILITY}" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_KIB[CAPABILITY] << 10, compiled.metadata.shared
    print(kernel.__name__, dtype, *inspected(compiled.asm["cubin"]), compiled.metadata.shared)


def inspected(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of the stack (spills), and loads of two bytes from global memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=False).stdout
            if flag != "-c"
            else subprocess.run(
                [TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-c")
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, len(re.findall(r"LDG\.E\.[US]16", code))


if __name__ == "__main__":
    heads = {"SHARE": 7, "KV_HEADS": 4, "HEAD_DIM": 128, "BLOCK_SIZE": 16, "SPLITS": 32}
    for biased in (False, True):
        heads["num_stages"] = triton_paged.NUM_STAGES
        compile_kernel(triton_paged._attend_split, **heads, BIASED=biased, BLOCK_H=16, BLOCK_N=64, BLOCK_D=128)
    compile_kernel(triton_paged._join_splits, HEADS=28, HEAD_DIM=128, SPLITS=32, BLOCK_D=128)
    for dtype, block in (("bf16", 64), ("fp32", 32)):
        tower = {"EIGHTS": True, "SHARE": 1, "HEAD_DIM": 72, "BLOCK": block, "BLOCK_D": 128, "dtype": dtype}
        odd = ("stride_qh", "stride_kj", "num_tokens")  # 72 channels a head; any number of tokens
        compile_kernel(triton_scores._log_sum_exp, odd, CAUSAL=False, **tower)
        for divisor in (0, 1, 2):
            compile_kernel(triton_scores._sum_received, odd, DIVISOR=divisor, **tower)
    compile_kernel(triton_layers._add_norm, HAS_DELTA=True, NUM_CHANNELS=3584, BLOCK_D=4096, num_warps=8)
    shape = {"HEADS": 28, "KV_HEADS": 4, "HEAD_DIM": 128, "BLOCK_H": 32, "BLOCK_G": 4, "BLOCK_D": 64}
    compile_kernel(triton_layers._rotate_write, WRITE=True, **shape)
    draw = {"NUM_TOKENS": 152_064, "SPLITS": 64}
    compile_kernel(triton_greedy._greedy_split, **draw, BLOCK=1024)
    compile_kernel(triton_greedy._greedy_join, ("num_rows",), **draw)
    compile_kernel(triton_layers._silu_mul, NUM_CHANNELS=18_944, BLOCK=1024)
