"""A second theory of one's own: every answer is equally uncertain. docs/inventing-a-theory.md derives it.

sfumato theory check examples/fair.py:fair
"""

import torch

from sfumato import Theory

FLOOR, RISE, FALL = 0.1, 0.7, 5.5  # of a pilot run: the error of v at noise level s is 0.1 + 0.7·exp(−5.5·s)


def scale(t):
    return (FLOOR / (FLOOR + RISE * torch.exp(-FALL * t.sqrt()))).sqrt()


fair = Theory(
    data=lambda t: ((1 - t).sqrt(), t.sqrt()),
    model=lambda t: (-scale(t) * t.sqrt(), scale(t) * (1 - t).sqrt()),
    name="fair",
)
