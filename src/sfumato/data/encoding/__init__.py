"""Encoding: filling the store, and reading training batches from it."""
