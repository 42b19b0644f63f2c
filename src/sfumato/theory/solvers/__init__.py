"""Solvers: walks from noise to data, each written once in the canonical angle φ."""
