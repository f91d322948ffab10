"""How policies and rewards are measured on held-out data: who is compared, by what, and what comes of it."""
