"""Demo: reference → picture. Words say which shape, how large, on what; the reference says in which color."""

from sfumato.data.sources import shape_reader
from sfumato.demo.drawing import draw
from sfumato.demo.runner import DemoReport, DemoTask, Scores
from sfumato.demo.two_step import GuideDemo, companion, plan_of, unseen
from sfumato.settings import Table

DEMO = GuideDemo(
    plan_of("ip-adapter", minutes=6.0, guidance=2.0, fewest=800),
    base_share=0.6,
    fewest_base=2000,
    base_data="shapes-alone",
    data={"reference_image": "reference", "condition_dropout": Table({"reference": 0.1})},
)


def judge(trained: DemoReport) -> Scores:
    """Whether a drawing has the color of its reference and the shape of its words, read from the pixels.

    The adapter's training showed neither that shape in that color, nor the color's name.
    """
    samples = unseen(trained)
    prompts = [sample.captions[0] for sample in samples]
    references = [companion(sample, "reference") for sample in samples]
    drawn = draw(trained, prompts, "judged_held_out", reference=references)
    color, shape, both = 0, 0, 0
    for prompt, reference, picture in zip(prompts, references, drawn, strict=True):
        wanted = shape_reader.read(reference)[0].color
        found = [(one.shape, one.color) for one in shape_reader.read(picture)]
        color += any(of == wanted for _, of in found[:1])
        shape += any(what in prompt.split() for what, _ in found[:1])
        both += len(found) == 1 and found[0][1] == wanted and found[0][0] in prompt.split()
    count = len(drawn)
    how = "shapes in colors that the adapter's training never showed: "
    notes = {
        "reference_color": f"{how}the color is the reference's",
        "shape": f"{how}the shape is the words'",
        "shape_and_color": f"{how}one thing, right in both",
    }
    return {"reference_color": color / count, "shape": shape / count, "shape_and_color": both / count}, notes


TASK = DemoTask(DEMO.recipe, judge, DEMO.train)
