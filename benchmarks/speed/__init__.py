"""Measures the time of tower, prefill, decode and whole answers."""
