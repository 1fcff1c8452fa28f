"""The disposable child process in which media are decoded."""
