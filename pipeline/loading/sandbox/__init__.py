"""Decodes media in a disposable child process."""
