//! Streaming training against the rule said plainly, on random small texts.

use std::collections::HashMap;

use rustbpe::bpe::train;
use rustbpe::count::{count, Chunk};
use rustbpe::error::Error;
use rustbpe::scanner::pattern;
use rustbpe::split::Splitter;

/// Recount everything for every merge.
fn plain(text: &str, splitter: &Splitter, vocab_size: usize) -> Vec<Vec<u8>> {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    let mut pieces: Vec<Vec<usize>> =
        splitter.pieces(text).unwrap().iter().map(|piece| piece.bytes().map(usize::from).collect()).collect();
    while tokens.len() < vocab_size {
        let mut counts: HashMap<(usize, usize), u64> = HashMap::new();
        for pair in pieces.iter().flat_map(|piece| piece.windows(2)) {
            *counts.entry((pair[0], pair[1])).or_default() += 1;
        }
        let fresh = counts.into_iter().filter(|((left, right), _)| {
            let bytes = [&tokens[*left][..], &tokens[*right][..]].concat();
            !tokens.contains(&bytes)
        });
        let Some((best, _)) = fresh.max_by_key(|&(pair, count)| (count, std::cmp::Reverse(pair))) else {
            break;
        };
        for piece in &mut pieces {
            let mut at = 0;
            while at + 1 < piece.len() {
                if (piece[at], piece[at + 1]) == best {
                    piece[at] = tokens.len();
                    piece.remove(at + 1);
                }
                at += 1;
            }
        }
        tokens.push([&tokens[best.0][..], &tokens[best.1][..]].concat());
    }
    tokens
}

fn streamed(texts: &[String], splitter: &Splitter, num_threads: usize, vocab_size: usize) -> Vec<Vec<u8>> {
    let mut left = texts.iter();
    let counts = count::<Error>(splitter, num_threads, || {
        Ok(left.next().map(|text| {
            let mut chunk = Chunk::default();
            chunk.push(text);
            chunk
        }))
    });
    train::<Error>(&counts.unwrap(), vocab_size, || Ok(())).unwrap()
}

#[test]
fn training_is_the_plain_rule_on_random_texts() {
    let splitter = Splitter::new(&pattern(2)).unwrap();
    let mut state = 3u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for trial in 0..400 {
        let letters = 1 + random(4);
        let length = random(400);
        let text: String = (0..length)
            .map(|_| match random(9) {
                0 => ' ',
                1 if letters > 3 => 'é',
                _ => char::from(b'a' + random(letters) as u8),
            })
            .collect();
        let tokens = streamed(std::slice::from_ref(&text), &splitter, 1, 340);
        assert_eq!(tokens, plain(&text, &splitter, 340), "trial {trial}: {text:?}");
    }
}

#[test]
fn threads_and_chunks_change_nothing() {
    let splitter = Splitter::new(&pattern(2)).unwrap();
    let texts: Vec<String> =
        (0..300).map(|n| format!("the {n} cats' {} sat on {}th", n * 7, n % 5)).collect();
    let alone = streamed(&[texts.join("\n")], &splitter, 1, 400);
    let chunked: Vec<String> =
        texts.iter().enumerate().map(|(n, t)| if n > 0 { format!("\n{t}") } else { t.clone() }).collect();
    for num_threads in [1, 2, 5] {
        assert_eq!(streamed(&chunked, &splitter, num_threads, 400), alone);
    }
}

#[test]
fn a_pattern_that_gives_up_is_an_error_and_not_a_hang() {
    let splitter = Splitter::new("(?i)(a|b|ab)*(?>c)").unwrap();
    let text = "abababab".repeat(8);
    let mut num_chunks = 0;
    let outcome = count::<Error>(&splitter, 2, || {
        num_chunks += 1;
        let mut chunk = Chunk::default();
        chunk.push(&text);
        Ok((num_chunks < 100_000).then_some(chunk))
    });
    assert!(matches!(outcome, Err(Error::Split(_))));
    assert!(num_chunks < 100_000, "the stream is read no further");
}

#[test]
fn an_error_of_the_producer_comes_through() {
    let splitter = Splitter::new(&pattern(1)).unwrap();
    let outcome = count(&splitter, 2, || Err(Error::TooMuchText));
    assert_eq!(outcome.err(), Some(Error::TooMuchText));
}
