"""Optimization: optimizers, learning rates, averages of the weights."""
