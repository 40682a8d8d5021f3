"""What functions and mechanisms do, as a key: equal keys do the same, as things are now.

A compiled step may serve a later request only if nothing that it was traced from has changed: not
the code of the loss, and not what the code looks at, such as a variable of the module or of the
enclosing function. So the key holds the values of all these. Where values cannot be told apart
there is no key, and the step is compiled anew: arrays (a teacher, a mask) and objects that can
change. So no array is kept by a key, either.
"""

import dataclasses
import dis
import enum
import functools
import operator
import pathlib
import sys
import sysconfig
import types
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import numpy as np

# More than this is not looked through.
_MOST_VALUES = 20_000
_PLAIN = (
    *(bool, int, str, bytes, type(None), type(...), range, slice),
    *(types.CodeType, jax.tree_util.PyTreeDef),
)
_FOLDERS = [sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")]
# This package, too, which may be installed elsewhere for development.
_FOLDERS.append(str(pathlib.Path(__file__).parent.parent))
_LIBRARIES = tuple(f"{pathlib.Path(folder).resolve()}/" for folder in _FOLDERS)
_COMPILED_FUNCTION = type(jax.jit(lambda: None))
_WITH_DERIVATIVE = (jax.custom_jvp, jax.custom_vjp)
# Whoever calls these can look at anything.
_LOOKS_ANYWHERE = ("globals", "locals", "vars", "eval", "exec", "__import__")


class _Unknown(Exception):
    """Something whose behaviour no key can hold."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """An object that is equal to itself only, and does not change."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def snapshot(*values: Any) -> Hashable | None:
    """A key that is equal for what does the same; None if that cannot be told.

    Args:
      values: functions, Optax transforms, frozen dataclasses, and plain values.

    >>> def scaled(factor):
    ...     return lambda x: factor * x
    >>> snapshot(scaled(2.0)) == snapshot(scaled(2.0))
    True
    >>> snapshot(scaled(2.0)) == snapshot(scaled(3.0))
    False
    >>> snapshot(scaled(np.ones(3))) is None
    True
    """
    try:
        key = tuple(map(_Look().at, values))
        hash(key)
    except (_Unknown, AttributeError, TypeError, RecursionError):
        return None
    return key


class _Look:
    """One look at values that may refer to each other."""

    def __init__(self) -> None:
        self._places: dict[Any, int] = {}
        self._count = 0

    def at(self, value: Any) -> Hashable:
        """The key of one value."""
        self._count += 1
        if self._count > _MOST_VALUES:
            raise _Unknown
        if type(value) in _PLAIN or isinstance(value, np.dtype):
            return type(value), value
        if isinstance(value, float | complex | np.generic):
            return type(value), np.asarray(value).dtype, np.asarray(value).tobytes()
        if isinstance(value, enum.Enum):
            return type(value), value.name
        if isinstance(value, np.ufunc) or _is_plain_builtin(value):
            return _Same(value)
        if isinstance(value, types.ModuleType):
            return _Same(value)  # a module of the user's is looked into by name, see `_function`
        if isinstance(value, tuple | list):
            return type(value), tuple(map(self.at, value))
        if isinstance(value, set | frozenset):
            return type(value), frozenset(map(self.at, value))
        if isinstance(value, dict):
            return type(value), tuple((self.at(k), self.at(v)) for k, v in value.items())
        return self._once(value)

    def _once(self, value: Any) -> Hashable:
        """The key of what may refer to itself: its place where it was seen before."""
        if id(value) in self._places:
            return "seen", self._places[id(value)]
        self._places[id(value)] = len(self._places)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return "method", self.at(value.__func__), self.at(value.__self__)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return type(value), *map(self.at, parts)
        if isinstance(value, staticmethod | classmethod):
            return type(value), self.at(value.__func__)
        if isinstance(value, property):
            return property, *map(self.at, (value.fget, value.fset, value.fdel))
        if isinstance(value, _COMPILED_FUNCTION):
            inside = (
                None if _in_library(value) else self.at(operator.attrgetter("__wrapped__")(value))
            )
            return _Same(value), inside
        if isinstance(value, _WITH_DERIVATIVE) and _in_library(value):
            return _Same(value)
        if dataclasses.is_dataclass(value):
            return self._dataclass(value)
        by_value = type(value).__hash__ not in (None, object.__hash__) and not callable(value)
        if by_value and _in_library(type(value)):
            return type(value), value  # it does not change
        raise _Unknown

    def _function(self, function: types.FunctionType) -> Hashable:
        code = function.__code__
        cells = tuple(self._cell(cell) for cell in function.__closure__ or ())
        more = self.at(function.__defaults__), self.at(function.__kwdefaults__)
        place = code.co_filename
        if _is_library_file(place):
            return code, place, cells, more
        used, imported, names = _names(code)
        for name in imported:
            if name not in sys.modules or not _is_library(sys.modules[name]):
                raise _Unknown
        variables = function.__globals__
        if any(name in _LOOKS_ANYWHERE and name not in variables for name in used):
            raise _Unknown
        seen = [
            (name, self._variable(variables[name], names)) for name in used if name in variables
        ]
        return code, place, cells, more, tuple(seen)

    def _cell(self, cell: types.CellType) -> Hashable:
        try:
            return self.at(cell.cell_contents)
        except ValueError:  # empty
            return "empty"

    def _variable(self, value: Any, names: tuple[str, ...]) -> Hashable:
        """A variable of a module; of another module of the user's, what the code may look up."""
        if not isinstance(value, types.ModuleType) or _is_library(value):
            return self.at(value)
        place = id(value), names
        if place in self._places:
            return "seen", self._places[place]
        self._places[place] = len(self._places)
        inside = vars(value)
        return _Same(value), tuple(
            (name, self._variable(inside[name], names)) for name in names if name in inside
        )

    def _class(self, cls: type) -> Hashable:
        members = []
        for each in cls.__mro__:
            if _in_library(each):
                continue
            skipped = ("_abc_impl", "__init__" if "__dataclass_fields__" in vars(each) else "")
            for name, member in vars(each).items():
                if name in skipped:
                    continue
                is_method = isinstance(member, types.FunctionType)
                written = is_method and member.__code__.co_filename != "<string>"
                if written or not name.startswith("__"):
                    members.append((name, self._member(member)))
        return _Same(cls), tuple(members)

    def _member(self, member: Any) -> Hashable:
        if type(member).__module__.startswith("flax."):
            return _Same(member)  # which Flax puts into every class of a module
        return self.at(member)

    def _dataclass(self, value: Any) -> Hashable:
        cls = type(value)
        if not cls.__dataclass_params__.frozen and cls.__hash__ in (None, object.__hash__):
            raise _Unknown  # it can change
        fields = tuple(
            (field.name, self.at(getattr(value, field.name))) for field in dataclasses.fields(value)
        )
        return self.at(cls), fields


def _is_plain_builtin(value: Any) -> bool:
    """Whether it is a function written in C that belongs to a module, and to no object."""
    if not isinstance(value, types.BuiltinFunctionType):
        return False
    return value.__self__ is None or isinstance(value.__self__, types.ModuleType)


def _in_library(value: Any) -> bool:
    """Whether a class or function is not of the user's own modules, and so does not change."""
    module = sys.modules.get(value.__module__)
    return module is not None and _is_library(module)


def _is_library(module: types.ModuleType) -> bool:
    """Whether a module is not of the user's own."""
    file = vars(module).get("__file__")
    if file is None:
        return module.__name__ in sys.builtin_module_names
    return _is_library_file(file)


@functools.lru_cache(maxsize=4096)
def _is_library_file(file: str) -> bool:
    """Whether code there is of an installed package, this one, or Python itself."""
    return file.startswith("<frozen") or str(pathlib.Path(file).resolve()).startswith(_LIBRARIES)


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """The variables of its module that a function looks up, what it imports, and all names."""
    used, imported, names = dict[str, None](), dict[str, None](), dict[str, None]()
    for each in _codes(code):
        names |= dict.fromkeys(each.co_names)
        names |= dict.fromkeys(text for text in each.co_consts if isinstance(text, str))
        for instruction in dis.get_instructions(each):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                used[instruction.argval] = None
            elif instruction.opname == "IMPORT_NAME":
                imported[instruction.argval] = None
    return tuple(used), tuple(imported), tuple(names)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
