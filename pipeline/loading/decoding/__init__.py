"""Decodes files to frames and pages; runs in the sandbox process only."""
