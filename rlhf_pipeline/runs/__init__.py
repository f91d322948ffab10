"""Run directories, the only state between stages."""
