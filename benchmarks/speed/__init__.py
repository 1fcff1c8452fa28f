"""Time of tower, prefill, decode and whole answers."""
