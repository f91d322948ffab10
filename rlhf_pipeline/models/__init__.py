"""Policies, rewards, sampling and likelihoods."""
