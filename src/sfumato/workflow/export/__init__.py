"""Files that load elsewhere."""
