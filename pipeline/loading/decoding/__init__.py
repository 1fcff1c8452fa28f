"""Decodes files to frames and pages: containers, decoders, orientation, and the choice of frames."""
