"""Measuring a run: numbers with error bars, and the drawings they are about."""

from sfumato.workflow.evaluate.evaluate_run import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
