"""Measures what the pipeline costs around the model."""
