"""Media to frames: staging, container checks, which frames, and the disposable child process that decodes them.

Knows nothing of models, rows or Ray; `loader.Loader` is its front door.
"""
