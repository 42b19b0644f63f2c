"""Control pictures made from pictures: white on black, so that black says nothing.

canny: thin edges (Canny 1986), soft-edge: the strength of the gradient, sketch: lines as a pen would draw
them, the darker sides of a difference of Gaussians (Winnemöller et al. 2012). By scikit-image.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import Refused, one_of

VERSION = 1


def _canny(grey: np.ndarray) -> np.ndarray:
    from skimage.feature import canny

    return canny(grey, sigma=max(1.0, min(grey.shape) / 256), low_threshold=0.05, high_threshold=0.12)


def _soft_edge(grey: np.ndarray) -> np.ndarray:
    from skimage.filters import gaussian, sobel

    strength = sobel(gaussian(grey, max(0.5, min(grey.shape) / 256)))
    return np.clip(strength / 0.25, 0, 1) ** 0.7


def _sketch(grey: np.ndarray) -> np.ndarray:
    from skimage.filters import difference_of_gaussians

    sigma = max(0.7, min(grey.shape) / 160)
    difference = np.abs(difference_of_gaussians(grey, sigma, 1.6 * sigma))
    return np.clip(difference / 0.05 - 0.35, 0, 1)


KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sketch": _sketch,
    "canny": _canny,
    "soft-edge": _soft_edge,
}


def kind_of(word: str) -> str:
    """The kind a word means, "soft edge" as "soft-edge"; any other word stays as it is."""
    plain = "-".join(word.lower().replace("_", " ").replace("-", " ").split())
    return plain if plain in KINDS else word


def control(pixels: Tensor, kind: str) -> Tensor:
    """The control pictures of pixels [B, 3, H, W] in [-1, 1], as such pixels; colors count as lightness does.

    Of clips [B, 3, F, H, W], every frame's.

    Raises:
        Refused: no such kind, or scikit-image is not installed.
    """
    if pixels.ndim == 5:
        frames = control(pixels.transpose(1, 2).flatten(0, 1), kind)
        return frames.unflatten(0, (len(pixels), -1)).transpose(1, 2)
    draw = KINDS[one_of("Control", kind_of(kind), KINDS)]
    try:
        import skimage  # noqa: F401
    except ImportError as missing:
        raise Refused(
            f'Making a "{kind}" needs scikit-image: pip install "sfumato[control]". Or name a column of '
            "control pictures as data.control_image."
        ) from missing
    found = []
    for picture in pixels.detach().float().cpu():
        channels = (picture.numpy().astype(np.float64) + 1) / 2
        drawn = np.max([draw(channel) for channel in channels], axis=0)  # an edge between colors is one too
        found.append(torch.from_numpy(drawn.astype(np.float32) * 2 - 1).expand(3, -1, -1))
    return torch.stack(found).to(pixels)
