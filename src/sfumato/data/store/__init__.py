"""The store: encodings that are computed once, checksummed, shared by all runs."""
