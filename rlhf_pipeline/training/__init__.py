"""What the stages' trainers share."""
