"""Published benchmarks: rows to manifests, prompts, scores."""
