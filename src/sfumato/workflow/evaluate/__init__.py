"""Measuring a run."""
