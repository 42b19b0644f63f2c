"""diffusers' UNet2DConditionModel as a denoiser: text by cross-attention, the summary through the time."""

from typing import Any

from torch import Tensor

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.interface import Denoiser, registered


@registered
class UNet(Denoiser):
    """Latents [B, C, H, W] → an answer of the same shape.

    Args:
        channels: of the latents.
        width: of the first level; the levels have width · 1, 2, 3, …
        depth: levels; each but the first halves the sides.
        heads: attention heads.
        text_width: D of the condition's `tokens`; 0 for an unconditional network.
        pooled_width: of its `pooled`; default the same.
        classes: of the condition's `labels`.
        clock_range: what the theory's clock says near the data and near the noise; mapped onto [0, 1000].
    """

    kind = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(
        self,
        channels: int,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        text_width: int = 384,
        pooled_width: int | None = None,
        clock_range: tuple[float, float] = (0.0, 1000.0),
        classes: int = 0,
    ):
        super().__init__()
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        if width % (8 * heads):
            raise Refused(f"A UNet of width {width} cannot have {heads} heads: width must divide by 8·heads.")
        self._config = {
            "channels": channels,
            "width": width,
            "depth": depth,
            "heads": heads,
            "text_width": text_width,
            "pooled_width": pooled_width,
            "clock_range": list(clock_range),
        }
        self._config |= {"classes": classes} if classes else {}
        self.clock_range, self.text_width, self.deepest = clock_range, text_width, 2 ** (depth - 1)
        self.latent_multiple = self.deepest
        cross = "CrossAttn" if text_width else ""
        widths = tuple(width * (level + 1) for level in range(depth))
        self.network = UNet2DConditionModel(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            down_block_types=(f"{cross}DownBlock2D",) * depth,
            up_block_types=(f"{cross}UpBlock2D",) * depth,
            mid_block_type="UNetMidBlock2DCrossAttn" if text_width else "UNetMidBlock2D",
            cross_attention_dim=text_width or width,
            attention_head_dim=heads,
            norm_num_groups=8,
            layers_per_block=1,
            class_embed_type="projection" if text_width else None,
            projection_class_embeddings_input_dim=(pooled_width or text_width) or None,
            num_class_embeds=classes + 1 if classes else None,
        )

    def config(self) -> dict[str, Any]:
        """The arguments it was built with."""
        return self._config

    def forward(self, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], clock [B], `tokens` [B, L, D], `mask` [B, L], `pooled` [B, D] → [B, C, H, W]."""
        if x.shape[-1] % self.deepest or x.shape[-2] % self.deepest:
            raise Refused(
                f"Latents of {x.shape[-2]}×{x.shape[-1]} cannot be halved {self.deepest.bit_length() - 1} "
                "times, as this UNet does. Choose a resolution that can, or a smaller model.depth."
            )
        low, high = self.clock_range
        return self.network(
            x,
            (clock - low) * (1000 / (high - low)),
            encoder_hidden_states=condition.get("tokens"),
            class_labels=condition.get("labels", condition.get("pooled")),
            encoder_attention_mask=condition.get("mask"),
        ).sample
