"""Evaluation of policies and rewards on held-out data."""
