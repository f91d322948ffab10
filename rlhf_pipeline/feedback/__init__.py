"""Step 2, first half: answers to compare, and the labels that people, or a reward in their place, give them."""
