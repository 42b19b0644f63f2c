"""Laws of `sfumato plan`: twelve lines that say what takes effect, and every key for who asks."""

from sfumato.recipe import Recipe
from sfumato.run_folder import RunFolder
from sfumato.workflow import summary

from .world import RECIPE, sfumato, write_recipe


def lines_of(out: str) -> dict[str, str]:
    return {line.split()[0]: line.partition("  ")[2].strip() for line in out.splitlines()}


def test_a_plan_is_twelve_lines_and_all_of_it_with_all(tmp_path):
    recipe = write_recipe(tmp_path)
    said = sfumato("plan", recipe, "train.batch=2", "train.warmup_steps=9", "sample.every=50")
    assert len(said.out.splitlines()) <= 12
    found = lines_of(said.out)
    assert "run, new" in found["run"] and "4 pictures of about 16 px, 4 held out" in found["data"]
    assert "trained first, 3 steps" in found["model"] and "6 steps of 2 on cpu" in found["training"]
    assert found["time"].startswith("about ") and "measuring" in found["time"]
    assert "GB that are free" in found["memory"] and "checkpoints" in found["disk"]
    assert found["fetched"] == "nothing"
    assert "3 values from the command line" in found["recipe"]
    assert "Nothing is drawn before the end" in said.out and "The warm-up of 9 steps" in said.out
    whole = sfumato("plan", recipe, "--all").out
    assert all(f"\n{name} " in whole for name in Recipe().values())
    assert "memory (GB)" in whole and "_gb" not in whole


def test_many_unusual_things_are_counted_not_listed(tmp_path):
    recipe = write_recipe(tmp_path)
    found = sfumato("plan", recipe, "--json").json()
    found["unusual"] = [f"number {i}" for i in range(7)]
    words = [line for word, line in summary(found) if word == "unusual"]
    assert words == ["number 0", "6 more: --all"] and len(summary(found)) == 12


def test_a_plan_tells_what_a_run_that_goes_on_still_takes(tmp_path):
    recipe = write_recipe(tmp_path, RECIPE.replace("threads = 1", "threads = 1\nsanity = false"))
    assert sfumato("train", recipe, "train.steps=3").code == 0
    found = sfumato("plan", recipe, "--json").json()
    assert found["step"] == 3 and "goes on from step-000003" in dict(summary(found))["run"]
    assert any("train.steps was 3 and is 6" in note for note in found["unusual"])
    done = lines_of(sfumato("plan", recipe, "train.steps=3").out)
    assert "has all of its 3 steps" in done["run"] and "training" not in done["time"]
    measured = {event["name"] for event in RunFolder.open("run").events() if event["kind"] == "phase"}
    assert {"codec", "encode", "train"} <= measured
