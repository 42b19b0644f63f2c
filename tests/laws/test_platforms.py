"""Laws of systems: the package runs where there is no fcntl, and locks hold between processes anywhere."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sfumato
from sfumato import locks, run_folder
from sfumato.data.store import leases
from sfumato.data.store.store import Store
from sfumato.errors import Refused
from sfumato.run_folder import RunFolder

SOURCE = Path(sfumato.__file__).parent
POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "crypt"}
POSIX_NAMES = {
    "os": frozenset(
        {"fork", "forkpty", "kill", "killpg", "getuid", "geteuid", "getgid", "getpgid", "setsid", "uname"}
        | {"sysconf", "statvfs", "pread", "pwrite", "preadv", "pwritev", "mkfifo", "mknod", "nice", "fchmod"}
        | {"getloadavg", "sched_getaffinity", "sched_setaffinity", "wait", "waitpid", "chown", "openpty"}
        | {"O_SYNC", "O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "O_CLOEXEC"}
    ),
    "signal": frozenset(
        {"SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGCONT", "SIGSTOP"}
        | {"alarm", "setitimer", "pause"}
    ),
}
"""What Windows does not have, of what a program is likely to reach for."""

EVERY_MODULE = """
import builtins, importlib, pkgutil, sys
there = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    asked_by = str((globals or {}).get("__name__", ""))
    if asked_by.partition(".")[0] == "sfumato" and name.partition(".")[0] in BLOCKED:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return there(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
import sfumato
for module in pkgutil.walk_packages(sfumato.__path__, "sfumato."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from sfumato.demo.runner import peak_memory_gb  # asks for `resource` and must do without
print(len([name for name in sys.modules if name.startswith("sfumato.")]))
"""


def test_every_module_is_imported_where_there_is_no_posix():
    """Law: no module needs what Windows lacks in order to be imported."""
    code = EVERY_MODULE.replace("BLOCKED", repr(POSIX_MODULES))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len([file for file in SOURCE.rglob("*.py") if file.stem[:2] != "__"])


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_what_only_posix_has_is_asked_for_before_it_is_used(file):
    """Law: a name that Windows lacks stands beside a `hasattr`, and its modules inside a function."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    asked = {
        (ast.unparse(node.args[0]), ast.unparse(node.args[1]).strip("'"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr"
    }
    imported = {one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            told = node.value.id, node.attr
            assert told[1] not in POSIX_NAMES.get(told[0], ()) or told in asked, (
                f"{file.name}, line {node.lineno}: {'.'.join(told)} is not there on Windows"
            )
    for node in tree.body:
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert POSIX_MODULES.isdisjoint(names), f"{file.name}, line {node.lineno}: Windows has no {names}"


# ----------------------------------------------------------------------------- locks

SYSTEMS = {"as-it-is": "", "without-fcntl": "import sys\nsys.modules['fcntl'] = None\n"}
"""Whether this system's own locks are there; without them files stand for them."""

HOLD_RUN = """
import sys
from sfumato.run_folder import RunFolder
with RunFolder.open(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""
TRY_RUN = """
import os, sys
from sfumato.errors import Refused
from sfumato.run_folder import RunFolder
try:
    with RunFolder.open(sys.argv[1]).lock():
        print("held", flush=True)
except Refused as problem:
    print(problem)
"""
INSIDE = """
import sys
from pathlib import Path
from sfumato.locks import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=SYSTEMS)
def start(request):
    """A function that starts Python code in another process, on this system or one without fcntl."""
    running = []

    def begin(code, *words):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-W", "ignore", "-c", SYSTEMS[request.param] + code, *map(str, words)]
        running.append(subprocess.Popen(command, text=True, **pipes))
        return running[-1]

    yield begin
    for one in running:
        one.kill()
        one.wait()
        one.stdin.close()
        one.stdout.close()


def said(process):
    """Its next line."""
    return process.stdout.readline().strip()


def ended(process):
    """Its last words, when it has been let go."""
    process.stdin.close()
    words = process.stdout.read().strip()
    assert process.wait() == 0
    return words


def killed(process):
    """End it as nothing can be ended more abruptly."""
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_told_of_the_first(start, tmp_path):
    run = RunFolder.create(tmp_path / "run")
    first = start(HOLD_RUN, run.path)
    assert said(first) == "held"
    assert f"process {first.pid} " in said(start(TRY_RUN, run.path))
    assert ended(first) == ""
    assert ended(start(TRY_RUN, run.path)) == "held"
    assert not (run.path / ".lock").exists()


def test_a_killed_owner_is_taken_over(start, tmp_path):
    run = RunFolder.create(tmp_path / "run")
    first = start(HOLD_RUN, run.path)
    assert said(first) == "held"
    killed(first)
    assert (run.path / ".lock").exists()
    assert said(start(TRY_RUN, run.path)) == "held"


def test_one_killed_while_it_takes_a_lock_hinders_nobody(start, tmp_path):
    run = RunFolder.create(tmp_path / "run")
    first = start(INSIDE, run.path / ".lock.guard")
    assert said(first) == "held"
    waiting = start(TRY_RUN, run.path)
    assert waiting.poll() is None
    killed(first)
    assert said(waiting) == "held"


def test_a_lock_is_held_until_the_run_ends_and_by_one_of_many(tmp_path):
    """Law: of processes that all want to write a run, one does at any time."""
    code = """
import sys
from pathlib import Path
from sfumato.errors import Refused
from sfumato.run_folder import RunFolder
run, got = RunFolder.open(sys.argv[1]), 0
while got < 5:
    try:
        with run.lock():
            inside = run.path / "samples" / "inside"
            inside.touch(exist_ok=False)
            inside.unlink()
            got += 1
    except Refused:
        pass
"""
    run = RunFolder.create(tmp_path / "run")
    many = [subprocess.Popen([sys.executable, "-c", code, run.path]) for _ in range(3)]
    assert [one.wait() for one in many] == [0, 0, 0]


def test_a_lock_of_another_machine_is_respected_while_it_gives_signs_of_life(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    (run.path / ".lock").write_text(json.dumps({"pid": 1, "started": "1", "host": "elsewhere"}))
    with pytest.raises(Refused, match="process 1 on elsewhere"), run.lock():
        pass
    long_ago = time.time() - 2 * locks.FOREIGN_LOCK_SECONDS
    os.utime(run.path / ".lock", (long_ago, long_ago))
    with run.lock():
        pass


LEASE = """
import sys
from pathlib import Path
from sfumato.locks import FileLease
lease = FileLease(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
IS_LEASED = """
import sys
from pathlib import Path
from sfumato.locks import LockHeld, exclusive, is_leased
try:
    with exclusive(Path(sys.argv[1] + ".gate"), wait=False):
        print(is_leased(Path(sys.argv[1])))
except LockHeld:
    print("busy")
"""


def test_any_number_of_processes_lease_a_file_until_the_last_ends(start, tmp_path):
    file = tmp_path / "use.safetensors"
    first, second = start(LEASE, file), start(LEASE, file)
    assert said(first) == said(second) == "held"
    assert ended(start(IS_LEASED, file)) == "True"
    killed(first)
    assert ended(start(IS_LEASED, file)) == "True"
    assert ended(second) == ""
    assert ended(start(IS_LEASED, file)) == "False"
    assert not list(tmp_path.glob("*.lock"))


def test_who_does_not_wait_is_told_that_another_is_inside(start, tmp_path):
    file = tmp_path / "use.safetensors"
    other = start(INSIDE, f"{file}.gate")
    assert said(other) == "held"
    assert ended(start(IS_LEASED, file)) == "busy"
    killed(other)
    assert ended(start(IS_LEASED, file)) == "False"


def test_a_store_is_collected_by_one_at_a_time(tmp_path):
    store = Store(tmp_path / "store").root
    with leases.collecting(store), pytest.raises(Refused, match="being collected"), leases.collecting(store):
        pass


def test_locks_that_an_older_version_left_hinder_nobody(tmp_path):
    store = Store(tmp_path / "store")
    store.hold(leases.Owner("run"), {"pixels": ["0" * 32]}, [])
    (use,) = (store.root / leases.FOLDER).glob("*.safetensors")
    use.with_suffix(".lock").touch()
    (store.root / ".gate").touch()
    for is_busy in (True, False):
        with leases.collecting(store.root):
            assert [one.busy for one in leases.read_leases(store.root)] == [is_busy]
        store._held.clear()
    assert not use.with_suffix(".lock").exists()


def test_a_process_is_told_from_a_later_one_of_its_number(tmp_path, monkeypatch):
    """Law: pid and start time name a process, by /proc or by psutil."""
    exists = Path.exists
    for has_proc in (True, False):
        if not has_proc:
            monkeypatch.setattr(Path, "exists", lambda it: "/proc/" not in str(it) and exists(it))
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        begun = locks.started(other.pid)
        assert begun is not None and begun == locks.started(other.pid)
        assert begun != locks.started(os.getpid())
        holder = locks.Holder(other.pid, begun, locks.Holder.me().host)
        assert holder.is_alive(tmp_path)
        other.kill()
        other.communicate()
        assert locks.started(other.pid) is None and not holder.is_alive(tmp_path)


def test_a_rename_waits_for_a_reader_where_readers_hold_files(tmp_path, monkeypatch):
    """Law: what Windows refuses for a moment is tried again there, and told at once elsewhere."""
    replace, refused = Path.replace, []

    def held(path, target):
        if len(refused) < 3:
            refused.append(path)
            raise PermissionError(13, "The process cannot access the file", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", held)
    with pytest.raises(Refused):
        run_folder.write_atomic(tmp_path / "file", "text")
    monkeypatch.setattr(run_folder, "IS_WINDOWS", True)
    run_folder.write_atomic(tmp_path / "file", "text")
    assert len(refused) == 3 and (tmp_path / "file").read_text() == "text"
