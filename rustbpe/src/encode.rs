//! Text to ids and back, by tiktoken's rule: within a piece, merge the pair whose bytes have the lowest rank.
//!
//! Language repeats itself, so nearly every piece has been encoded before: a cache answers most of them with one
//! look-up. Caches are lent to calls and come back, one for each thread at work, and are thrown away when they grow
//! beyond a fixed size, so that hostile text costs time but no memory.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::Error;
use crate::split::Splitter;
use crate::table::{FastMap, PieceTable};

/// Pieces longer than this are not cached: they seldom come twice.
const LONGEST_CACHED: usize = 64;
/// A cache with this many pieces is emptied (about 4 MB).
const CACHE_PIECES: usize = 1 << 16;
/// From this length on a piece is merged with a heap instead of by looking through all its parts each time.
const LONG_PIECE: usize = 96;
/// Texts that a thread takes at a time from a batch.
const TEXTS_AT_A_TIME: usize = 8;

const NO_RANK: u32 = u32::MAX;

/// A vocabulary with its split pattern.
pub struct Encoder {
    splitter: Splitter,
    rank_of: FastMap<Box<[u8]>, u32>,
    /// By id; None where a vocabulary read from elsewhere has a hole.
    tokens: Vec<Option<Box<[u8]>>>,
    caches: Mutex<Vec<Cache>>,
}

/// The ids of pieces met before: `table` says where in `ids`, as offset * 256 + number of ids.
#[derive(Default)]
struct Cache {
    table: PieceTable,
    ids: Vec<u32>,
}

impl Encoder {
    /// From tokens and their ids. Every byte must be a token; ids may have holes but no token or id may come twice.
    pub fn new(splitter: Splitter, ranks: impl IntoIterator<Item = (Vec<u8>, u32)>) -> Result<Self, Error> {
        let mut rank_of = FastMap::default();
        let mut tokens: Vec<Option<Box<[u8]>>> = Vec::new();
        for (bytes, id) in ranks {
            if id >= 1 << 24 {
                return Err(Error::Ranks(format!("id {id} is beyond 16,777,215")));
            }
            let index = id as usize;
            if tokens.len() <= index {
                tokens.resize(index + 1, None);
            }
            if tokens[index].is_some() {
                return Err(Error::Ranks(format!("id {id} stands for two tokens")));
            }
            if bytes.is_empty() {
                return Err(Error::Ranks(format!("token {id} is empty")));
            }
            let bytes = bytes.into_boxed_slice();
            if let Some(other) = rank_of.insert(bytes.clone(), id) {
                return Err(Error::Ranks(format!("ids {other} and {id} are the same token")));
            }
            tokens[index] = Some(bytes);
        }
        if let Some(byte) = (0..=255u8).find(|byte| !rank_of.contains_key(&[*byte][..])) {
            return Err(Error::Ranks(format!("no token for the byte {byte}")));
        }
        Ok(Self { splitter, rank_of, tokens, caches: Mutex::default() })
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens with their ids, in order of id.
    pub fn ranks(&self) -> impl Iterator<Item = (&[u8], u32)> {
        let numbered = self.tokens.iter().zip(0..);
        numbered.filter_map(|(token, id)| token.as_deref().map(|bytes| (bytes, id)))
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
            let token = self.tokens.get(id as usize).and_then(Option::as_deref);
            bytes.extend_from_slice(token.ok_or(Error::UnknownId(id))?);
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
        if cache.table.len() > CACHE_PIECES {
            *cache = Cache::default();
        }
        self.splitter.for_each(text, |start, end| {
            if end - start > LONGEST_CACHED {
                self.merge(&bytes[start..end], &mut ids);
                return;
            }
            let place = cache.table.entry(bytes, start, end);
            if *place == 0 {
                let offset = cache.ids.len();
                self.merge(&bytes[start..end], &mut cache.ids);
                *place = (offset as u64) << 8 | (cache.ids.len() - offset) as u64;
            }
            let (offset, count) = ((*place >> 8) as usize, (*place & 0xff) as usize);
            if count == 1 {
                ids.push(cache.ids[offset]);
            } else {
                ids.extend_from_slice(&cache.ids[offset..offset + count]);
            }
        })?;
        Ok(ids)
    }

    fn rank(&self, bytes: &[u8]) -> u32 {
        self.rank_of.get(bytes).copied().unwrap_or(NO_RANK)
    }

    /// Append the ids of one piece.
    fn merge(&self, piece: &[u8], ids: &mut Vec<u32>) {
        match self.rank(piece) {
            NO_RANK if piece.len() < LONG_PIECE => self.merge_short(piece, ids),
            NO_RANK => self.merge_long(piece, ids),
            id => ids.push(id),
        }
    }

    /// Quadratic in the piece's length, with a small constant: right for words.
    fn merge_short(&self, piece: &[u8], ids: &mut Vec<u32>) {
        // (where a part begins, the rank of the part together with the next one); one more marks the end.
        let mut parts: Vec<(usize, u32)> = (0..=piece.len()).map(|at| (at, NO_RANK)).collect();
        let pair_rank = |parts: &[(usize, u32)], index: usize| match parts.get(index + 2) {
            Some(&(end, _)) => self.rank(&piece[parts[index].0..end]),
            None => NO_RANK,
        };
        for index in 0..piece.len() {
            parts[index].1 = pair_rank(&parts, index);
        }
        loop {
            let lowest = parts.iter().enumerate().min_by_key(|(_, part)| part.1);
            let Some((index, &(_, rank))) = lowest.filter(|(_, part)| part.1 != NO_RANK) else { break };
            debug_assert!(rank != NO_RANK);
            parts.remove(index + 1);
            parts[index].1 = pair_rank(&parts, index);
            if index > 0 {
                parts[index - 1].1 = pair_rank(&parts, index - 1);
            }
        }
        ids.extend(parts.windows(2).map(|pair| self.rank(&piece[pair[0].0..pair[1].0])));
    }

    /// The same with a heap: a megabyte without a space takes a second, not a day.
    fn merge_long(&self, piece: &[u8], ids: &mut Vec<u32>) {
        let length = piece.len();
        // Where the part that begins here ends (0: none begins), and where the part before it begins.
        let mut end_of: Vec<usize> = (1..=length).collect();
        let mut before: Vec<usize> = (0..=length).map(|at| at.saturating_sub(1)).collect();
        let mut heap = BinaryHeap::new();
        let offer = |heap: &mut BinaryHeap<_>, start: usize, end: usize| {
            let rank = self.rank(&piece[start..end]);
            if rank != NO_RANK {
                heap.push(Reverse((rank, start, end)));
            }
        };
        (0..length - 1).for_each(|at| offer(&mut heap, at, at + 2));
        while let Some(Reverse((_, start, end))) = heap.pop() {
            let middle = end_of[start];
            // The offer holds only while two parts lie there that together end where they did.
            if middle == 0 || middle >= length || end_of[middle] != end {
                continue;
            }
            end_of[middle] = 0;
            end_of[start] = end;
            before[end] = start;
            if start > 0 {
                offer(&mut heap, before[start], end);
            }
            if end < length {
                offer(&mut heap, start, end_of[end]);
            }
        }
        let mut start = 0;
        while start < length {
            ids.push(self.rank(&piece[start..end_of[start]]));
            start = end_of[start];
        }
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
    fn the_heap_merges_like_the_plain_loop() {
        let encoder = encoder(&["ab", "ba", "aa", "bb", "aba", "abab", "bbaa", "abba", "aabab", "ababab"]);
        let mut state = 1u64;
        for length in 1..300usize {
            let piece: Vec<u8> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    b'a' + (state >> 63) as u8
                })
                .collect();
            let (mut short, mut long) = (Vec::new(), Vec::new());
            encoder.merge_short(&piece, &mut short);
            encoder.merge_long(&piece, &mut long);
            assert_eq!(short, long, "{:?}", String::from_utf8_lossy(&piece));
            assert_eq!(encoder.decode(&short).unwrap(), piece);
        }
    }

    #[test]
    fn a_full_cache_starts_again_and_changes_nothing() {
        let encoder = encoder(&["ab", " a"]);
        let text: String = (0..CACHE_PIECES + 100).map(|n| format!(" a{n:x}b")).collect();
        let once = encoder.encode(&text).unwrap();
        assert!(encoder.caches.lock().unwrap()[0].table.len() > 1000);
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

    #[test]
    fn a_table_that_is_no_byte_vocabulary_is_refused() {
        let splitter = Splitter::new(&scanner::pattern(1)).unwrap();
        let bytes = || (0..=255u8).map(|byte| vec![byte]).zip(0u32..);
        let refused =
            |ranks: Vec<(Vec<u8>, u32)>| Encoder::new(splitter.clone(), ranks).err().map(|e| e.to_string());
        assert!(refused(bytes().skip(1).collect()).unwrap().contains("no token for the byte 0"));
        assert!(refused(bytes().chain([(b"ab".to_vec(), 3)]).collect()).unwrap().contains("two tokens"));
        assert!(refused(bytes().chain([(b"a".to_vec(), 256)]).collect()).unwrap().contains("same token"));
        assert!(refused(bytes().chain([(vec![], 256)]).collect()).unwrap().contains("empty"));
        assert!(refused(bytes().chain([(b"ab".to_vec(), u32::MAX)]).collect()).unwrap().contains("beyond"));
        assert_eq!(refused(bytes().chain([(b"ab".to_vec(), 300)]).collect()), None);
    }
}
