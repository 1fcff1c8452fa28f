"""The small trained model: generator, architecture, training."""
