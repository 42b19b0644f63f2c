"""A GPU for these tests, made believe where torch was built for the CPU and there is a compiler."""

from collections.abc import Iterator

import pytest

from .make_believe import Ledger, Unavailable, compiled, make_believe

LIBRARY, WHY_NOT = None, ""
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
