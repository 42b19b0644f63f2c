"""Pretrained models: a diffusers pipeline as our three stages, each network through its family."""
