"""Reads a pickle as data: nothing that it names is imported, called or built.

A pickle is a program for a machine with a stack. Python's machine runs what the program names. The machine here understands containers,
texts and numbers, and replaces everything else by an object that does nothing:

    Name      stands for a class or a function that the program refers to; it holds the name only
    Inert     stands for an object that the program would have built; it holds the items and the state that the program puts there
    calls     the few calls that the reader of a format understands, by name

The size of the result is bounded: by the length of the pickle, by the number of its instructions, and by what is kept. Only texts are
keys (a tuple that contains itself a million times over takes for ever to hash). No value is compared, printed or traversed.
"""

import pickletools
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

# A tensor takes about 40 instructions, so that an SDXL with its optimizer and a moving average takes 0.3 million. A hostile pickle can
# have as many as it has bytes.
MOST_INSTRUCTIONS = 2_000_000
# The most bytes of a pickle, and of a text in it. The pickle of the same SDXL has 2 MB.
LONGEST = 256_000_000
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# Modules of Python whose names may occur without harm: containers, dates, paths, options. A checkpoint has no reason to call anything
# else of Python: that is an attack, or a mistake that its owner should hear of.
PLAIN_MODULES = {
    *(
        "_codecs",
        "argparse",
        "array",
        "collections",
        "copyreg",
        "dataclasses",
        "datetime",
        "decimal",
        "enum",
        "fractions",
    ),
    *("pathlib", "random", "re", "time", "types", "typing", "uuid", "weakref", "zoneinfo"),
}
PLAIN_BUILTINS = {
    *(
        "bool",
        "bytearray",
        "bytes",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "object",
        "range",
        "set",
        "slice",
    ),
    *("str", "tuple", "type"),
}


class Name(NamedTuple):
    """A class or a function that a pickle mentions."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """In place of an object that a pickle would have built: the name of its class, the items with text keys, and the state."""

    __slots__ = ("items", "maker", "state")

    def __init__(self, maker: str):
        self.maker, self.items, self.state = maker, {}, None


_MARK = object()


class _Bounded:
    """A file in which no read takes more than LONGEST bytes, whatever length the pickle states."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def read(self, n: int) -> bytes:
        if n > LONGEST:
            raise ValueError(f"the pickle states a text of {n} bytes, at most {LONGEST} are read")
        return self.file.read(n)

    def readline(self) -> bytes:
        line = self.file.readline(LONGEST)
        if len(line) == LONGEST:
            raise ValueError(f"the pickle has a line of more than {LONGEST} bytes")
        return line


def _called(name: Name) -> str:
    """The full name of what is called. ValueError for a function of Python or torch that is not part of a checkpoint."""
    root = name.module.partition(".")[0]
    root = PYTHON_2.get(root, root)
    plain = name.name in PLAIN_BUILTINS if root == "builtins" else root in PLAIN_MODULES
    # torch's classes (optimizers, modules) begin with a capital; its functions load files and compile code.
    if (root in sys.stdlib_module_names and not plain) or (root == "torch" and not name.name[:1].isupper()):
        raise ValueError(
            f"the pickle asks for {name}, which is not part of a tensor and is not executed; save the state_dict alone, or as "
            "safetensors"
        )
    return str(name)


def _make(maker: Any, arguments: Any, calls: Mapping[str, Callable]) -> Any:
    """The object that stands for maker(*arguments)."""
    if not isinstance(maker, Name):
        # The pickle calls an object that it made itself; none of these does anything.
        return Inert(maker.maker if isinstance(maker, Inert) else type(maker).__name__)
    if (call := calls.get(str(maker))) is not None:
        if type(arguments) is not tuple:
            raise ValueError(f"{maker} is called with a {type(arguments).__name__}, expected a tuple")
        try:
            return call(*arguments)
        except TypeError:
            raise ValueError(f"{maker} is called with {len(arguments)} arguments that it does not take") from None
    name = _called(maker)
    if name in ("copyreg._reconstructor", "copy_reg._reconstructor") and type(arguments) is tuple and arguments:
        name = str(arguments[0]) if isinstance(arguments[0], Name) else name
    return Inert(name)


def _put(target: Any, pairs: list) -> None:
    """target[key] = value for each pair in turn, for keys of text."""
    items = target.items if isinstance(target, Inert) else target
    if type(items) is not dict:
        raise ValueError(f"the pickle puts entries into a {type(target).__name__}")
    items.update((key, value) for key, value in zip(pairs[::2], pairs[1::2]) if type(key) is str)


def load(file: BinaryIO, calls: Mapping[str, Callable] | None = None, persistent: Callable | None = None) -> Any:
    """The content of the next pickle of `file`: dicts with text keys, lists, tuples, texts, numbers, Names and Inerts.

    calls       {'torch._utils._rebuild_tensor_v2': the function that is called in its place, ...}
    persistent  id of an object that is stored outside of the pickle -> the object that stands for it

    Raises ValueError for a pickle that is damaged or too long, and for one that calls a function that is not part of a checkpoint.
    """
    calls = calls or {}
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list:
        for at in range(len(stack) - 1, -1, -1):
            if stack[at] is _MARK:
                taken = stack[at + 1 :]
                del stack[at:]
                return taken
        raise ValueError("the pickle is damaged: it closes a group that it did not open")

    def refer(module: Any, name: Any) -> Name:
        if type(module) is not str or type(name) is not str:
            raise ValueError("the pickle is damaged: it refers to a name that is no text")
        return Name(module, name)

    count = 0
    try:
        for op, value, _ in pickletools.genops(_Bounded(file)):
            count += 1
            if count > MOST_INSTRUCTIONS:
                raise ValueError(f"the pickle has more than {MOST_INSTRUCTIONS} instructions: no checkpoint needs them")
            match op.name:
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[value] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[value])
                case (
                    "BININT" | "BININT1" | "BININT2" | "INT" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT"
                    | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE" | "STRING" | "BINSTRING"
                    | "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
                ):  # fmt: skip
                    stack.append(value)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
                case "MARK":
                    stack.append(_MARK)
                case "TUPLE":
                    stack.append(tuple(above_mark()))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    n = int(op.name[-1])
                    taken = tuple(stack[-n:])
                    if len(taken) < n:
                        raise IndexError
                    del stack[-n:]
                    stack.append(taken)
                case "EMPTY_LIST":
                    stack.append([])
                case "LIST":
                    stack.append(above_mark())
                case "APPEND" | "APPENDS":
                    taken = [stack.pop()] if op.name == "APPEND" else above_mark()
                    if type(stack[-1]) is list:
                        stack[-1].extend(taken)
                case "EMPTY_DICT":
                    stack.append({})
                case "DICT":
                    pairs = above_mark()
                    stack.append({})
                    _put(stack[-1], pairs)
                case "SETITEM" | "SETITEMS":
                    pairs = [stack.pop(-2), stack.pop()] if op.name == "SETITEM" else above_mark()
                    _put(stack[-1], pairs)
                case "EMPTY_SET":
                    stack.append(Inert("set"))
                case "ADDITEMS":
                    above_mark()
                case "FROZENSET":
                    above_mark()
                    stack.append(Inert("frozenset"))
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    above_mark()
                case "DUP":
                    stack.append(stack[-1])
                case "GLOBAL":
                    stack.append(refer(*value.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(refer(module, name))
                case "REDUCE" | "NEWOBJ":
                    arguments, maker = stack.pop(), stack.pop()
                    stack.append(_make(maker, arguments, calls))
                case "NEWOBJ_EX":
                    _, arguments, maker = stack.pop(), stack.pop(), stack.pop()
                    stack.append(_make(maker, arguments, calls))
                case "INST":
                    stack.append(_make(refer(*value.split(" ", 1)), tuple(above_mark()), calls))
                case "OBJ":
                    maker, *arguments = above_mark()
                    stack.append(_make(maker, tuple(arguments), calls))
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], Inert):
                        stack[-1].state = state
                case "PERSID" | "BINPERSID":
                    outside = value if op.name == "PERSID" else stack.pop()
                    if persistent is None:
                        raise ValueError("the pickle refers to something outside of it")
                    stack.append(persistent(outside))
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    result = stack.pop()
                    if result is _MARK:
                        raise IndexError
                    return result
                case _:
                    raise ValueError(f"the pickle has the instruction {op.name}, which no checkpoint needs")
    except (IndexError, KeyError):
        raise ValueError("the pickle is damaged: it takes what it did not put there") from None
    raise ValueError("the pickle is cut short")
