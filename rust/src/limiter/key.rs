//! What the limits are on, and whose buckets there are.

/// What a limit is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// One server, in all rooms together.
    Server,
    /// One server in one room.
    ServerInRoom,
    /// One user in one room.
    Sender,
    /// All other servers together in one room.
    Room,
    /// One user of this server, in all rooms together.
    User,
}

impl Scope {
    /// All scopes.
    pub const ALL: [Self; 5] = [
        Self::Server,
        Self::ServerInRoom,
        Self::Sender,
        Self::Room,
        Self::User,
    ];

    /// The name of the option that sets the limit.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Server => "per_server",
            Self::ServerInRoom => "per_server_in_room",
            Self::Sender => "per_sender",
            Self::Room => "per_room",
            Self::User => "per_user",
        }
    }
}

/// Identifies a bucket: a scope and its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key<'a> {
    /// A server's name.
    Server(&'a str),
    /// A server's name and a room ID.
    ServerInRoom(&'a str, &'a str),
    /// A user ID and a room ID.
    Sender(&'a str, &'a str),
    /// A room ID.
    Room(&'a str),
    /// A user ID.
    User(&'a str),
}

impl<'a> Key<'a> {
    /// The scope of the limit that applies.
    #[must_use]
    pub const fn scope(&self) -> Scope {
        match self {
            Self::Server(_) => Scope::Server,
            Self::ServerInRoom(..) => Scope::ServerInRoom,
            Self::Sender(..) => Scope::Sender,
            Self::Room(_) => Scope::Room,
            Self::User(_) => Scope::User,
        }
    }

    /// The four buckets that an event of another server is charged to.
    #[must_use]
    pub const fn of_event(server: &'a str, room_id: &'a str, sender: &'a str) -> [Self; 4] {
        [
            Self::Server(server),
            Self::ServerInRoom(server, room_id),
            Self::Sender(sender, room_id),
            Self::Room(room_id),
        ]
    }

    /// A string that no other key has. The length of the first name says where that name ends, whatever characters the
    /// names contain.
    pub(super) fn stored(&self) -> String {
        let (first, second) = match *self {
            Self::Server(first) | Self::Room(first) | Self::User(first) => (first, ""),
            Self::ServerInRoom(first, second) | Self::Sender(first, second) => (first, second),
        };
        format!("{}\0{}\0{first}{second}", self.scope() as u8, first.len())
    }
}
