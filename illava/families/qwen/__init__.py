"""Supports Qwen2-VL, Qwen2.5-VL and Qwen3-VL, which read images and frames at their native resolution."""
