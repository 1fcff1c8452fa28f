"""Defines the schema of a job's YAML, and makes one configuration of a file and `--set`."""
