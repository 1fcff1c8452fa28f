"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and frames at their native resolution."""
