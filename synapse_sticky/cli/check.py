"""Whether the module fits a Synapse, before that goes live (H5)."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from synapse_sticky.cli.report import Report
from synapse_sticky.config import StickyConfig, Strict
from synapse_sticky.homeserver.seams import SeamMismatchError

if TYPE_CHECKING:
    from synapse_sticky.cli.synapse import Configuration


def check(paths: Sequence[str], *, as_json: bool = False) -> int:
    """Checks the Synapse of this environment, prints what was found, and gives the exit code.

    Args:
        paths: the files of the configuration; without any, nothing but Synapse is looked at.
        as_json: whether to print one JSON object.
    """
    report = look(paths)
    if as_json:
        print(report.as_json())
    else:
        for line in report.lines():
            print(line)
    return report.exit_code()


def look(paths: Sequence[str]) -> Report:
    """What ``check`` prints."""
    report = Report(version("matrix-synapse"), version("synapse-sticky"))
    try:
        # Here, so that a name that Synapse no longer has is said like any other misfit.
        from synapse_sticky.cli import synapse
    except Exception as e:
        report.stops += [f"it lacks what every duty needs: {e}"]
        return report
    configuration: Configuration | None = None
    if problem := synapse.problem_of_version():
        report.stops.append(problem)
        return report
    if paths:
        try:
            configuration = synapse.Configuration(paths)
        except Exception as e:
            report.stops.append(f"the configuration is wrong: {_said(e)}")
            return report
        if configuration.sticky is None:
            report.problems.append(
                "synapse_sticky.StickyEventsModule is not listed under `modules:`: nothing runs"
            )
        _look_into_database(configuration, report)
    _decide(configuration, report)
    return report


def _said(e: BaseException) -> str:
    """The error and what caused it; where in the configuration it is, if that is known."""
    path = ".".join(getattr(e, "path", None) or ())
    said = f"{getattr(e, 'msg', e)}" + (f" (in {path})" if path else "")
    return f"{said}: {_said(e.__cause__)}" if e.__cause__ else said


def _look_into_database(configuration: "Configuration", report: Report) -> None:
    try:
        configuration.read_database()
    except Exception as e:
        report.stops.append(f"its database cannot be read: {type(e).__name__}: {e}")
        return
    report.problems += configuration.problems_of_tables()


def _decide(configuration: "Configuration | None", report: Report) -> None:
    from synapse_sticky import plan
    from synapse_sticky.duties import DUTIES, State, number_of_seams, shared_misfits

    sticky = (configuration and configuration.sticky) or StickyConfig()
    columns = configuration.columns if configuration else None
    states: dict[str, State] = {}
    problems = shared_misfits()
    for duty in DUTIES.values():
        decision = (
            plan.Decision(State.UNFIT, misfits=problems)
            if problems
            else plan.decide(duty, sticky, states, columns)
        )
        report.duties[duty.name] = decision
        states[duty.name] = decision.state
        states.update(dict.fromkeys(decision.parts, State.UNFIT))
    report.duties[plan.ACCESS] = (
        # Nothing is installed then, and so no guard.
        plan.Decision(State.UNFIT, misfits=problems) if problems else plan.decide_access(states)
    )
    states[plan.ACCESS] = report.duties[plan.ACCESS].state
    if stopping := plan.that_stop(sticky.strict, states):
        misfits = [m for name in stopping for m in report.misfits_of(name)]
        is_all = sticky.strict is Strict.ALL
        option = "strict: true" if is_all else "strict: access"
        report.stops.append(f"by `{option}`: {SeamMismatchError(misfits).msg}")
    if configuration is not None and configuration.sticky is not None:
        report.processes = {
            place.name: [
                duty.name
                for duty in DUTIES.values()
                if duty.where(place) and states[duty.name] is State.ON
            ]
            for place in configuration.places
        }
    try:
        report.seams = number_of_seams()
    except Exception:
        report.seams = None  # a file of a duty cannot be loaded, which its line says
