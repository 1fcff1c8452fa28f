"""The schema of a job's YAML, and how a file and `--set` become one."""
