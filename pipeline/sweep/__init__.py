"""Sweeps: plans x settings x models over one set of items, measured into one table and one picture."""
