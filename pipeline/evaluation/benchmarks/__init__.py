"""Converts published benchmarks: rows to manifests, prompts, scores."""
