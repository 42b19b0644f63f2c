"""Shapes as types: what a tensor means is written where it enters."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

Samples = Float[Tensor, "batch *rest"]
"""A batch of states, pictures or noise."""
AnyFloats = Float[Tensor, "..."]
"""Floating point, of any shape; a function that takes it speaks for itself about shapes."""
Grid = Float[Tensor, "*batch nodes"]
"""Times to sample at, from noise to data: [steps + 1], or [B, steps + 1] with a row per sample."""

TimeLike = Tensor | Sequence[float] | float | int
"""A time: a number, or one per sample."""
Denoise = Callable[[Tensor, Tensor], Tensor]
"""denoise(x_t [B, ...], t [B]) → out [B, ...], as the theory's model definition says."""
CoefficientFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A definition: t of any shape → two coefficients of that shape."""
NoiseSource = Callable[[Tensor, int], Tensor]
"""noise(like [B, ...], step) → unit normal like it."""
