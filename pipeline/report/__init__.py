"""One HTML file about a run: figures of all rows, and some items with what the model saw and kept."""
