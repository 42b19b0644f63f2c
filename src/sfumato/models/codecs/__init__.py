"""Codecs: pixels ↔ latents."""
