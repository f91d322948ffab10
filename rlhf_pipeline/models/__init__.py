"""Policies, rewards, and what computes with them."""
