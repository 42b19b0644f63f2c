"""The named theories: each a function whose arguments all have defaults, found by name.

Only the definitions are written here. Targets, steps and conversions follow from them (definition.py).
"""

import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sfumato.errors import Refused, nearest, one_of
from sfumato.theory.definition import Theory, as_float64, default_clock
from sfumato.theory.types import CoefficientFunction

Betas = str | Sequence[float] | Tensor

_CATALOG: dict[str, Callable[..., Theory]] = {}


def names() -> list[str]:
    """The names `get` knows."""
    return sorted(_CATALOG)


def get(name: str, **args: object) -> Theory:
    """The theory with this name; every argument has a default.

    Raises:
        Refused: for a name or an argument that is not known, with the nearest that is.
    """
    make = _CATALOG[one_of("Theory", str(name).replace("_", "-"), _CATALOG)]
    known = inspect.signature(make).parameters
    args = {word: v.item() if isinstance(v, Tensor) and v.ndim == 0 else v for word, v in args.items()}
    for word, value in args.items():
        if word not in known:
            raise Refused(
                f'Theory "{name}" takes no argument "{word}".{nearest(word, known) if known else ""}'
            )
        _check_argument(word, value, known[word].default)
    return make(**args)


def _check_argument(word: str, value: object, default: object) -> None:
    """Refuse a value that is not of its default's kind; betas speak for themselves."""
    if word == "betas" or (value is None and default is None):
        return
    number = isinstance(value, numbers.Real) and math.isfinite(float(value))
    fits, name = number and not isinstance(value, bool), "a number"
    if isinstance(default, bool):
        fits, name = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits, name = fits and isinstance(value, int), "a whole number"
    if not fits:
        raise Refused(f"{word} is {value!r}; it must be {name}.")


def describe(name: str) -> str:
    """The first line of what the catalogue says about a theory."""
    return (inspect.getdoc(_CATALOG[one_of("Theory", name, _CATALOG)]) or "").split("\n")[0]


def arguments(name: str) -> dict[str, object]:
    """A theory's arguments with their defaults."""
    make = _CATALOG[one_of("Theory", name, _CATALOG)]
    return {key: parameter.default for key, parameter in inspect.signature(make).parameters.items()}


def _register(name: str) -> Callable[[Callable[..., Theory]], Callable[..., Theory]]:
    def add(make: Callable[..., Theory]) -> Callable[..., Theory]:
        _CATALOG[name] = make
        return make

    return add


def _times_1000(t: Tensor) -> Tensor:
    return 1000 * t


# ---------------------------------------------------------------- straight lines and circles


def _shifted(shift: float) -> Callable[[Tensor], Tensor]:
    if not shift > 0:
        raise Refused(f"shift is {shift:g}; it multiplies the noise-to-signal ratio and must be above 0.")
    return (lambda t: t) if shift == 1 else (lambda t: shift * t / (1 + (shift - 1) * t))


@_register("flow-matching")
def flow_matching(shift: float = 1.0) -> Theory:
    """A straight line from data to noise, answered with its velocity x_T − x_0.

    `shift` multiplies s/a at every t (Stable Diffusion 3); the network hears the shifted time.
    Source: Lipman et al. 2022, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206.
    """
    level = _shifted(shift)
    return Theory(
        data=lambda t: (1 - level(t), level(t)),
        model=lambda t: (-torch.ones_like(t), torch.ones_like(t)),
        name="flow-matching",
        clock=lambda t: 1000 * level(t),
    )


@_register("flow-x0")
def flow_x0(shift: float = 1.0) -> Theory:
    """A straight line from data to noise, answered with the data x_0.

    Source: Li & He 2025, arXiv:2511.13720.
    """
    level = _shifted(shift)
    return Theory(
        data=lambda t: (1 - level(t), level(t)),
        model=lambda t: (torch.ones_like(t), torch.zeros_like(t)),
        name="flow-x0",
        clock=lambda t: 1000 * level(t),
    )


@_register("trigflow")
def trigflow() -> Theory:
    """A quarter circle, answered with its velocity; t is the angle φ itself.

    Source: Lu & Song 2024, arXiv:2410.11081, for data scaled to σ_d = 1.
    """
    return Theory(
        data=lambda t: (torch.cos(t), torch.sin(t)),
        model=lambda t: (-torch.sin(t), torch.cos(t)),
        t_noise=math.pi / 2,
        name="trigflow",
    )


@_register("gvp")
def generalized_variance_preserving() -> Theory:
    """A quarter circle in t ∈ [0, 1], answered with dx_t/dt = π/2·(cos·x_T − sin·x_0).

    Source: Ma et al. 2024 (SiT), arXiv:2401.08740.
    """
    turn = math.pi / 2
    return Theory(
        data=lambda t: (torch.cos(turn * t), torch.sin(turn * t)),
        model=lambda t: (-turn * torch.sin(turn * t), turn * torch.cos(turn * t)),
        name="gvp",
        clock=_times_1000,
    )


# ---------------------------------------------------------------- noise that explodes: a = 1


def _check_sigma_max(sigma_max: float) -> float:
    if not (sigma_max > 0 and math.isfinite(sigma_max)):
        raise Refused(
            f"sigma_max is {sigma_max:g}; it is the noise at the start and must be finite and above 0."
        )
    return sigma_max


@_register("edm")
def edm(sigma_data: float = 0.5, sigma_max: float = 80.0) -> Theory:
    """Noise of level t = σ on whole data, answered with EDM's preconditioned F.

    Raises:
        Refused: unless sigma_data and sigma_max are finite and above 0.
    Source: Karras et al. 2022, arXiv:2206.00364, table 1.
    """
    if not sigma_data > 0:
        raise Refused(
            f"sigma_data is {sigma_data:g}; it is the data's standard deviation and must be above 0."
        )
    return Theory(
        data=lambda t: (torch.ones_like(t), t),
        model=lambda t: (
            t / (sigma_data * (t**2 + sigma_data**2).sqrt()),
            -sigma_data / (t**2 + sigma_data**2).sqrt(),
        ),
        t_noise=_check_sigma_max(sigma_max),
        name="edm",
        clock=lambda t: t.log() / 4,
        input_scale=lambda t: 1 / (t**2 + sigma_data**2).sqrt(),
    )


@_register("variance-exploding")
def variance_exploding(sigma_max: float = 80.0) -> Theory:
    """Noise of level t = σ on whole data, answered with the noise x_T; the network hears log σ.

    Source: Song et al. 2021, arXiv:2011.13456, section 3.4.
    """
    return Theory(
        data=lambda t: (torch.ones_like(t), t),
        model=lambda t: (torch.zeros_like(t), torch.ones_like(t)),
        t_noise=_check_sigma_max(sigma_max),
        name="variance-exploding",
        clock=torch.log,
        input_scale=lambda t: 1 / (t**2 + 1).sqrt(),
    )


def preconditioned(
    skip: Callable[[Tensor], Tensor],
    out: Callable[[Tensor], Tensor],
    data: CoefficientFunction,
    t_noise: float,
    name: str = "preconditioned",
    clock: Callable[[Tensor], Tensor] = default_clock,
    input_scale: Callable[[Tensor], Tensor] = torch.ones_like,
) -> Theory:
    """A network F inside one's own preconditioning x_0 ≈ c_skip(t)·x_t + c_out(t)·F, as a theory.

    Solved for F: p = (1 − c_skip·a)/c_out, q = −c_skip·s/c_out. The clock is c_noise, the input scale c_in.
    """

    def model(t: Tensor) -> tuple[Tensor, Tensor]:
        a, s = data(t)
        return (1 - skip(t) * a) / out(t), -skip(t) * s / out(t)

    return Theory(data=data, model=model, t_noise=t_noise, name=name, clock=clock, input_scale=input_scale)


# ---------------------------------------------------------------- DDPM: a table of betas


def beta_table(
    betas: Betas = "linear", steps: int = 1000, beta_start: float | None = None, beta_end: float | None = None
) -> Tensor:
    """[steps] float64: a named schedule (linear, scaled-linear, cosine) or one's own numbers.

    Raises:
        Refused: for a name that is not known, and numbers that are no betas.
    Source: Ho et al. 2020, arXiv:2006.11239 (linear 1e-4 … 0.02); Rombach et al. 2022, arXiv:2112.10752
    (scaled-linear 0.00085 … 0.012); Nichol & Dhariwal 2021, arXiv:2102.09672 (cosine).
    """
    if not isinstance(betas, str):
        return _check_custom_betas(betas, steps, (beta_start, beta_end))
    if steps < 1:
        raise Refused(f"steps is {steps}; a table of betas needs at least 1.")
    word = betas.replace("_", "-").replace("squaredcos-cap-v2", "cosine")  # as diffusers calls it
    kind = one_of("Beta schedule", word, ("linear", "scaled-linear", "cosine"))
    if kind == "cosine":
        if beta_start is not None or beta_end is not None:
            raise Refused("The cosine schedule has no beta_start and beta_end. Leave them out.")
        time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        level = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - level[1:] / level[:-1]).clamp(max=0.999)
    low = beta_start if beta_start is not None else (1e-4 if kind == "linear" else 0.00085)
    high = beta_end if beta_end is not None else (0.02 if kind == "linear" else 0.012)
    if not 0 < low <= high < 1:
        raise Refused(f"beta_start {low:g} and beta_end {high:g} must satisfy 0 < start ≤ end < 1.")
    power = 1 if kind == "linear" else 2
    return torch.linspace(low ** (1 / power), high ** (1 / power), steps, dtype=torch.float64) ** power


def _check_custom_betas(betas: Sequence[float] | Tensor, steps: int, ends: tuple[object, object]) -> Tensor:
    given = cast(object, betas)  # a user's
    if not isinstance(given, Tensor | Sequence) or any(isinstance(beta, str) for beta in betas):
        raise Refused(f"betas is {betas!r}; name a schedule, or give a list of numbers.")
    table = as_float64(betas)
    good = table.ndim == 1 and len(table) and bool(((table > 0) & (table <= 1)).all())
    if not good or not bool((table[:-1] < 1).all()):
        raise Refused("betas must be a list of numbers in (0, 1), one per step; only the last may be 1.")
    if steps not in (1000, len(table)) or ends != (None, None):
        raise Refused(
            f"betas are {len(table)} numbers; they leave nothing for steps, beta_start or beta_end."
        )
    return table


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """√ᾱ stretched so that the last is 0 and the first stays (Lin et al. 2023, arXiv:2305.08891).

    Raises:
        Refused: a single step, which cannot be both.
    """
    if len(alphas_cumprod) < 2:
        raise Refused("Zero terminal SNR keeps the first step and darkens the last; one step cannot be both.")
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """(√ᾱ, √(1 − ᾱ)) at any t ∈ [0, 1] from N trained steps.

    Step n sits at t = (n + 1)/N, ᾱ(0) = 1, and log ᾱ is interpolated between; where the last ᾱ is 0 the
    last interval runs straight in √ᾱ.
    """

    logs: Tensor  # log ᾱ at 0, 1/N, …, 1

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        logs = self.logs.to(t.device, t.dtype)
        count = len(logs) - 1
        place = (t * count).clamp(0, count)
        place = place.masked_fill((t < -1e-6) | (t > 1 + 1e-6), math.nan)  # such a time was never trained
        below = place.nan_to_num(0.0).floor().clamp(max=count - 1)
        part, i = place - below, below.long()
        low, high = logs[i], logs[i + 1]
        ends_dark = torch.isneginf(high)
        log = low + part * torch.where(ends_dark, 0.0, high - low)
        alphas_cumprod = torch.where(ends_dark, (low.exp().sqrt() * (1 - part)).square(), log.exp())
        lost = torch.where(ends_dark, 1 - alphas_cumprod, 0.0 - torch.expm1(log))
        return alphas_cumprod.sqrt(), lost.sqrt()


def _ddpm(
    name: str,
    model: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    betas: Betas,
    steps: int,
    beta_start: float | None,
    beta_end: float | None,
    zero_terminal_snr: bool,
) -> Theory:
    alphas_cumprod = (1 - beta_table(betas, steps, beta_start, beta_end)).cumprod(0)
    alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod) if zero_terminal_snr else alphas_cumprod
    table = DiscreteSchedule(torch.cat([alphas_cumprod.new_zeros(1), alphas_cumprod.log()]))
    count = len(alphas_cumprod)
    return Theory(data=table, model=lambda t: model(*table(t)), name=name, clock=lambda t: count * t - 1)


@_register("ddpm-epsilon")
def ddpm_epsilon(
    betas: Betas = "linear",
    steps: int = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
    zero_terminal_snr: bool = False,
) -> Theory:
    """DDPM answered with the noise ε = x_T. betas: linear, scaled-linear, cosine or a table.

    Source: Ho et al. 2020, arXiv:2006.11239.
    """

    def answer(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(a), torch.ones_like(s)

    return _ddpm("ddpm-epsilon", answer, betas, steps, beta_start, beta_end, zero_terminal_snr)


@_register("ddpm-x0")
def ddpm_x0(
    betas: Betas = "linear",
    steps: int = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
    zero_terminal_snr: bool = False,
) -> Theory:
    """DDPM answered with the data x_0. betas: linear, scaled-linear, cosine or a table.

    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4.
    """

    def answer(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(a), torch.zeros_like(s)

    return _ddpm("ddpm-x0", answer, betas, steps, beta_start, beta_end, zero_terminal_snr)


@_register("ddpm-velocity")
def ddpm_velocity(
    betas: Betas = "linear",
    steps: int = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
    zero_terminal_snr: bool = False,
) -> Theory:
    """DDPM answered with v = √ᾱ·x_T − √(1−ᾱ)·x_0. betas: linear, scaled-linear, cosine or a table.

    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4.
    """

    def answer(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return -s, a

    return _ddpm("ddpm-velocity", answer, betas, steps, beta_start, beta_end, zero_terminal_snr)


@_register("score")
def score(
    betas: Betas = "linear",
    steps: int = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
    zero_terminal_snr: bool = False,
) -> Theory:
    """DDPM answered with the score −x_T/√(1−ᾱ). betas: linear, scaled-linear, cosine or a table.

    Source: Song et al. 2021, arXiv:2011.13456.
    """

    def answer(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(a), -1 / s

    return _ddpm("score", answer, betas, steps, beta_start, beta_end, zero_terminal_snr)
