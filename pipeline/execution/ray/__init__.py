"""The one door to Ray: its actors, how many are asked for, and the executor that drives them."""
