//! Text to ids and back, with the ids that tiktoken gives.
//!
//! Language repeats itself, so nearly every piece has been encoded before: a cache answers most of them with one
//! look-up. Caches are lent to calls and come back, one for each thread at work, and are thrown away when they grow
//! beyond a fixed size, so that hostile text costs time but no memory.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::Error;
use crate::ranks::Ranks;
use crate::split::Splitter;
use crate::table::{Front, Key, PieceTable};

/// Pieces longer than this are not cached: they seldom come twice.
const LONGEST_CACHED: usize = 64;
/// A cache with this many pieces is emptied (about 4 MB).
const CACHE_PIECES: usize = 1 << 16;
/// Texts that a thread takes at a time from a batch.
const TEXTS_AT_A_TIME: usize = 8;

/// A vocabulary with its split pattern.
pub struct Encoder {
    splitter: Splitter,
    ranks: Ranks,
    caches: Mutex<Vec<Cache>>,
}

/// The ids of pieces met before: the tables say where.
#[derive(Default)]
struct Cache {
    front: Front,
    table: PieceTable,
    ids: Vec<u32>,
}

/// A piece's ids: the one there is, or where in the cache's `ids` they begin.
#[derive(Clone, Copy)]
struct Place {
    first: u32,
    count: u32,
}

impl Place {
    fn pack(self) -> u64 {
        u64::from(self.count) << 32 | u64::from(self.first)
    }

    fn unpack(packed: u64) -> Self {
        Self { first: packed as u32, count: (packed >> 32) as u32 }
    }
}

impl Encoder {
    /// From tokens and their ids, as `Ranks::new` takes them.
    pub fn new(splitter: Splitter, ranks: impl IntoIterator<Item = (Vec<u8>, u32)>) -> Result<Self, Error> {
        Ok(Self { splitter, ranks: Ranks::new(ranks)?, caches: Mutex::default() })
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        self.ranks.vocab_size()
    }

    /// The tokens with their ids, in order of id.
    pub fn ranks(&self) -> impl Iterator<Item = (&[u8], u32)> {
        self.ranks.iter()
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut cache = self.borrow_cache();
        let ids = self.encode_with(&mut cache, text);
        self.return_cache(cache);
        ids
    }

    /// Encode many texts on `num_threads` threads; the order is kept.
    pub fn encode_batch<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        num_threads: usize,
    ) -> Result<Vec<Vec<u32>>, Error> {
        let num_threads = num_threads.clamp(1, texts.len().div_ceil(TEXTS_AT_A_TIME).max(1));
        if num_threads == 1 {
            let mut cache = self.borrow_cache();
            let ids = texts.iter().map(|text| self.encode_with(&mut cache, text.as_ref())).collect();
            self.return_cache(cache);
            return ids;
        }
        let taken = AtomicUsize::new(0);
        let share = || self.encode_share(texts, &taken);
        let shares: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..num_threads).map(|_| scope.spawn(share)).collect();
            threads.into_iter().map(|thread| thread.join().expect("a share returns its errors")).collect()
        });
        let mut all = vec![Vec::new(); texts.len()];
        for share in shares {
            for (index, ids) in share? {
                all[index] = ids;
            }
        }
        Ok(all)
    }

    /// Encode the texts that the other threads have not taken.
    fn encode_share<T: AsRef<str>>(
        &self,
        texts: &[T],
        taken: &AtomicUsize,
    ) -> Result<Vec<(usize, Vec<u32>)>, Error> {
        let mut cache = self.borrow_cache();
        let mut share = Vec::new();
        loop {
            let first = taken.fetch_add(TEXTS_AT_A_TIME, Ordering::Relaxed);
            let Some(rest) = texts.get(first..).filter(|rest| !rest.is_empty()) else { break };
            for (index, text) in (first..).zip(rest.iter().take(TEXTS_AT_A_TIME)) {
                share.push((index, self.encode_with(&mut cache, text.as_ref())?));
            }
        }
        self.return_cache(cache);
        Ok(share)
    }

    /// The bytes that `ids` stand for.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.ranks.token(id).ok_or(Error::UnknownId(id))?);
        }
        Ok(bytes)
    }

    fn borrow_cache(&self) -> Cache {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn return_cache(&self, cache: Cache) {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner).push(cache);
    }

    fn encode_with(&self, cache: &mut Cache, text: &str) -> Result<Vec<u32>, Error> {
        let bytes = text.as_bytes();
        let mut ids = Vec::with_capacity(bytes.len() / 4 + 1);
        self.splitter.for_each(text, |start, end| {
            if end - start > LONGEST_CACHED {
                self.ranks.merge(&bytes[start..end], &mut ids);
                return;
            }
            let place = self.place(cache, bytes, start, end);
            if place.count == 1 {
                ids.push(place.first);
            } else {
                let first = place.first as usize;
                ids.extend_from_slice(&cache.ids[first..first + place.count as usize]);
            }
        })?;
        Ok(ids)
    }

    /// Where the ids of a piece are, after merging it if it is new.
    #[inline(always)]
    fn place(&self, cache: &mut Cache, text: &[u8], start: usize, end: usize) -> Place {
        let Some(key) = Key::new(text, start, end) else {
            return Place::unpack(self.place_in(cache, text, start, end));
        };
        let (slot, found) = cache.front.slot(key);
        if found {
            return Place::unpack(slot.value);
        }
        let packed = self.place_in(cache, text, start, end);
        Front::replace(cache.front.slot(key).0, key, packed);
        Place::unpack(packed)
    }

    fn place_in(&self, cache: &mut Cache, text: &[u8], start: usize, end: usize) -> u64 {
        if cache.table.len() >= CACHE_PIECES {
            *cache = Cache::default();
        }
        let packed = cache.table.entry(text, start, end);
        if *packed == 0 {
            let first = cache.ids.len();
            self.ranks.merge(&text[start..end], &mut cache.ids);
            *packed = match cache.ids[first..] {
                [only] => Place { first: only, count: 1 }.pack(),
                _ => Place { first: first as u32, count: (cache.ids.len() - first) as u32 }.pack(),
            };
        }
        *packed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scanner;

    fn encoder(merges: &[&str]) -> Encoder {
        let bytes = (0..=255u8).map(|byte| vec![byte]);
        let tokens = bytes.chain(merges.iter().map(|token| token.as_bytes().to_vec()));
        Encoder::new(Splitter::new(&scanner::pattern(2)).unwrap(), tokens.zip(0..)).unwrap()
    }

    #[test]
    fn the_lowest_rank_merges_first_and_the_leftmost_of_equals() {
        let encoder = encoder(&["bc", "ab", "aa"]);
        assert_eq!(encoder.encode("abc").unwrap(), [97, 256]);
        assert_eq!(encoder.encode("aaa").unwrap(), [258, 97]);
        assert!(encoder.encode("").unwrap().is_empty());
    }

    #[test]
    fn a_full_cache_starts_again_and_changes_nothing() {
        let encoder = encoder(&["ab", " a"]);
        let text: String = (0..CACHE_PIECES + 100).map(|n| format!(" a{n:x}b")).collect();
        let once = encoder.encode(&text).unwrap();
        assert!((1..CACHE_PIECES).contains(&encoder.caches.lock().unwrap()[0].table.len()));
        assert_eq!(encoder.encode(&text).unwrap(), once);
        assert_eq!(encoder.decode(&once).unwrap(), text.as_bytes());
    }

    #[test]
    fn a_batch_is_its_texts_one_by_one() {
        let encoder = encoder(&["he", "hel", "lo"]);
        let texts: Vec<String> = (0..100).map(|n| format!("hello {n} hel{}", "lo".repeat(n))).collect();
        let singly: Vec<_> = texts.iter().map(|text| encoder.encode(text).unwrap()).collect();
        for num_threads in [0, 1, 3, 200] {
            assert_eq!(encoder.encode_batch(&texts, num_threads).unwrap(), singly);
        }
        assert!(encoder.encode_batch::<&str>(&[], 4).unwrap().is_empty());
    }
}
