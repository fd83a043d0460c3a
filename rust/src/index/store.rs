//! The memory of the index for its rows and names. It is compact and grows in small steps.
//!
//! There is no `HashMap` here: one with a million entries pauses for tens of milliseconds when it doubles. A B-tree of
//! short hashes grows node by node and is smaller.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};

/// Slots per chunk. A new chunk is the largest single allocation.
const CHUNK: usize = 512;

/// Values by `u32` number, in chunks that never move. The slab reuses a number once it is free.
#[derive(Debug)]
pub(super) struct Slab<T> {
    chunks: Vec<Vec<Option<T>>>,
    free: Vec<u32>,
    len: usize,
}

impl<T> Slab<T> {
    pub(super) const fn new() -> Self {
        Self {
            chunks: Vec::new(),
            free: Vec::new(),
            len: 0,
        }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Whether every number is taken.
    pub(super) const fn is_full(&self) -> bool {
        self.len >= u32::MAX as usize
    }

    /// The caller has checked that the slab is not full.
    pub(super) fn add(&mut self, value: T) -> u32 {
        self.len += 1;
        if let Some(number) = self.free.pop() {
            *self.slot(number) = Some(value);
            return number;
        }
        if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        let full_chunks = self.chunks.len() - 1;
        let last = &mut self.chunks[full_chunks];
        last.push(Some(value));
        u32::try_from(full_chunks * CHUNK + last.len() - 1).expect("the caller checked is_full()")
    }

    pub(super) fn get(&self, number: u32) -> &T {
        let number = number as usize;
        self.chunks[number / CHUNK][number % CHUNK]
            .as_ref()
            .expect("only numbers in use are looked up")
    }

    pub(super) fn get_mut(&mut self, number: u32) -> &mut T {
        self.slot(number)
            .as_mut()
            .expect("only numbers in use are looked up")
    }

    pub(super) fn remove(&mut self, number: u32) -> T {
        let value = self
            .slot(number)
            .take()
            .expect("only numbers in use are removed");
        self.len -= 1;
        self.free.push(number);
        if self.len == 0 {
            // The flood is over: give the memory back.
            *self = Self::new();
        }
        value
    }

    fn slot(&mut self, number: u32) -> &mut Option<T> {
        let number = number as usize;
        &mut self.chunks[number / CHUNK][number % CHUNK]
    }
}

/// The longest event ID that an [`EventId`] of 48 bytes holds in place. Event IDs of room version 3 and later have 44
/// bytes.
const SHORT: usize = 46;

/// An event ID. A short one is held in place: it needs no allocation and no pointer to follow.
#[derive(Debug)]
pub(super) enum EventId {
    Short { len: u8, bytes: [u8; SHORT] },
    Long(Box<str>),
}

impl EventId {
    pub(super) fn as_str(&self) -> &str {
        match self {
            Self::Short { len, bytes } => {
                std::str::from_utf8(&bytes[..usize::from(*len)]).expect("it was made from a str")
            }
            Self::Long(event_id) => event_id,
        }
    }
}

impl From<&str> for EventId {
    fn from(event_id: &str) -> Self {
        let mut bytes = [0; SHORT];
        match (
            u8::try_from(event_id.len()),
            bytes.get_mut(..event_id.len()),
        ) {
            (Ok(len), Some(start)) => {
                start.copy_from_slice(event_id.as_bytes());
                Self::Short { len, bytes }
            }
            _ => Self::Long(event_id.into()),
        }
    }
}

/// Numbers by name. An entry has eight bytes: a short hash and the number. The names themselves are stored elsewhere.
///
/// The hash has a random key, so nobody can choose names that collide. A few collide by chance; a look at the name
/// tells them apart.
#[derive(Debug, Default)]
pub(super) struct Names {
    hasher: RandomState,
    entries: BTreeSet<u64>,
}

impl Names {
    /// The number of `name`. `name_of` gives the name of a number.
    pub(super) fn find<'a>(&self, name: &str, name_of: impl Fn(u32) -> &'a str) -> Option<u32> {
        let first = self.entry(name, 0);
        self.entries
            .range(first..=first | u64::from(u32::MAX))
            .map(|entry| *entry as u32)
            .find(|number| name_of(*number) == name)
    }

    pub(super) fn add(&mut self, name: &str, number: u32) {
        self.entries.insert(self.entry(name, number));
    }

    pub(super) fn remove(&mut self, name: &str, number: u32) {
        self.entries.remove(&self.entry(name, number));
    }

    /// Upper half: the hash's lower half. Lower half: the number.
    fn entry(&self, name: &str, number: u32) -> u64 {
        self.hasher.hash_one(name) << 32 | u64::from(number)
    }
}

/// A name and how many rows use it.
#[derive(Debug)]
struct Interned {
    name: Box<str>,
    uses: u32,
}

/// Numbered names, each stored once. The interner forgets a name together with the last row that uses it. So it never
/// has more names than the index has rows, whatever names a sender makes up.
#[derive(Debug)]
pub(super) struct Interner {
    names: Names,
    slots: Slab<Interned>,
}

impl Interner {
    pub(super) fn new() -> Self {
        Self {
            names: Names::default(),
            slots: Slab::new(),
        }
    }

    pub(super) fn find(&self, name: &str) -> Option<u32> {
        self.names.find(name, |number| self.get(number))
    }

    pub(super) fn get(&self, number: u32) -> &str {
        &self.slots.get(number).name
    }

    /// The number of `name`, which one more row uses now.
    pub(super) fn acquire(&mut self, name: &str) -> u32 {
        if let Some(number) = self.find(name) {
            self.slots.get_mut(number).uses += 1;
            return number;
        }
        let number = self.slots.add(Interned {
            name: name.into(),
            uses: 1,
        });
        self.names.add(name, number);
        number
    }

    /// One row fewer uses the name of this number.
    pub(super) fn release(&mut self, number: u32) {
        let slot = self.slots.get_mut(number);
        slot.uses -= 1;
        if slot.uses == 0 {
            let name = self.slots.remove(number).name;
            self.names.remove(&name, number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_used_again() {
        let mut slab = Slab::new();
        let first = slab.add('a');
        let second = slab.add('b');
        assert_eq!(slab.remove(first), 'a');
        assert_eq!(slab.add('c'), first);
        assert_eq!((*slab.get(second), slab.len()), ('b', 2));
    }

    #[test]
    fn a_slab_has_as_many_chunks_as_it_needs_and_gives_them_back() {
        let mut slab = Slab::new();
        let numbers: Vec<u32> = (0..=CHUNK).map(|value| slab.add(value)).collect();
        assert_eq!(slab.chunks.len(), 2);
        assert_eq!(*slab.get(numbers[CHUNK]), CHUNK);
        for number in numbers {
            slab.remove(number);
        }
        assert_eq!((slab.chunks.len(), slab.free.len()), (0, 0));
    }

    #[test]
    fn an_event_id_of_any_length_is_kept_as_it_is() {
        for length in [0, 1, SHORT - 1, SHORT, SHORT + 1, 255, 256, 70_000] {
            let event_id = "é".repeat(length / 2) + &"$".repeat(length % 2);
            assert_eq!(event_id.len(), length);
            assert_eq!(EventId::from(event_id.as_str()).as_str(), event_id);
        }
        assert_eq!(size_of::<EventId>(), SHORT + 2);
    }

    #[test]
    fn a_name_is_kept_once_and_forgotten_with_its_last_use() {
        let mut interner = Interner::new();
        let number = interner.acquire("a");
        assert_eq!(interner.acquire("a"), number);
        assert_ne!(interner.acquire("b"), number);
        interner.release(number);
        assert_eq!(interner.find("a"), Some(number));
        interner.release(number);
        assert_eq!(interner.find("a"), None);
        assert_eq!((interner.slots.len(), interner.names.entries.len()), (1, 1));
    }

    #[test]
    fn names_whose_hashes_collide_are_told_apart() {
        let names = ["a", "b"];
        let mut index = Names::default();
        index.add("a", 0);
        // As if "b" had the hash of "a".
        index.entries.insert(index.entry("a", 1));
        assert_eq!(index.find("a", |number| names[number as usize]), Some(0));
        index.remove("a", 0);
        assert_eq!(index.find("a", |number| names[number as usize]), None);
    }
}
