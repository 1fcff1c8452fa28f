"""Attention over packed and paged tokens, its scores, and the kernels that serve them."""
