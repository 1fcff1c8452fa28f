"""Serves requests by continuous batching, from submission to the last token, phase by phase."""
