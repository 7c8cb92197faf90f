//! The default split pattern by hand: one pass, no backtracking, about thirty times the regex engine's speed.
//!
//! The pattern, `d` being the longest run of digits (2 in nanochat, 3 in GPT-4, 1 in our CPU preset):
//!
//! ```text
//! '(?i:[sdmt]|ll|ve|re)             a contraction
//! |[^\r\n\p{L}\p{N}]?+\p{L}+        a word, with one leading space or mark
//! |\p{N}{1,d}                       digits
//! | ?[^\s\p{L}\p{N}]++[\r\n]*       marks, with a leading space and the line's end
//! |\s*[\r\n]                        white space up to its last line break
//! |\s+(?!\S)                        white space but for the last one, which belongs to the next word
//! |\s+
//! ```
//!
//! Every character starts some alternative, so pieces tile the text. `tests/scanner.rs` compares with the regex.

use crate::classes::{Class, Classes};

const BEFORE_DIGITS: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,";
const AFTER_DIGITS: &str = r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// The split pattern with digits in runs of at most `max_digits`.
pub fn pattern(max_digits: usize) -> String {
    format!("{BEFORE_DIGITS}{max_digits}{AFTER_DIGITS}")
}

/// Cuts text into the pieces that the pattern of this module would find.
#[derive(Clone, Copy)]
pub struct Scanner {
    max_digits: usize,
    classes: &'static Classes,
}

impl Scanner {
    /// A scanner for `pattern`, when it is the one of this module with digit runs of 1 to 9; else None.
    pub fn for_pattern(pattern: &str) -> Option<Self> {
        let digits = pattern.strip_prefix(BEFORE_DIGITS)?.strip_suffix(AFTER_DIGITS)?;
        match digits.as_bytes() {
            [digit @ b'1'..=b'9'] => {
                Some(Self { max_digits: (digit - b'0').into(), classes: Classes::get() })
            }
            _ => None,
        }
    }

    /// The end of the piece that starts at byte `start`, which must lie inside `text` on a character's first byte.
    #[inline(always)]
    pub fn piece_end(&self, text: &[u8], start: usize) -> usize {
        let (class, next) = self.classes.at(text, start);
        match class {
            Class::Letter => self.after_run(text, next, Class::Letter),
            Class::Space => self.after_space(text, start, next),
            Class::Newline => self.after_white(text, start),
            Class::Number => self.after_digits(text, next),
            Class::Other => self.after_mark(text, start, next),
            Class::End => start,
        }
    }

    #[inline(always)]
    fn after_run(&self, text: &[u8], mut at: usize, wanted: Class) -> usize {
        loop {
            let (class, next) = self.classes.at(text, at);
            if class != wanted {
                return at;
            }
            at = next;
        }
    }

    fn after_digits(&self, text: &[u8], mut at: usize) -> usize {
        for _ in 1..self.max_digits {
            let (class, next) = self.classes.at(text, at);
            if class != Class::Number {
                break;
            }
            at = next;
        }
        at
    }

    /// A piece whose first character, a mark, ends at `next`.
    fn after_mark(&self, text: &[u8], start: usize, next: usize) -> usize {
        if text[start] == b'\'' {
            if let Some(length) = contraction(&text[next..]) {
                return next + length;
            }
        }
        match self.classes.at(text, next) {
            (Class::Letter, letter) => self.after_run(text, letter, Class::Letter),
            _ => self.after_marks(text, next),
        }
    }

    fn after_marks(&self, text: &[u8], at: usize) -> usize {
        let marks = self.after_run(text, at, Class::Other);
        self.after_run(text, marks, Class::Newline)
    }

    /// A piece whose first character, white but no line break, ends at `next`.
    #[inline(always)]
    fn after_space(&self, text: &[u8], start: usize, next: usize) -> usize {
        match self.classes.at(text, next) {
            (Class::Letter, letter) => self.after_run(text, letter, Class::Letter),
            (Class::Other, mark) if text[start] == b' ' => self.after_marks(text, mark),
            _ => self.after_white(text, start),
        }
    }

    fn after_white(&self, text: &[u8], start: usize) -> usize {
        let (mut at, mut last, mut line_end) = (start, start, None);
        let follower = loop {
            match self.classes.at(text, at) {
                (class @ (Class::Space | Class::Newline), next) => {
                    if class == Class::Newline {
                        line_end = Some(next);
                    }
                    (last, at) = (at, next);
                }
                (class, _) => break class,
            }
        };
        match line_end {
            Some(end) => end,
            None if follower == Class::End || last == start => at,
            None => last,
        }
    }
}

/// The length of `s d m t ll ve re` in any case at the start of `text`; the long s folds to s, as in the regex.
fn contraction(text: &[u8]) -> Option<usize> {
    let lower = |index: usize| text.get(index).map_or(0, u8::to_ascii_lowercase);
    match (lower(0), lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(1),
        (b'l', b'l') | (b'v', b'e') | (b'r', b'e') => Some(2),
        (0xc5, 0xbf) => Some("ſ".len()),
        _ => None,
    }
}
