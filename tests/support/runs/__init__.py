"""Makes, damages and kills runs for tests."""
