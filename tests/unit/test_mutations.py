"""A Synapse that is changed in one private part: exactly the duties that need it are off (H5).

The table of seams says what can change. Each seam is changed in every way that its kind allows,
and a seam that cannot be changed fails the suite.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import isclass

import attr
import pytest
from synapse.module_api import ModuleApi

from synapse_sticky import plan, wiring
from synapse_sticky.config import StickyConfig, Strict
from synapse_sticky.duties import ALL, CHECK, DUTIES, State, all_seams, seams_of, shared_misfits
from synapse_sticky.homeserver import access, database, fitting, schema
from synapse_sticky.homeserver.fitting import Columns, misfits, resolve
from synapse_sticky.homeserver.seams import (
    Attribute,
    Import,
    Method,
    Seam,
    SeamMismatchError,
    Table,
)
from tests.mutations import CLASS_GONE, HOLDER, Mutation, is_replaced_everywhere, mutations
from tests.unit.conftest import restore
from tests.unit.test_in_one_process import make_homeserver

pytestmark = pytest.mark.requirement("H5")

States = Mapping[str, State]
SHARED, COLUMNS, COMMAND = "shared", "columns", "check"


def seams_by_user() -> dict[str, tuple[Seam, ...]]:
    """What each duty needs for itself and each layer, by its name; and what all duties need, who
    reads the columns, and the command that checks. Nobody needs what the configuration of these
    tests does not ask for, which has a name of its own."""
    found: dict[str, tuple[Seam, ...]] = {}
    for duty in DUTIES.values():
        wanted = plan.wanted(duty, StickyConfig())
        found[duty.name] = tuple(seam for part in wanted for seam in part.seams())
        others = [part for part in duty.parts if part not in wanted]
        found.update({f"{duty.name}:{part.name}": part.seams() for part in others})
    found[SHARED] = tuple(seam for file in ALL for seam in seams_of(file))
    of_check = (*schema.SEAMS, *seams_of(CHECK))
    return {**found, **access.SEAMS, COLUMNS: database.SEAMS, COMMAND: of_check}


USERS = seams_by_user()
SEAMS = sorted(all_seams(), key=repr)
EVERYWHERE = [seam for seam in SEAMS if is_replaced_everywhere(seam)]


def columns_of_all() -> dict[str, dict[str, str]]:
    """A database that has all that the duties name."""
    columns: dict[str, dict[str, str]] = {}
    for seam in SEAMS:
        if isinstance(seam, Table):
            columns.setdefault(seam.name, {}).update(seam.columns)
    return columns


def each(seams: Iterable[Seam]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "seam", seams, ids=lambda seam: f"{seam.owner.split('.')[-1]}.{seam.name}"
    )


# What is expected, by the table alone


def harmed(*changes: Mutation) -> set[str]:
    """Who needs any of what has changed."""
    return {
        user
        for user, seams in USERS.items()
        if any(mutation.harms(seam) for mutation in changes for seam in seams)
    }


def expected(users: set[str]) -> States:
    """What becomes of each duty where Synapse does not fit these users."""
    if SHARED in users:
        return dict.fromkeys((*DUTIES, plan.ACCESS), State.UNFIT)
    states: dict[str, State] = {}
    for name, duty in DUTIES.items():
        if any(states[needed] is not State.ON for needed in duty.needs):
            states[name] = State.OFF
        else:
            states[name] = State.UNFIT if name in users else State.ON
    unguarded = any(users >= {*layers} for layers in access.LAYERS.values())
    return {**states, plan.ACCESS: State.UNFIT if unguarded else State.ON}


# What comes of it


def planned(columns: Columns | None = None) -> States:
    """The states as a start or ``synapse-sticky check`` plans them."""
    if shared_misfits():
        return dict.fromkeys((*DUTIES, plan.ACCESS), State.UNFIT)
    states: dict[str, State] = {}
    for duty in DUTIES.values():
        states[duty.name] = plan.decide(duty, StickyConfig(), states, columns).state
    return {**states, plan.ACCESS: plan.decide_access(states).state}


@attr.s(auto_attribs=True)
class Process:
    """A process of a homeserver in which the module starts, as often as it is asked to."""

    api: ModuleApi

    def start(self, strict: Strict = Strict.NO) -> States:
        """Starts the module, ends it, and gives the states of the duties.

        Raises:
            SeamMismatchError: something does not fit, and the start is strict.
        """
        started = wiring.Wiring(StickyConfig(strict=strict), self.api)
        if not started.states:  # what all duties need does not fit
            return dict.fromkeys((*DUTIES, plan.ACCESS), State.UNFIT)
        started._homeserver.close()
        return started.states


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    hs = make_homeserver(tmp_path_factory.mktemp("homeserver"), "mutated")
    yield Process(hs.get_module_api())
    restore()


Quick = Callable[[Mutation], None]


@pytest.fixture(scope="module")
def known() -> dict[tuple[Seam, bool], str | None]:
    """What is known of the parts of the Synapse that nothing has changed in."""
    return {}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, known: dict[tuple[Seam, bool], str | None]) -> Quick:
    """From a mutation on, has only that be looked at which the mutation is about."""
    look: Callable[[Seam, Columns | None], str | None] = fitting._problem
    mutation: list[Mutation] = []

    def look_or_know(seam: Seam, columns: Columns | None) -> str | None:
        if not mutation or mutation[-1].is_about(seam):
            return look(seam, columns)
        key = seam, columns is None
        if key not in known:
            known[key] = look(seam, columns)
        return known[key]

    monkeypatch.setattr(fitting, "_problem", look_or_know)
    return mutation.append


@each(SEAMS)
def test_exactly_what_needs_a_part_is_off(
    seam: Seam,
    process: Process,
    quick: Quick,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds: list[str] = []
    for mutation in mutations(seam):
        # The first, that it is gone, is looked at with all parts.
        if kinds:
            quick(mutation)
        kinds.append(mutation.kind)
        users = harmed(mutation)
        columns = mutation.columns(columns_of_all())
        with monkeypatch.context() as patched:
            if mutation.is_seen_late:
                restore()
                patched.setattr(
                    wiring,
                    "read_columns",
                    lambda config, server_name, columns=columns: (columns, []),
                )
                mutation.put(patched)
                assert planned(columns) == expected(set()), str(mutation)
                assert process.start() == expected(users), str(mutation)
                continue
            mutation.put(patched)
            assert bool(misfits([seam], columns)) is mutation.harms(seam), str(mutation)
            assert planned(columns) == expected(users), str(mutation)
    assert kinds, "no way is known in which this seam may change"


SYNAPSES_OWN = (
    "synapse.storage.database.LoggingDatabaseConnection",
    "synapse.types.MultiWriterStreamToken",
)
"""Without any of what is in these, Synapse itself can do nothing."""

IN_CLASSES = [
    seam
    for seam in SEAMS
    if isinstance(seam, Method | Attribute)
    and isclass(resolve(seam.owner))
    and seam.owner not in SYNAPSES_OWN
]


@each(IN_CLASSES)
def test_a_start_does_what_was_planned(
    seam: Seam, process: Process, quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the homeserver that runs lacks the part: what a duty takes of it to install itself is
    declared for this very duty, not only for another that uses the same file."""
    columns = columns_of_all()
    monkeypatch.setattr(wiring, "read_columns", lambda config, server_name: (columns, []))
    gone = next(mutations(seam))
    quick(gone)
    with removed(seam), monkeypatch.context() as patched:
        gone.put(patched)
        assert process.start() == planned(columns) == expected(harmed(gone))


@contextmanager
def removed(seam: Seam) -> Iterator[None]:
    """Takes it from what is of the class already, and from what will be: a property comes before
    what an instance has."""
    cls = resolve(seam.owner)
    had = vars(cls).get(seam.name)
    try:
        setattr(cls, seam.name, property(is_gone, lambda instance, value: None))
    except TypeError:  # it is compiled, and cannot be changed
        yield
        return
    try:
        yield
    finally:
        if had is None:
            delattr(cls, seam.name)
        else:
            setattr(cls, seam.name, had)


def is_gone(instance: object) -> None:
    raise AttributeError("gone")


def lacking(users: set[str]) -> list[str]:
    """Which duties lack something, and whether the guard of the sections does, on either layer."""
    unfit = {name for name, state in expected(users).items() if state is State.UNFIT}
    return sorted(unfit | ({plan.ACCESS} if users & access.SEAMS.keys() else set()))


STOPPING = [seam for seam in SEAMS if lacking(harmed(next(mutations(seam))))]
"""What the start does not need is not its matter."""


@each(STOPPING)
def test_a_strict_start_stops_and_says_which(
    seam: Seam, process: Process, quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = next(mutations(seam))
    quick(gone)
    columns = gone.columns(columns_of_all())
    monkeypatch.setattr(wiring, "read_columns", lambda config, server_name: (columns, []))
    with monkeypatch.context() as patched:
        gone.put(patched)
        with pytest.raises(SeamMismatchError) as error:
            process.start(Strict.ALL)
    assert (f"table {seam.name}" if isinstance(seam, Table) else str(seam)) in error.value.msg
    users = harmed(gone)
    if SHARED not in users:
        named = [name for name in (*DUTIES, plan.ACCESS) if f" {name}: " in error.value.msg]
        assert sorted(named) == lacking(users)


@each(list(database.SEAMS))
def test_a_strict_start_stops_if_the_tables_cannot_be_looked_at(
    seam: Seam, process: Process, quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = next(mutations(seam))
    quick(gone)
    with monkeypatch.context() as patched:
        gone.put(patched)
        with pytest.raises(SeamMismatchError) as error:
            process.start(Strict.ALL)
    assert str(seam) in error.value.msg


def test_a_strict_start_stops_if_the_columns_cannot_be_read(
    process: Process, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(config: object, server_name: str) -> None:
        raise OSError("connection\nrefused")

    monkeypatch.setattr(database, "connect", refuse)
    with pytest.raises(SeamMismatchError) as error:
        process.start(Strict.ALL)
    reason = "the columns of the database cannot be read: OSError: connection refused"
    assert f": tables: {reason}." in error.value.msg
    caplog.clear()
    for strict in (Strict.NO, Strict.ACCESS):
        assert process.start(strict) == expected(set())
    warnings = [
        r.getMessage()
        for r in caplog.records
        if r.levelname == "WARNING" and r.name.startswith("synapse_sticky")
    ]
    assert warnings == 2 * ["Not checking the database's columns"]


@each(EVERYWHERE)
def test_a_strict_start_stops_for_another_holder(
    seam: Seam, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore()
    (held,) = (mutation for mutation in mutations(seam) if mutation.is_seen_late)
    held.put(monkeypatch)
    with pytest.raises(SeamMismatchError) as error:
        process.start(Strict.ALL)
    assert f"{seam} is held by a functools.partial of {HOLDER}.held" in error.value.msg


def test_functions_that_are_replaced_everywhere_are_among_the_seams() -> None:
    assert [str(seam) for seam in EVERYWHERE] == [
        "synapse.visibility.filter_and_transform_events_for_client",
        "synapse.visibility.filter_events_for_server",
    ]


@pytest.mark.parametrize("duty", DUTIES)
def test_a_start_goes_on_without_the_duty(
    duty: str, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that it uses has changed, each part in another way; what is in a class before that."""
    seams = [seam for seam in DUTIES[duty].seams() if SHARED not in harmed(next(mutations(seam)))]
    by_part = {(seam.owner, seam.name): seam for seam in seams}
    in_order = sorted(by_part.values(), key=lambda s: (isinstance(s, Import), -s.owner.count(".")))
    changes = []
    for number, seam in enumerate(in_order):
        of_seam = [
            mutation
            for mutation in mutations(seam)
            if mutation.harms(seam) and not mutation.is_seen_late and mutation.kind != CLASS_GONE
        ]
        changes.append(of_seam[number % len(of_seam)])
    columns: Columns = columns_of_all()
    for mutation in changes:
        mutation.put(monkeypatch)
        columns = mutation.columns(columns)
    monkeypatch.setattr(wiring, "read_columns", lambda config, server_name: (columns, []))
    assert planned(columns) == expected(harmed(*changes))
    assert process.start() == expected(harmed(*changes))


@pytest.mark.requirement("D8")
@pytest.mark.parametrize("layers", access.LAYERS.values())
def test_one_layer_suffices_to_guard_the_sections(
    layers: tuple[str, str], process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_part(layer: str) -> Seam:
        return next(s for s in access.SEAMS[layer] if isinstance(s, Method) and s.is_replaced)

    for of_these in ([layers[0]], [layers[1]], layers):
        with monkeypatch.context() as patched:
            gone = [next(mutations(own_part(layer))) for layer in of_these]
            for mutation in gone:
                mutation.put(patched)
            states = process.start()
            assert states == planned() == expected(harmed(*gone))
            both = of_these == layers
            assert states[plan.ACCESS] is (State.UNFIT if both else State.ON)
            if not both:
                process.start(Strict.ACCESS)
            for strict in (Strict.ALL, Strict.ACCESS) if both else (Strict.ALL,):
                with pytest.raises(SeamMismatchError, match=r" access: ") as error:
                    process.start(strict)
                assert all(str(mutation.seam) in error.value.msg for mutation in gone)


def test_an_import_that_is_gone_is_found_where_it_is_written() -> None:
    """Not only by the table: the file itself is loaded then."""
    assert importlib.import_module("synapse_sticky.homeserver.tokens")
    seams = [s for s in USERS["delivery"] if isinstance(s, Import)]
    assert Import("synapse.types", "MultiWriterStreamToken") in seams
