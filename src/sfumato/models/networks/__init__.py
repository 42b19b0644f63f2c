"""Networks: our own denoisers, and what they and pretrained ones are made of."""
