"""Tiny models of every family, and models that misbehave."""
