//! The scanner against the regex engine, on the pattern that both implement.

use rustbpe::scanner::pattern;
use rustbpe::split::Splitter;

fn both(max_digits: usize) -> (Splitter, Splitter) {
    let pattern = pattern(max_digits);
    let scanner = Splitter::new(&pattern).unwrap();
    assert!(matches!(scanner, Splitter::Scanner(_)));
    (scanner, Splitter::regex(&pattern).unwrap())
}

fn assert_same(scanner: &Splitter, regex: &Splitter, text: &str) {
    let pieces = scanner.pieces(text).unwrap();
    assert_eq!(pieces, regex.pieces(text).unwrap(), "on {text:?}");
    assert_eq!(pieces.concat(), text, "pieces tile the text");
}

/// Every class, every character that the pattern names, and look-alikes: long s, Kelvin sign, no-break space, a
/// combining mark, letter-like numbers, line separators that are not line breaks.
const TELLING: [char; 32] = [
    'a', 'S', 'l', 'v', 'e', 'R', 't', 'é', 'ſ', '\u{212a}', '中', '1', '9', '٣', 'Ⅷ', '½', ' ', '\t',
    '\u{a0}', '\n', '\r', '\u{b}', '\u{85}', '\u{2028}', '\'', '’', '.', '$', '\u{301}', 'ⓐ', '\0', '🙂',
];

#[test]
fn all_strings_of_up_to_four_telling_characters() {
    let (scanner, regex) = both(2);
    for length in 0..=4u32 {
        for number in 0..TELLING.len().pow(length) {
            let text: String =
                (0..length).map(|place| TELLING[number / TELLING.len().pow(place) % TELLING.len()]).collect();
            assert_same(&scanner, &regex, &text);
        }
    }
}

#[test]
fn every_code_point_among_neighbours() {
    let (scanner, regex) = both(1);
    for character in char::MIN..=char::MAX {
        assert_same(
            &scanner,
            &regex,
            &format!("{character}a {character} 1{character}\n'{character}.{character}"),
        );
    }
}

#[test]
fn long_random_strings_with_every_length_of_digit_run() {
    let mut state = 7u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for max_digits in 1..=9 {
        let (scanner, regex) = both(max_digits);
        for _ in 0..5_000 {
            let length = random(60);
            let text: String = (0..length)
                .map(|_| match random(12) {
                    0 => char::from_u32(random(0x11_0000) as u32).unwrap_or('\u{fffd}'),
                    1..=3 => char::from(b'0' + random(10) as u8),
                    4 => '\'',
                    _ => TELLING[random(TELLING.len())],
                })
                .collect();
            assert_same(&scanner, &regex, &text);
        }
    }
}

#[test]
fn any_other_pattern_goes_to_the_regex() {
    let other = [pattern(10), pattern(2) + "|x", r"\w+|\W+".to_string()];
    for pattern in other {
        assert!(matches!(Splitter::new(&pattern).unwrap(), Splitter::Regex(_)));
    }
    assert!(Splitter::new("(").is_err());
    assert_eq!(Splitter::new("a*").unwrap().pieces("baab").unwrap(), ["aa"]);
}
