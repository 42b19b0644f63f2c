"""Every test runs on one thread, offline, with tensor shapes checked on each call, in a precision it states.

What `precision = "auto"` means depends on the processor; here it does not. It is float32, or what a test's
marker says: `@pytest.mark.precisions("fp32", "bf16")` runs it in each. `--precision bf16` is for looking at
all others in bf16. Processes that a test starts inherit it.
"""

import os
from collections.abc import Iterator
from types import SimpleNamespace

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
from jaxtyping import install_import_hook

install_import_hook("sfumato.theory", "beartype.beartype")

import torch  # noqa: E402

from sfumato.training.precision import AUTO_PRECISION, PRECISIONS  # noqa: E402
from sfumato.trust import MEMORY_VARIABLE  # noqa: E402

torch.set_num_threads(1)

MOST_WORKERS = 8
"""Tests at once, whatever the machine has: each worker holds torch and half a gigabyte."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--precision",
        choices=PRECISIONS[1:],
        default="fp32",
        help='what precision = "auto" means in tests that do not state theirs',
    )


def pytest_configure(config: pytest.Config) -> None:
    os.environ[AUTO_PRECISION] = config.getoption("--precision")  # for fixtures that many tests share


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("precisions")
    if marker is not None:
        metafunc.parametrize("precision", marker.args, indirect=True)


@pytest.fixture(autouse=True, scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the tests run is remembered apart from what the user runs; processes of the tests inherit it."""
    os.environ[MEMORY_VARIABLE] = str(tmp_path_factory.mktemp("machine") / "trusted-code")


@pytest.fixture(autouse=True, scope="session")
def disk() -> Iterator[None]:
    """No test cuts the power, and a killed process leaves what it wrote: nobody waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What "auto" means in this test and in the processes it starts; torch's own draws begin anew."""
    torch.manual_seed(0)
    found = getattr(request, "param", request.config.getoption("--precision"))
    monkeypatch.setenv(AUTO_PRECISION, found)
    return found


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One for each core this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of our own on the loopback, to which `huggingface_hub` goes in place of the real one."""
    import huggingface_hub
    from huggingface_hub import constants, file_download

    from hub_server import HubServer

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
        huggingface_hub.utils._http.close_session()
        yield server
        huggingface_hub.utils._http.close_session()
