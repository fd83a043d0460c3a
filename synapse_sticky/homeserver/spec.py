"""Names of the Matrix specification, and of proposals, as events have them: no seams.

What MSC4354 names is not among them. Synapse's own constants say that, so that stable names will
follow by themselves.
"""

MEMBER, CREATE = "m.room.member", "m.room.create"
POWER_LEVELS, SERVER_ACL = "m.room.power_levels", "m.room.server_acl"
"""Types of state events."""

JOIN, LEAVE = "join", "leave"
"""Values of ``membership``."""

IGNORED_USER_LIST = "m.ignored_user_list"
"""The type of the account data that says whom a user ignores."""

RETENTION = "m.room.retention"
"""The type of the state event with a room's retention policy (MSC1763)."""

LABELS = "org.matrix.labels"
"""The field of a content with the labels of an event (MSC2326)."""

DUMMY = "org.matrix.dummy_event"
"""The type of the events with which Synapse merges forward extremities."""

LONGEST_NAME = 255
"""Characters. Synapse persists no event of which an ID, the type or the state key is longer. In the
first two room versions a PDU brings its ID along, and it is staged before anybody looks at that."""
