"""A Synapse that has changed in one private part: every way in which a declared part may change.

What is changed is what is found in the part's place. Synapse itself holds its own classes and
functions, and goes on.
"""

import ast
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import attr
import pytest

from synapse_sticky.homeserver.fitting import Columns, resolve
from synapse_sticky.homeserver.seams import Attribute, Import, Method, Seam, Table

LEFT_OUT = {"__dict__", "__weakref__", "__slots__", "__classcell__", "__init_subclass__"}
HOLDER = "another_holder"
"""The name of a module that holds a function of Synapse in a way of its own."""

CLASS_GONE = "class gone"

Harms = Callable[[Seam], bool]
SignatureChange = Callable[[inspect.Signature], inspect.Signature]


def nothing_changes(columns: Columns) -> Columns:
    return columns


@attr.s(auto_attribs=True, frozen=True)
class Mutation:
    """One change.

    kind: the kind of change; each has its own word.
    seam: the part that changes.
    harms: whether this declaration of any part does not fit any more.
    put: puts the changed part in its place.
    columns: what becomes of the columns of the database.
    name: the argument or column that it is about.
    is_seen_late: only what installs a duty can see it.
    """

    kind: str
    seam: Seam
    harms: Harms
    put: Callable[[pytest.MonkeyPatch], None] = lambda patched: None
    columns: Callable[[Columns], Columns] = nothing_changes
    name: str = ""
    is_seen_late: bool = False

    def __str__(self) -> str:
        return f"{self.seam}: {self.name} {self.kind}"

    @property
    def path(self) -> str:
        """What has changed."""
        return self.seam.owner if self.kind == CLASS_GONE else f"{self.seam.owner}.{self.seam.name}"

    def is_about(self, seam: Seam) -> bool:
        """Is it in what has changed?"""
        return f"{seam.owner}.{seam.name}.".startswith(f"{self.path}.")


def is_of(seam: Seam) -> Harms:
    """Is it a declaration of the same part, or of what is in it?"""
    path = f"{seam.owner}.{seam.name}" if seam.name else seam.owner
    return lambda other: (
        (other.owner, other.name) == (seam.owner, seam.name)
        or f"{other.owner}.".startswith(f"{path}.")
    )


def is_call_of(seam: Method, matters: Callable[[Method], object]) -> Harms:
    """Is it a call of the same function, for which this matters?"""
    return lambda other: (
        isinstance(other, Method)
        and (other.owner, other.name) == (seam.owner, seam.name)
        and bool(matters(other))
    )


def nobody(other: Seam) -> bool:
    return False


HAVE_DEFAULTS = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


def positional(seam: Method) -> tuple[str, ...]:
    return (*seam.by_position, *seam.arguments)


def passes(name: str) -> Callable[[Method], object]:
    return lambda call: name in (*positional(call), *call.keywords)


def passes_by_name(name: str) -> Callable[[Method], object]:
    return lambda call: name in (*call.arguments, *call.keywords)


def passes_by_position(*names: str) -> Callable[[Method], object]:
    return lambda call: {*names} & {*positional(call)}


# Changed parts


def put(patched: pytest.MonkeyPatch, path: str, part: object) -> None:
    """Puts a class or a module in the place of the one of this path, for who looks it up."""
    parent, _, name = path.rpartition(".")
    if path in sys.modules:
        patched.setitem(sys.modules, path, part)
        if not parent:
            return
        if part is None:
            for below in [module for module in sys.modules if module.startswith(f"{path}.")]:
                patched.setitem(sys.modules, below, None)
            patched.delattr(sys.modules[parent], name, raising=False)
        elif vars(sys.modules[parent]).get(name) is not None:
            patched.setattr(sys.modules[parent], name, part)
        return
    if part is None:
        patched.delattr(resolve(parent), name)
    else:
        patched.setattr(resolve(parent), name, part)


def without(path: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patched: put(patched, path, None)


def with_member(
    seam: Seam, make: Callable[[], object] = lambda: None
) -> Callable[[pytest.MonkeyPatch], None]:
    """Another member in the owner; none if nothing is made."""
    return lambda patched: put(
        patched, seam.owner, stand_in(resolve(seam.owner), seam.name, make())
    )


def stand_in(owner: Any, name: str, member: object = None) -> object:
    """What is in the owner's place: the same but for the member, which is gone if None is given."""
    if inspect.isclass(owner):
        members = {
            key: value
            for cls in reversed(owner.__mro__[:-1])
            for key, value in vars(cls).items()
            if key not in LEFT_OUT
        }
        members = {key: without_setting(value, name) for key, value in members.items()}
        names = {key for cls in owner.__mro__ for key in names_set_in(cls)}
        sections = {c.section for c in getattr(owner, "config_classes", ())}
        annotations = dict.fromkeys((names | sections) - {name}, "Any")
        members.pop("config_classes", None)
        members.pop(name, None)
        members["__annotations__"] = annotations
        if member is not None:
            members[name] = member
        return type(owner.__name__, (), members)
    copy: Any = ModuleType(owner.__name__)
    copy.__dict__.update({k: v for k, v in vars(owner).items() if k != name})
    if member is not None:
        copy.__dict__[name] = member
    return copy


def without_setting(member: Any, name: str) -> Any:
    """The same member of a class; what it did with attributes of this name it does with others."""
    if isinstance(member, property):
        return property(member.fget and without_setting(member.fget, name), member.fset)
    if isinstance(member, staticmethod | classmethod):
        return type(member)(without_setting(member.__func__, name))
    if not isinstance(member, FunctionType):
        return member
    code = code_without(member.__code__, name)
    other: Any = FunctionType(
        code, member.__globals__, member.__name__, member.__defaults__, member.__closure__
    )
    other.__dict__.update(member.__dict__)
    other.__kwdefaults__ = member.__kwdefaults__
    other.__annotations__ = member.__annotations__
    if (wrapped := vars(member).get("__wrapped__")) is not None:
        other.__wrapped__ = without_setting(wrapped, name)
    return other


def code_without(code: CodeType, name: str) -> CodeType:
    names = tuple(f"{n}_elsewhere" if n == name else n for n in code.co_names)
    inner = (code_without(c, name) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_names=names, co_consts=tuple(inner))


@functools.cache
def names_set_in(cls: type) -> set[str]:
    """The names of what its instances get, as far as its source or its annotations say."""
    names = {*getattr(cls, "__annotations__", ())}
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls)))
    except (OSError, TypeError):
        return names
    return names | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


# Changed functions


def changed(
    seam: Method, change: SignatureChange = lambda signature: signature, *, is_other: bool = False
) -> object:
    """The function with another signature; ``is_other`` makes a coroutine function of one that is
    none, and the other way round."""
    found = inspect.getattr_static(resolve(seam.owner), seam.name)
    function = getattr(found, "orig", found)
    kind = type(function) if isinstance(function, classmethod | staticmethod) else None
    function = inspect.unwrap(getattr(function, "__func__", function))

    async def coroutine_function(*args: Any, **options: Any) -> None: ...

    def plain_function(*args: Any, **options: Any) -> None: ...

    is_async = inspect.iscoroutinefunction(function) is not is_other
    there: Any = coroutine_function if is_async else plain_function
    there.__signature__ = change(inspect.signature(function))
    return there if kind is None else kind(there)


def with_parameters(
    change: Callable[[list[inspect.Parameter]], list[inspect.Parameter]],
) -> SignatureChange:
    return lambda signature: signature.replace(
        parameters=change(list(signature.parameters.values()))
    )


def added(default: object) -> SignatureChange:
    more = inspect.Parameter("another_one", inspect.Parameter.KEYWORD_ONLY, default=default)

    def change(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
        last = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
        return [*(p for p in parameters if p not in last), more, *last]

    return with_parameters(change)


def renamed(name: str) -> SignatureChange:
    return with_parameters(
        lambda parameters: [
            p.replace(name="of_another_name") if p.name == name else p for p in parameters
        ]
    )


def removed(name: str) -> SignatureChange:
    return with_parameters(lambda parameters: [p for p in parameters if p.name != name])


def swapped(one: str, other: str) -> SignatureChange:
    def change(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
        names = {one: other, other: one}
        by_name = {p.name: p for p in parameters}
        return [
            p.replace(name=names[p.name], annotation=by_name[names[p.name]].annotation)
            if p.name in names
            else p
            for p in parameters
        ]

    return with_parameters(change)


def optional(name: str) -> SignatureChange:
    """With a default, and so have all after it."""

    def change(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
        at = [p.name for p in parameters].index(name)
        return [
            p.replace(default=None)
            if i >= at and p.kind in HAVE_DEFAULTS and p.default is p.empty
            else p
            for i, p in enumerate(parameters)
        ]

    return with_parameters(change)


def with_another_result(signature: inspect.Signature) -> inspect.Signature:
    return signature.replace(return_annotation="tuple[int, int, int, int, int]")


def with_other_elements(signature: inspect.Signature) -> inspect.Signature:
    return signature.replace(return_annotation="list[Another]")


def is_list_of(seam: Method) -> bool:
    return (seam.returns or "").startswith("list[")


# All of them


def mutations(seam: Seam) -> Iterator[Mutation]:
    """Every way in which this part may change; that it is gone comes first."""
    match seam:
        case Table():
            yield from _of_table(seam)
        case Import(owner=owner, name=""):
            yield Mutation("import gone", seam, is_of(seam), without(owner))
        case Import(owner=owner, name=name) if f"{owner}.{name}" in sys.modules:
            yield Mutation("import gone", seam, is_of(seam), without(f"{owner}.{name}"))
        case Import(owner=owner, name=name) if name in vars(resolve(owner)):
            yield Mutation("import gone", seam, is_of(seam), with_member(seam))
        case Attribute():
            yield Mutation("attribute gone", seam, is_of(seam), with_member(seam))
            yield _owner_gone(seam)
        case Method():
            yield Mutation("function gone", seam, is_of(seam), with_member(seam))
            yield _owner_gone(seam)
            yield from _of_method(seam)
        case _:
            pass


def _owner_gone(seam: Seam) -> Mutation:
    parent, _, name = seam.owner.rpartition(".")
    return Mutation(CLASS_GONE, seam, is_of(Seam(parent, name)), without(seam.owner))


def _of_method(seam: Method) -> Iterator[Mutation]:
    def mutation(
        kind: str,
        matters: Callable[[Method], object],
        change: SignatureChange = lambda signature: signature,
        *,
        is_other: bool = False,
        name: str = "",
    ) -> Mutation:
        make = functools.partial(changed, seam, change, is_other=is_other)
        return Mutation(kind, seam, is_call_of(seam, matters), with_member(seam, make), name=name)

    def always(other: Method) -> bool:
        return True

    yield Mutation("a number", seam, is_call_of(seam, always), with_member(seam, lambda: 5))
    yield mutation("sync or async", always, is_other=True)
    # What the module replaces passes it on.
    yield mutation(
        "one more is required", lambda other: not other.is_replaced, added(inspect.Parameter.empty)
    )
    yield mutation("one more is optional", nobody, added(None))
    for name in (*positional(seam), *seam.keywords):
        # Where only the position matters, nobody passes it by its name.
        yield mutation("renamed", passes_by_name(name), renamed(name), name=name)
        yield mutation("removed", passes(name), removed(name), name=name)
    for pair in itertools.pairwise(positional(seam)):
        names = ", ".join(pair)
        yield mutation("in another order", passes_by_position(*pair), swapped(*pair), name=names)
        yield mutation("becomes optional", nobody, optional(name), name=name)
    if is_list_of(seam):
        yield mutation("other elements", is_list_of, with_other_elements)
    if seam.returns is not None:
        yield mutation("another result", lambda other: other.returns, with_another_result)
    if is_replaced_everywhere(seam):
        yield Mutation(
            "another holder",
            seam,
            lambda other: other == seam,
            functools.partial(_hold, seam),
            is_seen_late=True,
        )


def is_replaced_everywhere(seam: Seam) -> bool:
    """Is it a module's function, that is replaced wherever a module holds it?"""
    is_replaced = isinstance(seam, Method) and seam.is_replaced
    return is_replaced and not inspect.isclass(resolve(seam.owner))


def _hold(seam: Seam, patched: pytest.MonkeyPatch) -> None:
    holder: Any = ModuleType(HOLDER)
    holder.held = functools.partial(getattr(resolve(seam.owner), seam.name))
    patched.setitem(sys.modules, HOLDER, holder)


def _of_table(seam: Table) -> Iterator[Mutation]:
    def mutation(
        kind: str, harms: Callable[[Table], object], name: str, becomes: Mapping[str, str] | None
    ) -> Mutation:
        def change(columns: Columns) -> Columns:
            there = {c: k for c, k in columns[seam.name].items() if c != name}
            return {**columns, seam.name: {} if becomes is None else {**there, **becomes}}

        def harms_table(other: Seam) -> bool:
            return isinstance(other, Table) and other.name == seam.name and bool(harms(other))

        return Mutation(kind, seam, harms_table, columns=change, name=name)

    yield mutation("table gone", lambda other: True, "", None)
    for name, kind in seam.columns:

        def names_it(other: Table, name: str = name) -> bool:
            return name in dict(other.columns)

        yield mutation("column gone", names_it, name, {})
        another_kind = "boolean" if kind != "boolean" else "text"
        yield mutation("column of another kind", names_it, name, {name: another_kind})
    yield mutation("one more column", nobody, "", {"another_one": "text"})
