"""The tiny demo model: its data and its training."""
