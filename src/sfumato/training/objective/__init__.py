"""Objectives: what is minimised, as a pure function of weights, seed and step."""
