//! Byte-pair encoding: from pieces and their counts to a vocabulary.
//!
//! The rule. Start from the 256 bytes. Again and again take the adjacent pair that occurs most often, of equals the
//! one with the smallest ids, and make it a token; replace its occurrences from left to right. A pair whose bytes
//! already are a token (reached by another way of merging) is passed over for good, so every token's bytes are unique.
//! `tests/bpe_oracle.py` says the same in forty lines, slowly.
//!
//! How it is fast. All pieces lie in one array, a cell per byte. A token writes its id into its first and its last
//! cell; its length is known from the id, so both neighbours are one look-up away and a merge moves nothing. Each pair
//! keeps the positions where it began when it was last complete. A pair of two old tokens can only become rarer, and a
//! pair with the new token arises only in the merge that makes that token: so its list is written once, in order, and
//! later merely checked. The heap holds upper bounds: a pair that has become rarer is found out when it comes to the top.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::error::Error;
use crate::table::{FastMap, PieceTable};

/// Between two pieces, and before the first.
const BORDER: u32 = u32::MAX;
/// A cell inside a token, where an older token used to begin.
const INSIDE: u32 = u32::MAX - 1;
/// How many merges pass between two calls of `pause`.
const MERGES_PER_PAUSE: usize = 256;

/// Train a vocabulary of at most `vocab_size` tokens; fewer when the text has no more pairs. The index is the id.
///
/// `pause` is called now and then; its error ends the training (a person who presses Ctrl-C).
pub fn train<E: From<Error>>(
    counts: &PieceTable,
    vocab_size: usize,
    mut pause: impl FnMut() -> Result<(), E>,
) -> Result<Vec<Vec<u8>>, E> {
    if vocab_size < 256 {
        return Err(Error::VocabTooSmall(vocab_size).into());
    }
    let mut text = Text::new(counts)?;
    let mut pairs = Pairs::count_bytes(&text);
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    let mut known: FastMap<Vec<u8>, ()> = FastMap::default();
    let mut lengths = vec![1; tokens.len()];
    let mut merge = Merge::default();
    while tokens.len() < vocab_size {
        if tokens.len() % MERGES_PER_PAUSE == 0 {
            pause()?;
        }
        let Some(best) = pairs.pop() else { break };
        let (left, right) = best;
        let bytes = [tokens[left as usize].as_slice(), tokens[right as usize].as_slice()].concat();
        if known.insert(bytes.clone(), ()).is_some() {
            continue;
        }
        lengths.push(bytes.len());
        tokens.push(bytes);
        merge.apply(best, &lengths, &mut text, &mut pairs);
    }
    Ok(tokens)
}

/// One byte of a piece.
#[derive(Clone, Copy)]
struct Cell {
    /// The id of the token that begins or ends here.
    token: u32,
    /// The number of the piece.
    piece: u32,
}

/// Every distinct piece, a cell per byte, a border before, between and after.
struct Text {
    cells: Vec<Cell>,
    /// How often each piece occurs.
    weights: Vec<u64>,
}

impl Text {
    fn new(counts: &PieceTable) -> Result<Self, Error> {
        let border = Cell { token: BORDER, piece: 0 };
        let (mut cells, mut weights) = (vec![border], Vec::new());
        counts.for_each(|piece, weight| {
            // A piece of one byte has no pair.
            if piece.len() > 1 {
                let number = weights.len() as u32;
                cells.extend(piece.iter().map(|&byte| Cell { token: byte.into(), piece: number }));
                cells.push(border);
                weights.push(weight);
            }
        });
        if cells.len() >= INSIDE as usize {
            return Err(Error::TooMuchText);
        }
        Ok(Self { cells, weights })
    }

    fn token(&self, at: usize) -> u32 {
        self.cells[at].token
    }

    fn weight(&self, at: usize) -> u64 {
        self.weights[self.cells[at].piece as usize]
    }
}

struct Pair {
    count: u64,
    /// Where the pair began when it was last complete, in ascending order; some may be gone.
    starts: Vec<u32>,
}

type Ids = (u32, u32);

#[derive(Default)]
struct Pairs {
    pairs: FastMap<u64, Pair>,
    /// (an upper bound of the count, smallest ids first)
    heap: BinaryHeap<(u64, Reverse<Ids>)>,
}

fn key((left, right): Ids) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl Pairs {
    fn count_bytes(text: &Text) -> Self {
        let mut found: Vec<Pair> = (0..1 << 16).map(|_| Pair { count: 0, starts: Vec::new() }).collect();
        for (at, cells) in text.cells.windows(2).enumerate() {
            let (left, right) = (cells[0].token, cells[1].token);
            if left != BORDER && right != BORDER {
                let pair = &mut found[(left << 8 | right) as usize];
                pair.count += text.weight(at);
                pair.starts.push(at as u32);
            }
        }
        let mut pairs = Self::default();
        for (index, pair) in found.into_iter().enumerate() {
            pairs.insert((index as u32 >> 8, index as u32 & 0xff), pair);
        }
        pairs
    }

    fn insert(&mut self, ids: Ids, pair: Pair) {
        if pair.count > 0 {
            self.heap.push((pair.count, Reverse(ids)));
            self.pairs.insert(key(ids), pair);
        }
    }

    fn lower(&mut self, ids: Ids, by: u64) {
        if let Some(pair) = self.pairs.get_mut(&key(ids)) {
            pair.count -= by;
        }
    }

    /// The commonest pair, smallest ids first among equals.
    fn pop(&mut self) -> Option<Ids> {
        while let Some((bound, Reverse(ids))) = self.heap.pop() {
            match self.pairs.get(&key(ids)) {
                Some(pair) if pair.count == bound => return Some(ids),
                Some(pair) if pair.count > 0 => self.heap.push((pair.count, Reverse(ids))),
                _ => drop(self.pairs.remove(&key(ids))),
            }
        }
        None
    }

    fn take_starts(&mut self, ids: Ids) -> Vec<u32> {
        self.pairs.remove(&key(ids)).map_or_else(Vec::new, |pair| pair.starts)
    }
}

/// What one merge does to the pairs on one side of the merged pair, by the neighbour's id.
#[derive(Default)]
struct Side {
    lost: Vec<u64>,
    gained: Vec<u64>,
    starts: Vec<Vec<u32>>,
    touched: Vec<u32>,
}

impl Side {
    fn grow(&mut self, num_tokens: usize) {
        self.lost.resize(num_tokens, 0);
        self.gained.resize(num_tokens, 0);
        self.starts.resize_with(num_tokens, Vec::new);
    }

    fn touch(&mut self, neighbour: u32, start: usize, weight: u64) {
        let index = neighbour as usize;
        if self.starts[index].is_empty() {
            self.touched.push(neighbour);
        }
        self.gained[index] += weight;
        self.starts[index].push(start as u32);
    }

    /// Hand the changes over to `pairs` and be empty again.
    fn settle(&mut self, pairs: &mut Pairs, old: impl Fn(u32) -> Ids, new: impl Fn(u32) -> Ids) {
        for neighbour in self.touched.drain(..) {
            let index = neighbour as usize;
            pairs.lower(old(neighbour), std::mem::take(&mut self.lost[index]));
            let pair = Pair {
                count: std::mem::take(&mut self.gained[index]),
                starts: std::mem::take(&mut self.starts[index]),
            };
            pairs.insert(new(neighbour), pair);
        }
    }
}

/// The work space of a merge, kept from one to the next.
#[derive(Default)]
struct Merge {
    before: Side,
    after: Side,
}

impl Merge {
    /// Replace `pair` by the newest token wherever it occurs. `lengths`: the bytes of every token.
    fn apply(&mut self, pair: Ids, lengths: &[usize], text: &mut Text, pairs: &mut Pairs) {
        let (left, right) = pair;
        let new = (lengths.len() - 1) as u32;
        let (left_len, right_len) = (lengths[left as usize], lengths[right as usize]);
        self.before.grow(lengths.len());
        self.after.grow(lengths.len());
        let stands =
            |text: &Text, start: usize| text.token(start) == left && text.token(start + left_len) == right;
        let mut starts = pairs.take_starts(pair);
        // Asked twice: now for all, so that the processor fetches many places at a time, and then one by one, because
        // in "aaa" the first merge ends the second.
        starts.retain(|&start| stands(text, start as usize));
        for start in starts {
            let start = start as usize;
            if !stands(text, start) {
                continue;
            }
            let (middle, end) = (start + left_len, start + left_len + right_len);
            self.note_neighbours(pair, new, start, end, lengths, text);
            text.cells[middle].token = INSIDE;
            text.cells[start].token = new;
            text.cells[end - 1].token = new;
        }
        self.before.settle(pairs, |neighbour| (neighbour, left), |neighbour| (neighbour, new));
        self.after.settle(pairs, |neighbour| (right, neighbour), |neighbour| (new, neighbour));
    }

    fn note_neighbours(
        &mut self,
        pair: Ids,
        new: u32,
        start: usize,
        end: usize,
        lengths: &[usize],
        text: &Text,
    ) {
        let weight = text.weight(start);
        let before = text.token(start - 1);
        if before != BORDER {
            self.before.touch(before, start - lengths[before as usize], weight);
            if before == new {
                // The token before us has only just been made, and has counted a neighbour that is now inside us.
                self.after.gained[pair.0 as usize] -= weight;
            } else {
                self.before.lost[before as usize] += weight;
            }
        }
        let after = text.token(end);
        if after != BORDER {
            self.after.touch(after, start, weight);
            // (right, after) may be the pair itself, in "aaa": it is gone already.
            if (pair.1, after) != pair {
                self.after.lost[after as usize] += weight;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary(words: &[(&str, u64)], vocab_size: usize) -> Vec<String> {
        let mut counts = PieceTable::default();
        for (word, count) in words {
            *counts.entry(word.as_bytes(), 0, word.len()) += count;
        }
        let tokens = train::<Error>(&counts, vocab_size, || Ok(())).unwrap();
        tokens[256..].iter().map(|token| String::from_utf8_lossy(token).into_owned()).collect()
    }

    #[test]
    fn the_commonest_pair_comes_first_and_the_smallest_of_equals() {
        assert_eq!(vocabulary(&[("ab", 2), ("cd", 3)], 300), ["cd", "ab"]);
        assert_eq!(vocabulary(&[("cd", 2), ("ab", 2)], 257), ["ab"]);
    }

    #[test]
    fn runs_merge_from_the_left() {
        assert_eq!(vocabulary(&[("aaa", 1)], 300), ["aa", "aaa"]);
        assert_eq!(vocabulary(&[("aaaaaaa", 1)], 300), ["aa", "aaaa", "aaa", "aaaaaaa"]);
        assert_eq!(vocabulary(&[("abab", 5), ("ababab", 1)], 300), ["ab", "abab", "ababab"]);
    }

    #[test]
    fn a_text_without_pairs_gives_the_bytes() {
        assert!(vocabulary(&[("a", 9)], 300).is_empty());
        assert!(vocabulary(&[], 300).is_empty());
    }

    #[test]
    fn fewer_than_256_tokens_is_an_error() {
        let trained = train::<Error>(&PieceTable::default(), 255, || Ok(()));
        assert_eq!(trained, Err(Error::VocabTooSmall(255)));
    }

    #[test]
    fn an_error_of_pause_ends_the_training() {
        let trained = train(&PieceTable::default(), 300, || Err(Error::TooMuchText));
        assert_eq!(trained, Err(Error::TooMuchText));
    }
}
