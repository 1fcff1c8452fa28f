"""The language model: its block loop, packed prefill, decode steps and the paged KV cache."""
