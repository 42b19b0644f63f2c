"""Chat templates of tokenizers: small programs that a model's folder brings, bounded in what they may do.

transformers renders them in jinja2's immutable sandbox, which lets them call nothing of Python's. It bounds
neither their time nor the texts they make: here a template that could make a text of any length in one
expression is refused when the model is loaded, and one that runs or grows without end is stopped.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sfumato.errors import Failed, Refused

LONGEST = 100_000
"""Letters of a template; those of large language models have some 5,000."""
MOST_LINES = 1_000_000
"""Lines of a template that reading the prompts of one batch may take, each loop's rounds counted."""
MOST_LETTERS = 20_000_000
"""Letters or items that a value of a template may have."""
GROWING = {"center", "format", "format_map", "indent", "ljust", "rjust", "zfill", "expandtabs", "wordwrap"}
"""Filters and methods that make as many letters as a number says."""
WAY_OUT = "Take the tokenizer of the model's makers."
COMPILED = "<template>"
"""What jinja2 calls the file of a compiled template."""


def tokenizers_of(pipe: Any) -> dict[str, Any]:
    """The parts of a pipeline that have a chat template, by their names."""
    parts = getattr(pipe, "components", {})
    return {name: one for name, one in parts.items() if getattr(one, "chat_template", None)}


def check_templates(pipe: Any) -> None:
    """Raises Refused for a chat template that could make a text of any length in one expression."""
    for name, part in tokenizers_of(pipe).items():
        templates = part.chat_template
        for one in templates.values() if isinstance(templates, dict) else [templates]:
            why = fault_of(str(one))
            if why:
                raise Refused(f"The chat template of {name} {why}. {WAY_OUT}")


def fault_of(template: str) -> str:
    """Why a template is not rendered; empty for one that is."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if len(template) > LONGEST:
        return f"has {len(template)} letters, more than {LONGEST}"
    extensions = ["jinja2.ext.loopcontrols"]
    try:
        # what transformers adds marks a part of the answer, and is no other's
        plain = template.replace("{% generation", "{% if true").replace("{%- generation", "{%- if true")
        plain = plain.replace("endgeneration", "endif")
        tree = ImmutableSandboxedEnvironment(extensions=extensions).parse(plain)
    except (TemplateSyntaxError, RecursionError) as problem:
        return f"is none ({problem})"
    if next(tree.find_all((nodes.Mul, nodes.Pow)), None):
        return "multiplies, which may make a text of any length"
    named = [*tree.find_all(nodes.Filter), *tree.find_all(nodes.Getattr)]
    words = {one.name if isinstance(one, nodes.Filter) else one.attr for one in named}
    words |= {str(one.arg.value) for one in tree.find_all(nodes.Getitem) if isinstance(one.arg, nodes.Const)}
    texts = [one.value for one in tree.find_all(nodes.Const) if isinstance(one.value, str)]
    if next(tree.find_all(nodes.Mod), None) and any("%" in one for one in texts):
        return "formats by %, which may make a text of any length"
    growing = sorted(words & GROWING)
    return f"uses {growing[0]}, which may make a text of any length" if growing else ""


@contextmanager
def bounded_templates(pipe: Any) -> Iterator[None]:
    """Inside it a chat template that runs or grows without end is stopped.

    Raises:
        Failed: it was.
    """
    if not tokenizers_of(pipe):
        yield
        return
    from jinja2 import TemplateError

    lines, before = 0, sys.gettrace()

    def each_line(frame: FrameType, event: str, given: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines > MOST_LINES or any(_size(one) > MOST_LETTERS for one in frame.f_locals.values()):
            raise Failed(
                "The chat template of a tokenizer runs or grows without end (over "
                f"{MOST_LINES:,} lines, or a text of over {MOST_LETTERS:,} letters). {WAY_OUT}"
            )
        return each_line

    def each_call(frame: FrameType, event: str, given: Any) -> Any:
        return each_line(frame, event, given) if frame.f_code.co_filename == COMPILED else None

    if before is None:  # a debugger's own tracing stays
        sys.settrace(each_call)
    try:
        yield
    except (TemplateError, RecursionError) as problem:
        raise Failed(f"The chat template of a tokenizer fails ({problem}). {WAY_OUT}") from problem
    finally:
        sys.settrace(before)


def _size(value: Any) -> int:
    """How long a text or list of a template is, those in a namespace too."""
    if isinstance(value, str | list | tuple):
        return len(value)
    kept = getattr(value, "_Namespace__attrs", None)
    return max(map(_size, kept.values()), default=0) if isinstance(kept, dict) else 0
