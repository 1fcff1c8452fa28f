"""Loads media: stages objects, checks containers, chooses frames, and decodes them in a disposable child process.

`loader.Loader` is the entry point.
"""
