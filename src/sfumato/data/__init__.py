"""Data: from any collection of captioned pictures to training batches, nothing lost, nothing stale."""
