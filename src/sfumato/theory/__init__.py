"""Theory: two definitions, and everything that follows from them."""

from sfumato.theory import guidance, noise, oracle, times
from sfumato.theory.catalog import arguments, describe, get, names, preconditioned
from sfumato.theory.convert import translate
from sfumato.theory.definition import Report, Theory
from sfumato.theory.solvers.solver import evaluations, integrate, methods, solve, widest_step

__all__ = [
    "Report",
    "Theory",
    "arguments",
    "describe",
    "evaluations",
    "get",
    "guidance",
    "integrate",
    "methods",
    "names",
    "noise",
    "oracle",
    "preconditioned",
    "solve",
    "times",
    "translate",
    "widest_step",
]
