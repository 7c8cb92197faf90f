//! Text to pieces: by the scanner where the pattern is ours, by the regex engine for any other.

use fancy_regex::Regex;

use crate::error::Error;
use crate::scanner::Scanner;

/// A compiled split pattern.
#[derive(Clone)]
pub enum Splitter {
    Scanner(Scanner),
    Regex(Box<Regex>),
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, Error> {
        match Scanner::for_pattern(pattern) {
            Some(scanner) => Ok(Self::Scanner(scanner)),
            None => Self::regex(pattern),
        }
    }

    /// The regex engine whatever the pattern: slower, and the oracle of the scanner's tests.
    pub fn regex(pattern: &str) -> Result<Self, Error> {
        let regex = Regex::new(pattern).map_err(|error| Error::Pattern(error.to_string()))?;
        Ok(Self::Regex(Box::new(regex)))
    }

    /// Call `visit(start, end)` for every piece in order. Text that no alternative matches is left out, as tiktoken does.
    #[inline(always)]
    pub fn for_each(&self, text: &str, mut visit: impl FnMut(usize, usize)) -> Result<(), Error> {
        match self {
            Self::Scanner(scanner) => {
                let (bytes, mut start) = (text.as_bytes(), 0);
                while start < bytes.len() {
                    let end = scanner.piece_end(bytes, start);
                    visit(start, end);
                    start = end;
                }
            }
            Self::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|error| Error::Split(error.to_string()))?;
                    if found.start() < found.end() {
                        visit(found.start(), found.end());
                    }
                }
            }
        }
        Ok(())
    }

    /// The pieces themselves.
    pub fn pieces<'t>(&self, text: &'t str) -> Result<Vec<&'t str>, Error> {
        let mut pieces = Vec::new();
        self.for_each(text, |start, end| pieces.push(&text[start..end]))?;
        Ok(pieces)
    }
}
