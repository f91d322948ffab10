"""Sweeps: their jobs, and what they came to."""
