"""Studio: what a run's folder holds, made visible. It opens on a laptop without torch."""
