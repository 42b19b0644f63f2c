"""The kernel distance (squared MMD) between two sets of pictures: zero, within its error, if they look alike.

    MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y),  k(x, y) = (x·y/d + 1)³

unbiased at any size (the Fréchet distance is not). It is the estimator of the Kernel Inception Distance
(Bińkowski et al. 2018, arXiv:1801.01401) on latents of the run's own codec, no Inception's features: values
compare between runs that share codec and data, never with a KID that was published.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.evaluation.measure import Measure, mean_with_error
from sfumato.theory import noise


def kernel_distance(
    real: Tensor, generated: Tensor, subset: int = 100, subsets: int = 50, seed: int = 0, note: str = ""
) -> Measure:
    """The distance of features [N, D] and [M, D], averaged over random subsets, with the mean's error.

    Features are standardised by the real ones' mean and deviation, so that no channel counts by its scale;
    one that hardly varies among the real ones counts by a tenth of the usual deviation, or it would drown
    all others.
    """
    real, generated = real.double(), generated.double()
    mean, deviation = real.mean(0), real.std(0)
    deviation = deviation.clamp_min(max(float(deviation.mean()) / 10, 1e-12))
    real, generated = (real - mean) / deviation, (generated - mean) / deviation
    size = min(subset, len(real), len(generated))
    if size < 2:
        raise ValueError("the kernel distance needs two pictures of each set")
    values: list[float] = []
    for index in range(subsets):
        ours = real[noise.permutation(len(real), seed, "kid-real", index)[:size]]
        theirs = generated[noise.permutation(len(generated), seed, "kid-drawn", index)[:size]]
        values.append(_unbiased_mmd(ours, theirs))
    return mean_with_error(values, note)


def _unbiased_mmd(x: Tensor, y: Tensor) -> float:
    count, dimension = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dimension + 1) ** 3

    def inner(a: Tensor) -> Tensor:
        gram = kernel(a, a)
        return (gram.sum() - gram.diagonal().sum()) / (count * (count - 1))

    return float(inner(x) + inner(y) - 2 * kernel(x, y).mean())


def latent_features(latents: Tensor, side: int = 4) -> Tensor:
    """Latents [B, C, h, w] averaged to at most side × side places: [B, C·side²], features of a codec."""
    places = (min(side, latents.shape[-2]), min(side, latents.shape[-1]))
    return torch.flatten(F.adaptive_avg_pool2d(latents.float(), places), 1)
