//! A vocabulary's tokens by rank, and the merging of one piece: the pair whose bytes have the lowest rank goes first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::error::Error;
use crate::table::PieceTable;

/// From this length on a piece is merged with a heap instead of by looking through all its parts each time.
const LONG_PIECE: usize = 96;
const NO_RANK: u32 = u32::MAX;

/// Tokens and their ids, which are their ranks.
pub struct Ranks {
    rank_of: PieceTable,
    /// By id; None where a vocabulary read from elsewhere has a hole.
    tokens: Vec<Option<Box<[u8]>>>,
}

impl Ranks {
    /// Every byte must be a token; ids may have holes, but no token and no id may come twice.
    pub fn new(ranks: impl IntoIterator<Item = (Vec<u8>, u32)>) -> Result<Self, Error> {
        let mut rank_of = PieceTable::default();
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
            let known = rank_of.entry(&bytes, 0, bytes.len());
            if *known != 0 {
                return Err(Error::Ranks(format!("ids {} and {id} are the same token", *known - 1)));
            }
            *known = u64::from(id) + 1;
            tokens[index] = Some(bytes.into());
        }
        if let Some(byte) = (0..=255u8).find(|&byte| rank_of.get(&[byte], 0, 1).is_none()) {
            return Err(Error::Ranks(format!("no token for the byte {byte}")));
        }
        Ok(Self { rank_of, tokens })
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens with their ids, in order of id.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u32)> {
        let numbered = self.tokens.iter().zip(0..);
        numbered.filter_map(|(token, id)| token.as_deref().map(|bytes| (bytes, id)))
    }

    /// The bytes of a token.
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        self.tokens.get(id as usize).and_then(Option::as_deref)
    }

    fn rank(&self, text: &[u8], start: usize, end: usize) -> u32 {
        // Ids are kept plus one, because 0 is a new entry.
        self.rank_of.get(text, start, end).map_or(NO_RANK, |id| (id - 1) as u32)
    }

    /// Append the ids of one piece.
    pub fn merge(&self, piece: &[u8], ids: &mut Vec<u32>) {
        match self.rank(piece, 0, piece.len()) {
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
            Some(&(end, _)) => self.rank(piece, parts[index].0, end),
            None => NO_RANK,
        };
        for index in 0..piece.len() {
            parts[index].1 = pair_rank(&parts, index);
        }
        loop {
            let lowest = parts.iter().enumerate().min_by_key(|(_, part)| part.1);
            let Some((index, _)) = lowest.filter(|(_, part)| part.1 != NO_RANK) else { break };
            parts.remove(index + 1);
            parts[index].1 = pair_rank(&parts, index);
            if index > 0 {
                parts[index - 1].1 = pair_rank(&parts, index - 1);
            }
        }
        ids.extend(parts.windows(2).map(|pair| self.rank(piece, pair[0].0, pair[1].0)));
    }

    /// The same with a heap: a megabyte without a space takes a second, not a day.
    fn merge_long(&self, piece: &[u8], ids: &mut Vec<u32>) {
        let length = piece.len();
        // Where the part that begins here ends (0: none begins), and where the part before it begins.
        let mut end_of: Vec<usize> = (1..=length).collect();
        let mut before: Vec<usize> = (0..=length).map(|at| at.saturating_sub(1)).collect();
        let mut heap = BinaryHeap::new();
        let offer = |heap: &mut BinaryHeap<_>, start: usize, end: usize| {
            let rank = self.rank(piece, start, end);
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
            ids.push(self.rank(piece, start, end_of[start]));
            start = end_of[start];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes() -> impl Iterator<Item = (Vec<u8>, u32)> {
        (0..=255u8).map(|byte| vec![byte]).zip(0..)
    }

    #[test]
    fn the_heap_merges_like_the_plain_loop() {
        let merges = ["ab", "ba", "aa", "bb", "aba", "abab", "bbaa", "abba", "aabab", "ababab"];
        let merges = merges.iter().map(|token| token.as_bytes().to_vec()).zip(256..);
        let ranks = Ranks::new(bytes().chain(merges)).unwrap();
        let mut state = 1u64;
        for length in 1..300usize {
            let piece: Vec<u8> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    b'a' + (state >> 63) as u8
                })
                .collect();
            let (mut short, mut long) = (Vec::new(), Vec::new());
            ranks.merge_short(&piece, &mut short);
            ranks.merge_long(&piece, &mut long);
            assert_eq!(short, long, "{:?}", String::from_utf8_lossy(&piece));
            let tokens: Vec<&[u8]> = short.iter().map(|&id| ranks.token(id).unwrap()).collect();
            assert_eq!(tokens.concat(), piece);
        }
    }

    #[test]
    fn a_table_that_is_no_byte_vocabulary_is_refused() {
        let refused = |ranks: Vec<(Vec<u8>, u32)>| Ranks::new(ranks).err().map(|e| e.to_string());
        assert!(refused(bytes().skip(1).collect()).unwrap().contains("no token for the byte 0"));
        assert!(refused(bytes().chain([(b"ab".to_vec(), 3)]).collect()).unwrap().contains("two tokens"));
        assert!(refused(bytes().chain([(b"a".to_vec(), 256)]).collect()).unwrap().contains("same token"));
        assert!(refused(bytes().chain([(vec![], 256)]).collect()).unwrap().contains("empty"));
        assert!(refused(bytes().chain([(b"ab".to_vec(), u32::MAX)]).collect()).unwrap().contains("beyond"));
        assert_eq!(refused(bytes().chain([(b"ab".to_vec(), 300)]).collect()), None);
    }
}
