"""Architecture, batches, losses and the training run."""
