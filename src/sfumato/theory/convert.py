"""Change of theory: a network trained under one theory, asked as if it had been trained under another.

Time is matched by signal-to-noise, the input is rescaled, the answer is read as the canonical velocity and
written again. Exact, and differentiable in state and answer: it serves sampling, distilling and fine-tuning.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory.definition import Theory, as_float64, broadcast_like, upload
from sfumato.theory.types import Denoise, TimeLike

OUTSIDE = 0.05
"""How far past the trained angles a network may be asked at its last: pure noise, for EDM at s/a = 80."""


def translate(denoise: Denoise, trained: Theory, to: Theory) -> Denoise:
    """`denoise` of theory `trained` as a denoise of theory `to`.

    Where `to` reaches further into noise or data than `trained` (flow matching starts at pure noise, EDM at
    s/a = 80), the network is asked at its nearest time.

    Raises (when called):
        Refused: at a time whose angle is more than 0.05 beyond all that was trained, and where `trained`
            is singular.
    """

    def answer(x_t: Tensor, t: TimeLike) -> Tensor:
        x, network_t, read = translate_inputs(trained, to, x_t, t)
        return read(denoise(x, upload(network_t, x.device)))

    return answer


def translate_inputs(
    trained: Theory, to: Theory, x_t: Tensor, t: TimeLike
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """(x', t', read): what the network is asked instead of (x_t, t), and how its answer reads in `to`.

    t' lies where t does: of times on the host all coefficients are computed there, and no GPU is waited for.

    Raises as `translation_coefficients`.
    """
    there, ratio, ask, keep = translation_coefficients(trained, to, to.clamp_time(as_float64(t)))
    network_t = there.to(x_t.dtype if x_t.dtype == torch.float64 else torch.float32)
    network_t = network_t.expand(len(x_t)) if network_t.ndim < 2 else network_t
    return (
        broadcast_like(ratio, x_t) * x_t,
        network_t,
        lambda out: broadcast_like(ask, x_t) * out + broadcast_like(keep, x_t) * x_t,
    )


def translation_coefficients(trained: Theory, to: Theory, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(t', ratio, ask, keep), each like t: the network hears t' and ratio·x; it becomes ask·out + keep·x.

    Raises:
        Refused: more than 0.05 rad beyond what was trained, and where `trained` is singular.
    """
    there = trained.time_at(to.log_snr(t))
    gap = (trained.angle(there) - to.angle(t)).abs()
    if bool((gap > OUTSIDE).any()):
        where = t.flatten()[gap.flatten().argmax()].item()
        raise Refused(
            f'"{trained.name}" was never trained at the log-SNR of t = {where:g} in "{to.name}". '
            f"Sample between the times both know."
        )
    r_there, from_out, from_z = trained.velocity_coefficients(there)
    a, s = to.data(t)
    p, q = to.model(t)
    r = torch.hypot(a, s)
    # out' = p·x_0 + q·x_T with x_0 = cos φ·z − sin φ·v and x_T = sin φ·z + cos φ·v
    of_z, of_v = (p * a + q * s) / r, (q * a - p * s) / r
    return there, r_there / r, of_v * from_out, (of_z + of_v * from_z) / r
