"""Says how a command goes while it runs, and what came of it."""
