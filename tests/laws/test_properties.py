"""Laws over drawn examples: names of LoRA's layers, buckets, recipes, tables of captions.

The examples are the same each time (derandomized), and few enough to take seconds.
"""

import csv
import itertools
import re
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sfumato.data import buckets
from sfumato.data.sources import metadata
from sfumato.errors import Refused
from sfumato.models.lora import key_conversion, lora_file
from sfumato.models.pretrained.families import families
from sfumato.recipe import DEFAULTS, RULES, Recipe, quoted

few = settings(
    derandomize=True, max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

# ----------------------------------------------------------------------------- LoRA

PLAIN = ("attn.to_q", "attn.to_out.0", "ff.net.0.proj")
"""Layers of a family whose names are diffusers' own everywhere."""
INPUTS, RANK = 3, 2


def tree(layers: dict[str, nn.Module]) -> nn.Module:
    """A network that has these layers at these names."""
    network = nn.Module()
    for name, layer in layers.items():
        *homes, leaf = name.split(".")
        place = network
        for home in homes:
            if home not in place._modules:
                place.add_module(home, nn.Module())
            place = place.get_submodule(home)
        place.add_module(leaf, layer)
    return network


@st.composite
def adapters(draw, rules):
    """(network, a LoRA of some of its layers by peft's names), in blocks of any numbers."""
    blocks = draw(st.lists(st.integers(0, 21), min_size=1, max_size=3, unique=True))
    one_each = {there: parts for parts, there in rules}  # of layers that share a name a block has one
    groups = list(one_each.values()) or [tuple(f"transformer_blocks.#.{one}" for one in PLAIN)]
    names = sorted(
        {part.replace("#", str(block)) for parts in groups for part in parts for block in blocks},
        key=lambda name: (name.count("."), name),
    )
    names = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    layers = {name: nn.Linear(INPUTS, 2 + 2 * (number % 3), bias=False) for number, name in enumerate(names)}
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
    tensors = {}
    for number, name in enumerate(chosen):
        chance = torch.Generator().manual_seed(number)
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, INPUTS, generator=chance)
        tensors[f"{name}.lora_B.weight"] = torch.randn(layers[name].out_features, RANK, generator=chance)
    return tree(layers), tensors


NAMED = {
    name: one.layer_names
    for name, one in families().items()
    if one.layer_names.comfyui or one.layer_names.kohya
}
"""The families that other programs have names for."""


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
@pytest.mark.parametrize("family", NAMED)
def test_a_lora_s_names_come_back_from_every_convention(family, to):
    """Law: written under others' names and read again, each layer has its own change and no other has any."""
    names = NAMED[family]

    def held(key):
        return re.fullmatch(names.kohya_holds, key.rsplit(".", 2)[0])

    @settings(few, max_examples=6)
    @given(adapters(names.rules), st.floats(0.1, 4))
    def law(adapter, scale):
        network, tensors = adapter
        if to == "kohya":  # what its networks have no room for is refused
            tensors = {key: one for key, one in tensors.items() if held(key)}
        if not tensors:
            return
        file = key_conversion.to_target_keys(tensors, scale, names, to, network)
        changes, strange = lora_file.sorted_by_layer(file)
        assert not strange
        known, found = key_conversion.spellings(network, names), {}
        for name, change in changes.items():
            home, rest = key_conversion.home_of(name, {"": network})
            assert home == "" and rest in known, f"{name} is not found again"
            for layer, rows, is_swapped in known[rest]:
                assert layer not in found, f"{layer} is named twice"
                found[layer] = (change.with_halves_swapped() if is_swapped else change).whole()[rows]
        for layer, delta in found.items():
            down, up = (tensors.get(f"{layer}.lora_{one}.weight") for one in "AB")
            own = scale * up @ down if up is not None and down is not None else torch.zeros_like(delta)
            torch.testing.assert_close(delta, own)
        assert {key.rsplit(".", 2)[0] for key in tensors} <= found.keys()

    if not getattr(names, to):
        with pytest.raises(Refused, match="no published names"):
            key_conversion.to_target_keys({}, 1.0, names, to, nn.Module())
        return
    law()


# ----------------------------------------------------------------------------- buckets

sides = st.integers(16, 4000)
sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=12)


@few
@given(sizes, st.sampled_from([8, 16, 32, 64]), st.integers(2, 8), st.integers(1, 6))
def test_buckets_fit_the_codec_and_each_picture_has_the_best_of_them(sizes, stride, times, count):
    """Law: sides in multiples of the stride, areas near the resolution's, no shape cuts off less."""
    resolution = stride * times
    chosen = buckets.choose(sizes, resolution, stride, count)
    assert 1 <= len(chosen.shapes) <= count
    assert all(width % stride == height % stride == 0 for width, height in chosen.shapes)
    for width, height in chosen.shapes:
        assert abs(width * height - resolution**2) <= stride * (width + height)
    for size in sizes:
        cut = buckets.crop_waste(size, chosen(size))
        assert 0 <= cut < 1 and cut == min(buckets.crop_waste(size, shape) for shape in chosen.shapes)
    assert sum(row["pictures"] for row in chosen.describe(sizes)) == len(sizes)


@few
@given(sizes, st.integers(2, 3))
def test_no_other_choice_of_buckets_cuts_off_less(sizes, count):
    """Law: the shortest path finds what trying all choices finds, to the grain that tells shapes apart."""
    shapes = buckets.candidates(64, 16)
    best = min(buckets.Buckets(some).waste(sizes) for some in itertools.combinations(shapes, count))
    assert buckets.choose(sizes, 64, 16, count).waste(sizes) <= best + 0.01


@few
@given(st.integers(1, 2000), st.sampled_from([8, 16, 64]))
def test_a_resolution_is_refused_unless_the_codec_divides_it(resolution, stride):
    if resolution % stride == 0:
        assert buckets.choose([], resolution, stride).shapes == ((resolution, resolution),)
        return
    with pytest.raises(Refused) as refusal:
        buckets.choose([], resolution, stride)
    near = int(str(refusal.value).rstrip(".").rpartition(" ")[2])
    assert near % stride == 0 and abs(near - resolution) <= stride


# ----------------------------------------------------------------------------- recipes

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
words = st.text("abcdefgh-_ éß", min_size=1, max_size=8).map(lambda word: f"x{word.strip()}x")


def values(name: str) -> st.SearchStrategy:
    """Values that a key may have."""
    rules, default = RULES[name], DEFAULTS[name]
    least, most = rules["least"], rules["most"]
    if rules["choices"]:
        return st.sampled_from(rules["choices"])
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(-5 if least is None else int(least), 10**6 if most is None else int(most))
    if isinstance(default, float):
        return st.floats(-1e9 if least is None else least, 1e9 if most is None else most)
    if rules["values"]:
        low, high = 0.0 if least is None else least, 10.0 if most is None else most
        entries = {float: st.floats(low, high), str: words, object: st.integers(0, 9) | words}
        return st.dictionaries(words, entries[rules["values"]], max_size=3)
    if rules["rows"]:
        row = {one.name: st.integers(1, 9) for one in fields(rules["rows"])}
        return st.lists(st.fixed_dictionaries(row), max_size=2).map(tuple)
    some = words if rules["path"] else texts.filter(lambda text: ".py:" not in text)
    if rules["numbers"]:
        return st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4).map(tuple)
    if isinstance(default, tuple):
        return st.lists(some, max_size=3).map(tuple)
    return some


def as_toml(value: object) -> str:
    """A value as a person writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{quoted(name)} = {as_toml(one)}' for name, one in value.items())}}}"
    return quoted(value) if isinstance(value, str) else str(value).lower()


recipes = st.fixed_dictionaries({}, optional={name: values(name) for name in RULES if name != "format"})


@settings(few, max_examples=15)
@given(recipes)
def test_a_recipe_that_is_written_is_the_recipe_that_is_read(said):
    """Law: whatever a recipe says, its two ways of writing it read back equal, from any folder."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        lines = {name: f"{name.rpartition('.')[2]} = {as_toml(value)}" for name, value in said.items()}
        parts: dict[str, list[str]] = {}
        for name, line in lines.items():
            parts.setdefault(name.rpartition(".")[0], []).append(line)
        text = "\n".join(parts.pop("", []))
        for section, rows in parts.items():
            text += "\n".join([f"\n[{section}]", *rows])
        (place / "mine.toml").write_text(text, encoding="utf-8")
        recipe = Recipe.read(place / "mine.toml")
        for name, value in said.items():
            if not (RULES[name]["path"] or RULES[name]["rows"]):
                assert recipe.values()[name] == value
        (place / "away").mkdir()
        for every in (False, True):
            again = place / "away" / f"{every}.toml"
            again.write_text(recipe.to_toml(every=every), encoding="utf-8")
            assert Recipe.read(again) == recipe
        assert recipe.checked() == recipe and not recipe.differences(recipe)


# ----------------------------------------------------------------------------- tables

names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\."), min_size=1, max_size=9
)
rows = st.lists(st.tuples(names, st.lists(texts, max_size=4).map(" ".join)), min_size=1, max_size=6)


@few
@given(rows, st.sampled_from(["metadata.csv", "metadata.tsv"]), st.sampled_from(["utf-8", "utf-8-sig"]))
def test_a_table_of_captions_says_what_was_written_into_it(rows, table, encoding):
    """Law: quotes, commas, tabs and line breaks in a caption are the caption's; none is lost or made up."""
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / table).open("w", encoding=encoding, newline="") as file:
            writer = csv.writer(file, delimiter="\t" if table.endswith(".tsv") else ",")
            writer.writerows([("file_name", "caption"), *rows])
        aside: list = []
        found = list(metadata.read(Path(folder), table, aside))
    assert not aside and [one.file_cell for one in found] == [name for name, _ in rows]
    for one, (_, caption) in zip(found, rows, strict=True):
        kept = " ".join(caption.replace("\0", "").split())
        assert one.captions == ((kept,) if kept else ())
        assert bool(one.reason) == (not kept)
