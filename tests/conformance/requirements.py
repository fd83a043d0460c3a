"""The requirements of MSC4354, by the IDs that the tests name."""

REQUIREMENTS = {
    "S1": (
        "An event is sticky if its `msc4354_sticky` is an object with an integer `duration_ms` from"
        " 0 to an hour; a longer one counts as an hour"
    ),
    "S2": (
        "It is sticky from when it was sent or first received, whichever is earlier: neither a time"
        " in the future nor waiting for other events prolongs it; where the server enforces a"
        " room's retention, it is not sticky for longer than that"
    ),
    "S3": (
        "Clients send one by a parameter of PUT /send, also as a delayed event; an option allows"
        " PUT /state too, as the first drafts did"
    ),
    "S4": (
        "`unsigned.msc4354_sticky_duration_ttl_ms` says how long it still is; it is absent once the"
        " event has expired"
    ),
    "S5": (
        "A redacted event is not sticky any more, whichever of the two came first, also where a ban"
        " redacts all of a user's events"
    ),
    "S6": "An event that a spam checker or policy server refuses is not sticky",
    "S7": "`/versions` names the feature",
    "P1": "Own sticky events are sent to every server in the room",
    "P2": "However many events wait for a server, the sticky ones reach it after an outage",
    "P3": "A server that joins is sent all unexpired sticky events of those in the room",
    "P4": "Each server sends its own users' sticky events only",
    "P5": "Own sticky events are sent in the order in which they were made",
    "P6": "Catch-up leaves out the sticky events of an erased user",
    "P7": "An event is sent until the other server has acknowledged it by its ID",
    "D1": "/sync has a section of sticky events, whatever the limit of the timeline",
    "D2": "Sliding sync has one too, with a position of its own, for more rooms than those shown",
    "D3": "What is in a response's timeline is not in its sticky section",
    "D4": (
        "Each sticky event comes once, also to a new connection of sliding sync that goes on from"
        " `since`; what one response has no room for comes in the next ones. To who arrives late,"
        " the newest of each key may come first, and once more with the rest"
    ),
    "D5": "A user who joins gets all unexpired sticky events of the room",
    "D6": "Sticky events of ignored users are left out, until they are not ignored any more",
    "D7": "A flood of one user or server does not delay the sticky events of others",
    "D8": (
        "The sticky sections, and what C1 shows elsewhere, are for users who are joined to the room"
        " at that moment; for others Synapse's ordinary rules hold on every other endpoint"
    ),
    "D9": "Sticky events in the timeline say how long they still are, too",
    "C1": (
        "For joined users and servers history visibility does not hide unexpired sticky events,"
        " on any endpoint that could show them, nor in what is sent to servers that join"
    ),
    "C2": "Soft-failed sticky events are checked again when the room's state changes",
    "C3": "Apart from that, sticky events are authorised as all events are",
    "L1": "Sticky events of other servers are rate limited",
    "L2": "An option refuses those past a limit: nothing is persisted, and the sender tries again",
    "L3": (
        "No sticky event is dropped once it is acknowledged, also if what it refers to is not to be"
        " had for a while"
    ),
    "L4": "The default defers them: they are persisted now, and delivered before they expire",
    "L5": "An event that comes through a third server is charged to its sender's server",
    "L6": "Nobody can use up another's allowance by claiming its name",
    "L7": "The start of a large call passes, as do servers that are exempt",
    "F1": "Sticky events on top of events that the server does not know are accepted",
    "F2": "The forward extremities that sticky events leave are merged within a minute",
    "F3": (
        "A sticky event that arrives while its receiver is still joining is not lost, even if the"
        " receiver has never been in the room"
    ),
    "E1": "A local user who floods is told to wait (429, `retry_after_ms`)",
    "E2": "All of it works with Postgres as with SQLite",
    "E3": "The operator sees what is deferred, refused and released, and by which limit",
    "E4": "Killing the server at any time loses nothing",
    "H1": "What cannot be done costs only itself: nothing else waits for it",
    "H2": "Trying again is bounded in number, whatever else happens meanwhile",
    "H3": "What others can multiply is bounded, and what was done once is not done again",
    "H4": "Other servers are asked within the limits that they have by default",
    "H5": (
        "If a Synapse does not fit a duty, that duty is off and the metric says so; what Synapse"
        " does itself is left to it"
    ),
    "H6": "Each duty can be switched off, and limits can be observed without being applied",
    "H7": "What was held back arrives once the cause has ended",
}
"""A sentence for each ID."""
