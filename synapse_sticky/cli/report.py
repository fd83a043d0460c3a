"""What ``synapse-sticky check`` found, and how it is printed."""

import json
from collections.abc import Iterator

import attr

from synapse_sticky.duties import State
from synapse_sticky.plan import ACCESS, Decision

ALL_FIT, SOMETHING_OFF, NO_START = 0, 1, 2


@attr.s(auto_attribs=True, slots=True)
class Report:
    """What was found.

    seams: how many private parts of Synapse the module uses; None if that cannot be known.
    duties: what would become of each, and of the guard of the sections, by name.
    processes: by the name of each process of the configuration, the duties that run there.
    problems: what else is wrong, one line each.
    stops: why Synapse would not start, one line each.
    """

    synapse: str
    module: str
    seams: int | None = None
    duties: dict[str, Decision] = attr.Factory(dict)
    processes: dict[str, list[str]] = attr.Factory(dict)
    problems: list[str] = attr.Factory(list)
    stops: list[str] = attr.Factory(list)

    def exit_code(self) -> int:
        """0 if all fit, 1 if something is off that should be on, 2 if Synapse would not start or
        does not guard the sections."""
        access = self.duties.get(ACCESS)
        if self.stops or (access and access.state is State.UNFIT):
            return NO_START
        off = [d for d in self.duties.values() if d.state is State.UNFIT or d.missing or d.parts]
        return SOMETHING_OFF if off or self.problems else ALL_FIT

    def misfits_of(self, name: str) -> list[str]:
        """What Synapse lacks for a duty, for a part of one, or to guard the sections."""
        if name in self.duties:
            return self.duties[name].misfits
        return [m for duty in self.duties.values() for m in duty.parts.get(name, [])]

    def as_json(self) -> str:
        """One JSON object."""
        duties = {name: _as_dict(decision) for name, decision in self.duties.items()}
        return json.dumps(
            {
                "synapse": self.synapse,
                "module": self.module,
                "seams": self.seams,
                "access": duties.pop(ACCESS, None),
                "duties": duties,
                "processes": self.processes,
                "problems": self.problems,
                "stops": self.stops,
                "exit_code": self.exit_code(),
            },
            indent=2,
        )

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"synapse-sticky {self.module} with Synapse {self.synapse}"
        if self.seams is not None:
            yield f"It uses {self.seams} private parts of Synapse."
        for name, decision in self.duties.items():
            yield f"{name:12} {decision.state.value}{_why(decision)}"
            yield from (f"{'':12} - {problem}" for problem in decision.misfits)
            for part, problems in decision.parts.items():
                yield f"{'':12} but its part {part} is off, as this Synapse does not fit:"
                yield from (f"{'':12} - {problem}" for problem in problems)
        for name, duties in self.processes.items():
            yield f"In {name}: {', '.join(duties)}"
        for problem in self.problems:
            yield f"Problem: {problem}"
        for stop in self.stops:
            yield f"Synapse would not start: {stop}"
        yield {
            ALL_FIT: "All is well.",
            SOMETHING_OFF: "Synapse would start, without what is said above.",
            NO_START: "Do not go on with this: see above.",
        }[self.exit_code()]


def _as_dict(decision: Decision) -> dict[str, object]:
    found: dict[str, object] = {"state": decision.state.value, "misfits": decision.misfits}
    if decision.missing:
        found["missing"] = decision.missing
    return {**found, "parts_off": dict(decision.parts)} if decision.parts else found


def _why(decision: Decision) -> str:
    if decision.missing:
        return f", as it needs {', '.join(decision.missing)}"
    return ", as this Synapse does not fit:" if decision.misfits else ""
