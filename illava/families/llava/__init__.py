"""Supports LLaVA-OneVision and LLaVA-NeXT, which read images and frames in tiles of one size."""
