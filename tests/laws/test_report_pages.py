"""A run's page stands alone, shows all that happened, and trusts nothing it is told."""

import base64
import hashlib
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from sfumato.commands import error_matrix
from sfumato.commands import eval as commands_eval
from sfumato.data import dataset_report as data_report
from sfumato.data.sources import folder as sources_folder
from sfumato.report import data_page, page, run_page
from sfumato.report.charts import Axis, Line, chart, downsample, smooth
from sfumato.report.page import Picture, amount, document, duration, embedded, section, table, tiles
from sfumato.run_folder import RunFolder
from sfumato.workflow.drawings import Drawing, write_drawings

NASTY = '<script>alert("x")</script> & "quotes"'


@pytest.fixture
def run(tmp_path):
    """A tiny run: a handful of events and four pictures."""
    run = RunFolder.create(
        tmp_path / "apples", "seed = 0\n", "seed = 0 # default\n\n[train]\nsteps = 4 # r.toml\n"
    )
    run.event(
        "data", summary={"samples": 12, "sizes": {"8×8": 12}, "set_aside": [{"file": NASTY, "reason": "no"}]}
    )
    run.event("start", step=0, parameters=1234, device="cpu", precision="fp32", threads=1)
    for step in range(1, 5):
        rates = {"learning_rate": 1e-3, "gradient_norm": 1.0, "samples_per_second": 9.0}
        run.event("step", step=step, loss=1.0 / step, **rates)
    for step in (2, 4):
        levels = [
            {"level": 0.25, "loss": 0.5, "error": 0.1},
            {"level": 0.75, "loss": 1.5 / step, "error": 0.1},
        ]
        for split in ("train", "held_out"):
            told = {"loss": 1.0, "error": 0.1, "by_level": levels}
            run.event("validation", step=step, split=split, weights="ema", **told)
        for group in ("trained", "held_out"):
            file = run.samples / f"{group}-{step}.png"
            Image.new("RGB", (8, 8), (step * 40, 0, 0)).save(file)
            told = {"files": [str(file.relative_to(run.path))], "prompts": [NASTY], "seeds": [3]}
            run.event("pictures", step=step, group=group, **told)
    run.event("phase", name="train", seconds=75.0)
    run.event("demo_evaluation", accuracy={"trained": 0.75}, notes={"trained": "by eye"})
    run.event("stop", step=4, reason="done")
    return run


class Tags(HTMLParser):
    """Checks that tags are closed in order, and collects their attributes."""

    VOID = ("meta", "img", "line", "polyline", "path", "circle", "br", "input")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(run):
    text = run_page.write(run).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    for tag, attributes in tags.seen:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"https?://|url\(|@import", text)


def test_the_page_shows_what_happened(run):
    text = run_page.render(run)
    assert text.count("data:image/png;base64,") == 2 + 4
    for words in (
        "Captions it was trained on",
        "Captions it never saw",
        "seed 3",
        "75%",
        "by eye",
        "1 min 15 s",
    ):
        assert words in text, words
    for words in (
        "Loss by noise level",
        "Gradient norm",
        "Where the time went",
        "1,234",
        "1 set aside",
        "r.toml",
    ):
        assert words in text, words


def test_what_it_is_told_stays_text(run):
    text = run_page.render(run)
    assert NASTY not in text and "&lt;script&gt;alert" in text
    assert text.count("<script") == len(re.findall(r"<figure class=\"chart\"", text)) + 1


HOSTILE = (
    "</title></style></script></h1><script>evil()</script><img src=x onerror=evil()>\"'><b onclick=evil()>"
)
"""Ends whatever it stands in, and begins what a browser would run."""


def hostile(value):
    """The same value with every text in it hostile, names of its entries kept."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, dict):
        return {key: hostile(one) for key, one in value.items()}
    return [hostile(one) for one in value] if isinstance(value, list | tuple) else value


def page_of_a_run(folder):
    run = RunFolder.create(
        folder / "run", "seed = 0\n", f"seed = 0 # {HOSTILE}\n[train]\n{HOSTILE} = {HOSTILE}\n"
    )
    Image.new("RGB", (8, 8)).save(run.samples / "a.png")
    files = ["samples/a.png", "samples/a.png"]
    summary = {HOSTILE: HOSTILE, "sizes": {HOSTILE: 1}, "set_aside": [{"file": HOSTILE, "reason": HOSTILE}]}
    run.event("data", summary=summary)
    run.event("start", step=0, device=HOSTILE, precision=HOSTILE, processes=2, parallel=HOSTILE)
    for step in (1, 2):
        run.event("step", step=step, loss=1.0)
        told = {"files": files, "prompts": [HOSTILE] * 2, "seeds": [HOSTILE] * 2, "shown": {HOSTILE: files}}
        for group in (None, HOSTILE, f"judged{HOSTILE}"):
            run.event("pictures", step=step, group=group, **told)
    run.event("phase", name=HOSTILE, seconds=1.0)
    metrics = {HOSTILE: {"value": 1.0, "error": 0.1, "note": HOSTILE}}
    run.event("evaluation", metrics=metrics)
    run.event("judge", accuracy={HOSTILE: 0.5}, notes={HOSTILE: HOSTILE})
    run.event("note", text=HOSTILE)
    run.event("stop", step=HOSTILE, reason=HOSTILE)
    return run_page.render(run)


def page_of_data(folder):
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    Image.new("RGB", (32, 32)).save(folder / "b.png")
    (folder / "a.txt").write_text("a")
    (folder / "torn.png").write_text("no picture")
    found = data_report.report(sources_folder.open_collection(folder))
    summary = hostile(found.summary)
    for name in ("labels", "sizes", "kinds", "companions"):
        summary[name] = {HOSTILE: 1} if name != "labels" else [[HOSTILE, 1]]
    clips = {
        "frames": 9,
        "rate": 8.0,
        "count": 1,
        "total_seconds": 1.0,
        "dropped": [{"file": HOSTILE, "reason": HOSTILE}],
    }
    bars = {name: [[HOSTILE, 1]] for name in ("seconds", "rates", "long_enough")}
    tokens = {"most": 4, "truncated": 1, "share": 1.0, "lengths": [[HOSTILE, 1]]}
    summary |= {"clips": {**clips, **bars}, "tokens": tokens, "truncated": [[HOSTILE, 9]]}
    summary |= {"leaks": [[HOSTILE] * 3], "near_duplicates": [[HOSTILE, HOSTILE, 0.1]]}
    summary["caption_statistics"] |= {"most_repeated": [HOSTILE, 2], "frequent_words": [[HOSTILE, 1]]}
    sheets = [(HOSTILE, [data_report.Thumbnail("", HOSTILE, 0.1)])]
    return data_page.render(summary, sheets, [(HOSTILE, [("", HOSTILE)])])


def page_of_drawings(folder):
    one = Drawing(
        Image.new("RGB", (8, 8)), HOSTILE, 0, {"negative": HOSTILE, HOSTILE: HOSTILE, "loras": [HOSTILE]}
    )
    return write_drawings(folder, [one], f"By {HOSTILE}.")["page"].read_text(encoding="utf-8")


def page_of_a_grid(folder):
    axes = {"prompt": [HOSTILE], "solver": [HOSTILE], HOSTILE: [HOSTILE]}
    values = dict.fromkeys(axes, HOSTILE)
    one = Drawing(Image.new("RGB", (8, 8)), HOSTILE, 0, {"negative": HOSTILE}, (0, 0, 0), values)
    return write_drawings(folder, [one], f"By {HOSTILE}.", axes=axes)["page"].read_text(encoding="utf-8")


def page_of_an_evaluation(folder):
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    found = SimpleNamespace(
        step=1, metrics={HOSTILE: SimpleNamespace(note=HOSTILE)}, by_level={}, notes=[HOSTILE]
    )
    pairs = [Picture(embedded(folder / "a.png"), HOSTILE, HOSTILE)]
    return commands_eval._page(Path(HOSTILE), found, [(folder / "a.png", HOSTILE)], pairs)


def page_of_a_theory(folder):
    refused = {"solver": HOSTILE, "grid": HOSTILE, "refused": HOSTILE}
    drawn = {"solver": "euler", "grid": HOSTILE, "error": 0.1, "evaluations": HOSTILE}
    parts = [
        tiles([(HOSTILE, HOSTILE, HOSTILE)]),
        section(HOSTILE, table([HOSTILE], [[HOSTILE]]), HOSTILE),
        section(HOSTILE, error_matrix.as_table([refused, drawn])),
        section(
            HOSTILE, chart(HOSTILE, [Line(HOSTILE, [0, 1], [0, 1])] * 2, x=HOSTILE, y=HOSTILE, note=HOSTILE)
        ),
        HOSTILE,
    ]
    return document(HOSTILE, HOSTILE, parts, kicker=HOSTILE)


PAGES = (
    page_of_a_run,
    page_of_data,
    page_of_drawings,
    page_of_a_grid,
    page_of_an_evaluation,
    page_of_a_theory,
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.__name__)
def test_hostile_words_stay_words_on_every_page(page, tmp_path):
    """Law: captions, names of files and folders, and whatever else a page is told, begin and end no tag."""
    text = page(tmp_path)
    assert "evil()" in text
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    for tag, attributes in tags.seen:
        assert tag != "b" or not attributes
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag != "img" or attributes.get("src", "data:").startswith("data:")
    scripts = [attributes for tag, attributes in tags.seen if tag == "script"]
    assert [one for one in scripts if one.get("type") != "application/json"] == [{}]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.__name__)
def test_a_page_runs_its_own_script_and_no_other(page, tmp_path):
    """Law: the policy a page carries names the hash of the one script it has, and lets nothing be fetched."""
    text = page(tmp_path)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0])
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")


STRANGE = {
    "above": lambda run, secret: "../secret.png",
    "far above": lambda run, secret: "samples/" + "../" * 40 + str(secret)[1:],
    "absolute": lambda run, secret: str(secret),
    "the machine's": lambda run, secret: "/etc/hostname",
    "a link out": lambda run, secret: link(run, "samples/link.png", secret),
    "through a folder that is a link": lambda run, secret: link(run, "there", secret.parent) + "/secret.png",
    "a device": lambda run, secret: link(run, "samples/zero.png", Path("/dev/zero")),
    "no picture": lambda run, secret: written(run, "samples/words.png", b"SECRET"),
    "half a picture": lambda run, secret: written(run, "samples/half.png", secret.read_bytes()[:60]),
    "a drawing with a script": lambda run, secret: written(
        run, "a.svg", b"<svg><script>evil()</script></svg>"
    ),
    "the record itself": lambda run, secret: "events.jsonl",
    "a folder": lambda run, secret: "samples",
    "nothing": lambda run, secret: "samples/none.png",
    "no name": lambda run, secret: "a\0b.png",
    "a number": lambda run, secret: 3,
    "a list": lambda run, secret: ["samples/a.png"],
}


def link(run, name, target):
    (run.path / name).symlink_to(target)
    return name


def written(run, name, content):
    (run.path / name).write_bytes(content)
    return name


@pytest.mark.parametrize("strange", STRANGE)
def test_a_page_embeds_pictures_of_its_run_alone(strange, tmp_path):
    """Law: what an event names is embedded if it lies inside the run and is a picture, else left out."""
    run, secret = RunFolder.create(tmp_path / "run", "seed = 0\n"), tmp_path / "secret.png"
    Image.effect_noise((16, 16), 80).save(secret)
    Image.new("RGB", (8, 8)).save(run.samples / "a.png")
    name = STRANGE[strange](run, secret)
    for step in (1, 2):
        files = [name, "samples/a.png"]
        shown = {"source": [name, name]}
        run.event("pictures", step=step, files=files, prompts=["", ""], seeds=[0, 1], shown=shown)
    text = run_page.render(run)
    inside = base64.b64encode((run.samples / "a.png").read_bytes()).decode()
    found = set(re.findall(r"data:[\w/+]+;base64,([\w+/=]*)", text))
    if not isinstance(name, str):  # no line that a run writes: left out as a whole, and said
        assert not found and "lines of events.jsonl" in text
        return
    assert found == {inside}
    assert text.count(inside) == 3, "among the latest, and twice in the strip"


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif"])
def test_a_page_says_what_kind_of_picture_it_embeds(kind, tmp_path):
    """Law: the kind is that of the picture, whatever its name says; a link inside the run serves."""
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{kind}")
    (tmp_path / f"a.{kind}").rename(tmp_path / "a.svg")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.svg")
    found = {page.embedded_from(tmp_path, name) for name in ("a.svg", "b.png")}
    assert len(found) == 1 and found.pop().startswith(f"data:image/{kind.replace('jpg', 'jpeg')};base64,")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def console_of(file, tmp_path):
    """(a page as the browser has it once it has run, what its console and network said)."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *options, profile, "--virtual-time-budget=3000", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


PROBE = (
    "for (const one of document.querySelectorAll('.gallery img, .strip img, .sheet img')) one.click();"
    "document.body.dataset.lens = document.getElementById('lens').open;"
)
"""What is asked of a page that works: a click on a picture opens it large."""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("made", PAGES, ids=lambda page: page.__name__)
def test_a_browser_runs_a_pages_script_and_nothing_it_was_told(made, tmp_path):
    """Law: told hostile words, the page works and the console is silent; a foreign script is refused."""
    (folder := tmp_path / "folder").mkdir()
    text = made(folder).replace("evil()", "document.title='PWNED'")
    (file := tmp_path / "page.html").write_text(text, encoding="utf-8")
    shown, said = console_of(file, tmp_path)
    assert said == []
    assert "<title>PWNED" not in shown and 'id="lens"' in shown
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    before = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    after = base64.b64encode(hashlib.sha256((script + PROBE).encode()).digest()).decode()
    file.write_text(
        text.replace(script, script + PROBE)
        .replace(before, after)
        .replace(html.escape(before), html.escape(after)),
        encoding="utf-8",
    )
    shown, said = console_of(file, tmp_path)
    assert said == [] and f'data-lens="{str("<img src=" in text or "data:image" in text).lower()}"' in shown
    for foreign in (
        "<script>document.title='PWNED'</script>",
        "<img src=x onerror=\"document.title='PWNED'\">",
    ):
        file.write_text(text.replace("<main>", f"<main>{foreign}"), encoding="utf-8")
        shown, said = console_of(file, tmp_path)
        assert "<title>PWNED" not in shown and any("Content Security Policy" in one for one in said)


def test_every_page_is_made_by_one_builder():
    """Law: nothing but the templates begins a page."""
    source = Path(page.__file__).parent.parent
    begun = [
        file
        for file in source.rglob("*.*")
        if file.suffix != ".pyc" and b"<!doctype" in file.read_bytes().lower()
    ]
    assert [file.name for file in begun] == ["page.html.jinja"]


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    run = RunFolder.create(tmp_path / "new", "seed = 0\n")
    assert "<h1>new</h1>" in run_page.render(run)
    run.event("step", step=1, loss=float("nan"))
    run.event("step", step=2, loss=2.0)
    run.event("pictures", step=2, files=["samples/lost.png"], prompts=["gone"], seeds=[0], group=None)
    run.event("something-new", step=2, shape=[1])
    assert "Loss" in run_page.render(run)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 3.0], [1e-6, 1.0, 1e6], [5.0, 5.0], [1.0, float("nan"), 3.0], [0.0, 1.0]]
)
def test_every_mark_of_a_chart_lies_on_its_paper(log, values):
    text = chart(
        "c",
        [Line("a", range(len(values)), values, [0.1] * len(values), points=True)],
        x="x",
        y="y",
        log_y=log,
    )
    points = re.findall(r"([\d.-]+),([\d.-]+)", " ".join(re.findall(r'points="([^"]*)"', text)))
    assert points
    for x, y in points:
        assert 0 <= float(x) <= 520 and 0 <= float(y) <= 280


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 0.19), (1e-5, 1e5), (0, 5000), (2.0, 2.2)])
@pytest.mark.parametrize("log", [False, True])
def test_ticks_lie_between_the_ends_and_are_a_few(low, high, log):
    ticks = Axis(max(low, 1e-9) if log else low, high, 0, 100, log).ticks()
    assert 2 <= len(ticks) <= 12
    room = 1e-9 * (high - low)
    assert all(low * 0.99 - room <= tick <= high * 1.01 for tick in ticks)


def test_smoothing_keeps_a_line_and_thinning_keeps_the_mean():
    assert smooth([2.0] * 50, 5) == pytest.approx([2.0] * 50)
    rough = [1.0, 3.0] * 50
    assert max(smooth(rough, 10)[5:-5]) - min(smooth(rough, 10)[5:-5]) < 0.3
    x, y = downsample(range(1000), rough * 10, 100)
    assert len(x) == 100 and sum(y) / 100 == pytest.approx(2.0)


def test_numbers_read_well():
    assert [duration(s) for s in (3.21, 42.4, 75, 3600, 7512)] == [
        "3.2 s",
        "42 s",
        "1 min 15 s",
        "1 h 0 min",
        "2 h 5 min",
    ]
    assert [amount(n) for n in (7, 12345, 1_750_000, 0.03121)] == ["7", "12,345", "1.75 M", "0.0312"]


def test_the_gap_between_held_out_and_trained_is_charted_with_its_error(tmp_path):
    run = RunFolder.create(tmp_path / "run", "output = 1\n", "output = 1\n")
    run.event("start", step=0, device="cpu", processes=2, parallel="fsdp")
    for step in (10, 20, 30):
        for weights in ("raw", "ema"):
            run.event("generalization_gap", step=step, weights=weights, gap=0.001 * step, error=0.01)
    page = run_page.render(run)
    assert "Generalisation gap" in page and "averaged weights" in page and "2 processes (fsdp)" in page
