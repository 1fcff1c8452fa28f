"""Executes a run: scheduler, executors, actors, rows, publishing and progress."""
