"""Suggest: data, base and machine are looked at, and a recipe that is good there is written.

look at data, base → sizes (rules) → a step is timed on this machine → steps for the minutes → TOML
"""

from sfumato.workflow.suggest.suggestion import Suggestion, suggest_recipe

__all__ = ["Suggestion", "suggest_recipe"]
