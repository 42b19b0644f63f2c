"""Conditioners of our own: text encoders and class labels."""
