"""Training: what is minimised, in which steps, and how none of them is ever lost."""
