"""Provides object stores that fail or send wrong bytes, and hostile addresses."""
