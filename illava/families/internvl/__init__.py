"""Supports InternVL3 and InternVL3.5, which read images and frames in tiles of one size, by whole groups of patches."""
