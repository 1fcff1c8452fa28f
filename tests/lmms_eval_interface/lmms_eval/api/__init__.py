"""Excerpt of lmms-eval 0.7.3 (github.com/EvolvingLMMs-Lab/lmms-eval; MIT and Apache-2.0)."""
