//! A hash table from pieces to numbers, for the two hot loops: counting pieces and looking up their ids.
//!
//! Nine pieces in ten are shorter than 16 bytes. Such a piece is its own key: 15 bytes and a length make two machine
//! words, so that a look-up compares registers and follows no pointer. Longer pieces go to an ordinary map, which
//! owns a copy of a piece only once it has seen it. In front of the table stands a small one of the latest pieces.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

/// The longest piece that is its own key.
const SHORT: usize = 15;

/// Multiply, and fold the high half of the product into the low one: every bit of the key reaches every bit.
#[inline(always)]
fn mix(left: u64, right: u64) -> u64 {
    let product = u128::from(left) * u128::from(right);
    product as u64 ^ (product >> 64) as u64
}

#[inline(always)]
fn word(bytes: &[u8]) -> u64 {
    let mut padded = [0; 8];
    padded[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(padded)
}

/// Hashes byte strings eight bytes at a time; seeded, so that nobody can prepare text that collides.
#[derive(Clone)]
pub struct Seed(u64);

impl Seed {
    #[inline(always)]
    fn hash(&self, key: Key) -> u64 {
        mix(key.low ^ self.0, key.high ^ 0x9e37_79b9_7f4a_7c15)
    }
}

impl Default for Seed {
    fn default() -> Self {
        Self(RandomState::new().hash_one(0) | 1)
    }
}

impl BuildHasher for Seed {
    type Hasher = Folding;
    fn build_hasher(&self) -> Folding {
        Folding(self.0)
    }
}

pub struct Folding(u64);

impl Hasher for Folding {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            self.0 = mix(self.0 ^ word(chunk), 0x9e37_79b9_7f4a_7c15 ^ chunk.len() as u64);
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = mix(self.0 ^ value, 0x9e37_79b9_7f4a_7c15);
    }
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

/// An ordinary map with the fast hash.
pub type FastMap<Key, Value> = HashMap<Key, Value, Seed>;

/// A short piece as two words: its bytes, and its length in the top byte. No piece is empty, so `high` is never 0.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Key {
    low: u64,
    high: u64,
}

impl Key {
    /// The key of the piece `text[start..end]`, or None when it is too long for one.
    #[inline(always)]
    pub fn new(text: &[u8], start: usize, end: usize) -> Option<Self> {
        let length = end - start;
        if length > SHORT {
            return None;
        }
        let mut bytes = [0; 16];
        match text.get(start..start + 16) {
            // Read 16 bytes whatever the length, then drop those that belong to the next pieces.
            Some(window) => bytes.copy_from_slice(window),
            None => bytes[..length].copy_from_slice(&text[start..end]),
        }
        let bits = u128::from_le_bytes(bytes) & !(u128::MAX << (8 * length));
        Some(Self { low: bits as u64, high: (bits >> 64) as u64 | (length as u64) << 56 })
    }

    fn is_none(self) -> bool {
        self.high == 0
    }

    /// Call `visit` with the piece's bytes.
    fn with_bytes<R>(self, visit: impl FnOnce(&[u8]) -> R) -> R {
        let bits = u128::from(self.high) << 64 | u128::from(self.low);
        visit(&bits.to_le_bytes()[..(self.high >> 56) as usize])
    }
}

/// A key with its number; free while there is no key.
#[derive(Clone, Copy, Default)]
pub struct Slot {
    key: Key,
    pub value: u64,
}

/// A few thousand of the pieces met last, small enough for the processor's own cache. The big table is twenty times that,
/// and would be waited for at every piece.
pub struct Front {
    slots: Box<[Slot]>,
    seed: Seed,
}

impl Default for Front {
    fn default() -> Self {
        Self { slots: vec![Slot::default(); 1 << 13].into(), seed: Seed::default() }
    }
}

impl Front {
    /// The slot where `key` belongs, and whether it is there; if not, the slot is free or another's.
    #[inline(always)]
    pub fn slot(&mut self, key: Key) -> (&mut Slot, bool) {
        let mask = self.slots.len() - 1;
        let slot = &mut self.slots[self.seed.hash(key) as usize & mask];
        let found = slot.key == key;
        (slot, found)
    }

    /// Put `key` with `value` in its slot; what stood there before, if anything.
    #[inline(always)]
    pub fn replace(slot: &mut Slot, key: Key, value: u64) -> Option<Slot> {
        let old = std::mem::replace(slot, Slot { key, value });
        (!old.key.is_none()).then_some(old)
    }

    /// All that is in it.
    pub fn drain(self) -> impl Iterator<Item = Slot> {
        self.slots.into_vec().into_iter().filter(|slot| !slot.key.is_none())
    }
}

/// A map from non-empty byte strings to numbers.
pub struct PieceTable {
    slots: Vec<Slot>,
    num_short: usize,
    seed: Seed,
    long: FastMap<Box<[u8]>, u64>,
}

impl Default for PieceTable {
    fn default() -> Self {
        Self {
            slots: vec![Slot::default(); 1 << 12],
            num_short: 0,
            seed: Seed::default(),
            long: FastMap::default(),
        }
    }
}

impl PieceTable {
    pub fn len(&self) -> usize {
        self.num_short + self.long.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of the piece `text[start..end]`, to read or to set; 0 when the piece is new.
    #[inline(always)]
    pub fn entry(&mut self, text: &[u8], start: usize, end: usize) -> &mut u64 {
        match Key::new(text, start, end) {
            Some(key) => self.short_entry(key),
            None => self.long_entry(&text[start..end]),
        }
    }

    /// The number of a piece, None when it is new.
    #[inline(always)]
    pub fn get(&self, text: &[u8], start: usize, end: usize) -> Option<u64> {
        match Key::new(text, start, end) {
            Some(key) => {
                Some(&self.slots[self.find(key)]).filter(|slot| !slot.key.is_none()).map(|slot| slot.value)
            }
            None => self.long.get(&text[start..end]).copied(),
        }
    }

    #[inline(always)]
    pub fn short_entry(&mut self, key: Key) -> &mut u64 {
        if self.num_short * 2 >= self.slots.len() {
            self.grow();
        }
        let index = self.find(key);
        let slot = &mut self.slots[index];
        if slot.key.is_none() {
            slot.key = key;
            self.num_short += 1;
        }
        &mut slot.value
    }

    /// The slot that holds the key, or the free one where it belongs. At least half of the slots are free.
    #[inline(always)]
    fn find(&self, key: Key) -> usize {
        let mask = self.slots.len() - 1;
        let mut index = self.seed.hash(key) as usize & mask;
        while self.slots[index].key != key && !self.slots[index].key.is_none() {
            index = (index + 1) & mask;
        }
        index
    }

    #[cold]
    fn grow(&mut self) {
        let doubled = vec![Slot::default(); self.slots.len() * 2];
        for slot in std::mem::replace(&mut self.slots, doubled) {
            if !slot.key.is_none() {
                let index = self.find(slot.key);
                self.slots[index] = slot;
            }
        }
    }

    pub fn long_entry(&mut self, piece: &[u8]) -> &mut u64 {
        if !self.long.contains_key(piece) {
            self.long.insert(piece.into(), 0);
        }
        self.long.get_mut(piece).expect("inserted above")
    }

    /// Call `visit` with every piece and its number, in no particular order.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], u64)) {
        for slot in self.slots.iter().filter(|slot| !slot.key.is_none()) {
            slot.key.with_bytes(|piece| visit(piece, slot.value));
        }
        self.long.iter().for_each(|(piece, &value)| visit(piece, value));
    }

    /// Add every number of `other` to ours.
    pub fn add(&mut self, other: &Self) {
        other.for_each(|piece, value| *self.entry(piece, 0, piece.len()) += value);
    }

    /// Add one slot's number.
    pub fn add_slot(&mut self, slot: Slot) {
        *self.short_entry(slot.key) += slot.value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_counted_apart_and_found_again() {
        let text: Vec<u8> = (0..40_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut table = PieceTable::default();
        let mut expected: HashMap<Vec<u8>, u64> = HashMap::new();
        for start in 0..text.len() - 40 {
            let end = start + 1 + start % 40;
            *table.entry(&text, start, end) += 1;
            *expected.entry(text[start..end].to_vec()).or_default() += 1;
        }
        let mut doubled = PieceTable::default();
        doubled.add(&table);
        doubled.add(&table);
        assert_eq!(table.len(), expected.len());
        let mut seen = 0;
        doubled.for_each(|piece, value| {
            assert_eq!(value, 2 * expected[piece]);
            seen += 1;
        });
        assert_eq!(seen, expected.len());
    }

    #[test]
    fn zero_bytes_are_part_of_the_key() {
        let mut table = PieceTable::default();
        *table.entry(b"\0", 0, 1) += 1;
        *table.entry(b"\0\0", 0, 2) += 1;
        assert_eq!(table.len(), 2);
    }
}
