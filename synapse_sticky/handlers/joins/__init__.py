"""Joins: a server that newly joins a room is pushed this server's own sticky events of it.

- ``handler`` puts everything together. Begin there.
- ``detection`` finds newcomers in the state changes: ``reader`` reads on and stores them,
  ``synapse`` queries Synapse's tables.
- ``newcomers`` begins a push for each newcomer. ``earlier`` remembers what a newcomer got before,
  and ``watch_quota`` limits how many newcomers of a room are watched.
- ``push`` is the state of one push. ``confirmable`` is its part about what the newcomer
  answers, ``sent`` is one event of it, and ``finished`` is the events that it is done with.
- ``destinations`` says which push of a destination has its turn, and when a failed one is tried
  again. ``destination`` is the state of one destination. ``due`` sorts times.
- ``rooms`` has a push take in the own events of its room from the index. ``grace`` delays that for
  new events. ``purged`` forgets the newcomers of purged rooms.
- ``ending`` ends a push, or holds it while an ACL denies one of the two servers. ``reopening``
  sends on what was held once the room's state allows it.
- ``refusals`` makes pushes of what other servers answer with an error. ``reached`` sends on what
  waits for a destination once it can be reached again. ``whitelist`` finds the servers that the
  federation whitelist allows since this start.
- ``confirmation`` asks newcomers whether they have what they acknowledged.
- ``tables`` has the rows and their layout.
- ``federation`` is what all this needs of Synapse's sending; ``synapse`` implements it, and
  ``backlog`` its part about Synapse's backlog.
"""
