"""Estimates: memory, time and soundness of a run, before it is begun."""
