"""A theory of one's own: t is the share of the picture that is still unknown.

docs/inventing-a-theory.md derives it.

    sfumato theory check examples/even.py:even
    sfumato train RECIPE model.theory=examples/even.py:even

MEASURED are the two numbers of a pilot run on the data at hand (the demo's shapes, captions given).
"""

import torch

from sfumato import Theory

MEASURED = (-1.4, 4.5)


def levels(t):
    """(a, s) with s²/a² = t/(1 − t)·h(t), log h a line in t, a² + s² = 1."""
    h = torch.exp(MEASURED[0] + MEASURED[1] * t)
    whole = (1 - t) + t * h
    return ((1 - t) / whole).sqrt(), (t * h / whole).sqrt(), (h / whole).sqrt()


def data(t):
    a, s, _ = levels(t)
    return a, s


def model(t):
    """The velocity, scaled by sin φ/√t, so that what cannot be known of it has one size at every t."""
    a, s, evenly = levels(t)
    return -evenly * s, evenly * a


even = Theory(data=data, model=model, name="even")
