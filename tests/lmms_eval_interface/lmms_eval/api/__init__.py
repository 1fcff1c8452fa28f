"""Excerpt of lmms-eval 0.7.3 (EvolvingLMMs-Lab/lmms-eval; MIT, Apache-2.0)."""
