"""Context parallel of pretrained networks: diffusers' own hooks split and gather what a network's plan names.

`_cp_plan` of a network says where its sequence is split and where it is gathered; its attention exchanges
tokens for heads (Ulysses, arXiv:2309.14509). diffusers' `enable_parallelism` asks for an accelerator, so its
parts are put together here, for CPUs too. Its other way, ring attention, needs an attention that also tells
the logarithm of its sums, which torch's own does not.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import Refused


def parts_of(network: nn.Module) -> list[Any]:
    """The networks with a plan: the network itself, or those it chooses between."""
    return [part for part in (network, *network.children()) if getattr(part, "_cp_plan", None)]


def check(network: nn.Module, count: int, obstacle: str = "") -> None:
    """Raises Refused unless `count` processes can share a sample of this network.

    obstacle: why its plan does not work, if its family knows one.
    """
    found, name = parts_of(network), type(network).__name__
    why = obstacle or ("" if found else "diffusers has no plan (_cp_plan) for it")
    if why:
        raise Refused(f"train.context_parallel: {name} cannot be shared by processes: {why}. Leave it at 1.")
    for part in found:
        heads = part.config.num_attention_heads
        if heads % count:
            raise Refused(
                f"train.context_parallel = {count} gives each process some of the attention heads, but "
                f"{name} has {heads}. Choose a divisor of {heads}."
            )


def share(network: nn.Module, mesh: Any) -> None:
    """Let the processes of a mesh (dimensions ring, ulysses) share each sample.

    Raises:
        Refused: they cannot; its attention is computed by a backend that cannot be shared.
    """
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    count = mesh.size()
    device = next(network.parameters()).device
    for part in parts_of(network):
        config = ContextParallelConfig(ulysses_degree=count, mesh=mesh)
        both = ParallelConfig(context_parallel_config=config)
        both.setup(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, mesh=mesh)
        _tell(part, both)
        apply_context_parallel(part, config, part._cp_plan)
        part._even_words = part.register_forward_pre_hook(_evener(part, count), with_kwargs=True)


def unshare(network: nn.Module) -> None:
    """Every process computes whole samples again."""
    from diffusers.hooks.context_parallel import remove_context_parallel

    for part in parts_of(network):
        if getattr(part, "_parallel_config", None) is not None:
            remove_context_parallel(part, part._cp_plan)
            _tell(part, None)
            part._even_words.remove()


def _tell(network: Any, config: Any) -> None:
    """Tell the network and every attention layer of it."""
    from diffusers.models import attention_dispatch as dispatch

    registry: Any = dispatch._AttentionBackendRegistry
    for module in network.modules():
        processor: Any = getattr(module, "processor", None)
        if not hasattr(processor, "_parallel_config"):
            continue
        chosen = processor._attention_backend or registry.get_active_backend()[0]
        if config is not None and not registry._is_context_parallel_available(
            dispatch.AttentionBackendName(chosen)
        ):
            raise Refused(
                f'model.attention_backend = "{dispatch.AttentionBackendName(chosen).value}" cannot be shared '
                "by processes (train.context_parallel). Leave it out: torch's own can."
            )
        processor._parallel_config = config
    network._parallel_config = config


def _evener(network: Any, count: int) -> Any:
    """Some networks split the words too: where these have a mask, they are made as many as can be split."""
    entries = [entry for entry in network._cp_plan.values() if isinstance(entry, dict)]
    splits = any("encoder_hidden_states" in entry for entry in entries)

    def even(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        words: Tensor | None = named.get("encoder_hidden_states")
        if not splits or words is None or words.shape[1] % count == 0:
            return given, named
        if "encoder_hidden_states_mask" not in named:
            raise Refused(
                f"Prompts of {words.shape[1]} tokens cannot be shared evenly by {count} processes "
                f"(train.context_parallel). Choose another model.prompt_options, a multiple of {count}."
            )
        more, mask = -words.shape[1] % count, named["encoder_hidden_states_mask"]
        mask = torch.ones(words.shape[:2], dtype=torch.long, device=words.device) if mask is None else mask
        evened = {
            "encoder_hidden_states": F.pad(words, (0, 0, 0, more)),
            "encoder_hidden_states_mask": F.pad(mask, (0, more)),
        }
        return given, named | evened

    return even
