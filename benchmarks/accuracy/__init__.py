"""Compares answers under a plan with answers without."""
