"""The run folder: opening and resuming, parts, totals, retry, status, verification."""
