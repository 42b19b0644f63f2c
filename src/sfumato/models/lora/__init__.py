"""Adapters: LoRA, DoRA, LoHa and LoKr beside a network's layers, and their files."""
