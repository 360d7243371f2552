"""Measurements: train (beside peer), eval, generate, gpu (all of it: gpu.sh), memory, padding, ratelimit."""
