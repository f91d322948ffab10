"""Code that the stages' trainers share."""
