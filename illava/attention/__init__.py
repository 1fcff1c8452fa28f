"""Computes attention over packed and paged tokens, and attention scores, by Triton kernels or in torch."""
