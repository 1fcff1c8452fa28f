"""LLaVA-OneVision and LLaVA-NeXT: images and frames in tiles of one size."""
