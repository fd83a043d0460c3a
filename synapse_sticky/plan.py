"""Which duties one process does, by the configuration and by what the running Synapse has.

The start and ``synapse-sticky check`` both go by this.
"""

from collections.abc import Collection, Iterable, Mapping

import attr

from synapse_sticky.config import StickyConfig, Strict
from synapse_sticky.duties import ADMIN, DUTIES, Duty, Part, State
from synapse_sticky.homeserver.access import LAYERS, fitting_layers
from synapse_sticky.homeserver.fitting import Columns
from synapse_sticky.homeserver.place import Place

TABLES = "tables"
"""By this name a strict start says that it cannot know the columns of Synapse's tables."""

ACCESS = "access"
"""By this name the log, the metric and ``check`` say whether the sections are guarded (D8)."""

WITHOUT_ACCESS = "sticky sections may have events of rooms that the user is not joined to"


API = "admin"
"""By this name the log says whether the API for administrators is there (E3)."""

WITHOUT_ADMIN = "administrators cannot ask what waits, and why"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Decision:
    """What becomes of a duty.

    misfits: what the running Synapse lacks for it, one line each.
    missing: the duties that it needs and that are not on.
    parts: what is to be done of it, and what the running Synapse lacks for that; what lacks nothing
        is done, even if others do.
    """

    state: State
    misfits: list[str] = attr.Factory(list)
    missing: list[str] = attr.Factory(list)
    parts: list[tuple[Part, list[str]]] = attr.Factory(list)


def decide(
    duty: Duty, config: StickyConfig, states: Mapping[str, State], columns: Columns | None
) -> Decision:
    """Whether a duty is done in a process that it belongs in.

    Args:
        states: of the duties that were decided on before, which are those that it may need.
        columns: those of the database; None if they are not known.
    """
    if duty.name in config.native or duty.is_native(columns):
        return Decision(State.NATIVE)
    if not config.is_on(duty.name):
        return Decision(State.OFF)
    if missing := [name for name in duty.needs if states.get(name) is not State.ON]:
        return Decision(State.OFF, missing=missing)
    parts = [(part, part.misfits(columns)) for part in wanted(duty, config)]
    problems = [line for part, lacks in parts for line in of_part(part, lacks)]
    return Decision(State.UNFIT if problems else State.ON, misfits=problems, parts=parts)


def wanted(duty: Duty, config: StickyConfig) -> list[Part]:
    """The parts of the duty that the configuration asks for."""
    return [part for part in duty.parts if not part.option or getattr(config, part.option)]


def of_part(part: Part, problems: Iterable[str]) -> list[str]:
    """These problems, each with the name of the part that it is of."""
    return [f"{part.name}: {problem}" if part.name else problem for problem in problems]


def is_done_in(name: str, place: Place) -> bool:
    """Does the duty of this name, or the guard of the sections, belong in the process?"""
    return place.serves("client") if name == ACCESS else DUTIES[name].where(place)


def guarded(states: Mapping[str, State]) -> list[str]:
    """The duties whose sections are to be guarded: all that Synapse does not do itself.

    That a duty is switched off says nothing of who may see what is sticky.
    """
    return [name for name in LAYERS if states.get(name) is not State.NATIVE]


def decide_access(states: Mapping[str, State]) -> Decision:
    """Whether the sections are guarded, in a process that serves clients."""
    names = guarded(states)
    if not names:
        return Decision(State.OFF)
    of_each = [fitting_layers(name) for name in names]
    is_guarded = all(layers for layers, _ in of_each)
    problems = [problem for _, found in of_each for problem in found]
    return Decision(State.ON if is_guarded else State.UNFIT, misfits=problems)


def misfits_of_admin(columns: Columns | None) -> list[str]:
    """What the API for administrators needs and the running Synapse lacks, one line each."""
    return Part(ADMIN, WITHOUT_ADMIN).misfits(columns)


def that_stop(
    strict: Strict, states: Mapping[str, State], misfits: Mapping[str, Collection[str]]
) -> list[str]:
    """The names of what does not fit and therefore stops the start.

    Args:
        misfits: what the running Synapse lacks, by the name of a duty, ``access`` or ``tables``.
            Something is on in spite of one: access, which has another layer.
    """
    match strict:
        case Strict.ALL:
            return sorted(name for name, lacks in misfits.items() if lacks)
        case Strict.ACCESS if states.get(ACCESS) is State.UNFIT:
            return [ACCESS]
        case _:
            return []


def by_name(names: Iterable[str], misfits: Mapping[str, Collection[str]]) -> list[str]:
    """What the running Synapse lacks for each of these, one line each."""
    return [f"{name}: {'; '.join(misfits[name])}" for name in names]
