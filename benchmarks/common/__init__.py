"""What the measurements share: the machine, clocks, rounds, random models."""
