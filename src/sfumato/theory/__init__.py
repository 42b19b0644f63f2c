"""Theory: two definitions, and everything that follows from them."""

from . import guidance, noise, oracle, times
from .catalogue import about, arguments, get, names, preconditioned
from .change import translate
from .definition import Report, Theory
from .solver import evaluations, integrate, methods, solve, widest

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
