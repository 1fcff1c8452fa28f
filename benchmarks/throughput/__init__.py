"""What the pipeline costs around the model."""
