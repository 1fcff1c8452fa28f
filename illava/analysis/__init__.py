"""What one looks at, never what an answer depends on: agreement, attention maps, peak memory."""
