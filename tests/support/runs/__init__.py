"""Runs made, damaged and killed for a test."""
