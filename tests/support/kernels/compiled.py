"""Compiles the Triton kernels to PTX for compute capability 9.0, at LLaVA-OneVision-7B's shapes; prints their names.

What the interpreter lets pass and the compiler does not shows here, without a GPU. Run by test_kernels.py.
"""

import sys
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from illava.attention import triton_paged as paged_decode
from illava.attention import triton_scores as score

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    **dict.fromkeys(("q", "k", "k_pool", "v_pool", "out"), "*bf16"),
    **dict.fromkeys(("partial", "lse", "score", "bias_pool"), "*fp32"),
    **dict.fromkeys(("table", "length", "blocks", "num_biased"), "*i32"),
    "scopes": "*i64",
    "scale": "fp32",
}


def compile_kernel(kernel: JITFunction, **constants: int) -> None:
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): n for name, n in constants.items()})
    backend = make_backend(HOPPER)
    from triton.compiler import compile as compile_source

    compiled = compile_source(source, target=HOPPER, options=backend.parse_options({"num_stages": 2}).__dict__)
    assert ".target sm_90" in compiled.asm["ptx"]
    assert compiled.metadata.shared < 99 << 10, compiled.metadata.shared  # what every GPU from 8.0 on has
    print(kernel.__name__)


if __name__ == "__main__":
    heads = {"SHARE": 7, "KV_HEADS": 4, "HEAD_DIM": 128, "BLOCK_SIZE": 16, "SPLITS": 32}
    for biased in (False, True):
        compile_kernel(paged_decode._attend_split, **heads, BIASED=biased, BLOCK_H=16, BLOCK_N=64, BLOCK_D=128)
    compile_kernel(paged_decode._join_splits, HEADS=28, HEAD_DIM=128, SPLITS=32, BLOCK_D=128)
    tower = {"SHARE": 1, "HEAD_DIM": 72, "BLOCK": 64, "BLOCK_D": 128}
    compile_kernel(score._log_sum_exp, CAUSAL=False, **tower)
    for divisor in (0, 1, 2):
        compile_kernel(score._sum_received, DIVISOR=divisor, **tower)
