"""A GPU that is not there: tensors that say cuda:0 and hold real numbers in the CPU's memory.

The real code runs on it, with true numbers. What a GPU would have had to do is counted with the line of
sfumato that asked for it: launches, copies between host and device, and moments at which the host waits until
the device has done all it was given. What a GPU would refuse raises: operands on two devices, and a tensor
read on a stream that has not waited for the stream that writes it.

It needs a C++ compiler once for each version of torch, for the few answers that torch wants below Python.
"""

import contextlib
import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

HERE = Path(__file__).parent
SOURCE = Path(torch.__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
MEMORY = 24 << 30
aten = torch.ops.aten


# ------------------------------------------------------------------------------------------ below Python


class Unavailable(Exception):
    """Why this machine cannot make believe."""


def compiled() -> ctypes.CDLL:
    """The answers that torch wants below Python, compiled once for each version of torch.

    Raises:
        Unavailable: no compiler, or a torch that was built for real GPUs.
    """
    if torch.version.cuda or torch.version.hip:
        raise Unavailable("this torch was built for a real GPU")
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        raise Unavailable("the make-believe GPU needs g++ on Linux")
    source = HERE / "guard.cpp"
    mark = hashlib.sha256(f"{torch.__version__} {source.read_text()}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"sfumato-make-believe-{mark}.so"
    if not library.exists():
        include, libraries = SOURCE / "include", SOURCE / "lib"
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / "guard.so"
            words = [compiler, "-O0", "-shared", "-fPIC", "-std=c++20", source, "-o", made, f"-I{include}"]
            words += [f"-I{include}/torch/csrc/api/include", f"-L{libraries}", "-lc10", "-ltorch_cpu"]
            flag = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
            done = subprocess.run(
                [*map(str, words), flag, f"-Wl,-rpath,{libraries}"], capture_output=True, text=True
            )
            if done.returncode:
                raise Unavailable(f"guard.cpp does not compile: {done.stderr[-500:]}")
            made.replace(library)
    found = ctypes.CDLL(str(library))
    found.install()
    return found


# ------------------------------------------------------------------------------------------ what is counted


class Ledger:
    """What a GPU would have had to do since `clear`: how often, and for which line."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.downloads: Counter[str] = Counter()
        self.doubles: Counter[str] = Counter()
        self.upload_bytes = self.download_bytes = 0

    def sync(self, why: str) -> None:
        """The host waits for the device."""
        self.syncs[f"{why} at {line()}"] += 1

    def upload(self, numbers: torch.Tensor, is_pinned: bool, non_blocking: bool) -> None:
        """A copy from host to device: it only waits for nothing if it is told so, from pinned memory."""
        self.uploads[line()] += 1
        self.upload_bytes += numbers.nbytes
        if not (is_pinned and non_blocking):
            self.sync(f"{'blocking' if is_pinned else 'pageable'} copy to the device")

    def download(self, numbers: torch.Tensor, non_blocking: bool) -> None:
        """A copy from device to host."""
        self.downloads[line()] += 1
        self.download_bytes += numbers.nbytes
        if not non_blocking:
            self.sync("copy to the host")


def line() -> str:
    """The innermost lines of sfumato that are being run; before them in brackets another package's within."""
    found: list[str] = []
    outside, frame = "", sys._getframe(1)
    while frame is not None and len(found) < 2:
        name = frame.f_code.co_filename
        if "/src/sfumato/" in name:
            found.append(f"{name.split('/src/sfumato/')[1]}:{frame.f_lineno}")
        elif not (outside or found) and "/torch/" not in name and name != __file__:
            outside = f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return " < ".join([*([f"[{outside}]"] if outside and found else []), *found]) or outside


def ours(counted: Counter[str]) -> Counter[str]:
    """Of what was counted, what sfumato's own lines ask for."""
    return Counter({where: count for where, count in counted.items() if "[" not in where})


class DeviceMismatch(RuntimeError):
    """Operands on two devices, as CUDA refuses them."""


class Race(RuntimeError):
    """A stream reads what another one writes, and has not waited for it."""


# ------------------------------------------------------------------------------------------ streams


class Stream:
    """A queue of the device's work. `seen` says how much of the others' work comes before its next."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.count, self.seen = 0, {}
        STATE.streams += 1

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        for stream, count in event.marks.items():
            self.seen[stream] = max(count, self.seen.get(stream, 0))

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        STATE.ledger.sync("stream.synchronize")
        STATE.known |= self.record_event().marks

    def query(self) -> bool:
        return True


class Event:
    """A mark in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self.marks: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        self.marks = {**stream.seen, stream: stream.count}

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        if threading.current_thread() is threading.main_thread():  # a thread of its own keeps nobody waiting
            STATE.ledger.sync("event.synchronize")
        STATE.known |= self.marks

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


class _State:
    """What the pretence knows: where it writes things down, and who wrote which memory last."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.streams = 0
        self.known: dict[Any, int] = {}
        self.writers: dict[int, tuple[Stream, int]] = {}
        self.pinned: dict[int, torch.Tensor] = {}
        """Kept, so that no other tensor is found where a pinned one was."""
        self.local = threading.local()
        self.default: Any = None


STATE = _State()
STATE.default = Stream()


def current_stream(device: Any = None) -> Stream:
    return getattr(STATE.local, "stream", None) or STATE.default


@contextlib.contextmanager
def stream_context(stream: Stream | None) -> Iterator[None]:
    before = getattr(STATE.local, "stream", None)
    STATE.local.stream = stream or before
    try:
        yield
    finally:
        STATE.local.stream = before


def _storage(numbers: torch.Tensor) -> int:
    return numbers.untyped_storage()._cdata


def _check_order(read: list["DeviceTensor"]) -> None:
    """Raises Race if one of these is written on a stream that this one has not waited for."""
    here = current_stream()
    for tensor in read:
        writer, count = STATE.writers.get(_storage(tensor.numbers), (here, 0))
        if writer is not here and max(here.seen.get(writer, 0), STATE.known.get(writer, 0)) < count:
            raise Race(f"{tensor!r} is read on a stream that has not waited for its copy, at {line()}")


def _stamp(written: list["DeviceTensor"]) -> None:
    here = current_stream()
    here.count += 1
    for tensor in written:
        STATE.writers[_storage(tensor.numbers)] = (here, here.count)


# ------------------------------------------------------------------------------------------ tensors


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on `place` and holds its numbers in the CPU's memory."""

    numbers: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, place: torch.device = CUDA) -> "DeviceTensor":
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=place,
        )
        self.numbers, self.place = numbers.detach(), place
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["numbers"], self.place

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, place: Any, *_: Any) -> "DeviceTensor":
        return cls(inner["numbers"], place)

    def __repr__(self) -> str:
        return f"DeviceTensor({self.place}, {tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            new = DeviceTensor(self.numbers.clone(), self.place)
            is_parameter = isinstance(self, torch.nn.Parameter)
            new = torch.nn.Parameter(new, False) if is_parameter else new
            memo[id(self)] = new.requires_grad_(self.requires_grad)
        return memo[id(self)]

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        other = value.detach() if isinstance(value, DeviceTensor) else DeviceTensor(value.detach(), CPU)
        torch._C.TensorBase.data.__set__(self, other)  # pyright: ignore[reportAttributeAccessIssue]
        self.numbers, self.place = other.numbers, other.place

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Stream) -> None:
        """The allocator's business."""

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def pin_memory(self, device: Any = None) -> Any:
        if self.place.type == "cuda":
            raise RuntimeError("cannot pin a tensor of the device: only dense CPU tensors can be pinned")
        return _pin_memory(self.numbers)


def _pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    if tensor.numel() == 0 or _is_pinned(tensor):
        return tensor
    with torch.no_grad():
        pinned = torch.empty_like(tensor).copy_(tensor)
    STATE.pinned[_storage(pinned)] = pinned
    return pinned


def _is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    return tensor.numel() == 0 or _storage(tensor) in STATE.pinned


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Its numbers, without any copy being counted: for tests."""
    return tensor.numbers if isinstance(tensor, DeviceTensor) else tensor


# ------------------------------------------------------------------------------------------ one operation

READ_BY_HOST = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "_unique2", "unique_dim", "unique_consecutive",
    "masked_select", "repeat_interleave.Tensor", "bincount", "multinomial", "_linalg_check_errors",
}  # fmt: skip
"""Operations whose answer, or its shape, the host waits for."""
TAKES_HOST_TENSORS = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}
MAKES_NOTHING = {
    "detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "set_", "_reshape_alias", "_unsafe_view", "device", "is_pinned", "_has_same_storage_numel", "resize_",
    "_conj", "is_same_size", "_fused_sdp_choice",
}  # fmt: skip


class _Asked(NamedTuple):
    name: str
    device: list[DeviceTensor]
    host: list[torch.Tensor]
    tensors: list[torch.Tensor]


def _numbers(value: Any, found: list[torch.Tensor]) -> Any:
    """The value with the device's tensors as their numbers; every tensor in it is added to `found`."""
    if isinstance(value, torch.Tensor):
        found.append(value)
        return value.numbers if isinstance(value, DeviceTensor) else value
    if isinstance(value, list | tuple):
        return type(value)([_numbers(one, found) for one in value])
    return value


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: on the CPU's numbers, and written down as a GPU would have had to do it."""
    schema = func._schema.name.split("::")[1]
    if schema == "device":
        return args[0].place
    if schema == "_fused_sdp_choice":
        return 0  # attention by plain products
    tensors: list[torch.Tensor] = []
    real_args = _numbers(args, tensors)
    real_kwargs = {name: _numbers(value, tensors) for name, value in kwargs.items() if name != "pin_memory"}
    device = [one for one in tensors if isinstance(one, DeviceTensor) and one.place.type == "cuda"]
    wanted = kwargs.get("device")
    target = None if wanted is None else torch.device(wanted)
    is_ours = target is not None and target.type == "cuda"
    if not is_ours and not any(isinstance(one, DeviceTensor) for one in tensors):
        return func(*args, **kwargs)
    host = [one for one in tensors if not isinstance(one, DeviceTensor) or one.place.type != "cuda"]
    asked = _Asked(schema, device, host, tensors)
    if is_ours:
        real_kwargs["device"] = CPU
    if STATE.streams > 1 and _is_doing_something(func, schema):
        _check_order(device)
    if schema == "_to_copy":
        return _copied(func, real_args, real_kwargs, asked, target)
    if schema == "copy_":
        return _copied_into(func, args, real_args, real_kwargs)
    _write_down(asked, func)
    result = func(*real_args, **real_kwargs)
    if kwargs.get("pin_memory"):
        STATE.pinned[_storage(result)] = result
    place = target if target is not None else CUDA if device else CPU
    return _wrapped(func, args, kwargs, result, CUDA if place.type == "cuda" else CPU)


def _is_doing_something(func: Any, name: str) -> bool:
    return not (name in MAKES_NOTHING or getattr(func, "is_view", False))


def _write_down(asked: _Asked, func: Any) -> None:
    """Count the launches and the waiting of an operation that is no copy."""
    name, ledger = asked.name, STATE.ledger
    if asked.device and any(one.dim() for one in asked.host) and name not in TAKES_HOST_TENSORS:
        shapes = [tuple(one.shape) for one in asked.device[:2]], [tuple(one.shape) for one in asked.host[:2]]
        raise DeviceMismatch(f"{name}: {shapes[0]} on cuda:0 with {shapes[1]} on the cpu, at {line()}")
    if not asked.device:
        if _is_doing_something(func, name):
            ledger.launches[name] += 1  # a factory
        return
    if asked.host and any(one.dim() for one in asked.host):
        ledger.sync("an index that lies on the host")
    overload = str(func).removeprefix("aten.")
    if name in READ_BY_HOST or overload in READ_BY_HOST:
        ledger.sync(name)
    is_index = name in ("index", "index_put", "index_put_")
    if is_index and any(one.dtype in (torch.bool, torch.uint8) for one in asked.tensors[1:]):
        ledger.sync("an index by a mask")
    if _is_doing_something(func, name):
        lists = "_foreach" in name or "_fused" in name
        ledger.launches[name] += max(1, len(asked.device) // 100) if lists else 1
        if any(one.dtype == torch.float64 and one.numel() > 1 for one in asked.device):
            ledger.doubles[line()] += 1


def _copied(func: Any, args: Any, kwargs: Any, asked: _Asked, target: torch.device | None) -> Any:
    """`to`: another dtype, another device, or both."""
    here = "cuda" if asked.device else "cpu"
    there = here if target is None else target.type
    non_blocking = bool(kwargs.pop("non_blocking", False))
    source, ledger = args[0], STATE.ledger
    if here == "cpu" and there == "cuda":
        ledger.upload(source, _is_pinned(source), non_blocking)
    if here == "cuda" and there == "cpu":
        ledger.download(source, non_blocking)
    result = func(*args, **kwargs)
    if result.untyped_storage()._cdata == source.untyped_storage()._cdata and result.numel():
        result = result.clone()
    if "cuda" in (here, there):
        ledger.launches["_to_copy"] += 1
        doubles = [one for one in (source, result) if one.dtype == torch.float64 and one.numel() > 1]
        if doubles and there == "cuda":
            ledger.doubles[line()] += 1
    if there != "cuda":
        return result
    made = DeviceTensor(result)
    _stamp([made])
    return made


def _copied_into(func: Any, args: Any, real_args: Any, kwargs: Any) -> Any:
    """`copy_`: within a device, or between host and device."""
    into, source = args[0], args[1]
    there, here = (one.place.type if isinstance(one, DeviceTensor) else "cpu" for one in (into, source))
    non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if here == "cpu" and there == "cuda":
        STATE.ledger.upload(real_args[1], _is_pinned(real_args[1]), non_blocking)
    if here == "cuda" and there == "cpu":
        STATE.ledger.download(real_args[1], non_blocking and _is_pinned(real_args[0]))
    func(*real_args, **kwargs)
    if "cuda" in (here, there):
        STATE.ledger.launches["copy_"] += 1
    if there == "cuda":
        _stamp([into])
    return into


def _wrapped(func: Any, args: Any, kwargs: Any, result: Any, place: Any) -> Any:
    """The result as the device's tensors; where an operation writes into an argument, that argument."""
    written: list[Any] = []
    names = [one.name for one in func._schema.arguments]
    owners: dict[int, Any] = {}
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[index] if index < len(args) else kwargs.get(names[index])
        for one in given if isinstance(given, list | tuple) else [given]:
            if isinstance(one, DeviceTensor):
                owners[id(one.numbers)] = one
                written.append(one)
                if one.shape != one.numbers.shape:
                    raise NotImplementedError(f"{func} changes a shape in its place")

    def wrap(one: torch.Tensor) -> Any:
        if id(one) in owners:
            return owners[id(one)]
        return one if place.type == "cpu" else DeviceTensor(one, place)

    found = wrap(result) if isinstance(result, torch.Tensor) else tree_map_only(torch.Tensor, wrap, result)
    if place.type == "cuda" and _is_doing_something(func, func._schema.name.split("::")[1]):
        made = [found] if isinstance(found, torch.Tensor) else tree_flatten(found)[0]
        _stamp([one for one in made if isinstance(one, DeviceTensor)] + written)
    return found


class _Machine(TorchDispatchMode):
    """Catches what names the device without having a tensor of it yet: `torch.zeros(…, device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


# ------------------------------------------------------------------------------------------ the pretence


class _Generator(torch._C.Generator):
    """A device's generator draws from the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


class _Properties:
    name, major, minor, total_memory, multi_processor_count = "make-believe", 9, 0, MEMORY, 132


def _count_synchronize(device: Any = None) -> None:
    STATE.ledger.sync("torch.cuda.synchronize")
    STATE.known |= current_stream().record_event().marks


_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
    "is_bf16_supported": lambda including_emulation=True: True,
    "get_device_name": lambda device=None: "make-believe",
    "get_device_properties": lambda device=None: _Properties,
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1,
    "reset_peak_memory_stats": lambda device=None: None,
    "set_per_process_memory_fraction": lambda share, device=None: None,
    "empty_cache": lambda: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "synchronize": _count_synchronize,
    "Stream": Stream,
    "Event": Event,
    "stream": stream_context,
    "current_stream": current_stream,
    "default_stream": lambda device=None: STATE.default,
}


def _set_data(tensor: Any, value: torch.Tensor) -> None:
    """`weight.data = value` where the weight lies on the host and the value on the device."""
    if isinstance(value, DeviceTensor):
        new = torch.nn.Parameter(value.detach(), tensor.requires_grad)
        torch.utils.swap_tensors(tensor, new if isinstance(tensor, torch.nn.Parameter) else value.detach())
    else:
        torch._C.TensorBase.data.__set__(tensor, value)  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def make_believe(library: ctypes.CDLL) -> Iterator[Ledger]:
    """Within it there is a device cuda:0, in this thread and in those that it starts."""
    run_thread, optimizers = threading.Thread.run, sys.modules["torch.optim.optimizer"]
    data = property(lambda one: torch._C.TensorBase.data.__get__(one), _set_data)  # pyright: ignore[reportAttributeAccessIssue]

    def pretending_thread(thread: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)
        with _Machine():
            run_thread(thread)

    patches = [mock.patch.object(torch.cuda, name, value) for name, value in _CUDA.items()]
    patches += [
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.Tensor, "pin_memory", _pin_memory),
        mock.patch.object(torch.Tensor, "is_pinned", _is_pinned),
        mock.patch.object(torch.Tensor, "data", data, create=True),
        mock.patch.object(torch, "Generator", _Generator),
        mock.patch.object(threading.Thread, "run", pretending_thread),
        mock.patch.object(
            optimizers, "_foreach_supported_types", [*optimizers._foreach_supported_types, DeviceTensor]
        ),
    ]
    STATE.ledger.clear()
    STATE.known, STATE.default, STATE.streams, STATE.local = {}, Stream(), 1, threading.local()
    STATE.writers.clear()
    STATE.pinned.clear()
    lifts = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        library.make_believe(1)
        stack.callback(library.make_believe, 0)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        stack.enter_context(_Machine())
        yield STATE.ledger
