"""Clips: time is one more axis, and a picture is a clip of one frame."""

import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import Refused
from sfumato.models import Condition, load_codec, load_stage, save_stage
from sfumato.models.codecs.image import ResidualCodec
from sfumato.models.codecs.video import ClipCodec, FramewiseCodec
from sfumato.models.networks.dit import DiT
from sfumato.models.networks.tokens import apply_rotary, position_features, rotary


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lively(network):
    """Every weight drawn anew, so that nothing stays at zero."""
    generator = torch.Generator().manual_seed(2)
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return network


def words(count, width=24):
    rows = [{"tokens": drawn(3 + i, width, seed=i), "pooled": drawn(width, seed=9 + i)} for i in range(count)]
    return Condition.stack(rows)


ATTENTIONS = ("full", "factorised")


def network(attention, frames=4):
    net = DiT(4, 32, 4, 2, patch=2, text_width=24, frames=frames, attention=attention, direct=True)
    return lively(net).double()


def asked(net, x, clock, condition):
    return net(x.double(), clock.double(), condition.to(dtype=torch.float64))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_picture_is_a_clip_of_one_frame(attention):
    net, x, clock = network(attention), drawn(2, 4, 8, 12), torch.tensor([100.0, 700.0])
    out = asked(net, x, clock, words(2))
    torch.testing.assert_close(asked(net, x[:, :, None], clock, words(2))[:, :, 0], out)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_clips_answer_does_not_depend_on_its_batch(attention):
    net, x, clock = network(attention), drawn(3, 4, 3, 8, 12), torch.tensor([100.0, 400.0, 700.0])
    whole, condition = asked(net, x, clock, words(3)), words(3)
    for i in range(3):
        alone = asked(net, x[i : i + 1], clock[i : i + 1], Condition.stack([condition.row(i)]))
        torch.testing.assert_close(alone, whole[i : i + 1])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_one_time_for_all_frames_is_that_time_for_each(attention):
    net, x, clock = network(attention), drawn(2, 4, 3, 8, 8), torch.tensor([100.0, 700.0])
    each = clock[:, None].expand(2, 3)
    torch.testing.assert_close(asked(net, x, each, words(2)), asked(net, x, clock, words(2)))
    other = each.clone()
    other[:, 0] = 0
    assert (asked(net, x, other, words(2)) - asked(net, x, each, words(2))).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_frames_see_each_other_and_know_when_they_are(attention):
    net, clock = network(attention), torch.tensor([500.0])
    x = drawn(1, 4, 1, 8, 8).expand(-1, -1, 3, -1, -1)
    out = asked(net, x, clock, words(1))
    assert (out[:, :, 0] - out[:, :, 2]).abs().max() > 1e-3
    changed = x.clone()
    changed[:, :, 2] += 1
    assert (asked(net, changed, clock, words(1))[:, :, 0] - out[:, :, 0]).abs().max() > 1e-4


def test_factorized_attention_is_over_space_then_over_time():
    """In a network of one block a frame sees itself alone."""
    net = lively(DiT(4, 32, 1, 2, text_width=0, frames=3, attention="factorised"))
    x, clock = drawn(1, 4, 3, 4, 4), torch.tensor([500.0])
    changed = x.clone()
    changed[:, :, 2] += 1
    both = [net(one, clock, Condition({}, size=1)) for one in (x, changed)]
    assert torch.equal(both[0][:, :, :2], both[1][:, :, :2])


def test_what_is_seen_enters_the_answer_past_all_blocks():
    """Law: each token says how much of each channel it sees is added to its answer."""
    net = DiT(4, 32, 1, 2, patch=2, text_width=0, frames=3, direct=True)
    x, clock, condition = drawn(2, 4, 3, 4, 6), torch.tensor([100.0, 700.0]), Condition({}, size=2)
    assert not net(x, clock, condition).any()
    net.leave.bias.data[:4] = torch.tensor([1.0, 2, 3, 4])
    torch.testing.assert_close(net(x, clock, condition), x * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1))
    net.leave.weight.data[0] = drawn(32)
    share = (net(x, clock, condition) / x)[:, 0].unflatten(2, (2, 2)).unflatten(4, (3, 2))
    torch.testing.assert_close(share, share[:, :, :, :1, :, :1].expand_as(share), rtol=1e-3, atol=1e-4)
    assert share[:, :, :, 0, :, 0].flatten(1).std(1).min() > 1e-3


def test_a_network_of_pictures_refuses_clips():
    with pytest.raises(Refused, match=r"data\.frames"):
        DiT(4, 32, 1, 2, text_width=0)(drawn(1, 4, 2, 4, 4), torch.tensor([1.0]), Condition({}, size=1))


# ---------------------------------------------------------------- codecs


def codec(time_stride=2):
    made = lively(ClipCodec(4, 6, 8, time_stride))
    made.fit_normalization(drawn(2, 3, 1 + 2 * time_stride, 16, 16))
    return made.double()


@pytest.mark.parametrize("time_stride", [1, 2, 4])
def test_latents_have_a_frame_for_the_first_and_for_each_group(time_stride):
    made, frames = codec(time_stride), 1 + 3 * time_stride
    latents = made.encode(drawn(2, 3, frames, 16, 24).double())
    assert latents.shape == (2, *made.latent_shape(24, 16, frames)) == (2, 6, 4, 4, 6)
    assert made.decode(latents).shape == (2, 3, frames, 16, 24)
    if time_stride > 1:
        with pytest.raises(Refused, match=f"{frames} or {frames + time_stride} frames"):
            made.latent_shape(24, 16, frames + 1)


def test_a_still_is_the_clip_of_one_frame():
    made, pixels = codec(), drawn(2, 3, 16, 16).double()
    latents = made.encode(pixels)
    assert latents.shape == (2, 6, 1, 4, 4)
    torch.testing.assert_close(latents, made.encode(pixels[:, :, None]))
    torch.testing.assert_close(made.decode(latents[:, :, 0]), made.decode(latents)[:, :, 0])


def test_the_codec_does_not_look_ahead():
    made, pixels = codec(), drawn(1, 3, 7, 16, 16).double()
    latents, longer = made.encode(pixels[:, :, :5]), made.encode(pixels)
    torch.testing.assert_close(longer[:, :, :3], latents)
    torch.testing.assert_close(made.decode(longer)[:, :, :5], made.decode(latents))


def test_the_clip_codec_starts_at_the_principal_components():
    """With as many channels as a group's patch has numbers, nothing is lost before any training."""
    made, pixels = ClipCodec(2, 24, 8, 2), drawn(40, 3, 5, 8, 8).clamp(-1, 1)
    made.prepare(pixels)
    assert (made.decode(made.encode(pixels)) - pixels).abs().max() < 1e-3


def test_noise_makes_a_sample_of_the_posterior():
    made, pixels = codec(), drawn(1, 3, 3, 16, 16).double()
    noise = torch.ones(1, 6, 2, 4, 4).double()
    spread = (made.encode(pixels, noise) - made.encode(pixels)) * made.scale
    expected = (made.log_variance[:, None] / 2).exp().expand_as(spread)
    torch.testing.assert_close(spread, expected)


@pytest.mark.parametrize("make", [codec, lambda: FramewiseCodec(ResidualCodec(4, 6, 8).double())])
def test_a_codec_of_clips_is_written_and_read_back(make, tmp_path):
    made = make()
    save_stage(made, tmp_path / "codec")
    again, pixels = load_codec(tmp_path / "codec"), drawn(1, 3, 5, 16, 16)
    assert again.fingerprint() == load_stage(tmp_path / "codec").fingerprint()
    latents = again.encode(pixels)
    torch.testing.assert_close(latents, made.encode(pixels.double()).float(), atol=1e-4, rtol=1e-4)
    assert again.decode(latents).shape == pixels.shape


def test_frame_by_frame_is_the_picture_codec_on_each_frame():
    inner = ResidualCodec(4, 6, 8)
    made, pixels = FramewiseCodec(inner), drawn(2, 3, 3, 16, 16)
    latents = made.encode(pixels)
    torch.testing.assert_close(latents[:, :, 1], inner.encode(pixels[:, :, 1]))
    torch.testing.assert_close(made.decode(latents)[:, :, 2], inner.decode(latents[:, :, 2]))


def test_pictures_are_answered_as_before_there_were_clips():
    """The same weights give the same bits as the network in two dimensions, written down here."""
    net = lively(DiT(4, 32, 2, 2, patch=2, text_width=24))
    x, clock, condition = drawn(2, 4, 8, 12), torch.tensor([100.0, 700.0]), words(2)
    tokens = net.enter(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))
    tokens = tokens + net.place(position_features(4, 6, x.device))
    sketch = F.interpolate(net.canvas(condition["pooled"]), (4, 6), mode="bilinear")
    tokens = tokens + sketch.flatten(2).transpose(1, 2)
    time, text = net.conditioning_vector(clock, net.summary(condition)), net.text(condition["tokens"])
    mask, angles = F.pad(condition["mask"], (24, 0), value=True)[:, None, None], rotary(4, 6, 16, x.device)
    for block in net.blocks:
        a, b, c, d, e, f = (one[:, None] for one in block.modulation(time).chunk(6, -1))
        q, k, v = block.split(block.qkv(torch.addcmul(a, F.layer_norm(tokens, (32,)), 1 + b)), 3)
        more_k, more_v = block.split(block.text_kv(text), 2)
        q, k = apply_rotary(block.q_norm(q), *angles), apply_rotary(block.k_norm(k), *angles)
        k, v = torch.cat((k, block.k_norm(more_k)), 2), torch.cat((v, more_v), 2)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        tokens = torch.addcmul(tokens, c, block.out(seen))
        hidden = F.relu(block.up(torch.addcmul(d, F.layer_norm(tokens, (32,)), 1 + e))).square()
        tokens = torch.addcmul(tokens, f, block.down(hidden))
    shift, scale = (one[:, None] for one in net.last_modulation(time).chunk(2, -1))
    out = net.leave(torch.addcmul(shift, F.layer_norm(tokens, (32,)), 1 + scale))
    out = F.pixel_shuffle(out.transpose(1, 2).unflatten(-1, (4, 6)), 2)
    assert torch.equal(net(x, clock, condition), out)
