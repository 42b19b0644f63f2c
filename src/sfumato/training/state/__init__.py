"""The state of a run: what is learned, and its checkpoints."""
