"""Whether the module fits a Synapse, before that goes live (H5)."""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from typing import TYPE_CHECKING

from synapse_sticky.cli.report import Report
from synapse_sticky.cli.running import elsewhere
from synapse_sticky.versions import synapse_version

if TYPE_CHECKING:
    from synapse_sticky.cli.synapse import Configuration
    from synapse_sticky.homeserver.fitting import Columns

# What needs any part of Synapse is imported where it is used: that one is gone is to be said like
# any other misfit.


def check(paths: Sequence[str], *, as_json: bool = False) -> int:
    """Checks the Synapse of this environment, prints what was found, and gives the exit code.

    Args:
        paths: the files of the configuration; without any, nothing but Synapse is looked at.
        as_json: whether to print one JSON object, and nothing else.
    """
    # Synapse prints while it loads its configuration.
    with redirect_stdout(sys.stderr):
        report = look(paths)
    try:
        print(report.as_json() if as_json else "\n".join(report.lines()), flush=True)
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return report.exit_code()


def look(paths: Sequence[str]) -> Report:
    """What ``check`` prints."""
    report = Report(synapse_version(), version("synapse-sticky"))
    try:
        import synapse_sticky.module  # noqa: F401  only whether it can be
    except Exception as e:
        report.stops.append(f"it cannot load synapse_sticky.StickyEventsModule: {e}")
        return report
    try:
        from synapse_sticky.cli import synapse
        from synapse_sticky.duties import CHECK, seams_of
        from synapse_sticky.homeserver.fitting import misfits
    except Exception as e:
        report.is_off = True
        report.problems.append(
            "synapse-sticky cannot be loaded with this Synapse. All of it would be off, and nobody"
            f" would guard the sticky sections: {e}"
        )
        return report
    if problem := synapse.problem_of_version():
        report.stops.append(problem)
        return report
    configuration: Configuration | None = None
    if paths and (changes := misfits(seams_of(CHECK))):
        report.problems.append(
            f"the check cannot load the configuration with this Synapse: {'; '.join(changes)}"
        )
    elif paths:
        configuration = _configuration(paths, report)
        if configuration is None:
            return report
        if configuration.sticky is None:
            report.problems.append(
                "synapse_sticky.StickyEventsModule is not listed under `modules:`. No duty would"
                " run."
            )
    _decide(configuration, _columns(configuration, report), report)
    if configuration is not None and configuration.sticky is not None:
        report.problems += configuration.problems_of_tables(report.running())
        problems, remarks = elsewhere(paths)
        report.problems += problems
        report.remarks += remarks
    return report


def _configuration(paths: Sequence[str], report: Report) -> "Configuration | None":
    """The configuration; None if Synapse would not start with it."""
    from synapse_sticky.cli.synapse import Configuration

    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return Configuration(paths)
    except SystemExit as e:
        # Synapse has said why, as a program does whose arguments are wrong.
        said = [f"exit code {e.code}", *printed.getvalue().splitlines()]
        reason = e.code if isinstance(e.code, str) else said[-1].rpartition("error: ")[2]
    except Exception as e:
        reason = _said(e)
    finally:
        sys.stderr.write(printed.getvalue())
    stop = f"the configuration ({', '.join(paths)}) is wrong: {reason}"
    report.stops.append(" ".join(stop.split()))  # one line
    return None


def _said(e: BaseException) -> str:
    """The error and what caused it; where in the configuration it is, if that is known."""
    path = ".".join(getattr(e, "path", None) or ())
    said = f"{getattr(e, 'msg', e)}" + (f" (in {path})" if path else "")
    return f"{said}: {_said(e.__cause__)}" if e.__cause__ else said


def _columns(configuration: "Configuration | None", report: Report) -> "Columns | None":
    """The columns that the duties would find; None if they cannot be known."""
    from synapse_sticky.homeserver import database
    from synapse_sticky.homeserver.fitting import misfits

    changes = misfits(database.SEAMS)
    if not changes:
        if configuration is not None:
            _look_into_database(configuration, report)
            if not configuration.is_to_be_migrated:
                return configuration.columns
        try:
            return database.new_columns()
        except Exception as e:
            changes = [f"{type(e).__name__}: {e}"]
    report.problems.append(
        f"the check cannot look at the tables of this Synapse: {'; '.join(changes)}"
    )
    return None


def _look_into_database(configuration: "Configuration", report: Report) -> None:
    try:
        refusal = configuration.read_database()
    except Exception as e:
        report.stops.append(f"Synapse's database cannot be read: {type(e).__name__}: {e}")
        return
    if refusal:
        report.stops.append(refusal)
    by_new = (
        "What is said of the duties goes by the tables that this Synapse makes in a new SQLite"
        " database."
    )
    if configuration.problems:
        report.problems.append(
            "the check cannot know whether this Synapse has yet to migrate the database:"
            f" {'; '.join(configuration.problems)}. {by_new}"
        )
    elif configuration.is_to_be_migrated:
        report.remarks.append(
            f"Synapse has not made or migrated its tables in this database yet. {by_new}"
        )


def _decide(
    configuration: "Configuration | None", columns: "Columns | None", report: Report
) -> None:
    from synapse_sticky import plan
    from synapse_sticky.config import StickyConfig, Strict
    from synapse_sticky.duties import DUTIES, State, number_of_seams, shared_misfits
    from synapse_sticky.homeserver import database
    from synapse_sticky.homeserver.fitting import misfits
    from synapse_sticky.homeserver.seams import SeamMismatchError

    sticky = (configuration and configuration.sticky) or StickyConfig()
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
    report.access = (
        # Nothing is installed then, and so no guard.
        plan.Decision(State.UNFIT, misfits=problems) if problems else plan.decide_access(states)
    )
    states[plan.ACCESS] = report.access.state
    if configuration is not None and configuration.sticky is not None and not problems:
        places = configuration.places()
        report.processes = {
            place.name: [
                name for name in DUTIES if states[name] is State.ON and plan.is_done_in(name, place)
            ]
            for place in places
        }
        if not_given := configuration.not_given():
            report.remarks.append(
                f"the files of these processes were not given: {not_given}. What may run there is"
                " judged as if it ran."
            )
        else:
            report.idle = [
                name for name in states if not any(plan.is_done_in(name, place) for place in places)
            ]
    counted = {name: state for name, state in states.items() if name not in report.idle}
    lacks = {name: d.misfits for name, d in report.decisions().items() if name in counted}
    lacks[plan.TABLES] = misfits(database.SEAMS)
    if sticky.admin.enabled and (lacking := plan.misfits_of_admin(columns)):
        lacks[plan.API] = lacking
        report.problems.append(f"{plan.API} would be off: {'; '.join(lacking)}")
    if stopping := plan.that_stop(sticky.strict, counted, lacks):
        option = "strict: true" if sticky.strict is Strict.ALL else "strict: access"
        reason = SeamMismatchError(plan.by_name(stopping, lacks)).msg
        report.stops.append(f"`{option}` stops the start: {reason}")
    try:
        report.seams = number_of_seams()
    except Exception:
        report.seams = None  # a file of a duty cannot be loaded, which its line says
