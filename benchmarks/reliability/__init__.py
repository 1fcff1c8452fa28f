"""Runs that are killed, and media that are damaged."""
