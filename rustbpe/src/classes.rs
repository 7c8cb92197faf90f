//! What the split pattern distinguishes about a code point: five classes, looked up in one table.
//!
//! `char::is_alphabetic` is not `\p{L}`: it also holds for 1,678 marks, symbols and letter-like numbers. So the table
//! is filled from the very ranges that the regex engine compiles, and cannot disagree with it.

use std::sync::OnceLock;

use regex_syntax::hir::{Class as HirClass, HirKind};

/// The class of a code point, or of the end of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// None of the others: punctuation, symbols, marks, controls, unassigned.
    Other,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s`, but not `\r` or `\n`
    Space,
    /// `\r` or `\n`
    Newline,
    /// Past the last character.
    End,
}

const BLOCK: usize = 256;
const NUM_BLOCKS: usize = 0x11_0000 / BLOCK;

/// Two steps: a block of 256 code points, then the code point in it. Equal blocks are stored once (about 30 KB in all).
pub struct Classes {
    ascii: [Class; 128],
    block_of: Vec<u16>,
    blocks: Vec<[Class; BLOCK]>,
}

impl Classes {
    /// The one table of the process, made on first use in a few milliseconds.
    pub fn get() -> &'static Self {
        static CLASSES: OnceLock<Classes> = OnceLock::new();
        CLASSES.get_or_init(Self::build)
    }

    fn build() -> Self {
        let mut flat = vec![Class::Other; NUM_BLOCKS * BLOCK];
        for (class, pattern) in [
            (Class::Letter, r"\p{L}"),
            (Class::Number, r"\p{N}"),
            (Class::Space, r"\s"),
            (Class::Newline, r"[\r\n]"),
        ] {
            for (first, last) in ranges(pattern) {
                flat[first as usize..=last as usize].fill(class);
            }
        }
        let mut ascii = [Class::Other; 128];
        ascii.copy_from_slice(&flat[..128]);
        let mut blocks: Vec<[Class; BLOCK]> = Vec::new();
        let block_of = flat
            .chunks_exact(BLOCK)
            .map(|chunk| {
                let known = blocks.iter().position(|block| block[..] == *chunk);
                known.unwrap_or_else(|| {
                    let mut block = [Class::Other; BLOCK];
                    block.copy_from_slice(chunk);
                    blocks.push(block);
                    blocks.len() - 1
                }) as u16
            })
            .collect();
        Self { ascii, block_of, blocks }
    }

    /// The class of a code point.
    pub fn of(&self, code_point: u32) -> Class {
        let point = code_point as usize;
        self.blocks[self.block_of[point / BLOCK] as usize][point % BLOCK]
    }

    /// The class of the character that starts at byte `at` of UTF-8 `text`, and the byte after it.
    #[inline(always)]
    pub fn at(&self, text: &[u8], at: usize) -> (Class, usize) {
        match text.get(at) {
            None => (Class::End, at),
            Some(&byte) if byte < 0x80 => (self.ascii[byte as usize], at + 1),
            Some(&byte) => self.at_multibyte(text, at, byte),
        }
    }

    fn at_multibyte(&self, text: &[u8], at: usize, first: u8) -> (Class, usize) {
        let tail = |index: usize| u32::from(text[at + index] & 0x3f);
        let (point, length) = match first {
            0xc0..=0xdf => (u32::from(first & 0x1f) << 6 | tail(1), 2),
            0xe0..=0xef => (u32::from(first & 0x0f) << 12 | tail(1) << 6 | tail(2), 3),
            _ => (u32::from(first & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
        };
        (self.of(point), at + length)
    }
}

fn ranges(pattern: &str) -> Vec<(u32, u32)> {
    let hir = regex_syntax::parse(pattern).expect("the four class patterns are constants");
    match hir.kind() {
        HirKind::Class(HirClass::Unicode(class)) => {
            class.iter().map(|range| (range.start() as u32, range.end() as u32)).collect()
        }
        // A class of ASCII characters alone, such as [\r\n], is kept as bytes.
        HirKind::Class(HirClass::Bytes(class)) => {
            class.iter().map(|range| (range.start().into(), range.end().into())).collect()
        }
        other => unreachable!("{pattern} is a class, not {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_regex_for_every_code_point() {
        let classes = Classes::get();
        let patterns =
            [r"\A\p{L}", r"\A\p{N}", r"\A[\r\n]", r"\A\s"].map(|p| fancy_regex::Regex::new(p).unwrap());
        let order = [Class::Letter, Class::Number, Class::Newline, Class::Space];
        for character in char::MIN..=char::MAX {
            let text = character.to_string();
            let found = patterns.iter().position(|p| p.is_match(&text).unwrap());
            let expected = found.map_or(Class::Other, |index| order[index]);
            assert_eq!(classes.at(text.as_bytes(), 0), (expected, text.len()), "{character:?}");
        }
        assert_eq!(classes.at(b"a", 1), (Class::End, 1));
    }

    #[test]
    fn alphabetic_is_wider_than_letter() {
        assert!('\u{0345}'.is_alphabetic()); // combining Greek ypogegrammeni, a mark
        assert_eq!(Classes::get().of(0x345), Class::Other);
        assert_eq!(Classes::get().of('Ⅷ' as u32), Class::Number);
        assert_eq!(Classes::get().of('ⓐ' as u32), Class::Other);
    }
}
