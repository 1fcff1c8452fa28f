"""The suites, and their helpers in `tests.support`."""
