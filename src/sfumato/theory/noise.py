"""Noise as a function: (seed, sample, step, purpose) → numbers, the same on every machine and in any batch.

Philox 4×32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in int64 tensor operations:
a counter is encrypted with a key, so any number is drawn without drawing those before it, and nothing
has a state that must be saved. The key is (seed, purpose), the counter (block, step, sample).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Seed = int | Sequence[int]


def normal(
    shape: Sequence[int],
    seed: Seed,
    samples: Sequence[int],
    step: int = 0,
    purpose: str = "noise",
    device: torch.device | str | None = None,
) -> Tensor:
    """Unit normal noise [len(samples), *shape], float32.

    Args:
        shape: of one sample.
        seed: one for all, or one per sample.
        samples: which samples; row i depends on samples[i] alone.
        step, purpose: further names of the noise; equal names give equal noise.
    """
    return _normal(tuple(shape), seed, samples, step, purpose, device).float()


def uniform(
    seed: Seed,
    samples: Sequence[int],
    step: int = 0,
    purpose: str = "time",
    device: torch.device | str | None = None,
) -> Tensor:
    """One number in (0, 1) per sample, [B] float64, on a lattice of 2⁻⁵³."""
    words = _words(1, seed, samples, step, purpose, device)[:, 0]
    words = words.cpu() if words.device.type == "mps" else words
    return (((words[:, 0] >> 5 << 26) + (words[:, 1] >> 6)).double() + 0.5) * 2.0**-53


def permutation(count: int, seed: int, purpose: str = "order", epoch: int = 0) -> Tensor:
    """The numbers 0 … count − 1 in a random order, [count] int64."""
    words = _words((count + 1) // 2, seed, [0], epoch, purpose, None)[0]
    keys = (words[:, ::2] >> 1 << 32) + words[:, 1::2]  # 63 random bits a key, two keys a block
    return keys.flatten()[:count].argsort(stable=True)


def of(seed: Seed, purpose: str = "solver") -> Callable[[Tensor, int], Tensor]:
    """A source of noise for `solve`: (like [B, …], step) → unit normal like it.

    Row i of an int seed uses seed + i, so that a picture does not depend on its batch.
    """

    def draw(like: Tensor, step: int) -> Tensor:
        count = like.shape[0]
        seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
        return _normal(tuple(like.shape[1:]), seeds, [0] * count, step, purpose, like.device).to(like.dtype)

    return draw


def _normal(
    shape: tuple[int, ...], seed: Seed, samples: Sequence[int], step: int, purpose: str, device: object
) -> Tensor:
    """Box–Muller on pairs of 32-bit words, in float64 where the device has it."""
    size = math.prod(shape)
    words = _words((size + 3) // 4, seed, samples, step, purpose, device)
    real = torch.float32 if words.device.type == "mps" else torch.float64
    u = (words.to(real) + 0.5) * 2.0**-32
    radius, turn = (-2 * u[..., 0::2].log()).sqrt(), 2 * math.pi * u[..., 1::2]
    pairs = torch.stack([radius * turn.cos(), radius * turn.sin()], -1)
    return pairs.flatten(1)[:, :size].reshape(len(samples), *shape)


def _words(
    blocks: int, seed: Seed, samples: Sequence[int], step: int, purpose: str, device: object
) -> Tensor:
    """Random 32-bit words [B, blocks, 4] in int64."""
    count = len(samples)
    seeds = [seed] * count if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} samples; give one seed, or one per sample.")
    name = _name(purpose)
    rows = [
        (s & WORD ^ name & WORD, s >> 32 & WORD ^ name >> 32, i & WORD, i >> 32 & WORD)
        for s, i in zip(seeds, samples, strict=True)
    ]
    place = torch.device(device) if isinstance(device, str | torch.device) else None
    table = torch.tensor(rows, dtype=torch.int64, device=place).reshape(count, 4)
    block = torch.arange(blocks, dtype=torch.int64, device=place)
    counter = (block.expand(count, blocks), torch.full_like(block, step & WORD), table[:, 2:3], table[:, 3:4])
    words = philox(counter, (table[:, 0:1], table[:, 1:2]))
    return torch.stack([word.expand(count, blocks) for word in words], -1)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox 4×32; words are int64 tensors with values in [0, 2³²), broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * _FACTORS[0], c2 * _FACTORS[1]  # wraps at 64 bits, which keeps both halves right
        c0, c1, c2, c3 = (
            (second >> 32 & WORD) ^ c1 ^ k0,
            second & WORD,
            (first >> 32 & WORD) ^ c3 ^ k1,
            first & WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    return c0, c1, c2, c3


@lru_cache(maxsize=256)
def _name(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
