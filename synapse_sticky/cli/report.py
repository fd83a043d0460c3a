"""What ``synapse-sticky check`` found, and how it is printed."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import attr

if TYPE_CHECKING:
    # Not when it runs: what these need of Synapse may be what is gone.
    from synapse_sticky.plan import Decision

ALL_FIT, SOMETHING_OFF, NO_START = 0, 1, 2

_END = {
    ALL_FIT: "All is well: nothing that should be on would be off.",
    SOMETHING_OFF: "Synapse would start, but not all is well: see above.",
    NO_START: "Do not let this Synapse go live: see above.",
}


@attr.s(auto_attribs=True, slots=True)
class Report:
    """What was found.

    seams: how many private parts of Synapse the module uses; None if that cannot be known.
    duties: what would become of each, by name.
    access: what would become of the guard of the sections.
    processes: by the name of each process of the configuration, the duties that run there.
    idle: the duties that belong in no process of the configuration; ``access`` may be among them.
    problems: what else is wrong, one line each.
    remarks: what is to be known and is not wrong, one line each.
    stops: why Synapse would not start, one line each.
    is_off: whether the module would be off as a whole, as one of the problems says.
    """

    synapse: str
    module: str
    seams: int | None = None
    duties: "dict[str, Decision]" = attr.Factory(dict)
    access: "Decision | None" = None
    processes: dict[str, list[str]] = attr.Factory(dict)
    idle: list[str] = attr.Factory(list)
    problems: list[str] = attr.Factory(list)
    remarks: list[str] = attr.Factory(list)
    stops: list[str] = attr.Factory(list)
    is_off: bool = False

    def decisions(self) -> "dict[str, Decision]":
        """The duties and the guard of the sections, by name."""
        return self.duties if self.access is None else {**self.duties, "access": self.access}

    def running(self) -> list[str]:
        """The duties that would run in any process."""
        return [
            name
            for name, decision in self.duties.items()
            if decision.state.value == "on" and name not in self.idle
        ]

    def exit_code(self) -> int:
        """0 if all fit, 1 if something is off that should be on, 2 if Synapse would not start or
        does not guard the sections."""
        missing = {
            name
            for name, decision in self.decisions().items()
            if decision.state.value != "on"
            and (decision.misfits or decision.missing)
            and name not in self.idle
        }
        if self.stops or self.is_off or "access" in missing:
            return NO_START
        return SOMETHING_OFF if missing or self.problems else ALL_FIT

    def as_json(self) -> str:
        """One JSON object."""
        found = {name: self._as_dict(name, d) for name, d in self.decisions().items()}
        return json.dumps(
            {
                "synapse": self.synapse,
                "module": self.module,
                "seams": self.seams,
                "access": found.pop("access", None),
                "duties": found,
                "processes": self.processes,
                "problems": self.problems,
                "remarks": self.remarks,
                "stops": self.stops,
                "exit_code": self.exit_code(),
            },
            indent=2,
        )

    def _as_dict(self, name: str, decision: "Decision") -> Mapping[str, object]:
        found: dict[str, object] = {"state": decision.state.value, "misfits": decision.misfits}
        if decision.missing:
            found["missing"] = decision.missing
        return {**found, "idle": True} if name in self.idle else found

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"synapse-sticky {self.module} with Synapse {self.synapse}"
        if self.seams is not None:
            yield f"synapse-sticky uses {self.seams} private parts of Synapse."
        for name, decision in self.decisions().items():
            idle = " (no process of this configuration does this)" if name in self.idle else ""
            yield f"{name:12} {decision.state.value}{_why(name, decision)}{idle}"
            yield from (f"{'':12} - {problem}" for problem in decision.misfits)
        for name, duties in self.processes.items():
            yield f"Process {name} runs {', '.join(duties) or 'no duty'}."
        for remark in self.remarks:
            yield f"Remark: {remark}"
        for problem in self.problems:
            yield f"Problem: {problem}"
        for stop in self.stops:
            yield f"Synapse would not start: {stop}"
        yield _END[self.exit_code()]


def _why(name: str, decision: "Decision") -> str:
    if decision.missing:
        return f", as it needs {', '.join(decision.missing)}"
    if decision.misfits:
        layer = " on one of its two layers" if decision.state.value == "on" else ""
        return f", as this Synapse lacks what it needs{layer}:"
    match decision.state.value:
        case "native":
            return ", left to Synapse"
        case "off" if name == "access":
            return ", as delivery and sliding are left to Synapse"
        case "off":
            return ", by the configuration"
        case _:
            return ""
