"""Joins: a server that newly joins a room is pushed this server's own sticky events of it.

- ``handler`` puts everything together. Begin there.
- ``detection`` finds newcomers in the state changes: ``reader`` reads on and stores them,
  ``synapse`` queries Synapse's tables.
- ``newcomers`` begins a push for each newcomer. ``earlier`` remembers what a newcomer got before,
  and ``watch_quota`` limits how many newcomers of a room are watched.
- ``push`` is the state of one push. ``confirmable`` is its part about confirmation, ``sent`` is one
  event of it, and ``finished`` is the events that it is done with.
- ``destinations`` says which push of a destination has its turn, and when a failed one is tried
  again. ``destination`` is the state of one destination. ``due`` sorts times.
- ``rooms`` has a push take in the own events of its room from the index. ``grace`` delays that for
  new events. ``purged`` forgets the newcomers of purged rooms.
- ``confirmation`` asks newcomers whether they have what they acknowledged.
- ``tables`` has the rows and their layout.
- ``federation`` is what all this needs of Synapse's sending; ``synapse`` implements it.
"""
