"""CogVideoX: a v-predicting transformer on clips that reads T5, whose padding it sees.

Source: Yang et al. 2024, arXiv:2408.06072.
"""

from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.pretrained.family import Family, called_with


class CogVideoX(Family):
    """Latents [B, 16, F, H, W]; the network takes frames before channels, and places by rotation (5B)."""

    weighted_tokens = (("tokenizer",),)
    pipelines = ("CogVideoXPipeline",)
    video = True
    stride = 8

    def size(self, pipe: Any) -> tuple[int, int]:
        """The size it was trained at."""
        known = pipe.transformer.config
        return known.sample_height * self.stride, known.sample_width * self.stride

    def frames(self, pipe: Any) -> int | None:
        """The pipeline's, else as many as it was trained on."""
        return called_with(type(pipe)).get("num_frames") or int(pipe.transformer.config.sample_frames)

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """v [B, 16, F, H, W]."""
        turned = network.config.use_rotary_positional_embeddings
        out = network(
            hidden_states=x.transpose(1, 2),
            encoder_hidden_states=condition["tokens"],
            timestep=clock,
            image_rotary_emb=rotation(network.config, x) if turned else None,
            return_dict=False,
        )[0]
        return out.transpose(1, 2)


def rotation(config: Any, x: Tensor) -> Any:
    """(cos, sin) of every token's place, from latents [B, C, F, H, W]; 1.5 also patches time."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, size = x.shape[2], config.patch_size
    grid = (x.shape[3] // size, x.shape[4] // size)
    base = (config.sample_height // size, config.sample_width // size)
    shared: dict[str, Any] = {"embed_dim": config.attention_head_dim, "grid_size": grid, "device": x.device}
    if config.patch_size_t is None:
        region = get_resize_crop_region_for_grid(grid, base[1], base[0])
        return get_3d_rotary_pos_embed(crops_coords=region, temporal_size=frames, **shared)
    steps = -(-frames // config.patch_size_t)
    return get_3d_rotary_pos_embed(
        crops_coords=None, temporal_size=steps, grid_type="slice", max_size=base, **shared
    )
