"""The design's boundaries, read off the source: who imports what, and who touches what is private.

Each check is a function from a file's source to its findings. It is shown to find what it must
on small pieces of bad source, and then to find nothing in the project.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from synapse_sticky.config import DUTIES

ROOT = Path(__file__).parents[2]
PACKAGE = "synapse_sticky"

SYNAPSE_ALLOWED = {
    "synapse.module_api": "the stable interface to modules",
    "synapse.module_api.errors": "the errors that are part of it",
    "synapse.module_api.callbacks.federation": "what one of its callbacks is called with",
}

# Every part of the package, and the parts that it may import. A new part needs its line here, but
# for a duty, which may import what each duty may, and its own folder.
OF_A_DUTY = {
    *("_core", "apart", "backoff", "config", "homeserver", "logs", "index", "limits", "metrics"),
    *("orders", "renewal"),
}
MAY_IMPORT = {
    "__init__": {"module"},
    "module": {"config", "metrics", "wiring"},
    "wiring": {
        *("config", "duties", "homeserver", "index", "installer", "loading", "metrics", "plan"),
    },
    "installer": {
        *("admin", "config", "handlers", "homeserver", "index", "lately", "limits", "loading"),
        "orders",
    },
    # It knows no duty: the installer gives it what reads their tables.
    "admin": {"_core", "backoff", "config", "homeserver", "lately", "limits", "logs", "orders"},
    "lately": set[str](),
    "orders": set[str](),
    "loading": {"backoff", "duties", "homeserver"},
    "plan": {"config", "duties", "homeserver"},
    "cli": {
        *("_core", "admin", "config", "duties", "handlers", "homeserver", "limits", "metrics"),
        *("__init__", "index", "module", "options", "plan", "versions"),
    },
    "__main__": {"cli"},
    "duties": {"homeserver"},
    "handlers": OF_A_DUTY,
    "limits": {"_core", "config", "lately", "logs", "metrics", "orders"},
    "metrics": set[str](),
    "index": {"_core", "backoff", "homeserver", "logs", "renewal"},
    "renewal": {"_core", "backoff", "homeserver", "logs"},
    "apart": {"backoff", "homeserver", "logs"},
    "homeserver": {"logs", "metrics", "versions"},
    "logs": set[str](),
    "backoff": set[str](),
    "config": {"options"},
    "options": set[str](),
    "versions": set[str](),
}

LONGEST_FILE = 350

# The only file that imports by a computed name: its duties' own files.
IMPORTS_BY_NAME = "synapse_sticky/duties.py"

# What waits, by any of its names.
TIMERS = {
    *("call_later", "callLater", "delayed_background_call", "looping_call", "LoopingCall"),
    *("sleep", "sleep_ms", "Timer"),
}
# Where something waits in its own way, and why. All else uses backoff.py.
WAIT_BY_THEMSELVES = {
    "synapse_sticky/cli/api/watch.py": "it is a program of its own, without a reactor",
    "synapse_sticky/cli/drain.py": "it is a program of its own, without a reactor",
    "synapse_sticky/handlers/joins/confirmation/questions.py": "each destination has its own time",
    "synapse_sticky/handlers/joins/destinations.py": "the time is the earliest of many pushes",
    "synapse_sticky/handlers/staging/parking/trying.py": "each parked PDU has its own time",
}

# File and function that may sleep.
MAY_SLEEP = ("tests/lab/wait.py", "wait_until")


def part_of(path: str) -> str:
    """``synapse_sticky/handlers/joins/push.py`` belongs to ``handlers``."""
    return Path(path).parts[1].removesuffix(".py")


def duty_of(path: str) -> str | None:
    """``synapse_sticky/handlers/joins/push.py`` is of ``joins``; None if it is of no duty."""
    parts = Path(path).parts
    return parts[2] if parts[1] == "handlers" and len(parts) > 3 else None


def may_touch_synapse(path: str) -> bool:
    """Only files named ``synapse.py``, and what all duties share."""
    return Path(path).name == "synapse.py" or part_of(path) == "homeserver"


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """Line, absolute module name and the names taken from it (none for a plain ``import``)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, []
        elif isinstance(node, ast.ImportFrom):
            package = Path(path).parent.parts
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield node.lineno, module, [alias.name for alias in node.names]


def directions(path: str, source: str) -> Iterator[str]:
    """Imports of this package that do not point the one way."""
    part = part_of(path)
    if part not in MAY_IMPORT:
        yield f"{path}: '{part}' has no line in MAY_IMPORT"
        return
    for line, module, names in imports(path, ast.parse(source)):
        if module.split(".")[0] != PACKAGE:
            continue
        if part == "handlers" and is_of_another_duty(path, module, names):
            yield f"{path}:{line}: a duty may not import another's {module}"
            continue
        if module != PACKAGE:
            targets = [module.split(".")[1]]
        else:
            # `from synapse_sticky import x`: a part, or something of the package's own file.
            known = {*MAY_IMPORT, "_core"}
            targets = [name if name in known else "__init__" for name in names or ["__init__"]]
        for target in targets:
            if target not in {*MAY_IMPORT[part], part}:
                yield f"{path}:{line}: {part} may not import {target}"


def is_of_another_duty(path: str, module: str, names: list[str]) -> bool:
    """``synapse_sticky.handlers.joins.push`` is, for all files but those of ``joins``."""
    parts = module.split(".")
    if parts[1:2] == ["handlers"]:
        return {parts[2]} != {duty_of(path)} if len(parts) > 2 else True
    return module == PACKAGE and "handlers" in names


def private_parts(path: str, source: str) -> Iterator[str]:
    """What few files may do: import Synapse's inside, touch what is private to others."""
    if may_touch_synapse(path):
        return
    tree = ast.parse(source)
    for line, module, names in imports(path, tree):
        if module.split(".")[0] == "synapse" and module not in SYNAPSE_ALLOWED:
            yield f"{path}:{line}: imports {module}"
        for name in names:
            if is_private(name) and name != "_core":
                yield f"{path}:{line}: imports the private {module}.{name}"
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name) if is_private(name):
                yield f"{path}:{node.lineno}: touches the private {ast.unparse(node)}"
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ) if is_private(name):
                yield f"{path}:{node.lineno}: touches the private {ast.unparse(node)}"
            case ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"):
                if path == IMPORTS_BY_NAME:
                    continue
                yield f"{path}:{node.lineno}: imports by a computed name"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def sleeps(path: str, source: str) -> Iterator[str]:
    """Uses of any ``sleep`` but the one wait helper's: a test waits for a condition, not a time."""
    tree = ast.parse(source)
    allowed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (path, node.name) == MAY_SLEEP
        for inner in ast.walk(node)
    }
    for line, module, names in imports(path, tree):
        if "sleep" in names:
            yield f"{path}:{line}: imports {module}.sleep"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "sleep" and id(node) not in allowed:
            yield f"{path}:{node.lineno}: sleeps"


def timers(path: str, source: str) -> Iterator[str]:
    """What waits or sets a timer outside of the one way to try again (H2)."""
    if part_of(path) in ("backoff", "homeserver"):
        return
    tree = ast.parse(source)
    for line, module, names in imports(path, tree):
        for name in names:
            if name in TIMERS:
                yield f"{path}:{line}: imports {module}.{name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in TIMERS:
            yield f"{path}:{node.lineno}: waits by {ast.unparse(node)}"


def sources(folder: str) -> list[str]:
    paths = sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))
    assert paths, f"no sources in {folder}"
    return paths


@pytest.mark.parametrize("path", sources(PACKAGE))
def test_dependencies_point_one_way(path: str) -> None:
    assert list(directions(path, (ROOT / path).read_text())) == []


@pytest.mark.parametrize("path", sources(PACKAGE))
def test_few_files_touch_private_parts(path: str) -> None:
    assert list(private_parts(path, (ROOT / path).read_text())) == []


@pytest.mark.requirement("H2")
@pytest.mark.parametrize("path", sources(PACKAGE))
def test_nobody_waits_by_themselves(path: str) -> None:
    found = list(timers(path, (ROOT / path).read_text()))
    assert bool(found) == (path in WAIT_BY_THEMSELVES), found


@pytest.mark.parametrize("path", sources(PACKAGE))
def test_no_file_is_too_long(path: str) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= LONGEST_FILE


def test_handlers_are_duties_and_nothing_else() -> None:
    found = {p.name for p in (ROOT / PACKAGE / "handlers").iterdir() if p.name[:2] != "__"}
    # Pruning and parking share the staging area.
    folders = {"staging" if duty in ("pruning", "parking") else duty for duty in DUTIES}
    assert found == folders - {"index"}


@pytest.mark.parametrize("path", sources("tests"))
def test_no_test_sleeps(path: str) -> None:
    assert list(sleeps(path, (ROOT / path).read_text())) == []


def test_no_part_depends_on_itself_through_others() -> None:
    def reach(part: str, seen: frozenset[str]) -> None:
        assert part not in seen, f"{part} is in a circle with {sorted(seen - {part})}"
        for target in MAY_IMPORT.get(part, set()) - {part}:
            reach(target, seen | {part})

    for part in MAY_IMPORT:
        reach(part, frozenset())


HANDLER = "synapse_sticky/handlers/joins/handler.py"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (HANDLER, "import synapse_sticky.handlers"),
        (HANDLER, "from synapse_sticky.handlers.staging.parking.handler import ParkingHandler"),
        (HANDLER, "from synapse_sticky.handlers.staging import synapse"),
        (HANDLER, "from synapse_sticky.handlers import staging"),
        (HANDLER, "from synapse_sticky import config, handlers"),
        (HANDLER, "from ..staging import tables"),
        (HANDLER, "from .. import staging"),
        (HANDLER, "from synapse_sticky import StickyEventsModule"),
        (HANDLER, "import synapse_sticky"),
        (HANDLER, "from ... import module"),
        (HANDLER, "from synapse_sticky.module import StickyEventsModule"),
        (HANDLER, "def late():\n    from synapse_sticky.module import StickyEventsModule"),
        ("synapse_sticky/index/follower.py", "from synapse_sticky.handlers.joins import tables"),
        ("synapse_sticky/index/synapse.py", "from ..handlers.joins import synapse"),
        ("synapse_sticky/homeserver/rooms.py", "from synapse_sticky.index import Position"),
        ("synapse_sticky/homeserver/rooms.py", "from synapse_sticky.handlers import joins"),
        ("synapse_sticky/config.py", "from synapse_sticky.handlers import joins"),
        ("synapse_sticky/backoff.py", "from synapse_sticky.homeserver import Homeserver"),
        ("synapse_sticky/limits.py", "from synapse_sticky.handlers.receipt import handler"),
        ("synapse_sticky/brand_new.py", ""),
    ],
)
def test_a_wrong_direction_is_found(path: str, source: str) -> None:
    assert len(list(directions(path, source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import synapse",
        "import synapse.server",
        "from synapse import server",
        "from synapse.config._base import Config",
        "from synapse.types import UserID",
        "def late():\n    import synapse.storage",
        "import importlib\nimportlib.import_module('synapse.' + 'server')",
        "__import__('synapse.server')",
        "api._hs",
        "self.api._hs",
        "api._hs = None",
        "getattr(api, '_hs')",
        "setattr(api, '_hs', None)",
        "from synapse.module_api import _secret",
    ],
)
def test_a_touch_of_private_parts_is_found(source: str) -> None:
    for path in (HANDLER, "synapse_sticky/module.py", "synapse_sticky/config.py"):
        assert len(list(private_parts(path, source))) == 1
    for path in ("synapse_sticky/handlers/joins/synapse.py", "synapse_sticky/homeserver/rooms.py"):
        assert list(private_parts(path, source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "from synapse.module_api import ModuleApi",
        "from synapse.module_api.errors import ConfigError",
        "from synapse_sticky import _core",
        "from synapse_sticky.handlers.joins.push import Push",
        "self._api = cls._api",
        "api.__class__.__name__",
        "getattr(api, 'public')",
    ],
)
def test_what_is_allowed_is_not_found(source: str) -> None:
    assert list(private_parts(HANDLER, source)) == []
    assert list(directions(HANDLER, source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "self._homeserver.call_later(5, 'again', self._again)",
        "async def f():\n    await homeserver.sleep_ms(5)",
        "reactor.callLater(5, f)",
        "api.delayed_background_call(5, f)",
        "clock.looping_call(f, 5)",
        "import time\ntime.sleep(5)",
        "from time import sleep",
        "from threading import Timer",
        "later = homeserver.call_later",
    ],
)
def test_a_timer_is_found(source: str) -> None:
    for path in (HANDLER, "synapse_sticky/handlers/joins/synapse.py", "synapse_sticky/wiring.py"):
        assert len(list(timers(path, source))) == 1
    for path in ("synapse_sticky/backoff.py", "synapse_sticky/homeserver/signal.py"):
        assert list(timers(path, source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.sleep(1)",
        "import time as t\ndef wait_until():\n    t.sleep(1)",
        "import asyncio\nasync def f():\n    await asyncio.sleep(1)",
        "from time import sleep",
        "from time import sleep as pause",
        "import time\nwaste = time.sleep",
    ],
)
def test_a_sleep_is_found(source: str) -> None:
    assert len(list(sleeps("tests/unit/test_x.py", source))) == 1


def test_only_the_wait_helper_may_sleep() -> None:
    source = "import time\ndef {}():\n    time.sleep(1)"
    assert list(sleeps("tests/lab/wait.py", source.format("wait_until"))) == []
    assert len(list(sleeps("tests/lab/wait.py", source.format("wait_a_bit")))) == 1
