//! Trains and runs byte-level BPE. The modules know nothing of Python; `python.rs` is all that does.

pub mod bpe;
pub mod classes;
pub mod count;
pub mod encode;
pub mod error;
pub mod ranks;
pub mod scanner;
pub mod split;
pub mod table;

#[cfg(feature = "python")]
mod python;
