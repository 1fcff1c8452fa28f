"""Measures and shows what a plan does: agreement, attention maps, peak memory. No answer depends on it."""
