"""Which duties one process does, by the configuration and by what the running Synapse has.

The start and ``synapse-sticky check`` both go by this.
"""

from collections.abc import Mapping

import attr

from synapse_sticky.config import StickyConfig, Strict
from synapse_sticky.duties import Duty, State
from synapse_sticky.homeserver.access import LAYERS, fitting_layers
from synapse_sticky.homeserver.fitting import Columns

ACCESS = "access"
"""By this name the log, the metric and ``check`` say whether the sections are guarded (D8)."""

WITHOUT_ACCESS = "sticky sections may have events of rooms that the user is not joined to"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Decision:
    """What becomes of a duty.

    misfits: what the running Synapse lacks for it, one line each.
    missing: the duties that it needs and that are not on.
    parts: by the name of each part of it that is off by itself, what Synapse lacks for that.
    """

    state: State
    misfits: list[str] = attr.Factory(list)
    missing: list[str] = attr.Factory(list)
    parts: Mapping[str, list[str]] = attr.Factory(dict)


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
    if problems := duty.misfits(columns):
        return Decision(State.UNFIT, misfits=problems)
    lacking = {part.name: part.misfits(columns) for part in duty.parts}
    return Decision(State.ON, parts={name: found for name, found in lacking.items() if found})


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
    problems: list[str] = []
    for name in names:
        layers, found = fitting_layers(name)
        problems += [] if layers else found
    return Decision(State.UNFIT if problems else State.ON, misfits=problems)


def that_stop(strict: Strict, states: Mapping[str, State]) -> list[str]:
    """The names of what does not fit and therefore stops the start."""
    unfit = sorted(name for name, state in states.items() if state is State.UNFIT)
    match strict:
        case Strict.ALL:
            return unfit
        case Strict.ACCESS:
            return [name for name in unfit if name == ACCESS]
        case _:
            return []
