"""The workflow: from a recipe to a trained run, each step done once and never twice.

recipe → pictures and captions → codec → encodings in the store → training → pictures, numbers, page
"""

from sfumato.workflow.averaging import average
from sfumato.workflow.planning.plan import fit_to_memory, plan
from sfumato.workflow.planning.summary import summary
from sfumato.workflow.prepare import prepare_run, resolve_recipe
from sfumato.workflow.resume import check_resume
from sfumato.workflow.train_run import Run, encode, train

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
    "train",
]
