"""Runs the language model: its layers, packed prefill, decode steps and the paged key/value cache."""
