"""Where files are written for."""

TARGETS = ("diffusers", "comfyui", "kohya")
