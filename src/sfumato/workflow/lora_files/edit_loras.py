"""LoRA files added up, made smaller, written under other names, or taken from the difference of two models.

What is written is loaded back into the base and compared, weight by weight.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from sfumato.errors import Failed, Refused, one_of
from sfumato.generation import Pipeline, load
from sfumato.models.files import save_sealed
from sfumato.models.lora import adapter, key_conversion, lora_file
from sfumato.models.lora.experts import EXPERT_HEADER
from sfumato.models.lora.layer_names import layer_names_of
from sfumato.run_folder import atomic_folder
from sfumato.workflow.export.export_run import TARGETS
from sfumato.workflow.export.lora import LORA_FILE, load_back, merged_weight
from sfumato.workflow.export.text_encoders import encoders, flat_prefix, full_layer_name
from sfumato.workflow.lora_files.low_rank import LowRank, Place, layers_by_network, of_matrix, read_low_rank

SECOND = "transformer_2"
NEAR = 1e-4
"""How far a weight that was loaded back may be off, as a share of its layer's largest."""


@dataclass(frozen=True)
class LoraFiles:
    """What was written: files; ranks: how many layers of each; kept: the share of the change that is left.

    apart: how far the weights are off once loaded back, as a share of a layer's largest.
    """

    files: tuple[Path, ...]
    ranks: dict[int, int]
    kept: float
    apart: float
    notes: tuple[str, ...] = ()


def merge(
    files: Sequence[tuple[Path | str, float]],
    base: Path,
    to: str,
    out: Path,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoraFiles:
    """Write the weighted sum of LoRA files as one, for diffusers, ComfyUI or kohya's tools.

    One file alone at weight 1 is converted, and with a rank or an energy resized.

    Args:
        files: (file, weight). base: the model they are for. out: the folder to write into.
        rank: of each layer, at most; energy: the share of each layer's squared change to keep. Without
            either the sum is exact.
    Raises:
        Refused: a file that is no LoRA of this base, or what the target has no room for.
        Failed: what was written makes other weights once it is loaded back.
    """
    model = _base(base, to)
    _check_reduction(rank, energy)
    total: dict[Place, LowRank] = {}
    for file, amount in files:
        for place, change in read_low_rank(model, file, amount, rank, energy).items():
            total[place] = total[place].plus(change) if place in total else change
    before = {place: change.norm() for place, change in total.items()}
    if rank is not None or energy is not None:
        total = {place: change.reduced(rank, energy) for place, change in total.items()}
    told = {"merged": ", ".join(f"{Path(file).name}:{amount:g}" for file, amount in files)}
    return _write(model, base, total, before, to, out, told, dtype)


@torch.no_grad()
def extract(
    tuned: Path,
    base: Path,
    to: str,
    out: Path,
    rank: int,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoraFiles:
    """Write the difference of two whole models as a LoRA of the base.

    Args:
        tuned: a run, a folder or a single file of the same network; rank: of each layer, at most.
    Raises:
        Refused: models of different networks, or that do not differ where a LoRA can say so.
        Failed: what was written makes other weights once it is loaded back.
    """
    model, other = _base(base, to), load(tuned)
    _check_reduction(rank, energy)
    layers, theirs = layers_by_network(model), layers_by_network(other)
    total: dict[Place, LowRank] = {}
    before: dict[Place, float] = {}
    rest: list[str] = []
    for home, known in layers.items():
        for layer, module in known.items():
            there = theirs.get(home, {}).get(layer)
            if there is None or there.weight.shape != module.weight.shape:
                raise Refused(
                    f"{tuned} is no model of {base}'s network: {layer} differs. Give another --base."
                )
            delta = there.weight.float() - module.weight.float()
            if not bool(delta.any()):
                continue
            if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) != 1:
                rest.append(layer)
                continue
            total[home, layer] = of_matrix(delta, rank, energy)
            before[home, layer] = float(delta.norm())
    if not total:
        raise Refused(f"{tuned} and {base} have the same weights, so that there is nothing to extract.")
    notes = [
        f"{len(rest)} layers that are no matrices also differ, which is left out: {lora_file.said(rest)}."
    ]
    told = {"extracted": tuned.name}
    return _write(model, base, total, before, to, out, told, dtype, notes if rest else [])


def _base(base: Path, to: str) -> Pipeline:
    one_of("--to", to, TARGETS)
    model = load(base)
    if model.origin is None:
        raise Refused(f"{base} is a model of sfumato's own stages; LoRA files are of pretrained models.")
    return model


def _check_reduction(rank: int | None, energy: float | None) -> None:
    if rank is not None and rank < 1:
        raise Refused(f"--rank {rank}: a LoRA has rank 1 at least.")
    if energy is not None and not 0 < energy <= 1:
        raise Refused(f"--energy {energy:g}: give the share that is kept, above 0 and at most 1, as 0.95.")


def _write(
    model: Pipeline,
    base: Path,
    total: Mapping[Place, LowRank],
    before: Mapping[Place, float],
    to: str,
    out: Path,
    told: Mapping[str, str],
    dtype: torch.dtype,
    notes: Sequence[str] = (),
) -> LoraFiles:
    """Write the changes under a target's names, load them back into the base, and compare the weights."""
    about = {
        "format": "pt", "software": "sfumato", "base": base.name, "pipeline": model.info["pipeline"],
        "modelspec.sai_model_spec": "1.0.0", "modelspec.title": out.name,
        "modelspec.architecture": model.info["pipeline"].removesuffix("Pipeline") + "/lora",
        "ss_network_module": "networks.lora", "ss_network_dim": str(max(one.rank for one in total.values())),
        "ss_base_model_version": model.info["family"], **told,
    }  # fmt: skip
    with atomic_folder(out) as beside:
        for second in ("", "_2"):
            _write_network(model, total, second, to, beside, about, dtype)
        written = sorted(beside.glob("*.safetensors"))
        apart = _compare(model, load(base), written, total, to, dtype)
        names = sorted(file.name for file in beside.iterdir())
    kept = sum(one.norm() ** 2 for one in total.values()) / max(sum(one**2 for one in before.values()), 1e-30)
    ranks = Counter(one.rank for one in total.values())
    return LoraFiles(
        tuple(out / name for name in names), dict(sorted(ranks.items())), min(1.0, kept), apart, tuple(notes)
    )


def _write_network(
    model: Pipeline,
    total: Mapping[Place, LowRank],
    second: str,
    to: str,
    folder: Path,
    about: dict[str, str],
    dtype: torch.dtype,
) -> None:
    """The file of the denoiser and the text encoders, or with `second` of the second of two experts."""
    own = {layer: change for (home, layer), change in total.items() if home == (SECOND if second else "")}
    text = {} if second else _text_keys(model, total, to, dtype)
    if not own and not text:
        return
    network = key_conversion.networks(model)[SECOND if second else ""]
    parts = _peft(own, dtype)
    if hasattr(adapter.peft_target(model.denoiser), "noisy"):
        about = {**about, EXPERT_HEADER: "low" if second else "high"}
    if to != "diffusers":
        names = layer_names_of(model.denoiser.family)
        keyed = key_conversion.to_target_keys(parts, 1.0, names, to, network) if parts else {}
        save_sealed(keyed | text, folder / f"{about['modelspec.title']}{second}.safetensors", about)
    elif hasattr(model.origin, "load_lora_weights"):
        prefix = model.denoiser.family.network
        keyed = {f"{prefix}.{name}": tensor for name, tensor in parts.items()} | text
        save_sealed(keyed, folder / LORA_FILE.replace(".", f"{second}."), about)
    else:
        import peft

        ranks = {layer: change.rank for layer, change in own.items()}
        most = max(ranks.values())
        config = peft.LoraConfig(
            r=most, lora_alpha=most, target_modules=sorted(own), rank_pattern=ranks, alpha_pattern=ranks
        )
        config.save_pretrained(str(folder))
        keyed = {f"base_model.model.{name}": tensor for name, tensor in parts.items()}
        save_sealed(keyed, folder / "adapter_model.safetensors", about)


def _peft(changes: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors under peft's names, with kernels for convolutions."""
    found: dict[str, Tensor] = {}
    for layer, change in changes.items():
        ones = [1] * (len(change.shape) - 2)
        found[f"{layer}.lora_A.weight"] = (
            change.down.reshape(change.rank, *change.shape[1:]).to(dtype).contiguous()
        )
        found[f"{layer}.lora_B.weight"] = change.up.reshape(-1, change.rank, *ones).to(dtype).contiguous()
    return found


def _text_keys(
    model: Pipeline, total: Mapping[Place, LowRank], to: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is changed of the text encoders, under the target's names."""
    found: dict[str, Tensor] = {}
    for home in encoders(model):
        flat = flat_prefix(model, home)
        for name, tensor in _peft({y: one for (x, y), one in total.items() if x == home}, dtype).items():
            end = lora_file.end_of(name)
            layer = full_layer_name(name.removesuffix(end))
            if to == "diffusers":
                found[f"{home}.{layer}{end}"] = tensor
                continue
            key = flat + layer.replace(".", "_")
            found[f"{key}.lora_down.weight" if end == ".lora_A.weight" else f"{key}.lora_up.weight"] = tensor
            found[f"{key}.alpha"] = torch.tensor(
                float(min(tensor.shape[:2]) if tensor.ndim == 2 else len(tensor))
            )
    return found


@torch.no_grad()
def _compare(
    model: Pipeline,
    fresh: Pipeline,
    files: Sequence[Path],
    total: Mapping[Place, LowRank],
    to: str,
    dtype: torch.dtype,
) -> float:
    """How far the weights are off once the target has loaded the files into a fresh base.

    Raises:
        Failed: further than rounding explains, or a layer that was not matched.
    """
    has_two = hasattr(adapter.peft_target(model.denoiser), "noisy")
    spelt = {"": "noisy.", SECOND: "clean."} if has_two else {"": ""}
    inside = {place: spelt.get(place[0], f"{place[0]}.") + place[1] for place in total}
    acting = {name for place, name in inside.items() if bool(total[place].up.any())}
    where = load_back(fresh, files, to, set(inside.values()) if to == "diffusers" else acting)
    mine, worst = layers_by_network(model), 0.0
    networks = key_conversion.networks(fresh)
    for (home, layer), change in total.items():
        expected = cast(Tensor, mine[home][layer].weight).float() + change.whole()
        there = merged_weight(networks[home].get_submodule(layer))
        worst = max(worst, float((there - expected).abs().max() / expected.abs().max().clamp(min=1e-8)))
    if not worst < NEAR + 4 * torch.finfo(dtype).eps:
        raise Failed(
            f"What was written makes other weights once {where} has loaded it: {worst:.1e} of a layer's "
            "largest apart. Nothing was kept."
        )
    return worst
