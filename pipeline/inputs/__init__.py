"""From a prefix or a manifest file to the frozen manifest of a run."""
