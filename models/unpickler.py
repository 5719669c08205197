"""The unpickler for foreign files: it builds data, runs no code, and costs no more than the file.

A pickle is a program that names functions and calls them. Here a machine of our own runs its
opcodes. A name never resolves to the object that it names. Every global is one of a few functions
of this module, which build tensors, containers and numbers, or a stub that accepts any operation
and does nothing. Names that only an attack needs end the load. So the packages that wrote the file,
such as fairseq and omegaconf, need not be installed, and the list of forbidden names need not be
complete.

A pickle of a few bytes can also ask for gigabytes, or for hashes that never end. So every object,
copy and reference is paid from a budget in proportion to the file's size. Keys of dictionaries and
members of sets are scalars, because a tuple of shared tuples takes for ever to hash. No opcode
takes long, so Ctrl-C is answered between two of them.

Tested by tests/models/test_checkpoint.py.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_DEPTH = 100  # real checkpoints have less than 20
_MAX_INT_BITS = 2048  # real ones have 128; longer ones make arithmetic and hashes slow
_MAX_KEY = (1 << 61) - 1  # integers below are their own hash, so that few of them collide

# Bytes that a file may cost apart from its mapped storages. Real ones stay below 2 x their size.
_ALLOWANCE = 40 << 20
_ALLOWANCE_PER_BYTE = 8
# Cost in bytes, plain copy included.
_OPCODE_COST = 60
_CONTAINER_COST = 300
_TENSOR_COST = 1000
_ITEM_COST = 100  # entry of a dict or set
_POINTER = 8

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


class Budget:
    """The memory that one file may still cost."""

    def __init__(self, file_size: int) -> None:
        """Allow a file of `file_size` bytes what real ones of its size cost, and more."""
        self._left = _ALLOWANCE + _ALLOWANCE_PER_BYTE * file_size

    def spend(self, size: int) -> None:
        """Take `size` bytes.

        Raises: Refused: when they are not left.
        """
        self._left -= size
        if self._left < 0:
            raise Refused(
                "needs far more memory than its size explains: it is damaged or an attack"
            )


def unpickle(file: io.BytesIO | mmap.mmap, budget: Budget) -> tuple[Any, dict[str, Storage]]:
    """Load one pickle at the position of `file`: its objects, for `plain`, and storages by key.

    Leaves `file` behind the pickle. Runs no code of it.

    Raises: Refused: when the pickle is damaged, needs more than data, or exceeds the budget.
    """
    machine = _Machine(budget)
    try:
        for number, (opcode, arg, _) in enumerate(pickletools.genops(file)):
            if opcode.name == "STOP":
                return machine.stack.pop(), machine.storages
            machine.apply(opcode.name, arg, number)
    except (
        AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError,
        MemoryError,
    ) as error:  # fmt: skip
        raise Refused(f"has a damaged pickle ({_short(error)})") from error
    raise Refused("has a damaged pickle (it has no end)")


def plain(unpickled: Any, read: Callable[[Storage], Tensor], budget: Budget) -> Any:
    """Convert the output of `unpickle` to containers, numbers, strings, tensors and Opaques.

    read: returns all elements of an entry of the container as a one-dimensional tensor, given a
    `Storage` of which only key and dtype count. It is called once per key and dtype; tensors share
    storages as in the file. budget: covers the output when nothing in it is shared, as in a copy
    of all tensors or a printed list.

    Raises: Refused: when the data are damaged or exceed the budget.
    """
    try:
        return _Plain(read, budget).of(unpickled, 0)
    except (
        AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError,
        MemoryError,
    ) as error:  # fmt: skip
        raise Refused(f"has damaged data ({_short(error)})") from error


def _short(text: object) -> str:
    line = str(text).partition("\n")[0] or type(text).__name__
    return line if len(line) < 200 else line[:200] + "..."


class _Machine:
    """The pickle machine: a stack, stacks below its marks, and numbered objects."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[str, _Name] = {}
        self.storages: dict[str, Storage] = {}

    def apply(self, op: str, arg: Any, number: int) -> None:
        """Run the opcode `op`, which is the pickle's `number`-th."""
        self.budget.spend(_OPCODE_COST)
        stack = self.stack
        match op:
            case "BINPUT" | "LONG_BINPUT" | "PUT" | "MEMOIZE":
                self.budget.spend(_ITEM_COST)
                index = len(self.memo) if op == "MEMOIZE" else int(arg)
                if index > number:
                    raise Refused("has a damaged pickle (an object's number is out of range)")
                self.memo[index] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[int(arg)])
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE":
                self.push_text(arg)
            case "BINSTRING" | "SHORT_BINSTRING" | "STRING":  # of Python 2
                self.push_text(arg.encode("latin-1").decode("utf-8", "surrogateescape"))
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT" | "FLOAT":
                stack.append(arg)
            case "INT" | "LONG" | "LONG1" | "LONG4":
                stack.append(_checked_int(arg))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(op == "NEWTRUE")
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                self.budget.spend(len(arg))
                stack.append(bytes(arg))
            case "TUPLE" | "LIST" | "FROZENSET" | "DICT" | "INST" | "OBJ":
                self.close(op, arg, self.pop_mark())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(op[-1])
                if len(stack) < count:
                    raise IndexError("a tuple lacks elements")
                stack[-count:] = [self.new(tuple(stack[-count:]))]
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append(self.new([]))
            case "EMPTY_DICT":
                stack.append(self.new({}))
            case "EMPTY_SET":
                stack.append(self.new(set()))
            case "APPEND":
                item = stack.pop()
                self.extend(stack[-1], [item])
            case "APPENDS":
                items = self.pop_mark()
                self.extend(self.stack[-1], items)
            case "SETITEM":
                item, key = stack.pop(), stack.pop()
                self.update(stack[-1], [(key, item)])
            case "SETITEMS":
                items = self.pop_mark()
                self.update(self.stack[-1], zip(items[::2], items[1::2], strict=True))
            case "ADDITEMS":
                items = self.pop_mark()
                if isinstance(self.stack[-1], set):
                    self.stack[-1].update(self.members(items))
                elif not isinstance(self.stack[-1], _Stub):
                    raise TypeError("adds to something other than a set")
            case "GLOBAL":
                module, _, name = arg.partition(" ")
                stack.append(self.name(module, name))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self.name(module, name))
            case "REDUCE" | "NEWOBJ":
                args, kind = stack.pop(), stack.pop()
                stack.append(self.call(kind, args))
            case "NEWOBJ_EX":
                named, args, kind = stack.pop(), stack.pop(), stack.pop()
                stack.append(self.call(kind, args, named))
            case "BUILD":
                state = stack.pop()
                self.budget.spend(_cost(state))
                if isinstance(stack[-1], _Object):
                    stack[-1].build(state)
                elif not isinstance(stack[-1], dict):  # an OrderedDict has attributes
                    raise TypeError("gives a state to something that has none")
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "DUP":
                stack.append(stack[-1])
            case "POP":
                stack.pop() if stack else self.pop_mark()
            case "POP_MARK":
                self.pop_mark()
            case "PROTO" | "FRAME":
                pass
            case "PERSID":
                raise Refused("refers to something other than a storage of numbers")
            case _:
                raise Refused(f"has the pickle opcode {op}, which no checkpoint needs")

    def new(self, container: Any) -> Any:
        """Pay for a new container and return it."""
        self.budget.spend(_CONTAINER_COST + _cost(container))
        return container

    def push_text(self, text: str) -> None:
        self.budget.spend(len(text))
        self.stack.append(text)

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def close(self, op: str, arg: Any, items: list[Any]) -> None:
        """Push what `op` makes of the items above a mark."""
        match op:
            case "TUPLE":
                made: Any = self.new(tuple(items))
            case "LIST":
                made = self.new(items)
            case "DICT":
                made = self.new({})
                self.update(made, zip(items[::2], items[1::2], strict=True))
            case "FROZENSET":
                made = self.new(frozenset(self.members(items)))
            case "INST":
                module, _, name = arg.partition(" ")
                made = self.call(self.name(module, name), tuple(items))
            case _:  # OBJ
                made = self.call(items[0], tuple(items[1:]))
        self.stack.append(made)

    def extend(self, target: Any, items: list[Any]) -> None:
        self.budget.spend(_POINTER * len(items))
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, _Stub):
            raise TypeError("appends to something other than a list")

    def update(self, target: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
        if not isinstance(target, dict | _Stub):
            raise TypeError("sets an item of something other than a dictionary")
        for key, value in pairs:
            self.budget.spend(_ITEM_COST)
            if isinstance(target, dict):
                target[_key(key)] = value

    def members(self, items: Iterable[Any]) -> list[Any]:
        members = [_key(item) for item in items]
        self.budget.spend(_ITEM_COST * len(members))
        return members

    def name(self, module: str, name: str) -> _Name:
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        if full not in self.names:
            self.budget.spend(_CONTAINER_COST + len(full))
            if not all(part.isidentifier() for part in full.split(".")):
                raise Refused("asks for an invalid name")
            if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGE_DTYPES:
                self.names[full] = _Name(f"torch.{name}")
            elif full not in _KNOWN and _is_hostile(full):
                raise Refused(f"asks for {_short(full)}, which only an attack needs")
            else:
                self.names[full] = _Name(full)
        return self.names[full]

    def call(self, kind: Any, args: Any, named: Any = None) -> Any:
        """Return the result of a call, which costs the size of its arguments."""
        if not isinstance(args, tuple):
            raise TypeError("calls something without a tuple of arguments")
        self.budget.spend(_CONTAINER_COST + sum(map(_cost, args)))
        if isinstance(kind, _Stub):
            return kind
        if not isinstance(kind, _Name):
            raise TypeError("calls something that is not a name")
        made = _KNOWN.get(kind.full)
        if made is None or named:
            return _Stub(kind.full)
        if made is _Tensor:
            self.budget.spend(_TENSOR_COST)
        result = made(*args)
        if isinstance(result, int):
            return _checked_int(result)
        return result

    def storage(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _Name(full=kind), str(key), str(), int(numel), *view):
                pass
            case _:
                raise Refused("refers to something other than a storage of numbers")
        dtype = _STORAGE_DTYPES.get(kind.removeprefix("torch."))
        if dtype is None:
            raise Refused(f"has numbers of an unknown type ({_short(kind)})")
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
        self.budget.spend(_CONTAINER_COST)
        storage = Storage(key, dtype, numel, start)
        self.storages[storage.key] = storage
        return _Storage(storage)


def _cost(value: Any) -> int:
    """Return the bytes that a copy of `value` takes, without those of its elements."""
    match value:
        case str() | bytes():
            return len(value)
        case list() | tuple():
            return _POINTER * len(value)
        case dict() | set() | frozenset():
            return _ITEM_COST * len(value)
    return 0


def _key(value: Any) -> Any:
    """Return `value` if it may be a key of a dictionary or a member of a set."""
    match value:
        case None | str() | bytes() | float() | _Name() | _Object() | Opaque() | Tensor():
            return value
        case int() if abs(value) < _MAX_KEY:
            return value
        case int():
            raise Refused("has a dictionary or set with a number beyond 2^61 as a key")
    raise Refused(f"has a dictionary or set with a {type(value).__name__} as a key")


def _checked_int(value: Any) -> int:
    if value.bit_length() > _MAX_INT_BITS:
        raise Refused(f"has a number of {value.bit_length()} bits")
    return int(value) if not isinstance(value, bool) else value


def _is_hostile(full: str) -> bool:
    parts = full.split(".")
    if parts[0] == "builtins":
        return parts[1] in _HOSTILE_BUILTINS
    return any(".".join(parts[:n]) in _HOSTILE for n in range(1, len(parts) + 1))


@dataclass(frozen=True, eq=False, slots=True)
class _Name:
    """A global. full: module and name; nothing of that name is ever looked up."""

    full: str


class _Object:
    """Base of all objects that are not containers, numbers or text."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        """Take the state of the opcode BUILD, which most kinds ignore."""


class _Stub(_Object):
    """An object of a foreign class. name: module and class; state: that given to it, if any."""

    __slots__ = ("name", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None

    def build(self, state: Any) -> None:
        self.state = state


class _Storage(_Object):
    __slots__ = ("storage",)

    def __init__(self, storage: Storage) -> None:
        self.storage = storage


class _Tensor(_Object):
    """A tensor whose numbers are not read yet."""

    __slots__ = ("numel", "offset", "size", "storage", "stride")

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
        if len(size) != len(stride) or len(size) > 32:
            raise Refused("has a tensor whose size and strides disagree")
        self.size = tuple(_index(n) for n in size)
        self.stride = tuple(_index(n) for n in stride)
        self.numel = math.prod(self.size)
        last = sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        limit = self.storage.numel
        if self.numel > limit or (self.numel and self.offset + last >= limit):
            raise Refused(f"has a tensor of size {self.size} that exceeds its storage")


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any,
    metadata: Any = None,
) -> _Tensor:  # fmt: skip
    """Return a tensor over an untyped storage, with a dtype of its own."""
    name = dtype.full.removeprefix("torch.") if isinstance(dtype, _Name) else ""
    known = getattr(torch, name, None)
    if not isinstance(storage, _Storage) or known not in _DTYPES or storage.storage.start:
        raise Refused("has a tensor of an unsupported kind")
    raw = storage.storage
    typed = Storage(raw.key, known, raw.numel * raw.dtype.itemsize // known.itemsize)
    return _Tensor(_Storage(typed), offset, size, stride, grad, hooks, metadata)


def _parameter(data: Any, *rest: Any) -> Any:
    """Return the tensor of a parameter."""
    return data


def _reconstructor(kind: Any, *rest: Any) -> Any:
    """Return an object of a foreign class, without state, in place of `copyreg._reconstructor`."""
    return _Stub(kind.full) if isinstance(kind, _Name) and kind.full not in _KNOWN else None


def _dict(*args: Any) -> dict[Any, Any]:
    """Return a dict in place of dict, OrderedDict, defaultdict and Counter."""
    content = [a for a in args if not isinstance(a, _Name) and a is not None]
    if len(content) > 1:
        raise TypeError("makes a dictionary of several things")
    if not content:
        return {}
    pairs = content[0].items() if isinstance(content[0], dict) else _elements(content[0])
    return {_key(key): value for key, value in pairs}


def _elements(value: Any = ()) -> Any:
    if not isinstance(value, list | tuple | set | frozenset | dict):
        raise TypeError("makes a container of something else")
    return value


def _number(kind: type) -> Callable[..., Any]:
    """Return a function that makes numbers of the type `kind` from numbers and short texts."""

    def number(*args: Any) -> Any:
        if any(isinstance(a, str | bytes) and len(a) > _MAX_INT_BITS for a in args):
            raise Refused("has a number of too many digits")
        return kind(*args)

    return number


def _bytes(value: Any = b"", encoding: Any = "latin1", errors: Any = "strict") -> bytes:
    """Return bytes with content from the pickle, never of a given length."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and encoding in ("latin1", "latin-1", "iso88591", "iso-8859-1"):
        return value.encode("latin1")
    raise Refused("has bytes in an unknown encoding")


def _text(value: Any = "") -> str:
    """Return str of text only, because the str of a container can be exponentially long."""
    if not isinstance(value, str):
        raise Refused("converts something other than text to text")
    return value


class _Dtype(_Object):
    """numpy.dtype of plain numbers."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *rest: Any) -> None:
        plain_number = isinstance(code, str) and re.fullmatch(r"[?biufc]\d{0,2}", code)
        self.code = code if plain_number else ""
        self.order = "<"

    def build(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def numbers(self, data: bytes) -> np.ndarray[Any, Any]:
        if not self.code:
            raise Refused("has a numpy array of something other than numbers")
        return np.frombuffer(data, np.dtype(self.order + self.code))


def _scalar(dtype: Any, data: Any) -> Any:
    """Return a Python number in place of a numpy scalar."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) > 32:
        raise Refused("has a malformed numpy number")
    return dtype.numbers(data)[0].item()


class _Array(_Object):
    """A numpy array; `plain` converts it to a tensor."""

    __slots__ = ("value",)

    def __init__(self, *rest: Any) -> None:
        self.value: np.ndarray[Any, Any] | None = None

    def build(self, state: Any) -> None:
        match state:
            case (_, tuple(shape), _Dtype() as dtype, fortran, bytes(data)):
                flat = dtype.numbers(data)
                self.value = flat.reshape(shape, order="F" if fortran else "C")


_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "collections.Counter": _dict,
    "torch._utils._rebuild_tensor": _Tensor,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": lambda values=(): tuple(_elements(values)),
    "_codecs.encode": _bytes,
    "copyreg._reconstructor": _reconstructor,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.unicode": _text,
    "builtins.str": _text,
    "builtins.dict": _dict,
    "builtins.list": lambda values=(): list(_elements(values)),
    "builtins.tuple": lambda values=(): tuple(_elements(values)),
    "builtins.set": lambda values=(): set(map(_key, _elements(values))),
    "builtins.frozenset": lambda values=(): frozenset(map(_key, _elements(values))),
    "builtins.long": _number(int),
    "builtins.int": _number(int),
    "builtins.float": _number(float),
    "builtins.complex": _number(complex),
    "builtins.bool": bool,
}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _index(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise Refused("has a tensor whose size, stride or offset is not a natural number")
    if value >> 63:
        raise Refused("has a tensor whose size, stride or offset is beyond 2^63")
    return value


class _Plain:
    """One conversion of unpickled objects; shared objects stay shared.

    The budget pays for each reference to a shared object as if it were a copy.
    """

    def __init__(self, read: Callable[[Storage], Tensor], budget: Budget) -> None:
        self.read = read
        self.budget = budget
        self.spent = 0
        self.done: dict[int, Any] = {}
        self.cost: dict[int, int] = {}  # of each object in `done`, with all that it contains
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def of(self, value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise Refused(f"is nested deeper than {_MAX_DEPTH} levels")
        if value is None or isinstance(value, str | bytes | int | float | complex):
            self.spend(_POINTER + _cost(value))
            return value
        if id(value) in self.done:
            self.spend(self.cost.get(id(value), _POINTER))
        else:
            before = self.spent
            self.spend(_POINTER)
            self.done[id(value)] = self.convert(value, depth + 1)
            self.cost[id(value)] = self.spent - before
        return self.done[id(value)]

    def spend(self, size: int) -> None:
        self.spent += size
        self.budget.spend(size)

    def convert(self, value: Any, depth: int) -> Any:
        match value:
            case dict():
                return self.fill_dict(value, value, depth)
            case list():
                return self.fill_list(value, value, depth)
            case tuple():
                return tuple(self.of(item, depth) for item in value)
            case set() | frozenset():
                return type(value)(_key(self.of(item, depth)) for item in value)
            case _Tensor():
                return self.tensor(value)
            case _Array(value=np.ndarray() as array):
                self.spend(array.nbytes)
                return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
            case _Stub():
                return self.stub(value, depth)
            case _Name(full=full):
                return Opaque(full)
        return Opaque(type(value).__name__.strip("_"))

    def fill_dict(self, owner: Any, content: dict[Any, Any], depth: int) -> dict[Any, Any]:
        self.done[id(owner)] = filled = {}
        for key, item in content.items():
            filled[_key(self.of(key, depth))] = self.of(item, depth)
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
        claimed = value.storage
        entry = (claimed.key, claimed.dtype)
        if entry not in self.storages:
            self.storages[entry] = self.read(Storage(*entry, 0))
            self.spend(self.storages[entry].nbytes)
        numbers = self.storages[entry]
        end, size = claimed.start + claimed.numel, claimed.dtype.itemsize
        if end > len(numbers):
            raise Refused(
                f"is truncated or damaged (storage {claimed.key!r} claims {end * size} bytes and "
                f"has {len(numbers) * size}): download it again"
            )
        self.spend(value.numel * size)
        if not value.numel:
            return numbers.new_empty(value.size)
        return numbers.as_strided(value.size, value.stride, claimed.start + value.offset)
