"""The workflow: from a recipe to a trained run, each step done once and never twice.

recipe → pictures and captions → codec → encodings in the store → training → pictures, numbers, page

The names load on first use, so that what a command refuses it refuses at once.
"""

from typing import TYPE_CHECKING

from sfumato.lazy import names_from

if TYPE_CHECKING:
    from sfumato.workflow.averaging import average
    from sfumato.workflow.planning.plan import fit_to_memory, plan, to_fetch
    from sfumato.workflow.planning.summary import summary
    from sfumato.workflow.prepare import prepare_run, resolve_recipe
    from sfumato.workflow.resume import check_resume
    from sfumato.workflow.train_run import Run, encode, train
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Run": "sfumato.workflow.train_run",
            "average": "sfumato.workflow.averaging",
            "check_resume": "sfumato.workflow.resume",
            "encode": "sfumato.workflow.train_run",
            "fit_to_memory": "sfumato.workflow.planning.plan",
            "plan": "sfumato.workflow.planning.plan",
            "to_fetch": "sfumato.workflow.planning.plan",
            "prepare_run": "sfumato.workflow.prepare",
            "resolve_recipe": "sfumato.workflow.prepare",
            "summary": "sfumato.workflow.planning.summary",
            "train": "sfumato.workflow.train_run",
        },
    )

__all__ = [
    "Run",
    "average",
    "check_resume",
    "encode",
    "fit_to_memory",
    "plan",
    "prepare_run",
    "resolve_recipe",
    "summary",
    "to_fetch",
    "train",
]
