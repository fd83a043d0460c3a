"""Which seams the running Synapse does not have.

What is looked at is Synapse's classes and their code, and the columns of its database. No
instance of anything is needed, so all of it is known before anything is installed.
"""

import ast
import dis
import functools
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, GenericAlias
from typing import Any

from synapse_sticky.homeserver.seams import Attribute, Import, Method, Seam, Table

Columns = Mapping[str, Mapping[str, str]]
"""By table and column: the kind of its values, as ``kind_of_column`` says it."""


def misfits(seams: Iterable[Seam], columns: Columns | None = None) -> list[str]:
    """What of these seams the running Synapse does not have, one line each.

    Args:
        columns: those of the database; None if they are not known, which nothing is wrong with.
    """
    problems = []
    for seam in seams:
        try:
            problem = _problem(seam, columns)
        except Exception as e:
            # Whatever a part is like by now, the homeserver starts.
            problem = f"{seam} cannot be looked into: {type(e).__name__}: {e}"
        if problem:
            problems.append(problem)
    return problems


def _problem(seam: Seam, columns: Columns | None) -> str | None:
    match seam:
        case Table():
            return None if columns is None else _problem_of_table(seam, columns)
        case Import():
            return _problem_of_import(seam)
        case _:
            pass
    try:
        owner = resolve(seam.owner)
    except (ImportError, AttributeError) as e:
        return f"{seam.owner} is not there ({e})"
    problem = None
    if isinstance(seam, Method):
        problem = _problem_of_method(owner, seam)
    elif isinstance(seam, Attribute) and not _has_attribute(owner, seam.name):
        problem = "is not there"
    return problem and f"{seam} {problem}"


def resolve(path: str) -> Any:
    """The module or class of this dotted path.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such class.
    """
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as e:
            if length == 1 or (not path.startswith(f"{e.name}.") and e.name != path):
                raise
            continue
        return functools.reduce(getattr, parts[length:], found)
    raise ImportError(path)


def _problem_of_import(seam: Import) -> str | None:
    try:
        resolve(f"{seam.owner}.{seam.name}" if seam.name else seam.owner)
    except (ImportError, AttributeError) as e:
        return f"{seam} cannot be imported ({e})"
    return None


# Calls


def _problem_of_method(owner: Any, seam: Method) -> str | None:
    try:
        found = inspect.getattr_static(owner, seam.name)
    except AttributeError:
        return "is not there"
    # Synapse's cached methods are descriptors around the function.
    function = getattr(found, "orig", found)
    takes_self = inspect.isclass(owner) and not isinstance(function, staticmethod)
    function = getattr(function, "__func__", function)
    if not callable(function):
        return "is not a function"
    try:
        signature = inspect.signature(function)
    except ValueError as e:
        return f"cannot be looked into: {e}"
    if problem := _problem_of_call(signature, seam, takes_self=takes_self):
        return f"takes {signature}{problem}"
    is_async = inspect.iscoroutinefunction(inspect.unwrap(function))
    return _problem_of_result(signature.return_annotation, is_async, seam)


def _problem_of_result(returns: Any, is_async: bool, seam: Method) -> str | None:
    if is_async != seam.is_async:
        return "is a coroutine function" if is_async else "is no coroutine function"
    if seam.returns is None or returns is inspect.Signature.empty:
        return None
    shown = inspect.formatannotation(returns)
    shapes = [shown, *_bases(returns)]
    if any(_has_shape(shape, seam.returns) for shape in shapes):
        return None
    return f"returns {shown}, not {seam.returns}"


def _bases(annotation: Any) -> Iterator[str]:
    """What else an object of this class is; one of a ``NamedTuple`` is a tuple."""
    if not inspect.isclass(annotation) or isinstance(annotation, GenericAlias):
        return
    for cls in annotation.__mro__[:-1]:
        yield cls.__name__
    if fields := getattr(annotation, "_fields", ()):
        yield f"tuple[{', '.join('_' * len(fields))}]"


def _problem_of_call(signature: inspect.Signature, seam: Method, *, takes_self: bool) -> str | None:
    first = (*seam.by_position, *seam.arguments)
    arguments = [None] * (len(first) + takes_self)
    try:
        # What the module replaces passes on whatever else it gets.
        bind = signature.bind_partial if seam.is_replaced else signature.bind
        bind(*arguments, **dict.fromkeys(seam.keywords))
    except TypeError as e:
        return f": {e}"
    parameters = list(signature.parameters.values())[takes_self:]
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return None  # it hands on whatever comes
    if unknown := [name for name in seam.keywords if name not in signature.parameters]:
        return f", and not {', '.join(unknown)}"  # `**options` would swallow it
    there = parameters[: len(first)]
    for parameter, name in zip(there, first, strict=True):
        if parameter.name != name and not _is_renamed(parameter, name, signature, seam):
            return f", and not {', '.join(first)}"
    return None


def _is_renamed(
    parameter: inspect.Parameter, name: str, signature: inspect.Signature, seam: Method
) -> bool:
    """Is it the argument of this name, under another that does not matter?"""
    if name in signature.parameters or name not in seam.by_position:
        return False
    # One that can be left out, or any number of them, has moved up to where the argument was.
    return (
        parameter.default is inspect.Parameter.empty
        and parameter.kind is not inspect.Parameter.VAR_POSITIONAL
    )


# Shapes of results

_SAME = {
    **dict.fromkeys(
        ("dict", "Dict", "Mapping", "MutableMapping", "JsonDict", "JsonMapping", "StateMap"), "dict"
    ),
    **dict.fromkeys(("list", "List", "Sequence"), "list"),
    "EventBase": "Event",
    **dict.fromkeys(("set", "frozenset", "Set", "AbstractSet", "FrozenSet"), "set"),
}


_LIST_OF = re.compile(r"^list of [^|]*(?=$| \| None$)")
"""A list whose elements matter to some of its users only."""


def _has_shape(returned: str, expected: str) -> bool:
    try:
        there = _shape(returned)
    except SyntaxError:
        return True  # an annotation that is no expression says nothing
    wanted = _shape(expected)
    # One that may be None where none was expected does not do; the other way round it does.
    return any(
        wanted in (shape, f"{shape} | None") for shape in (there, _LIST_OF.sub("list", there))
    )


@functools.cache
def _shape(annotation: str) -> str:
    """A result by what its user relies on: its class, a list's elements, a tuple's length."""
    return _shape_of(ast.parse(annotation, mode="eval").body)


def _shape_of(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            shape = _shape(text)
        case ast.Call(args=[argument]):  # ForwardRef('Name')
            shape = _shape_of(argument)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            shape = _either(left, right)
        case ast.Subscript(value=value, slice=items):
            shape = _shape_of_generic(_name_of(value), items)
        case _:
            shape = _name_of(node)
    return _SAME.get(shape, shape)


def _shape_of_generic(name: str, items: ast.expr) -> str:
    match name, items:
        case "Optional", item:
            return f"{_shape_of(item)} | None"
        case "Union", ast.Tuple(elts=[first, *others]):
            return _either(first, *others)
        case "tuple" | "Tuple", ast.Tuple(elts=elements):
            return f"tuple of {len(elements)}"
        case _, ast.Name() | ast.Attribute() | ast.Constant() if _SAME.get(name) == "list":
            return f"list of {_shape_of(items)}"
        case _:
            return name


def _either(*nodes: ast.expr) -> str:
    shapes = dict.fromkeys(map(_shape_of, nodes))
    is_optional = shapes.pop("None", "") is None
    return " | ".join((*shapes, *(["None"] if is_optional else [])))


def _name_of(node: ast.expr) -> str:
    """The last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else ast.unparse(node)


# Attributes


def _has_attribute(owner: Any, name: str) -> bool:
    if not inspect.isclass(owner):
        return hasattr(owner, name)
    # Whose class says it is found before any code is looked into.
    return any(name in _declared_by(cls) for cls in owner.__mro__) or any(
        _sets(code, name) for cls in owner.__mro__ for code in _code_of(cls)
    )


@functools.cache
def _declared_by(cls: type) -> frozenset[str]:
    """The attributes of the class, and what it says that its instances have."""
    # The root of Synapse's configuration has the sections of its classes.
    sections = (config.section for config in getattr(cls, "config_classes", ()))
    return frozenset((*vars(cls), *getattr(cls, "__annotations__", ()), *sections))


@functools.cache
def _code_of(cls: type) -> tuple[CodeType, ...]:
    """The code of the methods of the class, and of what is defined in them."""
    found = [code for member in vars(cls).values() if (code := _code_of_member(member))]
    for code in found:  # grows meanwhile
        found += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return tuple(found)


def _code_of_member(member: Any) -> CodeType | None:
    if isinstance(member, property):
        member = member.fget
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
    return code if isinstance(code, CodeType) else None


def _sets(code: CodeType, name: str) -> bool:
    """Does the code set an attribute of this name? It needs no source for that."""
    # Reading all instructions of a class takes a hundred times as long as the list of names.
    return name in code.co_names and any(
        step.opname == "STORE_ATTR" and step.argval == name for step in dis.get_instructions(code)
    )


# Columns

_KINDS = {
    "text": "text",
    "character": "text",
    "varchar": "text",
    "bigint": "integer",
    "int": "integer",
    "integer": "integer",
    "smallint": "integer",
    "bool": "boolean",
    "boolean": "boolean",
    "bytea": "bytes",
    "blob": "bytes",
}


def kind_of_column(declared: str) -> str:
    """The kind of values of a column that is declared like this: text, integer, boolean, bytes."""
    first = declared.lower().partition("(")[0].split()[:1]
    return _KINDS.get(first[0], first[0]) if first else ""


def _problem_of_table(seam: Table, columns: Columns) -> str | None:
    there = columns.get(seam.name)
    if not there:
        return f"table {seam.name} is not there"
    for name, kind in seam.columns:
        if name not in there:
            return f"table {seam.name} has no column {name}"
        if there[name] != kind:
            return f"column {name} of table {seam.name} has values of {there[name]}, not {kind}"
    return None
