"""Pictures and clips are read as a player or a browser shows them, by training and by drawing alike."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw

from sfumato.data.encoding import views
from sfumato.data.encoding.views import EncodingOptions
from sfumato.data.sources.sample import Sample
from sfumato.data.store.store import key
from sfumato.errors import Refused
from sfumato.generation.image_guidance import fit_image
from sfumato.generation.video import clip_pixels, frames_in
from sfumato.models.pretrained.image_inputs import mask_picture, picture
from sfumato.readers import clips, media, video_frames
from sfumato.readers.clips import ClipSpan

# ---------------------------------------------------------------- pictures


def profile(gamma, colorants, name):
    """A matrix profile of ICC version 2, made by hand: gamma, and the colors of its primaries under D50."""

    def fixed(value):
        return struct.pack(">i", round(value * 65536))

    def color(x, y, z):
        return b"XYZ \0\0\0\0" + fixed(x) + fixed(y) + fixed(z)

    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" * 79,
        b"wtpt": color(0.9642, 1, 0.8249),
        **{tag: color(*values) for tag, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True)},
        **{
            tag: b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
            for tag in (b"rTRC", b"gTRC", b"bTRC")
        },
    }
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += tag + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    head += fixed(0.9642) + fixed(1) + fixed(0.8249) + b"\0" * 48
    return head + table + data


ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
WIDE = profile(2.2, ADOBE, b"Wide like Adobe RGB")
LINEAR = profile(1.0, SRGB, b"Linear sRGB")


def saved(path, image, **options):
    image.save(path, **options)
    return path


def linear_of(code):
    """The sRGB level of an amount of light that is written as a code of 255."""
    light = code / 255
    return 255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)


GREEN = (60, 200, 80)
PROFILES = {
    "rgb.png": lambda p: saved(p, Image.new("RGB", (16, 16), GREEN), icc_profile=WIDE),
    "rgba.png": lambda p: saved(p, Image.new("RGBA", (16, 16), (*GREEN, 255)), icc_profile=WIDE),
    "palette.png": lambda p: saved(p, Image.new("RGB", (16, 16), GREEN).quantize(4), icc_profile=WIDE),
    "clear.webp": lambda p: saved(p, half_clear(GREEN), icc_profile=WIDE, lossless=True),
    "clear.png": lambda p: saved(p, half_clear(GREEN), icc_profile=WIDE),
    "plain.tif": lambda p: saved(p, Image.new("RGB", (16, 16), GREEN), icc_profile=WIDE),
}


def half_clear(color):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((*color, 255), (4, 4, 12, 12))
    return image


@pytest.mark.parametrize("name", PROFILES)
def test_an_embedded_profile_is_applied_whatever_holds_the_colors(name, tmp_path):
    """Law: what training sees, and what drawing sees, is what littleCMS, asked directly, says."""
    file = PROFILES[name](tmp_path / name)
    source, target = ImageCms.ImageCmsProfile(io.BytesIO(WIDE)), ImageCms.createProfile("sRGB")
    judged = ImageCms.profileToProfile(Image.new("RGB", (1, 1), GREEN), source, target, outputMode="RGB")
    right = judged.getpixel((0, 0))
    assert max(abs(a - b) for a, b in zip(right, GREEN, strict=True)) > 20
    for read in (media.read_picture(file), picture(file)):
        assert max(abs(a - b) for a, b in zip(read.getpixel((8, 8)), right, strict=True)) <= 2
        if "clear" in name:
            assert read.getpixel((1, 1)) == (255, 255, 255)


def test_a_profile_that_has_srgb_in_its_name_is_applied_unless_it_is_srgb(tmp_path):
    """Law: linear light of 60 is shown as 133, and colors that are sRGB already stay bit for bit."""
    grey = Image.new("RGB", (16, 16), (60, 60, 60))
    read = media.read_picture(saved(tmp_path / "linear.png", grey, icc_profile=LINEAR))
    assert abs(read.getpixel((8, 8))[0] - linear_of(60)) <= 1.5 and round(linear_of(60)) == 133
    own = profile(2.2, SRGB, b"sRGB IEC61966-2.1")
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() or own
    noise = Image.merge("RGB", [Image.effect_noise((32, 32), 80) for _ in range(3)]).convert("RGBA")
    file = saved(tmp_path / "plain.png", noise, icc_profile=own)
    assert (np.asarray(media.read_picture(file)) == np.asarray(noise.convert("RGB"))).all()
    assert media.conversion_of(file) == ""


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("ending", ["tif", "jpg", "png", "webp"])
def test_a_turned_picture_has_the_size_it_is_read_with(ending, turn, tmp_path):
    """Law: the size told from the head is that of the pixels; a TIFF's is not swapped twice."""
    exif = Image.Exif()
    exif[0x0112] = turn
    file = saved(tmp_path / f"turned.{ending}", Image.new("RGB", (60, 120), GREEN), exif=exif)
    assert media.size_of(file) == media.read_picture(file).size == ((60, 120) if turn < 5 else (120, 60))


def upright():
    image = Image.new("RGB", (40, 60), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 40, 30))
    return image


def phone(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(path, upright().transpose(Image.Transpose.ROTATE_90), exif=exif, quality=98)


def palette(path):
    image = Image.new("P", (40, 60), 1)
    image.putpalette([0, 0, 0, 10, 20, 30] + [0] * 762)
    return saved(path, image, transparency=1)


SHOWN = {
    "phone.jpg": (phone, (255, 0, 0)),
    "clear.png": (lambda p: saved(p, Image.new("RGBA", (40, 60), (0, 0, 0, 0))), (255, 255, 255)),
    "palette.png": (palette, (255, 255, 255)),
    "grey16.png": (lambda p: saved(p, Image.fromarray(np.full((60, 40), 40000, np.uint16))), (156, 156, 156)),
    "float.tif": (lambda p: saved(p, Image.fromarray(np.full((60, 40), 0.5, np.float32))), (128, 128, 128)),
    "cmyk.jpg": (lambda p: saved(p, Image.new("CMYK", (40, 60), (0, 255, 255, 0)), quality=98), (255, 0, 0)),
    "dark16.png": (lambda p: saved(p, Image.fromarray(np.full((60, 40), 300, np.uint16))), (1, 1, 1)),
    "linear.png": (
        lambda p: saved(p, Image.new("RGB", (40, 60), (60, 60, 60)), icc_profile=LINEAR),
        (133, 133, 133),
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_shown_to_a_drawing_is_read_as_training_reads_it(name, tmp_path):
    """Law: a picture to start from, a mask, a control, a reference, a clip's frame: the same right pixels."""
    make, right = SHOWN[name]
    file = make(tmp_path / name)
    for read in (media.read_picture(file), picture(file), picture(str(file)), frames_in(file, 1)[0]):
        assert read.size == (40, 60)
        assert max(abs(a - b) for a, b in zip(read.getpixel((20, 10)), right, strict=True)) <= 4
    level = fit_image(str(file), 40, 60)[:, 10, 20]
    torch.testing.assert_close((level + 1) * 127.5, torch.tensor(right).float(), atol=4, rtol=0)


def test_pixels_in_memory_are_read_likewise():
    """Law: a PIL picture with a clear ground is seen on white, uint8 and floats as they are."""
    assert picture(half_clear(GREEN)).getpixel((1, 1)) == (255, 255, 255)
    assert picture(np.full((16, 16, 3), 7, np.uint8)).getpixel((3, 3)) == (7, 7, 7)
    assert picture(torch.zeros(3, 16, 16)).getpixel((3, 3)) == (128, 128, 128)


def torn(kind):
    buffer = io.BytesIO()
    Image.merge("RGB", [Image.effect_noise((64, 64), 80)] * 3).save(buffer, kind)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


REFUSED = {
    "torn.jpg": lambda: torn("JPEG"),
    "torn.png": lambda: torn("PNG"),
    "script.jpg": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\nshowpage\n",
    "script.eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\nshowpage\n",
    "playlist.mp4": lambda: b"ffconcat version 1.0\nfile 'real.mp4'\n",
    "list.png": lambda: b"#EXTM3U\n#EXTINF:1,\nreal.mp4\n",
    "empty.png": lambda: b"",
    "gone.png": None,
    "gone.mp4": None,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_torn_or_of_another_kind_is_refused_in_a_sentence(name, tmp_path, monkeypatch):
    """Law: no other program is started, no other file is opened, and the sentence names the file."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    movie(tmp_path / "real.mp4", [plain(90)] * 4)
    if REFUSED[name]:
        (tmp_path / name).write_bytes(REFUSED[name]())
    for read in (picture, lambda file: clip_pixels(file, 32, 32, 2)):
        with pytest.raises(Refused) as told:
            read(str(tmp_path / name))
        assert name in str(told.value) and "\n" not in str(told.value) and len(str(told.value)) < 500


# ---------------------------------------------------------------- clips


def movie(
    path, frames, rate=8, codec="libx264", pix="yuv420p", options=None, prepare=None, first=0, sound=0.0
):
    """A video of frames uint8 [H, W, 3 or 4]; `first`: the first one's number; seconds of sound beside it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.thread_count = pix, 1
        if prepare:
            prepare(stream)
        audio = container.add_stream("libopus", rate=48000) if sound else None
        if audio:
            audio.layout = "mono"
        for number, pixels in enumerate(frames):
            kind = "rgba" if pixels.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), kind).reformat(format=pix)
            frame.pts, frame.time_base = number + first, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio:
            for at in range(0, int(sound * 48000), 960):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), "s16", "mono")
                samples.sample_rate, samples.pts, samples.time_base = 48000, at, Fraction(1, 48000)
                container.mux(audio.encode(samples))
            container.mux(audio.encode())
    return path


def plain(level, height=32, width=32):
    return np.full((height, width, 3), level, np.uint8)


def rising(count):
    return [plain(20 + round(200 * i / (count - 1))) for i in range(count)]


def levels(clip):
    return clip.float().mean((0, 2, 3))


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    """Law: of a circle stored as 32×64 with pixels 2:1 the size is 64×64, and it is round."""
    image = Image.new("RGB", (32, 64))
    ImageDraw.Draw(image).ellipse((4, 8, 27, 55), fill="white")
    stretch = lambda stream: setattr(stream.codec_context, "sample_aspect_ratio", Fraction(2, 1))  # noqa: E731
    file = movie(tmp_path / "wide.mp4", [np.asarray(image)] * 9, prepare=stretch)
    assert clips.video_info(file.name, file).size == (64, 64)
    for seen in (
        clips.read_frames(file.name, file, ClipSpan(9, 8), 64, 64)[0, 4] > 128,
        clip_pixels(str(file), 64, 64, 2)[0, 0] > 0,
    ):
        wide, high = int(seen.any(0).sum()), int(seen.any(1).sum())
        assert abs(wide - high) <= 2 and abs(wide - 48) <= 2


MATRICES = {
    "as it is": ((1, 0, 0, 1), None),
    "a quarter right": ((0, 1, -1, 0), Image.Transpose.ROTATE_270),
    "half": ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
    "a quarter left": ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
    "mirrored": ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
    "transposed": ((0, 1, 1, 0), Image.Transpose.TRANSPOSE),
    "transverse": ((0, -1, -1, 0), Image.Transpose.TRANSVERSE),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_display_matrix_turns_and_mirrors(name, tmp_path):
    """Law: the matrix written into the track's header is obeyed, mirrored or not."""
    matrix, turn = MATRICES[name]
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    for color, box in (((0, 255, 0), (32, 0)), ((0, 0, 255), (0, 16)), ((255, 255, 0), (32, 16))):
        image.paste(color, (*box, box[0] + 32, box[1] + 16))
    file = movie(tmp_path / "phone.mp4", [np.asarray(image)] * 9)
    data = bytearray(file.read_bytes())
    place = data.index(b"tkhd") + 44
    a, b, c, d = (one << 16 for one in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    file.write_bytes(data)
    right = image if turn is None else image.transpose(turn)
    assert clips.video_info(file.name, file).size == right.size
    trained = clips.read_frames(file.name, file, ClipSpan(9, 8), *right.size)[:, 4].permute(1, 2, 0).numpy()
    for seen in (trained, np.asarray(frames_in(file, 9, 8)[0])):
        for x, y in ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)):
            at = (int(x * right.width), int(y * right.height))
            assert ((seen[at[1], at[0]] > 128) == (np.array(right.getpixel(at)) > 128)).all()


CLEAR = {
    "clear.mov": ("qtrle", "argb", {}),
    "clear.webm": ("libvpx-vp9", "yuva420p", {"lossless": "1"}),
    "clear.mkv": ("libvpx", "yuva420p", {"auto-alt-ref": "0"}),
}


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_clear_in_a_clip_lies_on_white(name, tmp_path):
    """Law: as in pictures."""
    codec, pix, options = CLEAR[name]
    frame = np.zeros((32, 32, 4), np.uint8)
    frame[8:24, 8:24] = (255, 0, 0, 255)
    file = movie(tmp_path / name, [frame] * 9, codec=codec, pix=pix, options=options)
    for seen in (
        clips.read_frames(name, file, ClipSpan(9, 8), 32, 32)[:, 4],
        clip_pixels(str(file), 32, 32, 2)[:, 1],
    ):
        seen = seen.float() if seen.max() > 2 else (seen + 1) * 127.5
        assert seen[:, 2, 2].min() > 245 and abs(seen[:, 16, 16] - torch.tensor([255, 0, 0])).max() < 12


@pytest.mark.parametrize(("transfer", "white"), [("PQ", 0.5806888), ("HLG", 0.75)])
def test_reference_white_of_hdr_is_white_and_grey_is_grey(transfer, white, tmp_path):
    """Law: 203 cd/m² (BT.2408: 58 % of PQ, 75 % of HLG) is shown as 255, a quarter of that light as 137."""
    number = getattr(video_frames, transfer)

    def hdr(stream):
        stream.codec_context.color_primaries, stream.codec_context.colorspace = 9, 9
        stream.codec_context.color_trc, stream.codec_context.color_range = number, 1

    for share, right in ((1.0, 255), (0.25, 137)):
        code = (
            white if share == 1 else (0.4459 if transfer == "PQ" else 0.5017)
        )  # BT.2100, solved for a quarter
        file = tmp_path / f"{share}.mp4"
        with av.open(str(file), "w") as container:
            stream = container.add_stream(
                "libx265", rate=8, options={"x265-params": "log-level=none:lossless=1"}
            )
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p10le"
            hdr(stream)
            for index in range(9):
                frame = av.VideoFrame(64, 64, "yuv420p10le")
                for plane, value in zip(frame.planes, (round(64 + 876 * code), 512, 512), strict=True):
                    plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
                frame.pts, frame.time_base = index, Fraction(1, 8)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        seen = clips.read_frames(file.name, file, ClipSpan(9, 8), 32, 32)[:, 4, 16, 16].int()
        assert (seen - right).abs().max() <= 3


def test_interlaced_fields_become_whole_frames(tmp_path):
    """Law: of a bar that moves between the fields no comb of single lines is left."""
    frames = []
    for index in range(12):
        pixels = np.full((64, 64, 3), 40, np.uint8)
        pixels[0::2, 4 * index : 4 * index + 10] = 220
        pixels[1::2, 4 * index + 2 : 4 * index + 12] = 220
        frames.append(pixels)
    options = {"x264-params": "tff=1:interlaced=1", "crf": "10"}
    file = movie(tmp_path / "fields.mp4", frames, pix="yuv420p", options=options)
    seen = clips.read_frames(file.name, file, ClipSpan(9, 8), 64, 64)[0].float()
    comb = (seen[:, 1:] - seen[:, :-1]).abs().mean()
    raw = torch.tensor(np.stack(frames))[:, :, :, 0].float()
    assert comb < 0.35 * (raw[:, 1:] - raw[:, :-1]).abs().mean()


@pytest.mark.parametrize("ending", ["mkv", "webm", "mp4"])
def test_sound_that_is_longer_does_not_count(ending, tmp_path):
    """Law: the piece lies in the middle of the video, whatever else the file holds."""
    codec = "libvpx-vp9" if ending == "webm" else "libx264"
    file = movie(tmp_path / f"sound.{ending}", rising(24), codec=codec, sound=9.0)
    known = clips.video_info(file.name, file)
    assert abs(known.seconds - 3) < 0.2
    seen = levels(clips.read_frames(file.name, file, ClipSpan(9, 8), 16, 16))
    silent = movie(tmp_path / f"silent.{ending}", rising(24), codec=codec)
    right = levels(clips.read_frames(silent.name, silent, ClipSpan(9, 8), 16, 16))
    assert (seen - right).abs().max() <= 3
    short = movie(tmp_path / f"short.{ending}", rising(6), codec=codec, sound=9.0)
    with pytest.raises(media.Unreadable, match=r"a clip of 0\.7\d s; 9 frames at 8 a second"):
        clips.read_frames(short.name, short, ClipSpan(9, 8), 16, 16)


@pytest.mark.parametrize("ending", ["mkv", "mp4", "avi"])
def test_a_clip_begins_at_its_first_frame(ending, tmp_path):
    """Law: a first frame at five seconds is where the clip begins."""
    late = movie(tmp_path / f"late.{ending}", rising(17), first=40)
    soon = movie(tmp_path / f"soon.{ending}", rising(17))
    late, soon = (levels(clips.read_frames(f.name, f, ClipSpan(9, 8), 16, 16)) for f in (late, soon))
    assert (late - soon).abs().max() <= 3


@pytest.mark.parametrize(
    ("ending", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx-vp9")]
)
def test_a_piece_found_by_seeking_is_the_one_found_from_the_beginning(ending, codec, tmp_path, monkeypatch):
    """Law: bit for bit, with key frames far apart, and with frames that are stored out of order."""
    noise = np.random.default_rng(0).integers(0, 60, (32, 32, 3), dtype=np.uint8)
    frames = [plain(20 + (i * 7) % 200) // 2 + noise for i in range(240)]
    file = movie(tmp_path / f"long.{ending}", frames, rate=24, codec=codec, options={"g": "50"})
    pieces = [ClipSpan(9, 8, number, 5) for number in range(5)]
    sought = [clips.read_frames(file.name, file, piece, 32, 32) for piece in pieces]
    monkeypatch.setattr(clips, "SEEK_FROM", 1e9)
    for piece, found in zip(pieces, sought, strict=True):
        assert (clips.read_frames(file.name, file, piece, 32, 32) == found).all()


def test_a_piece_beyond_what_may_be_decoded_is_found(tmp_path, monkeypatch):
    """Law: the limit is of the frames decoded for a piece, not of where it lies; what cannot be is told."""
    monkeypatch.setattr(clips, "MOST_DECODED", 60)
    file = movie(tmp_path / "long.mp4", rising(240), rate=24, options={"g": "12"})
    seen = levels(clips.read_frames(file.name, file, ClipSpan(9, 8), 16, 16))
    assert abs(seen[4] - 120) <= 12
    monkeypatch.setattr(clips, "SEEK_FROM", 1e9)
    with pytest.raises(media.Unreadable, match="begins after frame 60, and the file cannot be searched"):
        clips.read_frames(file.name, file, ClipSpan(9, 8), 16, 16)


def gif(path, delay):
    images = [Image.new("L", (16, 16), 10 * i) for i in range(20)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=delay)
    return path


@pytest.mark.parametrize(("delay", "shown"), [(10, 100), (0, 100), (20, 20), (50, 50), (100, 100)])
def test_a_gif_without_delays_is_as_fast_as_browsers_show_it(delay, shown, tmp_path):
    """Law: 10 ms and less are 100 ms."""
    file = gif(tmp_path / "quick.gif", delay)
    assert clips.video_info(file.name, file).seconds == pytest.approx(20 * shown / 1000)


# ---------------------------------------------------------------- what is stored

HOW = EncodingOptions("codec", frames=4, fps=4)
OF_YESTERDAY = "picture 1: upright, on white, sRGB, centre crop, Lanczos, large JPEGs by halves"


def keys_of(file, options):
    task = views.plan_task(Sample(file.name, ("words",), file=file), (16, 16), options)
    assert isinstance(task, views.EncodingTask), task
    return task.keys[0]


GOOD = {
    "plain.png": lambda p: saved(p, upright()),
    "clear.png": lambda p: saved(p, half_clear(GREEN)),
    "phone.jpg": phone,
    "profile.jpg": lambda p: saved(p, upright(), icc_profile=WIDE),
    "grey16.png": lambda p: saved(p, Image.fromarray(np.full((60, 40), 40000, np.uint16))),
    "movie.mp4": lambda p: movie(p, rising(17)),
    "movie.mkv": lambda p: movie(p, rising(17)),
    "movie.gif": lambda p: gif(p, 100),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_was_read_right_keeps_its_key(name, tmp_path):
    """Law: a store of yesterday is not encoded again for files that were read right."""
    file = GOOD[name](tmp_path / name)
    moves = clips.is_clip(name, file)
    words = f", {ClipSpan(4, 4).words}" if moves else ", a clip"
    right = key(
        Sample(name, (), file=file).content_hash(), f"{OF_YESTERDAY} to 16x16{words}", "codec", "same"
    )
    assert keys_of(file, HOW) == right
    if not moves:
        still = key(Sample(name, (), file=file).content_hash(), f"{OF_YESTERDAY} to 16x16", "codec", "same")
        assert keys_of(file, EncodingOptions("codec")) == still


CHANGED = {
    "profile.png": lambda p: saved(p, half_clear(GREEN), icc_profile=WIDE),
    "linear.png": lambda p: saved(p, upright(), icc_profile=LINEAR),
    "quick.gif": lambda p: gif(p, 10),
    "clear.mov": lambda p: movie(p, [np.asarray(half_clear(GREEN))] * 17, codec="qtrle", pix="argb"),
    "sound.mkv": lambda p: movie(p, rising(24), sound=9.0),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_was_read_wrong_has_a_key_of_its_own(name, tmp_path):
    """Law: an encoding of yesterday's wrong pixels is not taken for today's."""
    file = CHANGED[name](tmp_path / name)
    words = f", {ClipSpan(4, 4).words}" if clips.is_clip(name, file) else ", a clip"
    wrong = key(
        Sample(name, (), file=file).content_hash(), f"{OF_YESTERDAY} to 16x16{words}", "codec", "same"
    )
    assert keys_of(file, HOW) != wrong


def test_a_mask_that_tells_by_what_is_clear_is_refused(tmp_path):
    """Law: on white it would be white all over, and everything repainted; a white mask without holes acts."""
    strokes = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    strokes.paste((255, 255, 255, 255), (4, 4, 12, 12))
    for one in (strokes, saved(tmp_path / "mask.png", strokes), str(tmp_path / "mask.png")):
        with pytest.raises(Refused, match=r"white all over.*Save the mask without transparency"):
            mask_picture(one)
    assert mask_picture(Image.new("RGBA", (16, 16), "white")).getpixel((3, 3)) == (255, 255, 255)
    ink = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (4, 4, 12, 12))
    assert [mask_picture(ink).getpixel(at)[0] for at in ((1, 1), (8, 8))] == [255, 0]
