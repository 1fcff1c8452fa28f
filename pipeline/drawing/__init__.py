"""Pictures of what a reduction keeps: from a request's trace to PNG and one self-contained HTML page."""
