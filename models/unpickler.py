"""The unpickler for foreign files: it builds data and runs no code.

A pickle is a program that names functions and calls them. Here a name never resolves to the object
that it names. Every global is one of a few classes of this module, which build tensors, containers
and numbers, or a stub that accepts any operation and does nothing. Names that only an attack needs
end the load. So the packages that wrote the file, such as fairseq and omegaconf, need not be
installed, and the list of forbidden names need not be complete.

Tested by tests/models/test_checkpoint.py.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_DEPTH = 100  # real checkpoints have less than 20

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# dtypes that may view a storage. Others can crash, for example quantised ones.
_DTYPES = frozenset(_STORAGE_DTYPES.values()) | {
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}

# Names that data never needs. A stub would be harmless, but a file with them is an attack.
_HOSTILE = frozenset(
    "os posix nt subprocess popen2 commands sys importlib imp runpy shutil socket pickle _pickle "
    "cPickle dill cloudpickle joblib marshal shelve code codeop ctypes _ctypes multiprocessing "
    "_posixsubprocess pty pdb bdb doctest profile cProfile timeit trace inspect asyncio signal "
    "atexit linecache zipimport pkgutil pip venv webbrowser urllib urllib2 http requests httplib "
    "ftplib smtplib telnetlib operator _operator types.CodeType types.FunctionType "
    "functools.reduce itertools.starmap io.open _io.open "
    "torch.load torch.hub torch.jit torch.fx torch.package torch.compile torch.library "
    "torch.serialization.load torch.storage._load_from_bytes torch._inductor "
    "torch._dynamo torch.onnx torch.multiprocessing torch.utils.cpp_extension "
    "numpy.load numpy.fromfile numpy.memmap numpy.testing numpy.f2py numpy.distutils "
    "numpy.ctypeslib".split()
)
_HOSTILE_BUILTINS = frozenset(
    "eval exec execfile compile open file __import__ getattr setattr delattr globals locals vars "
    "input raw_input breakpoint apply map filter reduce print help exit quit memoryview".split()
)


class Refused(Exception):
    """Refusal of a pickle; the message continues a sentence that starts with the file's name."""


@dataclass(frozen=True)
class Opaque:
    """Placeholder of an object of a class that is not data. name: module and class."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A storage of numbers in the container. numel: claimed number of elements of `dtype`."""

    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0  # offset of a view into another storage, in elements


def unpickle(data: bytes) -> tuple[Any, dict[str, Storage]]:
    """Load the objects of one pickle, as input of `plain`, and its storages by key.

    Runs no code of `data`.

    Raises: Refused: when the pickle is damaged or needs more than data.
    """
    _check_opcodes(data)
    unpickler = _Unpickler(io.BytesIO(data), encoding="utf-8", errors="surrogateescape")
    try:
        return unpickler.load(), unpickler.storages
    except (
        pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError,
        ValueError, ArithmeticError, RuntimeError, MemoryError,
    ) as error:  # fmt: skip
        raise Refused(f"has a damaged pickle ({error})") from error


def pickle_end(data: Any, start: int) -> int:
    """Return the end of the pickle that begins at `start` of the mapped file `data`.

    Raises: Refused: when the pickle is damaged.
    """
    data.seek(start)
    try:
        for opcode, _, position in pickletools.genops(data):
            if opcode.name == "STOP":
                return position + 1
    except (ValueError, LookupError) as error:
        raise Refused(f"has a damaged pickle ({error})") from error
    raise Refused("has a pickle without an end")


def plain(unpickled: Any, read: Callable[[Storage], Tensor]) -> Any:
    """Convert the output of `unpickle` to containers, numbers, strings, tensors and Opaques.

    read: returns all elements of a storage as a one-dimensional tensor. It is called once per
    storage; tensors share storages as in the file.

    Raises: Refused: when the data are damaged.
    """
    try:
        return _Plain(read).of(unpickled, 0)
    except (
        AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError,
        MemoryError,
    ) as error:  # fmt: skip
        raise Refused(f"has damaged data ({str(error).partition(chr(10))[0]})") from error


def _check_opcodes(data: bytes) -> None:
    """Refuse pickles that would need memory out of proportion to the file, before loading them."""
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(arg) > count:
                raise Refused("has a damaged pickle (an object's number is out of range)")
    except (ValueError, LookupError) as error:
        raise Refused(f"has a damaged pickle ({error})") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stubs: dict[str, type[_Stub]] = {}
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        if not all(part.isidentifier() for part in full.split(".")):
            raise Refused("asks for an invalid name")
        if full in _KNOWN:
            return _KNOWN[full]
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGE_DTYPES:
            full = f"torch.{name}"
        elif _is_hostile(full):
            raise Refused(f"asks for {full}, which only an attack needs")
        if full not in self._stubs:
            self._stubs[full] = type("_Stub", (_Stub,), {"name": full})
        return self._stubs[full]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", kind, str(key), str(), int(numel), *view) if _is_stub_class(kind):
                pass
            case _:
                raise Refused("refers to something other than a storage of numbers")
        dtype = _STORAGE_DTYPES.get(kind.name.removeprefix("torch."))
        if dtype is None:
            raise Refused(f"has numbers of an unknown type ({kind.name})")
        start = 0
        match view:
            case [] | [None]:
                pass
            case [(_, int(start), int(numel))]:
                pass
            case _:
                raise Refused("has a malformed view of a storage")
        if numel < 0 or start < 0:
            raise Refused("has a storage of negative size")
        storage = Storage(key, dtype, numel, start)
        self.storages[storage.key] = storage
        return _Storage(storage)


def _is_hostile(full: str) -> bool:
    parts = full.split(".")
    if parts[0] == "builtins":
        return parts[1] in _HOSTILE_BUILTINS
    return any(".".join(parts[:n]) in _HOSTILE for n in range(1, len(parts) + 1))


class _Inert:
    """Base of all objects that a pickle can reach; `__setstate__` protects their `__dict__`."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Stub(_Inert):
    """An object of a foreign class; each foreign class is a subclass with its `name`."""

    name = ""
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> _Stub:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> _Stub:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _Dict(dict[Any, Any], _Inert):
    """Replacement of OrderedDict, defaultdict and Counter."""

    def __init__(self, *args: Any) -> None:
        pairs = [a for a in args if not isinstance(a, type) and a is not None]
        super().__init__(*pairs)


class _Storage(_Inert):
    def __init__(self, storage: Storage) -> None:
        self.storage = storage


class _Tensor(_Inert):
    """A tensor whose numbers are not read yet."""

    def __init__(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        _requires_grad: Any = None,
        _hooks: Any = None,
        metadata: Any = None,
    ) -> None:
        if not isinstance(storage, _Storage) or metadata:
            raise Refused("has a tensor of an unsupported kind")
        self.storage = storage.storage
        self.offset = _index(offset)
        self.size = tuple(_index(n) for n in size)
        self.stride = tuple(_index(n) for n in stride)
        self.check()

    def check(self) -> None:
        numel = self.storage.numel
        if len(self.size) != len(self.stride) or len(self.size) > 32:
            raise Refused("has a tensor whose size and strides disagree")
        last = sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        count = math.prod(self.size)
        if count > numel or (count and self.offset + last >= numel):
            raise Refused(f"has a tensor of size {self.size} that exceeds its storage")


class _TensorV3(_Inert):
    """A tensor over an untyped storage, with a dtype of its own."""

    def __new__(
        cls, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any,
        dtype: Any, metadata: Any = None,
    ) -> Any:  # fmt: skip
        name = dtype.name.removeprefix("torch.") if _is_stub_class(dtype) else ""
        known = getattr(torch, name, None)
        if not isinstance(storage, _Storage) or known not in _DTYPES:
            raise Refused("has a tensor of an unsupported kind")
        raw = storage.storage
        typed = Storage(raw.key, known, raw.numel // known.itemsize)
        return _Tensor(_Storage(typed), offset, size, stride, grad, hooks, metadata)


class _Parameter(_Inert):
    """A parameter, replaced by its tensor."""

    def __new__(cls, data: Any, *rest: Any) -> Any:
        return data


class _Reconstructor(_Inert):
    """Replacement of `copyreg._reconstructor`: an object of a stub's class, without state."""

    def __new__(cls, kind: Any, *rest: Any) -> Any:
        return kind() if _is_stub_class(kind) else None


class _Bytes(_Inert):
    """bytes and bytearray with content from the pickle, never of a given length."""

    def __new__(cls, value: Any = b"", encoding: str = "latin1", errors: str = "strict") -> Any:
        if isinstance(value, bytes | bytearray):
            return bytes(value)
        if isinstance(value, str) and encoding.replace("-", "") in ("latin1", "iso88591"):
            return value.encode("latin1")
        raise Refused("has bytes in an unknown encoding")


class _Text(_Inert):
    """str of text only, because the str of a container can be exponentially long."""

    def __new__(cls, value: Any = "") -> Any:
        if not isinstance(value, str):
            raise Refused("converts something other than text to text")
        return value


class _Dtype(_Inert):
    """numpy.dtype of plain numbers."""

    def __init__(self, code: Any, *rest: Any) -> None:
        plain_number = isinstance(code, str) and re.fullmatch(r"[?biufc]\d{0,2}", code)
        self.code = code if plain_number else ""
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def numbers(self, data: bytes) -> np.ndarray[Any, Any]:
        if not self.code:
            raise Refused("has a numpy array of something other than numbers")
        return np.frombuffer(data, np.dtype(self.order + self.code))


class _Scalar(_Inert):
    """A numpy scalar, converted to a Python number."""

    def __new__(cls, dtype: Any, data: Any) -> Any:
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise Refused("has a malformed numpy number")
        return dtype.numbers(data)[0].item()


class _Array(_Inert):
    """A numpy array; `plain` converts it to a tensor."""

    value: np.ndarray[Any, Any] | None = None

    def __init__(self, *rest: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        match state:
            case (_, tuple(shape), _Dtype() as dtype, fortran, bytes(data)):
                flat = dtype.numbers(data)
                self.value = flat.reshape(shape, order="F" if fortran else "C")


class _Tuple(_Inert):
    """Replacement of torch.Size."""

    def __new__(cls, values: Any = ()) -> Any:
        return tuple(values)


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": _Dict,
    "collections.defaultdict": _Dict,
    "collections.Counter": _Dict,
    "torch._utils._rebuild_tensor": _Tensor,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_tensor_v3": _TensorV3,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_parameter_with_state": _Parameter,
    "torch.Size": _Tuple,
    "_codecs.encode": _Bytes,
    "copyreg._reconstructor": _Reconstructor,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _Scalar,
    "numpy._core.multiarray.scalar": _Scalar,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "builtins.bytes": _Bytes,
    "builtins.bytearray": _Bytes,
    "builtins.long": int,
    "builtins.unicode": _Text,
    "builtins.str": _Text,
}
_BUILTINS = (dict, list, tuple, set, frozenset, int, float, complex, bool)
_KNOWN |= {f"builtins.{kind.__name__}": kind for kind in _BUILTINS}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _is_stub_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, _Stub)


def _index(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise Refused("has a tensor whose size, stride or offset is not a natural number")
    return value


class _Plain:
    """One conversion of unpickled objects; shared objects stay shared."""

    def __init__(self, read: Callable[[Storage], Tensor]) -> None:
        self.read = read
        self.done: dict[int, Any] = {}
        self.storages: dict[Storage, Tensor] = {}

    def of(self, value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise Refused(f"is nested deeper than {_MAX_DEPTH} levels")
        if value is None or isinstance(value, str | bytes | int | float | complex):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = self.convert(value, depth + 1)
        return self.done[id(value)]

    def convert(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            return self.fill_dict(value, value, depth)
        if isinstance(value, list):
            return self.fill_list(value, value, depth)
        if isinstance(value, tuple | set | frozenset):
            return type(value)(self.of(item, depth) for item in value)
        if isinstance(value, _Tensor):
            return self.tensor(value)
        if isinstance(value, _Array) and value.value is not None:
            array = value.value.astype(value.value.dtype.newbyteorder("="))
            return torch.from_numpy(array)
        if isinstance(value, _Stub):
            return self.stub(value, depth)
        if isinstance(value, type):
            return Opaque(value.name if _is_stub_class(value) else value.__name__)
        return Opaque(type(value).__name__.strip("_"))

    def fill_dict(self, owner: Any, content: dict[Any, Any], depth: int) -> dict[Any, Any]:
        self.done[id(owner)] = filled = {}
        for key, item in content.items():
            filled[self.of(key, depth)] = self.of(item, depth)
        return filled

    def fill_list(self, owner: Any, content: list[Any], depth: int) -> list[Any]:
        self.done[id(owner)] = filled = []
        filled.extend(self.of(item, depth) for item in content)
        return filled

    def stub(self, value: _Stub, depth: int) -> Any:
        """Convert configurations to data, other objects to an Opaque with their name."""
        state = value.state if isinstance(value.state, dict) else {}
        if value.name == "argparse.Namespace":
            return self.fill_dict(value, state, depth)
        if value.name.startswith("omegaconf."):
            content = state.get("_content")
            if isinstance(content, dict):
                return self.fill_dict(value, content, depth)
            if isinstance(content, list):
                return self.fill_list(value, content, depth)
            if "_content" in state:  # a missing or interpolated one
                return self.of(content, depth)
            if "_val" in state:
                return self.of(state["_val"], depth)
        return Opaque(value.name)

    def tensor(self, value: _Tensor) -> Tensor:
        if value.storage not in self.storages:
            self.storages[value.storage] = self.read(value.storage)
        flat = self.storages[value.storage]
        if not math.prod(value.size):
            return flat.new_empty(value.size)
        return flat.as_strided(value.size, value.stride, value.offset)
