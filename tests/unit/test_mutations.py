"""A Synapse that is changed in one private part: exactly the duties that need it are off (H5).

The table of seams says what can change. Each seam is changed in every way that its kind allows,
and a seam that cannot be changed fails the suite.
"""

import ast
import functools
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import attr
import pytest
import synapse.app.homeserver  # noqa: F401  # all that it imports, before any of that is gone

from synapse_sticky import plan
from synapse_sticky.config import StickyConfig
from synapse_sticky.duties import ALL, CHECK, DUTIES, State, all_seams, seams_of, shared_misfits
from synapse_sticky.homeserver import access, database
from synapse_sticky.homeserver.fitting import Columns, misfits, resolve
from synapse_sticky.homeserver.seams import Attribute, Import, Method, Seam, Table

pytestmark = pytest.mark.requirement("H5")

MODULE = "module"  # a part that is not a class's
LEFT_OUT = {"__dict__", "__weakref__", "__slots__", "__classcell__", "__init_subclass__"}


@attr.s(auto_attribs=True, frozen=True)
class Mutation:
    """A change of the Synapse that is looked at.

    is_harmless: whether the module goes on as before.
    parts: what is in a class's or module's place, by dotted path.
    columns: those of the database.
    """

    what: str
    is_harmless: bool = False
    parts: Mapping[str, object] = {}
    columns: Columns | None = None


def seams_by_user() -> dict[str, tuple[Seam, ...]]:
    """What each duty, and each part of one, needs for itself, by its name; what all need under
    ``*``; and the layers."""
    found: dict[str, tuple[Seam, ...]] = {d.name: d.seams() for d in DUTIES.values()}
    found |= {part.name: part.seams() for duty in DUTIES.values() for part in duty.parts}
    found["*"] = tuple(seam for file in ALL for seam in seams_of(file))
    return {**found, **access.SEAMS, "columns": database.SEAMS, "check": seams_of(CHECK)}


USERS = seams_by_user()
SEAMS = sorted(all_seams(), key=repr)


def columns_of_all() -> dict[str, dict[str, str]]:
    """A database that has all that the duties name."""
    columns: dict[str, dict[str, str]] = {}
    for seam in SEAMS:
        if isinstance(seam, Table):
            columns.setdefault(seam.name, {}).update(seam.columns)
    return columns


# Making mutated parts


def stand_in(owner: Any, name: str, member: object = None) -> object:
    """What is in the owner's place: the same but for the member, which is gone if None is given."""
    if inspect.isclass(owner):
        members = {
            key: value
            for cls in reversed(owner.__mro__[:-1])
            for key, value in vars(cls).items()
            if key not in LEFT_OUT
        }
        # Nobody looks for the source of a class that is of no module.
        members["__module__"] = "nowhere"
        names = {key for cls in owner.__mro__ for key in names_set_in(cls)}
        sections = {c.section for c in getattr(owner, "config_classes", ())}
        annotations = dict.fromkeys((names | sections) - {name}, "Any")
        members.pop("config_classes", None)
        members.pop(name, None)
        members["__annotations__"] = annotations
        if member is not None:
            members[name] = member
        return type(owner.__name__, (), members)
    copy: Any = type(sys)(owner.__name__)
    copy.__dict__.update({k: v for k, v in vars(owner).items() if k != name})
    if member is not None:
        copy.__dict__[name] = member
    return copy


@functools.cache
def names_set_in(cls: type) -> set[str]:
    """The names of what its instances get, as far as its source or its annotations say."""
    names = {*getattr(cls, "__annotations__", ())}
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls)))
    except (OSError, TypeError):
        return names
    return names | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


def like(seam: Method, change: Callable[[inspect.Signature], inspect.Signature]) -> object:
    """The function with another signature."""
    found = inspect.getattr_static(resolve(seam.owner), seam.name)
    function = getattr(found, "orig", found)
    is_class_method = isinstance(function, classmethod)
    function = inspect.unwrap(getattr(function, "__func__", function))

    async def coroutine_function(*args: Any, **options: Any) -> None: ...

    def plain_function(*args: Any, **options: Any) -> None: ...

    changed: Any = coroutine_function if inspect.iscoroutinefunction(function) else plain_function
    changed.__signature__ = change(inspect.signature(function))
    return classmethod(changed) if is_class_method else changed


def with_parameters(
    change: Callable[[list[inspect.Parameter]], list[inspect.Parameter]],
) -> Callable[[inspect.Signature], inspect.Signature]:
    return lambda signature: signature.replace(
        parameters=change(list(signature.parameters.values()))
    )


def added(default: object) -> Callable[[inspect.Signature], inspect.Signature]:
    more = inspect.Parameter("another_one", inspect.Parameter.KEYWORD_ONLY, default=default)

    def change(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
        last = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
        return [*(p for p in parameters if p not in last), more, *last]

    return with_parameters(change)


def renamed(name: str) -> Callable[[inspect.Signature], inspect.Signature]:
    return with_parameters(
        lambda parameters: [
            p.replace(name="of_another_name") if p.name == name else p for p in parameters
        ]
    )


def removed(name: str) -> Callable[[inspect.Signature], inspect.Signature]:
    return with_parameters(lambda parameters: [p for p in parameters if p.name != name])


def swapped(one: str, other: str) -> Callable[[inspect.Signature], inspect.Signature]:
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


def of_the_other_kind(seam: Method) -> object:
    changed: Any = like(seam, lambda signature: signature)
    function: FunctionType = getattr(changed, "__func__", changed)
    signature = inspect.signature(function)

    async def coroutine_function(*args: Any, **options: Any) -> None: ...

    def plain_function(*args: Any, **options: Any) -> None: ...

    other: Any = plain_function if seam.is_async else coroutine_function
    other.__signature__ = signature
    return classmethod(other) if isinstance(changed, classmethod) else other


def mutations_of_method(seam: Method) -> Iterator[tuple[str, bool, object]]:
    """What becomes of it, whether that is harmless, and the member that is there then."""
    yield "gone", False, None
    yield "a number", False, 5
    yield "sync or async", False, of_the_other_kind(seam)
    # What the module replaces passes it on.
    required = like(seam, added(inspect.Parameter.empty))
    yield "one more that is required", seam.is_replaced, required
    yield "one more that is optional", True, like(seam, added(None))
    for name in (*seam.arguments, *seam.keywords):
        yield f"{name} renamed", False, like(seam, renamed(name))
    for name in seam.by_position:
        # Nobody passes it by its name.
        yield f"{name} renamed", True, like(seam, renamed(name))
    first = (*seam.by_position, *seam.arguments)
    for name in (*first, *seam.keywords):
        yield f"{name} removed", False, like(seam, removed(name))
    for one, other in itertools.pairwise(first):
        yield f"{one} and {other} swapped", False, like(seam, swapped(one, other))
    if seam.returns is not None:
        returned = "tuple[int, int, int, int, int]"
        yield (
            "another result",
            False,
            like(seam, lambda signature: signature.replace(return_annotation=returned)),
        )


def mutations(seam: Seam) -> Iterator[Mutation]:
    """Every way in which this part may change."""
    match seam:
        case Table():
            columns = columns_of_all()
            yield Mutation("table gone", columns={**columns, seam.name: {}})
            for name, kind in seam.columns:
                rest = {c: k for c, k in columns[seam.name].items() if c != name}
                yield Mutation(f"{name} gone", columns={**columns, seam.name: rest})
                other = {**rest, name: "boolean" if kind != "boolean" else "text"}
                yield Mutation(f"{name} of another kind", columns={**columns, seam.name: other})
            more = {**columns[seam.name], "another_one": "text"}
            yield Mutation("one more column", True, columns={**columns, seam.name: more})
        case Import(owner=owner, name=""):
            yield Mutation("gone", parts={owner: None})
        case Import(owner=owner, name=name) if f"{owner}.{name}" in sys.modules:
            yield Mutation("gone", parts={f"{owner}.{name}": None})
        case Import(owner=owner, name=name) if name in vars(resolve(owner)):
            yield Mutation("gone", parts={owner: stand_in(resolve(owner), name)})
        case Attribute(owner=owner, name=name):
            yield Mutation("gone", parts={owner: stand_in(resolve(owner), name)})
        case Method(owner=owner, name=name):
            for what, is_harmless, member in mutations_of_method(seam):
                part = stand_in(resolve(owner), name, member)
                yield Mutation(what, is_harmless, parts={owner: part})
        case _:
            pass


# What comes of them


def users_of(seam: Seam) -> set[str]:
    """Whoever needs this very part: any of its declarations with the same owner and name."""
    return {user for user, seams in USERS.items() if seam in seams}


def users_that_do_not_fit(columns: Columns | None) -> set[str]:
    needs = (needs for duty in DUTIES.values() for needs in (duty, *duty.parts))
    found = {needs.name for needs in needs if needs.misfits(columns)}
    if shared_misfits():
        found.add("*")
    found |= {layer for layer, seams in access.SEAMS.items() if misfits(seams)}
    found |= {"columns"} if misfits(database.SEAMS) else set()
    return found | ({"check"} if misfits(seams_of(CHECK)) else set())


@pytest.mark.parametrize("seam", SEAMS, ids=lambda s: f"{s.owner.split('.')[-1]}.{s.name}")
def test_what_does_not_fit(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another declaration of the same part may ask for more of it, or for less.
    same = {s for s in SEAMS if (s.owner, s.name) == (seam.owner, seam.name)}
    # And with a class that is gone, what is in it is gone.
    same |= {s for s in SEAMS if f"{s.owner}.".startswith(f"{seam.owner}.{seam.name}.")}
    may_be_unfit = {user for s in same for user in users_of(s)}
    was_gone = False
    for mutation in mutations(seam):
        with monkeypatch.context() as patched:
            for path, part in mutation.parts.items():
                put(patched, path, part)
            problems = misfits([seam], mutation.columns)
            assert bool(problems) is not mutation.is_harmless, (mutation.what, problems)
            if not was_gone:
                # The first is that it is gone. Who is off is the same for all others.
                unfit = users_that_do_not_fit(mutation.columns or columns_of_all())
                assert users_of(seam) <= unfit <= may_be_unfit, mutation.what
                was_gone = True
    assert was_gone, "no way is known in which this seam may change"


def put(monkeypatch: pytest.MonkeyPatch, path: str, part: object) -> None:
    """Puts a class or a module in the place of the one of this path, for who looks it up."""
    parent, _, name = path.rpartition(".")
    if path in sys.modules:
        monkeypatch.setitem(sys.modules, path, part)
        if not parent:
            return
        if part is None:
            monkeypatch.delattr(sys.modules[parent], name, raising=False)
        elif vars(sys.modules[parent]).get(name) is not None:
            monkeypatch.setattr(sys.modules[parent], name, part)
        return
    monkeypatch.setattr(resolve(parent), name, part)


def states_with(columns: Columns | None = None) -> dict[str, State]:
    states: dict[str, State] = {}
    for duty in DUTIES.values():
        states[duty.name] = plan.decide(duty, StickyConfig(), states, columns).state
    return {**states, plan.ACCESS: plan.decide_access(states).state}


def test_what_needs_a_duty_that_does_not_fit_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    store = "synapse.storage.databases.main.DataStore"
    put(monkeypatch, store, stand_in(resolve(store), "process_replication_rows"))
    states = states_with()
    assert states["index"] is State.UNFIT
    assert (states["joins"], states["extremities"]) == (State.OFF, State.OFF)
    assert states["sending"] is states[plan.ACCESS] is State.ON


@pytest.mark.requirement("D8")
@pytest.mark.parametrize(("section", "response"), access.LAYERS.values())
def test_one_layer_suffices_to_guard_the_sections(
    section: str, response: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_part(layer: str) -> Seam:
        return next(s for s in access.SEAMS[layer] if isinstance(s, Method) and s.is_replaced)

    for layers, state in (
        ([section], State.ON),
        ([response], State.ON),
        ([section, response], State.UNFIT),
    ):
        with monkeypatch.context() as patched:
            for seam in map(own_part, layers):
                put(patched, seam.owner, stand_in(resolve(seam.owner), seam.name))
            assert states_with()[plan.ACCESS] is state


def test_an_import_that_is_gone_is_found_where_it_is_written() -> None:
    """Not only by the table: the file itself is loaded then."""
    assert importlib.import_module("synapse_sticky.index.synapse")
    seams = [s for s in USERS["index"] if isinstance(s, Import)]
    assert Import("synapse.types", "MultiWriterStreamToken") in seams
