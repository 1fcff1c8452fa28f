"""What one does with a model and a few files of one's own, outside of any run."""
