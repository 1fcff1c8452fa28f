"""Runs jobs on Ray: the actors, how many of them are requested, and the executor that drives them."""
