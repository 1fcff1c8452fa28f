"""Measurements of speed, throughput, reliability and accuracy."""
