"""Sweeps: their jobs and results."""
