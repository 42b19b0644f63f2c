"""How near two runs must be that are one run up to rounding, in each precision."""

from collections.abc import Mapping

from torch import Tensor

APART = {"fp32": 1e-4, "bf16": 4e-2, "fp16": 1e-2}
"""Of the way that a run's weights have gone.

A sum taken in another order is off by the unit roundoff u (6e-8, 4e-3, 5e-4) of its largest terms. Adam moves
a weight by its gradient's sign as much as by its size, so that where terms cancel to about u the step itself
is uncertain: of the weights a share of about u goes the other way. Ten times u leaves room for a few steps;
float32's small numbers are worth more room.
"""


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """How far two ends of a run are apart, over the way from its start to the wanted end."""
    assert found.keys() == wanted.keys()
    far = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    gone = sum(float((wanted[name].double() - start[name].double()).square().sum()) for name in wanted)
    assert gone > 0
    return (far / gone) ** 0.5
