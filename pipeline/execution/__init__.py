"""A run while it works: scheduler, executors, actors, rows, publishing, progress."""
