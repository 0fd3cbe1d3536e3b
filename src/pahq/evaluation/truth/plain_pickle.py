"""Reads plain data out of a pickle without running it.

A pickle is a program for a small stack machine that may import and call anything. This reads the opcodes that build
strings, numbers, lists, tuples and dictionaries. The name of a class or function is kept as a string and never looked
up; an object becomes the dictionary of its attributes; a call is refused.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.files import naming

_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
"""Opcodes that put their argument on the stack."""
_FIXED: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SIZE = 2**26
"""Bytes that a file of configuration or edges may have."""


def read_plain_pickle(path: Path) -> Any:
    """The data in ``path``; raises PahqError for a pickle that does more than hold data, and for a damaged one."""
    with naming(path):
        size = path.stat().st_size
        if size > _SIZE:
            raise PahqError(f"{path}: {size:,} bytes are too many for a file of plain data; check the path")
        data = path.read_bytes()
    try:
        return _interpret(data, path)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise PahqError(f"{path}: not a whole pickle of plain data ({error}); the file is damaged") from None


def _interpret(data: bytes, path: Path) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _FIXED:
            stack.append(_FIXED[name])
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "LIST":
            stack.append(to_mark())
        elif name == "TUPLE":
            stack.append(tuple(to_mark()))
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else to_mark()
            stack[-1].extend(items)
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else to_mark()
            if name == "DICT":
                stack.append({})
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(argument.replace(" ", "."))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [".".join(stack[-2:])]
        elif name == "NEWOBJ":
            stack[-2:] = [{}]
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].update(state)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise PahqError(f"{path}: it does more than hold data ({name}), and so may run code; convert it to JSON")
    raise ValueError("it has no end")
