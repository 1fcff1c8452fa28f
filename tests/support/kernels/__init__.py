"""The Triton kernels under their interpreter, and compiled ahead of time."""
