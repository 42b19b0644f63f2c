"""Models on disk: saved and loaded whole, or as what a run keeps beside its base."""
