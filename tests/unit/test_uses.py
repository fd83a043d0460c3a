"""No private part of Synapse is used that is not declared for the file that uses it (H5)."""

import ast
import re

import pytest

from synapse_sticky.duties import all_seams as declared
from synapse_sticky.duties import number_of_seams
from synapse_sticky.homeserver.seams import (
    Attribute,
    Import,
    attributes,
    imports_in,
    method,
    table,
)
from tests.unit.test_boundaries import ROOT
from tests.unit.uses import Allowed, allowed, sources_of_synapse, undeclared

MOST_SEAMS = 281


@pytest.mark.parametrize("path", sources_of_synapse())
def test_every_use_of_synapse_is_declared(path: str) -> None:
    assert undeclared((ROOT / path).read_text(), allowed(path)) == []


IMPORTS = """
from synapse import visibility
from synapse.api.constants import EventTypes
from synapse.types import Token
import synapse.events
"""
ALLOWED = Allowed(
    (
        method("synapse.store.Store", "get_rows(room_id, /, *, limit)"),
        method("synapse.store.Store", "replaced(one, *, two)", is_replaced=True),
        method("synapse.visibility", "filter_events(events, /)"),
        Attribute("synapse.store.Store", "engine"),
        *attributes("synapse.types.Token", "stream", "DECLARED"),
        table("events", "event_id text"),
    ),
    frozenset({"of_this_file"}),
)


def found(lines: str) -> list[str]:
    """The kinds of use that are found in a function of these lines."""
    body = "".join(f"    {line}\n" for line in lines.splitlines())
    source = f"{IMPORTS}\ndef function(hs, store, txn, original):\n{body}"
    return [use.kind for use in undeclared(source, ALLOWED)]


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        # It may be declared, but for another file.
        ("attribute", "store.get_notifier()"),
        ("attribute", "hs.federation = 5"),
        ("attribute", "store.engine.module_of_it"),
        ("name", "getattr(store, 'hidden')"),
        ("name", "setattr(store, 'hidden', 5)"),
        ("name", "hs.replace(store, 'hidden', len)"),
        ("table", "txn.execute('SELECT 1 FROM presence_stream')"),
        ("table", "txn.execute('DELETE FROM e2e_room_keys WHERE room_id = ?')"),
        ("call", "store.get_rows('!room', limit=5, order='asc')"),
        ("call", "store.get_rows(room_id='!room')"),
        ("call", "store.get_rows('!room', 5)"),
        ("call", "visibility.filter_events([], redact=True)"),
        ("import", "visibility.filter_others"),
        ("import", "visibility.filter_others([])"),
        ("import", "EventTypes.Member"),
        ("import", "synapse.events.utils"),
        ("import", "Token.UNDECLARED"),
        ("import", "Token(stream=5, undeclared=5)"),
        # That the file is loaded does not say that a function of it can be.
        ("import", "from synapse.types import Undeclared"),
        ("original", "def replaced(one, *args, **options):\n    original(one, three=5)"),
        ("original", "def replaced(one, *args, two):\n    original(one, two, *args)"),
    ],
)
def test_an_undeclared_use_is_found(kind: str, lines: str) -> None:
    assert found(lines) == [kind]


@pytest.mark.parametrize(
    "lines",
    [
        "store.get_rows('!room', limit=5)",
        "store.get_rows(*[], **{})",
        "store.engine.of_this_file()",
        "getattr(store, 'engine')",
        "getattr(store, 'hidden', None)",
        "setattr(store, '_synapse_sticky_entry', 5)",
        "hs.replace(store, 'replaced', len)",
        "visibility.filter_events([])",
        "Token(stream=5).stream",
        "Token.DECLARED",
        "from synapse.types import Token",
        "from synapse.visibility import filter_events",
        "from synapse.module_api import Requester",
        "txn.execute('SELECT 1 FROM events')",
        "txn.execute('SELECT 1 FROM synapse_sticky_pages')",
        "def replaced(one, *args, two, **options):\n    original(one, *args, two=two, **options)",
    ],
)
def test_a_declared_use_is_not(lines: str) -> None:
    assert found(lines) == []


def test_what_is_read_when_the_file_is_loaded_need_not_be_declared() -> None:
    """Whatever of it is gone, the file is, and that is found."""
    source = f"{IMPORTS}FIELD = EventTypes.Member\n"
    assert undeclared(source, ALLOWED) == []


def test_what_is_declared_for_another_file_is_not_for_this_one() -> None:
    receipt, sliding = (
        allowed(f"synapse_sticky/handlers/{duty}/synapse.py") for duty in ("receipt", "sliding")
    )
    source = "def function(store):\n    store.get_received_txn_response('id', 'origin')"
    assert undeclared(source, receipt) == []
    (use,) = undeclared(source, sliding)
    assert (use.kind, use.what) == ("attribute", "store.get_received_txn_response")


def test_every_declaration_is_used() -> None:
    texts = " ".join((ROOT / path).read_text() for path in sources_of_synapse())
    for seam in declared():
        used = len(re.findall(rf"\b{re.escape(seam.name)}\b", texts))
        assert used >= 2, f"{seam} is declared and nowhere used"


def test_every_import_is_found() -> None:
    """Also one of a file that no duty names: it is declared by nobody then. What a function imports
    is a use of it like any other."""
    declared_imports = {seam for seam in declared() if isinstance(seam, Import)}
    for path in sources_of_synapse():
        found = set(imports_in(ast.parse((ROOT / path).read_text())))
        assert found <= declared_imports, path
    source = (
        "if TYPE_CHECKING:\n    import synapse.a\ntry:\n    from synapse.b import c, d\n"
        "finally:\n    pass\ndef f():\n    from synapse.e import f"
    )
    assert set(imports_in(ast.parse(source))) == {
        Import("synapse.b", "c"),
        Import("synapse.b", "d"),
    }


def test_their_number_does_not_grow_by_itself() -> None:
    """Each private part of Synapse that is imported, called, read or replaced, and each table."""
    assert number_of_seams() <= MOST_SEAMS, "\n".join(sorted({str(s) for s in declared()}))
