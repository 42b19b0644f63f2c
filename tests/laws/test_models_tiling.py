"""Decoding in pieces is decoding."""

import diffusers
import pytest
import torch

from sfumato.errors import Refused
from sfumato.models import load_codec, load_stage, save_stage
from sfumato.models.codecs.image import PixelCodec, ResidualCodec
from sfumato.models.codecs.tiling import Tiling, decode_tiled
from sfumato.models.codecs.video import ClipCodec, FramewiseCodec
from sfumato.theory import noise


def lively(network):
    """Every weight drawn anew, so that nothing stays at zero."""
    for index, weight in enumerate(network.parameters()):
        weight.data = 0.1 * noise.normal(tuple(weight.shape), 1, [index])[0]
    return network.double()


OURS = {
    "residual": (lambda: ResidualCodec(4, 6, 8), (6, 14, 17)),
    "clip": (lambda: ClipCodec(4, 6, 8, 2), (6, 6, 14, 17)),
    "clip, every frame": (lambda: ClipCodec(4, 6, 8, 1), (6, 4, 14, 14)),
    "framewise": (lambda: FramewiseCodec(ResidualCodec(4, 6, 8)), (6, 2, 14, 14)),
    "pixels": (PixelCodec, (3, 40, 44)),
}


@pytest.mark.parametrize("pieces", [Tiling(24, 1), Tiling(0, 4)], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_pieces_of_our_codecs_are_the_whole(name, pieces):
    make, shape = OURS[name]
    made, latents = lively(make()), noise.normal(shape, 0, range(2)).double()
    with torch.no_grad():
        torch.testing.assert_close(decode_tiled(made, latents, pieces), made.decode(latents))


def test_pieces_need_less_memory_at_once():
    made, seen = lively(ClipCodec(4, 6, 8, 2)), []
    paint = made.decode_raw
    made.decode_raw = lambda raw: seen.append(raw[0, 0].numel()) or paint(raw)
    latents = noise.normal((6, 16, 24, 24), 0, [0]).double()
    with torch.no_grad():
        decode_tiled(made, latents, Tiling(20, 4))
    assert max(seen) <= 4 * 19 * 19


WIDTHS = {"block_out_channels": (8,) * 4}
LAYERS = {"layers_per_block": (1,) * 5}
AUTOENCODERS = {
    "AutoencoderKLWan": {"base_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 2, 2, 2]},
    "AutoencoderKLLTXVideo": {
        **WIDTHS, **LAYERS, "latent_channels": 16, "decoder_block_out_channels": (8,) * 4,
        "decoder_layers_per_block": (1,) * 5,
    },
    "AutoencoderKLHunyuanVideo": {**WIDTHS, "layers_per_block": 1, "norm_num_groups": 4},
    "AutoencoderKLCogVideoX": {
        **WIDTHS, "layers_per_block": 1, "norm_num_groups": 4, "sample_height": 32, "sample_width": 48,
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (64,) * 4, "decoder_block_out_channels": (64,) * 4,
        "layers_per_block": (1,) * 5,
    },
}  # fmt: skip


LARGE = ("AutoencoderKLMochi", "AutoencoderKLHunyuanVideo", "AutoencoderKLCogVideoX")


@pytest.fixture(
    scope="module",
    params=[pytest.param(one, marks=[pytest.mark.slow] * (one in LARGE)) for one in AUTOENCODERS],
)
def autoencoder(request, tmp_path_factory):
    """A codec from a small autoencoder's folder, and the autoencoder."""
    folder = tmp_path_factory.mktemp("codecs") / request.param
    torch.manual_seed(0)
    network = getattr(diffusers, request.param)(**AUTOENCODERS[request.param])
    network.save_pretrained(folder)
    return load_codec(folder), network.eval()


def clip_for(codec, tiles=1):
    side = max(32, 2 * codec.stride) * tiles
    return noise.normal((3, 1 + 2 * codec.time_stride, side, side), 0, [0]).clamp(-1, 1)


@torch.no_grad()
def test_diffusers_video_autoencoders_are_codecs(autoencoder, tmp_path):
    codec, network = autoencoder
    pixels = clip_for(codec)
    latents = codec.encode(pixels)
    assert tuple(latents.shape[1:]) == codec.latent_shape(pixels.shape[-1], pixels.shape[-2], pixels.shape[2])
    raw = network.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents * codec.scale + codec.shift, raw, atol=1e-4, rtol=1e-4)
    assert codec.decode(latents).shape == pixels.shape
    still = codec.encode(pixels[:, :, 0])
    torch.testing.assert_close(still, codec.encode(pixels[:, :, :1]))
    save_stage(codec, tmp_path / "codec")
    torch.testing.assert_close(load_stage(tmp_path / "codec").encode(pixels), latents)


@torch.no_grad()
def test_diffusers_video_autoencoders_decode_in_tiles(autoencoder):
    codec, _ = autoencoder
    pixels = clip_for(codec, 4)[:1]
    latents = codec.encode(pixels)
    plain = codec.decode(latents)
    tiled = decode_tiled(codec, latents, Tiling(tile=4 * codec.stride, frames=2 * codec.time_stride))
    assert tiled.shape == plain.shape and torch.isfinite(tiled).all() and (tiled != plain).any()
    torch.testing.assert_close(codec.decode(latents), plain)  # the switches are back
    with pytest.raises(Refused, match="multiples"):
        decode_tiled(codec, latents, Tiling(tile=3))
