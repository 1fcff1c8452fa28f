"""Sweeps plans x settings x models over one set of items, into one table and one picture."""
