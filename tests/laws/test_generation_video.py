"""Clips are drawn around known frames, and longer than the network sees at once."""

from itertools import pairwise

import pytest
import torch
from PIL import Image

from sfumato.errors import Refused
from sfumato.generation import as_pipeline
from sfumato.generation.files import webp
from sfumato.generation.video import Windows, clip_pixels, image_pixels
from sfumato.models import Condition, new_codec, new_conditioner, new_model
from sfumato.models.settings import ModelSettings
from sfumato.theory import get, names, noise
from sfumato.training.objective.frame_timesteps import FrameTimes, by_frame, mean_of_unknown

TINY = {"width": 32, "depth": 2, "heads": 2, "latent_channels": 4, "codec_width": 8, "codec_stride": 4}
DRAWN = {"width": 16, "height": 16, "steps": 3, "guidance": 1}


def model(theory="flow-matching", frames=5):
    settings = ModelSettings(**TINY, text_encoder="none", theory=theory)
    codec = new_codec(settings, clips=True)
    codec.fit_normalization(noise.normal((3, frames, 16, 16), 0, range(4)))
    made = as_pipeline(new_model(settings, codec, new_conditioner(settings), frames=frames))
    for index, weight in enumerate(made.denoiser.parameters()):
        weight.data = 0.1 * noise.normal(tuple(weight.shape), 1, [index])[0]
    made.info |= {"frames": frames, "fps": 8.0, "known": ["first", "last"], "guidance": 1.0}
    return made


@pytest.fixture
def picture():
    return Image.effect_noise((16, 16), 60).convert("RGB")


SOUND = [name for name in names() if get(name).check().ok]


@pytest.mark.parametrize("theory", SOUND)
def test_a_known_frame_comes_out_as_it_went_in(theory, picture):
    made = model(theory)
    seen = []
    decode = made.codec.decode
    made.codec.decode = lambda latents: seen.append(latents) or decode(latents)
    (clip,) = made.generate(image=picture, **DRAWN)
    (free,) = made.generate(**DRAWN)
    known = made.encode(image_pixels(picture, 16, 16)[None])
    torch.testing.assert_close(seen[0][:, :, :1], known, atol=1e-4, rtol=1e-4)
    assert clip.shape == free.shape == (5, 16, 16, 3)
    assert (clip[1:] != free[1:]).any()


def test_first_and_last_frame_are_held(picture):
    made, seen = model(), []
    decode = made.codec.decode
    made.codec.decode = lambda latents: seen.append(latents) or decode(latents)
    other = picture.rotate(90)
    made.generate(seed=[1, 2], image=picture, last_image=[picture, other], **DRAWN)
    assert torch.equal(seen[0][0, :, 0], seen[0][1, :, 0])
    assert not torch.allclose(seen[0][0, :, -1], seen[0][1, :, -1])


def test_frames_that_were_not_trained_for_are_refused(picture):
    made = model()
    del made.info["known"]
    with pytest.raises(Refused, match="first_frame_share"):
        made.generate(image=picture, **DRAWN)
    made.info["known"] = ["first"]
    with pytest.raises(Refused, match="last_frame_share"):
        made.generate(image=picture, last_image=picture, **DRAWN)


def test_windows_cover_every_frame_with_their_overlap():
    for size, overlap, frames in ((4, 2, 4), (4, 2, 5), (4, 2, 9), (5, 0, 10), (3, 1, 20), (4, 3, 7)):
        pieces = Windows(size, overlap).pieces(frames)
        assert pieces[0].start == 0 and pieces[-1].stop == frames
        assert all(piece.stop - piece.start == min(size, frames) for piece in pieces)
        assert all(b.start <= a.stop - overlap for a, b in pairwise(pieces))


def test_windows_of_a_network_that_sees_single_frames_change_nothing():
    asked = []

    def ask(x_t, t, condition):
        asked.append(x_t.shape[2])
        return 2 * x_t + t.view(-1, 1, t.shape[-1] if t.ndim == 2 else 1, 1, 1)

    x, condition = noise.normal((2, 9, 3, 3), 0, range(2)), Condition({}, size=2)
    windowed = Windows(4, 2).asked(ask)
    for t in (torch.tensor([0.2, 0.5]), torch.rand(2, 9)):
        torch.testing.assert_close(windowed(x, t, condition), ask(x, t, condition))
    assert max(asked[:4]) == 4


def test_a_clip_may_be_longer_than_those_it_was_trained_on():
    made = model()
    sizes = []
    forward = made.denoiser.forward
    made.denoiser.forward = lambda x, *more: sizes.append(x.shape[2]) or forward(x, *more)
    (clip,) = made.generate(frames=14, **DRAWN)
    assert clip.shape == (14, 16, 16, 3) and set(sizes) == {3}
    (short,) = made.generate(frames=5, **DRAWN)
    (same,) = made.generate(frames=5, window=5, **DRAWN)
    assert (short == same).all()
    with pytest.raises(Refused, match="overlap"):
        made.generate(frames=14, window=5, overlap=5, **DRAWN)


def test_a_size_that_the_network_cannot_cut_into_tokens_is_refused():
    made = model()
    made.denoiser.latent_multiple = 2
    with pytest.raises(Refused, match=r"multiples of 8. Choose 16×8"):
        made.generate(**{**DRAWN, "height": 12})


def test_a_clip_may_begin_from_a_clip(tmp_path):
    """Little strength keeps it, and its file begins the same."""
    made = model()
    clip = (noise.normal((5, 16, 16, 3), 3, [0])[0] * 40 + 128).clamp(0, 255).byte().numpy()
    kept = made.decode(made.encode(clip_pixels(clip, 16, 16, 5)[None])).clamp(-1, 1)
    whole = {**DRAWN, "steps": 50}
    near, far = (made.generate(init=clip, strength=s, **whole)[0] for s in (0.02, 0.9))
    shown = ((kept[0].permute(1, 2, 3, 0) + 1) * 127.5).numpy()
    assert abs(near - shown).mean() < 0.3 * abs(far - shown).mean()
    (tmp_path / "clip.webp").write_bytes(
        webp([Image.fromarray(frame) for frame in clip], {}, 8, lossless=True)
    )
    (again,) = made.generate(init=str(tmp_path / "clip.webp"), strength=0.02, **whole)
    assert (again == near).all()
    with pytest.raises(Refused, match="cannot be read"):
        made.generate(init=str(tmp_path / "no.mp4"), **DRAWN)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("lengths", [[50] * 16, [100] * 8, [300, 20, 20, 60, 100, 300], [400, 400]])
def test_a_file_is_seen_at_the_models_rate(lengths, tmp_path):
    """Law: frame i is what the file shows at i / fps seconds, whatever rate it has, even or not."""
    pictures = [Image.new("RGB", (8, 8), (10 * i, 0, 0)) for i in range(len(lengths))]
    file = tmp_path / "uneven.webp"
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=lengths, lossless=True)
    seen = (clip_pixels(file, 8, 8, 6, fps=8.0)[0, :, 0, 0] + 1) * 127.5 / 10
    began = [sum(lengths[:i]) for i in range(len(lengths))]
    shown = [max(i for i, start in enumerate(began) if start <= 125 * at + 1) for at in range(6)]
    assert seen.round().int().tolist() == shown


def test_times_of_frames_are_a_function_of_sample_and_step():
    theory, t = get("flow-matching"), torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    times = FrameTimes(apart=True, first=0.5, last=0.5)

    def density(theory, u):
        return u

    whole, known = times(theory, density, t, 4, 7, [11, 12, 13], 5)
    part, part_known = times(theory, density, t[1:], 4, 7, [12, 13], 5)
    assert torch.equal(whole[1:], part) and torch.equal(known[1:], part_known)
    assert whole.shape == (3, 4) and not known[:, 1:-1].any()
    assert torch.equal(whole[:, 0][~known[:, 0]], t[~known[:, 0]]) and (whole[:, 1] != t).all()


def test_frames_that_share_their_time_lose_as_before():
    theory = get("flow-matching")
    x_0, x_T = (noise.normal((2, 3, 4, 4), seed, range(3)) for seed in (0, 1))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    each = t[:, None].expand(3, 3)
    torch.testing.assert_close(by_frame(theory.mix, x_0, x_T, each), theory.mix(x_0, x_T, t))
    error = (x_0 - x_T) ** 2
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    torch.testing.assert_close(mean_of_unknown(error, torch.ones(3, 3), nothing), error.flatten(1).mean(1))


def test_known_frames_are_not_asked_for():
    error = torch.ones(1, 2, 3, 4, 4)
    error[:, :, 0] = 1e6
    known = torch.tensor([[True, False, False]])
    assert float(mean_of_unknown(error, torch.ones(1, 3), known)) == 1
