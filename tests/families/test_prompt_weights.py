"""Prompt weights: the grammar of A1111, the arithmetic of ComfyUI, on the tokens of CLIP and T5."""

import warnings

import pytest
import torch
from PIL import Image

import sfumato
from sfumato.errors import Refused
from sfumato.models.pretrained import prompt_weights
from sfumato.models.pretrained.families import families
from sfumato.models.pretrained.prompt_weights import LiteralPromptWarning, encode, is_weighted, notes, parse

from . import clips, pictures
from .zoo import ZOO

PARTS = [("a ", 1.0), ("red", 1.3), (" circle on a ", 1.0), ("blue", 1 / 1.1**2), (" background", 1.0)]
WEIGHTED, PLAIN = "a (red:1.3) circle on a [[blue]] background", "a red circle on a blue background"
WEIGHS = {
    "stable-diffusion-1.5": [["tokenizer"]],
    "stable-diffusion-xl": [["tokenizer", "tokenizer_2"]],
    "stable-diffusion-3.5": [["tokenizer", "tokenizer_2"], ["tokenizer_3"]],
    "flux-dev": [["tokenizer_2"]],
    "flux-kontext": [["tokenizer_2"]],
    "pixart-sigma": [["tokenizer"]],
    "auraflow": [["tokenizer"]],
    "chroma": [["tokenizer"]],
    "wan-2.1": [["tokenizer"]],
    "wan-2.1-i2v": [["tokenizer"]],
    "ltx-video": [["tokenizer"]],
    "cogvideox-5b": [["tokenizer"]],
    "mochi": [["tokenizer"]],
}
"""Members of the zoo whose families act on weights, and whose tokens stand after and beside each other."""


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Members of the zoo, loaded by name, each made once."""
    known = {}

    def one(name):
        if name not in known:
            folder = tmp_path_factory.mktemp("weights") / name
            torch.manual_seed(0)
            with pictures.small():
                ZOO[name].make(name).save_pretrained(folder)
                known[name] = sfumato.load(folder)
        return known[name]

    return one


def written_out(model, name, length):
    """The weight of each token, from parts that are tokenized one by one, as ComfyUI does."""
    rows = []
    for block in WEIGHS[name]:
        tokenizer = getattr(model.origin, block[0])
        apart = [
            (id, weight)
            for text, weight in PARTS
            for id in tokenizer(text, add_special_tokens=False).input_ids
        ]
        whole = tokenizer(PLAIN).input_ids
        first = 1 if type(tokenizer).__name__.startswith("CLIP") else 0
        assert whole[first : first + len(apart)] == [id for id, _ in apart], "the judge's parts are the whole"
        rows.append(([1.0] * first + [weight for _, weight in apart], 77 if first else None))
    known = sum(size for _, size in rows if size)
    return torch.tensor(
        [w for row, size in rows for w in row + [1.0] * ((size or length - known) - len(row))]
    )


@pytest.mark.parametrize("negative", [False, True], ids=["prompt", "negative"])
@pytest.mark.parametrize("name", WEIGHS)
def test_a_tokens_distance_from_the_empty_prompt_is_multiplied(load, name, negative):
    """Law: z ← e + w · (z − e) at each token; all else of the condition is the plain prompt's, to the bit."""
    model, options = load(name), dict(ZOO[name].options)
    if model.conditioner.family.requires_image:
        picture = Image.new("RGB", (64, 64), (200, 40, 40))
        options |= {"image": [picture, picture], "height": 64, "width": 64, "num_frames": 5}
    ask = model.conditioner.encode_negative if negative else model.conditioner
    with torch.no_grad():
        plain, empty = ask([PLAIN, "a"], **options), ask(["", ""], **options)
        found = encode(model.conditioner, [WEIGHTED, "a"], negative=negative, **options)
    weights = written_out(model, name, plain["tokens"].shape[1])
    assert (weights != 1).sum() >= 2
    z, e = plain["tokens"][0].double(), empty["tokens"][0].double()
    expected = e + weights[:, None].double() * (z - e)
    assert (found["tokens"][0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(found["tokens"][0][weights == 1], plain["tokens"][0][weights == 1])
    assert torch.equal(found["tokens"][1], plain["tokens"][1]), "a prompt without weights beside it"
    assert not torch.allclose(found["tokens"][0], plain["tokens"][0], atol=1e-4)
    for key in plain:
        assert key == "tokens" or torch.equal(found[key], plain[key]), key


def test_every_family_that_reads_with_clip_or_t5_acts_on_weights():
    """Law: the others are those whose text encoder is a language model, or that read no text."""
    without = {name for name, family in families().items() if not family.weighted_tokens}
    assert without == {
        "ddpm", "dit", "flux2_klein", "hunyuan_video", "lumina2", "qwen_image", "qwen_image_edit", "sana",
        "z_image",
    }  # fmt: skip
    assert WEIGHS.keys() <= ZOO.keys() and clips


def test_each_reader_may_have_a_prompt_of_its_own(load):
    model = load("stable-diffusion-xl")
    with torch.no_grad():
        found = encode(model.conditioner, ["a circle"], prompt_2=["a (red:1.5) circle"])
        plain = model.conditioner(["a circle"], prompt_2=["a red circle"])
        empty = model.conditioner([""])
    width = model.origin.text_encoder.config.hidden_size
    assert torch.equal(found["tokens"][..., :width], plain["tokens"][..., :width])
    changed = (found["tokens"] != plain["tokens"])[0, :, width:].any(1)
    assert 0 < changed.sum() < 5
    z, e = (one["tokens"][0, changed][:, width:] for one in (plain, empty))
    torch.testing.assert_close(found["tokens"][0, changed][:, width:], e + 1.5 * (z - e))


def test_generate_acts_on_weights_in_prompt_and_negative_unless_told_not_to(load):
    model = load("stable-diffusion-1.5")
    draw = {"seed": 1, "steps": 2, "guidance": 3.0, "height": 64, "width": 64}

    def drawn(prompt, negative=None, **more):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LiteralPromptWarning)
            return model.generate([prompt], negative, **draw, **more)[0].tobytes()

    assert (
        drawn("a (red:1.0) circle")
        == drawn("a red circle")
        == drawn("a (red:1.0) circle", literal_prompt=False)
    )
    assert drawn("a (red:1.9) circle") != drawn("a red circle")
    assert drawn("a red circle", "[[[[blurry]]]]") != drawn("a red circle", "blurry")
    assert drawn("a (red:1.9) circle", literal_prompt=True) != drawn("a (red:1.9) circle")
    assert drawn("a cat (cute)") == drawn("a cat (cute)", literal_prompt=True) == drawn(r"a cat \(cute\)")
    with pytest.warns(LiteralPromptWarning, match=r"\(cute\) has no number"):
        model.generate(["a cat (cute)"], **draw)


def test_captions_are_never_weighed(load):
    """Law: what encodes for training reads brackets as letters."""
    model = load("stable-diffusion-1.5")
    with torch.no_grad():
        assert torch.equal(model.condition([WEIGHTED])["tokens"], model.conditioner([WEIGHTED])["tokens"])
        assert not torch.equal(model.condition([WEIGHTED])["tokens"], model.condition([PLAIN])["tokens"])


def test_a_model_that_cannot_says_so_and_reads_letters(load):
    model = load("z-image")
    (said,) = notes(model.conditioner, [WEIGHTED, "a cat (cute)"])
    assert WEIGHTED[:30] in said and "another text encoder" in said
    with torch.no_grad():
        assert torch.equal(
            encode(model.conditioner, [WEIGHTED])["tokens"], model.conditioner([WEIGHTED])["tokens"]
        )


# ---------------------------------------------------------------- the grammar

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    "text, parts",
    [
        (WEIGHTED, PARTS),
        ("((a)) b", [("a", UP**2), (" b", 1)]),
        ("[a] (b:.5)", [("a", DOWN), (" ", 1), ("b", 0.5)]),
        ("((a:2) b:3)", [("a", 6), (" b", 3)]),
        ("(a (b) c:2)", [("a ", 2), ("b", 2 * UP), (" c", 2)]),
        (r"(a \(b\):2) \[c\]", [("a (b)", 2), (" [c]", 1)]),
        ("(a:1.2) (b", [("a", 1.2), (" (b", 1)]),
        ("(a: -1 ) :)", [("a", -1), (" :)", 1)]),
        ("(at 12:30, 16:9) ((x))", [("at 12:30, 16:9", UP), (" ", 1), ("x", UP**2)]),
        (r"back\slash [x]", [("back\\slash ", 1), ("x", DOWN)]),
    ],
)
def test_weights_are_read_as_they_are_written(text, parts):
    found = parse(text)
    assert is_weighted(text) and found.text == "".join(one for one, _ in parts)
    assert found.weights == pytest.approx([weight for one, weight in parts for _ in one])


@pytest.mark.parametrize(
    "text", ["a cat (cute)", "at (12:30)", "a (16:9) frame", ":) (:", "f(x) = (a)(b)", "", "a)b(c"]
)
def test_parentheses_of_prose_are_no_weights(text):
    assert not is_weighted(text)


@pytest.mark.parametrize("text", ["[a|b]", "[a:b:0.5]", "a [cat:10]"])
def test_prompt_editing_is_refused(text):
    with pytest.raises(Refused, match="prompt editing"):
        parse(text)


def test_what_a_pipeline_cleans_keeps_its_weights():
    """A tokenizer may be given the prompt in small letters, without double spaces, with a word more."""
    prompt = parse("A (Red:1.3)  <cat:1>, (z:2)")
    seen = "a red <cat:1> <cat_1>, z"
    letters = prompt_weights.letter_weights(seen, prompt)
    assert letters[seen.index("red")] == 1.3 and letters[0] == 1 and letters[-1] == 2
    assert letters[seen.index("<cat_1>")] == 1
