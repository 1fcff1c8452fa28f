"""Bytes to frames and pages: containers, decoders, orientation, which frames."""
