//! How often each piece occurs in a stream of text, on several threads.
//!
//! The caller's thread pulls text (in Python it needs the interpreter for that) while workers split and count what
//! has been pulled. Memory holds the chunks under way and the distinct pieces, never the stream.

use std::sync::mpsc::{sync_channel, Receiver};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
use crate::split::Splitter;
use crate::table::{Front, Key, PieceTable, Slot};

/// Each worker has a table of its own: beyond this many the copies cost more than the workers bring.
const MOST_WORKERS: usize = 16;
/// Slots that go to the big table at a time.
const LEAVING: usize = 512;

/// Several texts end to end; a piece never spans two of them.
#[derive(Default)]
pub struct Chunk {
    text: String,
    ends: Vec<usize>,
}

impl Chunk {
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }

    pub fn num_bytes(&self) -> usize {
        self.text.len()
    }

    pub fn num_texts(&self) -> usize {
        self.ends.len()
    }

    fn count(&self, splitter: &Splitter, counts: &mut Counts) -> Result<(), Error> {
        let mut start = 0;
        for &end in &self.ends {
            let text = &self.text[start..end];
            splitter.for_each(text, |from, to| counts.add(text.as_bytes(), from, to))?;
            start = end;
        }
        Ok(())
    }
}

/// Counts pieces: the common ones in the small table, from where they move to the big one when another takes their slot.
#[derive(Default)]
struct Counts {
    front: Front,
    /// Slots on their way to the big table. It lies far from the processor: sent there together, they wait together.
    leaving: Vec<Slot>,
    table: PieceTable,
}

impl Counts {
    #[inline(always)]
    fn add(&mut self, text: &[u8], start: usize, end: usize) {
        let Some(key) = Key::new(text, start, end) else {
            *self.table.long_entry(&text[start..end]) += 1;
            return;
        };
        let (slot, found) = self.front.slot(key);
        if found {
            slot.value += 1;
        } else if let Some(old) = Front::replace(slot, key, 1) {
            self.leaving.push(old);
            if self.leaving.len() == LEAVING {
                self.settle();
            }
        }
    }

    #[cold]
    fn settle(&mut self) {
        self.leaving.drain(..).for_each(|slot| self.table.add_slot(slot));
    }

    fn finish(mut self) -> PieceTable {
        self.settle();
        self.front.drain().for_each(|slot| self.table.add_slot(slot));
        self.table
    }
}

/// Count the pieces of every chunk that `produce` gives until it gives None.
pub fn count<E: From<Error>>(
    splitter: &Splitter,
    num_threads: usize,
    mut produce: impl FnMut() -> Result<Option<Chunk>, E>,
) -> Result<PieceTable, E> {
    let num_workers = num_threads.clamp(1, MOST_WORKERS);
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel::<Chunk>(num_workers);
        let receiver = Arc::new(Mutex::new(receiver));
        let workers: Vec<_> = (0..num_workers)
            .map(|_| {
                let (splitter, receiver) = (splitter.clone(), receiver.clone());
                scope.spawn(move || work(&splitter, &receiver))
            })
            .collect();
        // The workers alone hold the receiver: when the last of them is gone, a send fails instead of waiting for ever.
        drop(receiver);
        let produced = loop {
            match produce() {
                Ok(Some(chunk)) => {
                    // A worker that leaves before the sender does has failed; its error is read below.
                    let failed = workers.iter().any(|worker| worker.is_finished());
                    if failed || sender.send(chunk).is_err() {
                        break Ok(());
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        drop(sender);
        let mut total = PieceTable::default();
        let mut outcome = produced;
        for worker in workers {
            match worker.join().expect("a worker returns its errors") {
                Ok(counts) if total.is_empty() => total = counts,
                Ok(counts) => total.add(&counts),
                Err(error) => outcome = outcome.and(Err(error.into())),
            }
        }
        outcome.map(|()| total)
    })
}

fn work(splitter: &Splitter, chunks: &Mutex<Receiver<Chunk>>) -> Result<PieceTable, Error> {
    let mut counts = Counts::default();
    loop {
        let next = chunks.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match next {
            Ok(chunk) => chunk.count(splitter, &mut counts)?,
            Err(_) => return Ok(counts.finish()),
        }
    }
}
