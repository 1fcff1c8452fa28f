"""Kills runs and damages media, and checks what is left."""
