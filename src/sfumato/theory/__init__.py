"""Theory: two definitions, and everything that follows from them."""

from sfumato.theory import guidance, noise, oracle, times
from sfumato.theory.catalogue import about, arguments, get, names, preconditioned
from sfumato.theory.convert import translate
from sfumato.theory.definition import Report, Theory
from sfumato.theory.solvers.solver import evaluations, integrate, methods, solve, widest

__all__ = [
    "Report",
    "Theory",
    "about",
    "arguments",
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
    "widest",
]
