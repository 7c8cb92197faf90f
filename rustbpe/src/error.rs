//! Everything that can go wrong, in words for the person who caused it.

use std::fmt;

/// Each of these becomes a Python `ValueError`; none of them is ever a panic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// A vocabulary cannot be smaller than the 256 bytes it starts from.
    VocabTooSmall(usize),
    /// The split pattern does not compile.
    Pattern(String),
    /// The split pattern compiles but gives up on this text (it backtracks without end).
    Split(String),
    /// More distinct text than 32-bit positions can number.
    TooMuchText,
    /// An id that no token has.
    UnknownId(u32),
    /// A rank table that is not a byte-level vocabulary.
    Ranks(String),
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VocabTooSmall(size) => {
                write!(out, "vocab_size is {size}; it must be at least 256, one token for every byte")
            }
            Self::Pattern(why) => write!(out, "the split pattern does not compile: {why}"),
            Self::Split(why) => write!(out, "the split pattern gave up on a text: {why}"),
            Self::TooMuchText => {
                write!(out, "more than 4 GB of distinct pieces; train on less text")
            }
            Self::UnknownId(id) => write!(out, "{id} is not the id of a token"),
            Self::Ranks(why) => write!(out, "not a byte-level vocabulary: {why}"),
        }
    }
}

impl std::error::Error for Error {}
