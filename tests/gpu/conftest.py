"""A GPU for these tests, made believe where torch was built for the CPU and there is a compiler.

They run in a process of their own (tests/laws/test_gpu_laws.py begins it; by hand `GPU_LAWS=1 pytest -n 0
tests/gpu`): the first backward pass beside a device starts a thread for it, after which nothing can fork.
"""

import os
from collections.abc import Iterator

import pytest

from .make_believe import Ledger, Unavailable, compiled, make_believe

LIBRARY, WHY_NOT = None, ""
if "GPU_LAWS" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    try:
        LIBRARY = compiled()  # before the first backward pass of this process, which counts the devices
    except Unavailable as reason:
        WHY_NOT = str(reason)


@pytest.fixture
def gpu() -> Iterator[Ledger]:
    """A device cuda:0, and what it would have had to do."""
    if LIBRARY is None:
        pytest.skip(WHY_NOT)
    with make_believe(LIBRARY) as ledger:
        yield ledger
