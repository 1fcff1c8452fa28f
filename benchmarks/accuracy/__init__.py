"""Answers under a plan against answers without."""
