"""Law: only a programming error is a traceback. Whatever a file says, it is read, or refused in a sentence.

Each kind of file that sfumato reads is made as sfumato makes it; then a value in it becomes another, a name
is lost, or bytes change. The examples are the same each time and few; `-m slow` tries more.
"""

import copy
import hashlib
import importlib
import io
import json
import math
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import sfumato
from sfumato import models
from sfumato.commands import theory_fit
from sfumato.data import survey
from sfumato.data.sources import folder as sources_folder
from sfumato.data.store.store import Store, key
from sfumato.errors import Failed, Refused
from sfumato.generation import files as generation_files
from sfumato.models import files, locate
from sfumato.models.control.control_plan import read_plans
from sfumato.models.io import adapter_run, fitted_times
from sfumato.models.lora import lora_file
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.pretrained import train_text_encoders
from sfumato.models.settings import ModelSettings
from sfumato.recipe import Recipe
from sfumato.report import run_page
from sfumato.run_folder import RunFolder
from sfumato.theory.times import FittedGrid
from sfumato.training.state import checkpoint
from upgrade.material import make_base

few = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
EXAMPLES, MANY = 12, 400

# ----------------------------------------------------------------------------- what becomes of a file

DEEP: Any = None
for _ in range(3000):
    DEEP = [DEEP]
STRANGE = [
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**70, -(2**70), 10**400, 0.5, -0.5, 1e-320, 1e308,
    math.nan, math.inf, "", "x", "nan", "\0", "a\0b", "\x1b]0;P\x07", "\udce9", "../../..", ".",
    "/dev/zero", "/etc/passwd", "there.py:x", "a" * 3000, [], {}, [[]], [None], [1, 2], ["a", "b"],
    [{}], {"a": 1}, {"": {}}, {"a": {"a": {"a": []}}}, "cpu", "dit", "pixels", "float32",
    [0.5] * 40, "{}", "[1]", "1.5",
]  # fmt: skip
RAW = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1" * 6000,
    b"NaN",
    b"null",
    b"[]",
    b'"a"',
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value inside a value, itself among them."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inside:
        yield from places(one, (*path, name))


def changed(value: Any, path: tuple[Any, ...], how: str, to: Any) -> Any:
    """The value with what is at the path replaced, left out, or given a further entry."""
    if not path:
        return to
    value = copy.deepcopy(value)
    home = value
    for name in path[:-1]:
        home = home[name]
    if how == "replace":
        home[path[-1]] = to
    elif how == "drop":
        del home[path[-1]]
    elif isinstance(home, dict):
        home[to if isinstance(to, str) else "more"] = to
    else:
        home.append(to)
    return value


@st.composite
def broken_json(draw, data: bytes):
    """A JSON file of which one or two values are others, or whose bytes are."""
    if draw(st.integers(0, 4)) == 0:
        return draw(broken_bytes(data))
    value = json.loads(data)
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.integers(0, 30)) == 0:
            return json.dumps(value).encode()[:-1] + b', "deep": ' + b"[" * 3000 + b"]" * 3000 + b"}"
        path = draw(st.sampled_from(sorted(places(value), key=repr)))
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add"]))
        value = changed(value, path, how, draw(st.sampled_from(STRANGE)))
    return json.dumps(value).encode()


@st.composite
def broken_bytes(draw, data: bytes):
    """A file that ends early, has other bytes in the middle, or is something else altogether."""
    how = draw(st.sampled_from(["cut", "put", "raw"]))
    if how == "raw":
        return draw(st.sampled_from(RAW))
    at = draw(st.integers(0, len(data)))
    return data[:at] + (b"" if how == "cut" else draw(st.sampled_from(RAW[:3] + RAW[6:])) + data[at + 1 :])


@st.composite
def broken_lines(draw, data: bytes):
    """A file of JSON lines, one of them broken."""
    lines = data.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    line = lines[at]
    if b', "check"' in line:  # a stranger's line has no checksum
        line = line[: line.rindex(b', "check"')] + b"}"
    return b"\n".join([*lines[:at], draw(broken_json(line)), *lines[at + 1 :]])


@st.composite
def broken_safetensors(draw, data: bytes):
    """A safetensors file whose header says something else, of its length or of its tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    if draw(st.integers(0, 5)) == 0:
        said = draw(st.sampled_from([0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1]))
        return struct.pack("<Q", said) + header + rest
    header = draw(broken_json(header))
    return struct.pack("<Q", len(header)) + header + rest


@st.composite
def broken_lora(draw, data: bytes):
    """A LoRA of which the header, or the JSON that peft keeps inside it, says something else."""
    if draw(st.booleans()):
        return draw(broken_safetensors(data))
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    said = header["__metadata__"][lora_file.METADATA]
    header["__metadata__"][lora_file.METADATA] = draw(broken_json(said.encode())).decode("utf-8", "replace")
    changed_header = json.dumps(header).encode()
    return struct.pack("<Q", len(changed_header)) + changed_header + data[8 + length :]


@st.composite
def broken_tar(draw, data: bytes):
    """A tar of which a field of a member's header says something else, under a right checksum."""
    if draw(st.integers(0, 2)) == 0:
        return draw(broken_bytes(data))
    found = bytearray(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        at = draw(st.sampled_from([member.offset for member in archive.getmembers()]))
    begin, end = draw(st.sampled_from([(0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (345, 500)]))
    fills = [
        b"\0",
        b"\xff",
        b"9",
        b"7",
        b"../",
        b"/",
        b"\x1b]0;P\x07",
        b"-",
        b"\x80",
        b"x",
        b"S",
        b"L",
        b"g",
        b"2",
    ]
    fill = draw(st.sampled_from(fills))
    found[at + begin : at + end] = (fill * (end - begin))[: end - begin]
    found[at + 148 : at + 156] = b" " * 8
    found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + 512])
    return bytes(found)


@st.composite
def broken_toml(draw, data: bytes):
    """A recipe of which one line is another."""
    if draw(st.integers(0, 4)) == 0:
        return draw(broken_bytes(data))
    lines = data.decode().splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    name = lines[at].partition(" = ")[0]
    value = draw(st.sampled_from([one for one in STRANGE if one not in (None, "\udce9")]))
    said = str(value).lower() if isinstance(value, bool | float) else json.dumps(value)
    if isinstance(value, dict):
        said = "{" + ", ".join(f'"{k}" = {json.dumps(v)}' for k, v in value.items()) + "}"
    odd = [
        "[" * 9000,
        "[model",
        "[model]\n[model]",
        "a.b.c = 1",
        "x = " + "[" * 9000,
        "d = 9999-99-99",
        "\0",
        "é = 1",
    ]
    odd += ["model = 3", "[[train]]", "format = 2", "format = -1", "format = 'x'", "x = {a = " * 3000]
    line = f"{name} = {said}" if draw(st.booleans()) else draw(st.sampled_from(odd))
    return "\n".join([*lines[:at], line, *lines[at + 1 :]]).encode("utf-8", "surrogateescape")


@st.composite
def broken_csv(draw, data: bytes):
    """A table with another cell, another quote, another separator."""
    if draw(st.integers(0, 3)) == 0:
        return draw(broken_bytes(data))
    rows = [line.split(b",") for line in data.splitlines()]
    row = draw(st.sampled_from(rows))
    at = draw(st.integers(0, len(row) - 1))
    cells = [
        b"",
        b'"',
        b'"a',
        b"a\rb",
        b"a\nb",
        b"\0",
        b"\xff",
        b",,,,",
        b"1" * 6000,
        b"-1",
        b"../a.png",
        b"/etc/passwd",
    ]
    row[at] = draw(st.sampled_from(cells))
    return draw(st.sampled_from([b"\n", b"\r", b"\r\n", b"\n\n"])).join(b",".join(row) for row in rows)


# ----------------------------------------------------------------------------- the kinds of files


@dataclass(frozen=True)
class Kind:
    """make(folder) → the file that is broken; read(folder): as a user would; breaks: how it is broken."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    breaks: Callable[[bytes], Any] = broken_json
    alone: bool = False
    """Whether no other file of its ending may stand beside it."""


def tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.ones(6, 5), "b.bias": torch.ones(7)}


def make_model(name: str, **how: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        usual = {"text_encoder": "none", "width": 16, "depth": 1, "heads": 2, "codec": "pixels"}
        settings = ModelSettings(**{**usual, **how})
        parts = models.new_codec(settings), models.new_conditioner(settings, ["a", "b"])
        models.save(models.new_model(settings, *parts), folder / "model")
        return folder / "model" / name

    return make


def read_model(folder: Path) -> None:
    sfumato.load(folder / "model")


def make_unchecked(name: str, **how: Any) -> Callable[[Path], Path]:
    """A stranger's model: no checksums beside it."""

    def make(folder: Path) -> Path:
        file = make_model(name, **how)(folder)
        (folder / "model" / files.SEAL).unlink()
        return file

    return make


def make_run(folder: Path) -> RunFolder:
    run = RunFolder.create(folder / "run", "seed = 0\n", Recipe().to_toml(every=True))
    checkpoint.save(run, 2, {"model": tensors(), "ema": tensors(), "optimizer": tensors()}, {"seconds": 1.0})
    return run


def make_checkpoint(name: str) -> Callable[[Path], Path]:
    return lambda folder: make_run(folder).checkpoint_folder(2) / name


def read_checkpoint(folder: Path) -> None:
    run = RunFolder(folder / "run")
    whole = checkpoint.newest_intact(run)
    if whole is not None:
        checkpoint.read_state(whole)
    locate.newest_weights(run)


def read_state(folder: Path) -> None:
    checkpoint.read_state(RunFolder(folder / "run").checkpoint_folder(2))
    checkpoint.saved_precision(RunFolder(folder / "run"))


def make_events(folder: Path) -> Path:
    run = make_run(folder)
    Image.new("RGB", (4, 4)).save(run.samples / "a.png")
    summary = {"samples": 3, "held_out": 1, "sizes": {"8×8": 3}, "set_aside": [{"file": "a", "reason": "b"}]}
    run.event("data", summary=summary)
    run.event("code", hashes={"train.loss": {"a.py:b": "0123"}})
    run.event("start", step=0, parameters={"trained": 3, "denoiser": 4}, device="cpu", processes=2, threads=1)
    levels = [{"level": 0.25, "loss": 0.5, "error": 0.1}, {"level": 0.75, "loss": 0.5, "error": 0.1}]
    for step in (1, 2, 3):
        run.event("step", step=step, loss=1.0, learning_rate=1e-3, gradient_norm=1.0, samples_per_second=9.0)
        for split in ("train", "held_out"):
            run.event(
                "validation", step=step, split=split, weights="ema", loss=1.0, error=0.1, by_level=levels
            )
        run.event("generalization_gap", step=step, weights="ema", gap=0.1, error=0.1)
        drawn = {
            "files": ["samples/a.png"],
            "prompts": ["a"],
            "seeds": [0],
            "shown": {"source": ["samples/a.png"]},
        }
        run.event("pictures", step=step, group=None, **drawn)
    run.event("phase", name="train", seconds=1.0)
    metrics = {"one": 1.0, "two": {"value": 1.0, "error": 0.1, "note": "n"}}
    run.event("evaluation", step=3, metrics=metrics)
    run.event("demo_evaluation", accuracy={"trained": 0.5}, notes={"trained": "n"})
    run.event("damaged_checkpoint", file="a", reason="b")
    run.event("note", text="n")
    run.event("stop", step=3, reason="done")
    run.close()
    return run.events_file


def read_report(folder: Path) -> None:
    run_page.render(RunFolder(folder / "run"))
    theory_fit.usual_prompts(folder / "run")


KEYS = [key(str(number), "", "", "") for number in range(3)]


def make_shard(folder: Path) -> Path:
    return Store(folder / "store").commit("pixels", {one: tensors() for one in KEYS})


def make_index(folder: Path) -> Path:
    make_shard(folder)
    index = Store(folder / "store").index("pixels")
    index.merge()
    return index.file


def read_store(folder: Path) -> None:
    for file in (folder / "store" / "pixels").glob(
        "[!i]*.safetensors"
    ):  # a stranger's header has its own hash
        data = file.read_bytes()
        length = min(struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0], len(data))
        file.rename(file.with_name(f"{hashlib.sha256(data[8 : 8 + length]).hexdigest()[:32]}.safetensors"))
    store = Store(folder / "store")
    store.drop("pixels", store.verify("pixels", KEYS))
    for one in store.has("pixels", KEYS):
        store.get("pixels", one)


def make_table(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for number in range(2):
            Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text("words")
        (folder / name).write_text(text)
        return folder / name

    return make


def read_data(folder: Path) -> None:
    sources_folder.open_collection(folder)


def make_recipe(folder: Path) -> Path:
    text = Recipe().to_toml(every=True)
    (folder / "a.toml").write_text("\n".join(line.partition(" # ")[0] for line in text.splitlines()))
    return folder / "a.toml"


def read_recipe(folder: Path) -> None:
    Recipe.read(folder / "a.toml").to_toml(every=True)


def read_effective(folder: Path) -> None:
    Recipe.read(folder / "run").values()
    read_report(folder)


def make_base_json(folder: Path) -> Path:
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    adapter_run.write_base(folder, folder, {"theory": "flow-matching"})
    return folder / adapter_run.BASE


def make_adapter(folder: Path) -> Path:
    adapter_run.write_plan(folder, AdapterPlan("lora", 4))
    return folder / adapter_run.ADAPTER


def make_text_plan(folder: Path) -> Path:
    plan = train_text_encoders.TextPlan(AdapterPlan("lora", 4), (("a", "b"),))
    train_text_encoders.write_plan(folder, plan)
    return folder / train_text_encoders.FILE


def make_guides(folder: Path) -> Path:
    built = {"channels": 3, "size": [8, 8]}
    said = {"format": 1, "guides": [{"kind": "controlnet", "control": "sketch", "built": built}]}
    (folder / "guides.json").write_text(json.dumps(said))
    return folder / "guides.json"


def make_drawn(folder: Path) -> Path:
    (folder / "a.png").write_bytes(
        generation_files.png(Image.new("RGB", (4, 4)), {"prompt": "a", "seed": 3, "steps": [1]})
    )
    return folder / "a.png"


def make_weights(folder: Path) -> Path:
    files.save_sealed(tensors(), folder / "a.safetensors", {"kind": "x"})
    return folder / "a.safetensors"


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def make_lora(folder: Path) -> Path:
    """As diffusers writes it, with peft's config in its header."""
    parts = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 4), f"unet.{LAYER}.lora_B.weight": torch.ones(4, 2)}
    said = {
        "unet.r": 2,
        "unet.lora_alpha": 4,
        "unet.alpha_pattern": {"to_q": 3},
        "unet.rank_pattern": {"to_k": 2},
    }
    said |= {"unet.use_rslora": False, "unet.use_dora": False, "unet.target_modules": ["to_q"]}
    save_file(parts, folder / "a.safetensors", {lora_file.METADATA: json.dumps(said), "format": "pt"})
    return folder / "a.safetensors"


def make_peft(folder: Path) -> Path:
    """As peft writes it: its config in a file of its own."""
    lora = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.{LAYER}.{name}": one for name, one in lora.items()}, folder / "a.safetensors"
    )
    said = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"to_q": 3}, "rank_pattern": {}, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps({**said, "peft_type": "LORA"}))
    return folder / "adapter_config.json"


def read_lora(folder: Path) -> None:
    for change in lora_file.read(folder / "a.safetensors")[0].values():
        if not change.misplaced(torch.Size((4, 4))):
            change.delta(torch.Size((4, 4)))


def picture_bytes() -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (8, 8)).save(held, "PNG")
    return held.getvalue()


def make_tar(folder: Path) -> Path:
    members = {
        "a.png": picture_bytes(),
        "a.txt": b"words",
        "b.png": picture_bytes(),
        "b.json": b'{"caption": "a"}',
    }
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, data in {**members, "b.cls": b"1"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return folder / "a.tar"


def make_npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", x=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3))
    return folder / "a.npz"


def make_parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"image": [picture_bytes()] * 2, "text": ["a", "b"], "label": [0, 1]})
    importlib.import_module("pyarrow.parquet").write_table(table, folder / "a.parquet")
    return folder / "a.parquet"


def read_archive(folder: Path) -> None:
    """Opened, and each of its pictures looked at."""
    (file,) = folder.iterdir()
    found = sources_folder.open_collection(file)
    survey.inspect_images(found.samples, {0}, lambda *_: None)


ROWS = (
    '{"file_name": "0.png", "caption": "a", "split": "train", "label": 0, "mask_image": "1.png"}\n'
    '{"file_name": "1.png", "caption": ["a", "b"], "extra": 1}\n'
)
TABLE = "file_name,caption,split,label\n0.png,a,train,0\n1.png,b,,1\n"
KINDS = {
    "model.json": Kind(make_model("model.json"), read_model),
    "checksums.json": Kind(make_model("checksums.json"), read_model),
    "stage.json of a DiT": Kind(make_model("denoiser/stage.json"), read_model),
    "stage.json of a UNet": Kind(make_model("denoiser/stage.json", denoiser="unet", width=32), read_model),
    "stage.json of a codec": Kind(make_model("codec/stage.json"), read_model),
    "stage.json of labels": Kind(make_model("conditioner/stage.json", text_encoder="labels"), read_model),
    "weights of a stage": Kind(
        make_unchecked("denoiser/weights.safetensors"), read_model, broken_safetensors
    ),
    "weights alone": Kind(
        make_weights, lambda folder: files.read_tensors(folder / "a.safetensors"), broken_safetensors
    ),
    "base.json": Kind(make_base_json, adapter_run.read_base),
    "adapter.json": Kind(make_adapter, adapter_run.read_plan),
    "the plan of text encoders": Kind(make_text_plan, train_text_encoders.read_plan),
    "guides.json": Kind(make_guides, read_plans),
    "times.json": Kind(
        lambda folder: fitted_times.write_times(folder, FittedGrid((1.5, 0.7, 0.0), (0.0, 0.4, 1.0))),
        fitted_times.read_times,
    ),
    "manifest.json": Kind(make_checkpoint("manifest.json"), read_checkpoint),
    "state.json": Kind(make_checkpoint("state.json"), read_state),
    "weights of a checkpoint": Kind(
        make_checkpoint("model.safetensors"), read_checkpoint, broken_safetensors
    ),
    "events.jsonl": Kind(make_events, read_report, broken_lines),
    "effective.toml": Kind(lambda folder: make_run(folder).effective, read_effective, broken_toml),
    "a recipe": Kind(make_recipe, read_recipe, broken_toml),
    "a shard of the store": Kind(make_shard, read_store, broken_safetensors, alone=True),
    "the index of the store": Kind(make_index, read_store, broken_safetensors),
    "metadata.jsonl": Kind(make_table("metadata.jsonl", ROWS), read_data, broken_lines),
    "metadata.csv": Kind(make_table("metadata.csv", TABLE), read_data, broken_csv),
    "metadata.tsv": Kind(make_table("metadata.tsv", TABLE.replace(",", "\t")), read_data, broken_bytes),
    "a caption's .json": Kind(make_table("0.json", '{"caption": ["a", "b"]}'), read_data),
    "a caption's .txt": Kind(make_table("0.txt", "a\nb\n"), read_data, broken_bytes),
    "a LoRA's header": Kind(make_lora, read_lora, broken_lora),
    "adapter_config.json": Kind(make_peft, read_lora),
    "a tar": Kind(make_tar, read_archive, broken_tar),
    "an npz": Kind(make_npz, read_archive, broken_bytes),
    "a parquet": Kind(make_parquet, read_archive, broken_bytes),
    "a drawn picture": Kind(
        make_drawn, lambda folder: generation_files.read_metadata(folder / "a.png"), broken_bytes
    ),
}


# ----------------------------------------------------------------------------- a model of others


def make_pipeline(name: str) -> Callable[[Path], Path]:
    """A pipeline's folder as diffusers writes it."""

    def make(folder: Path) -> Path:
        make_base(folder / "model")
        return folder / "model" / name

    return make


def make_lora_run(name: str) -> Callable[[Path], Path]:
    """What a run keeps of a LoRA on that pipeline; it has no checkpoint yet."""

    def make(folder: Path) -> Path:
        make_base(folder / "base")
        run = RunFolder.create(folder / "model", "seed = 0\n")
        adapter_run.write_base(run.path / "model", folder / "base", {"resolution": 32, "guidance": 3.0})
        adapter_run.write_plan(run.path / "model", AdapterPlan("lora", 2))
        model = sfumato.load(folder / "base")
        adapter_run.attach(model.denoiser, AdapterPlan("lora", 2))
        own = {n: w.detach().clone() for n, w in model.denoiser.named_parameters() if w.requires_grad}
        checkpoint.save(run, 1, {"model": own}, {})
        return run.path / "model" / name

    return make


FOREIGN = {
    **{
        name: Kind(make_pipeline(name), read_model)
        for name in (
            "model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json",
            "text_encoder/config.json", "tokenizer/tokenizer_config.json",
        )
    },
    "a run's base.json": Kind(make_lora_run("base.json"), read_model),
    "a run's adapter.json": Kind(make_lora_run("adapter.json"), read_model),
}  # fmt: skip


def try_out(kind: Kind, folder: Path, examples: int) -> tuple[int, int]:
    """(how many broken files were read, how many refused): each in a sentence."""
    file = kind.make(folder)
    kind.read(folder)  # unbroken it is read
    whole, counts = file.read_bytes(), [0, 0]

    @settings(max_examples=examples, **few)
    @given(kind.breaks(whole))
    def read(data: bytes) -> None:
        for one in file.parent.glob(f"*{file.suffix}") if kind.alone else [file]:
            one.unlink(missing_ok=True)
        file.write_bytes(data)
        try:
            kind.read(folder)
            counts[0] += 1
        except (Refused, Failed) as found:
            said = str(found)
            assert (len(said) > 20 and said.isprintable()) or "\n" in said, said
            counts[1] += 1

    read()
    return counts[0], counts[1]


@pytest.mark.parametrize("name", KINDS)
def test_a_broken_file_is_read_or_refused_in_a_sentence(name, tmp_path):
    read, refused = try_out(KINDS[name], tmp_path, EXAMPLES)
    assert read + refused >= EXAMPLES // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FOREIGN)
def test_a_broken_model_of_others_is_read_or_refused_in_a_sentence(name, tmp_path):
    read, refused = try_out(FOREIGN[name], tmp_path, MANY)
    print(f"{name}: {read} read, {refused} refused")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_broken_files_are_read_or_refused_in_a_sentence(name, tmp_path):
    read, refused = try_out(KINDS[name], tmp_path, MANY)
    print(f"{name}: {read} read, {refused} refused")
