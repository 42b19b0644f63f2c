"""Buckets: the few picture shapes of about one area that crop a given collection least.

Every candidate has sides in multiples of the codec's stride. Which few to take is solved exactly: pictures
lie on a line by aspect ratio, so the best k shapes are a shortest path with k stops along it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sfumato.errors import Refused

WIDEST = 4.0  # aspect ratio of the most extreme bucket
BINS = 512  # aspect ratios are told apart to 0.5 %

Size = tuple[int, int]  # width, height


def crop_waste(size: Size, bucket: Size) -> float:
    """Share of a picture of `size` that is cut away to fill `bucket`."""
    ratio = size[0] * bucket[1] / (size[1] * bucket[0])
    return 1 - min(ratio, 1 / ratio)


@dataclass(frozen=True)
class Buckets:
    """A choice of shapes; call it with a picture's (width, height) to get the shape for it."""

    shapes: tuple[Size, ...]

    def __call__(self, size: Size) -> Size:
        """The shape that cuts least off a picture of this size."""
        return min(self.shapes, key=lambda shape: crop_waste(size, shape))

    def describe(self, sizes: Sequence[Size]) -> list[dict[str, object]]:
        """For each shape: width, height, how many of the pictures, mean share cut away, share enlarged."""
        members: dict[Size, list[Size]] = {shape: [] for shape in self.shapes}
        for size in sizes:
            members[self(size)].append(size)
        return [
            {
                "width": shape[0],
                "height": shape[1],
                "pictures": len(held),
                "cropped": mean([crop_waste(size, shape) for size in held]),
                "enlarged": mean([is_enlarged(size, shape) for size in held]),
            }
            for shape, held in members.items()
        ]

    def waste(self, sizes: Sequence[Size]) -> float:
        """Mean share of a picture that is cut away."""
        return mean([crop_waste(size, self(size)) for size in sizes])


def mean(values: Sequence[float]) -> float:
    """The mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def is_enlarged(size: Size, bucket: Size) -> bool:
    """Whether a picture has fewer pixels than the bucket along the side that counts."""
    return min(size[0] / bucket[0], size[1] / bucket[1]) < 1


def candidates(resolution: int, stride: int, widest: float = WIDEST) -> list[Size]:
    """All shapes with sides in multiples of `stride` and an area near resolution², from tall to wide."""
    found: dict[float, Size] = {}
    for width in range(stride, int(resolution * math.sqrt(widest)) + stride, stride):
        height = max(stride, round(resolution**2 / width / stride) * stride)
        if max(width, height) <= widest * min(width, height):
            off = abs(width * height - resolution**2)
            best = found.get(width / height)
            if best is None or off < abs(best[0] * best[1] - resolution**2):
                found[width / height] = (width, height)
    listed = set(found.values()) | {(height, width) for width, height in found.values()}
    return sorted(listed, key=lambda shape: shape[0] / shape[1])


def choose(sizes: Sequence[Size], resolution: int, stride: int = 8, buckets: int = 1) -> Buckets:
    """The `buckets` shapes that cut the least off pictures of these sizes.

    Args:
        sizes: (width, height) of every picture.
        resolution: a bucket has about resolution × resolution pixels; alone it is that square.
        stride: sides are multiples of it (the codec's stride times the denoiser's patch).
    Raises:
        Refused: resolution is no multiple of stride.
    """
    if resolution % stride or resolution < stride:
        near = max(stride, round(resolution / stride) * stride)
        raise Refused(
            f"data.resolution = {resolution}, but this model needs sides in multiples of {stride}. "
            f"Set data.resolution = {near}."
        )
    if buckets == 1 or not sizes:
        return Buckets(((resolution, resolution),))
    shapes = candidates(resolution, stride)
    aspects, counts = _histogram(sizes)
    ratios = np.log([width / height for width, height in shapes])
    waste = 1 - np.exp(-np.abs(aspects[:, None] - ratios[None]))  # [aspects, shapes]
    cost = counts[:, None] * waste
    return Buckets(tuple(shapes[i] for i in _best(cost, aspects, ratios, min(buckets, len(shapes)))))


def _histogram(sizes: Sequence[Size]) -> tuple[np.ndarray, np.ndarray]:
    """Log aspect ratios that occur, rising, and how often."""
    logs = np.log([width / height for width, height in sizes])
    step = 2 * math.log(64) / BINS
    values, counts = np.unique(np.round(logs / step).astype(int), return_counts=True)
    return values * step, counts.astype(float)


def _best(cost: np.ndarray, aspects: np.ndarray, ratios: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` shapes of least total cost; pictures go to the nearer of two neighbors."""
    number = len(ratios)
    below = np.array([cost[aspects <= ratio, i].sum() for i, ratio in enumerate(ratios)])
    above = np.array([cost[aspects > ratio, i].sum() for i, ratio in enumerate(ratios)])
    between = np.full((number, number), np.inf)
    for i in range(number):
        for j in range(i + 1, number):
            inside = (aspects > ratios[i]) & (aspects <= ratios[j])
            between[i, j] = np.minimum(cost[inside, i], cost[inside, j]).sum()
    total, came = [below], []
    for _ in range(count - 1):
        table = total[-1][:, None] + between
        came.append(table.argmin(0))
        total.append(table.min(0))
    used = min(range(count), key=lambda k: (float((total[k] + above).min()), k))
    path = [int((total[used] + above).argmin())]
    for k in range(used - 1, -1, -1):
        path.append(int(came[k][path[-1]]))
    return sorted(path)


def token_budget(
    batch: int, shapes: Sequence[tuple[int, ...]], multiple: int = 1
) -> Callable[[tuple[int, ...]], int]:
    """Batch size by latent shape [C, …], so that all batches cost alike: `batch` samples of mean size.

    Give it to `Order`; with one shape it is `batch`. Sizes are multiples of `multiple`, so that as many
    processes have equal shares.
    """
    typical = mean([math.prod(shape[1:]) for shape in shapes])

    def size(shape: tuple[int, ...]) -> int:
        return max(1, round(batch * typical / math.prod(shape[1:]) / multiple)) * multiple

    return size
