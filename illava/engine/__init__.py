"""Continuous batching: a request from submission to its last token, phase by phase."""
