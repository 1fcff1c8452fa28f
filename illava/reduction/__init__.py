"""Carries out a plan: the tower's reduction call, the decoder's, and what both share."""
