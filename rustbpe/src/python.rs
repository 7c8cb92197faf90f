//! The Python module: the same API as the registry's package `rustbpe`, and two constructors' worth more.
//!
//! No method panics; every error becomes a Python exception. The interpreter's lock is released for all real work.

use std::sync::{Arc, PoisonError, RwLock};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyInt, PyIterator, PyList, PyString};

use crate::count::{count, Chunk};
use crate::encode::Encoder;
use crate::error::Error;
use crate::split::Splitter;
use crate::{bpe, scanner};

/// Digits in a run, unless the caller brings a pattern: nanochat's choice for small vocabularies.
const DEFAULT_DIGITS: usize = 2;
/// A chunk is handed to the workers when it holds this many bytes, however few texts that is.
const CHUNK_BYTES: usize = 1 << 20;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// A vocabulary as trained or loaded; training replaces it as a whole, so other threads never see half of one.
struct Model {
    pattern: String,
    encoder: Encoder,
    /// One Python integer for every id, shared by all lists that we return: quicker, and 8 bytes a token instead of 40.
    integers: PyOnceLock<Vec<Py<PyInt>>>,
}

impl Model {
    fn new(
        pattern: String,
        splitter: Splitter,
        ranks: impl IntoIterator<Item = (Vec<u8>, u32)>,
    ) -> Result<Self, Error> {
        let encoder = Encoder::new(splitter, ranks)?;
        Ok(Self { pattern, encoder, integers: PyOnceLock::new() })
    }

    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let integers = self.integers.get_or_init(py, || {
            let all = 0..self.encoder.vocab_size();
            all.map(|id| PyInt::new(py, id).unbind()).collect()
        });
        PyList::new(py, ids.iter().map(|&id| &integers[id as usize]))
    }
}

/// A byte-level BPE tokenizer: 256 byte tokens until it is trained.
#[pyclass(frozen)]
struct Tokenizer {
    model: RwLock<Arc<Model>>,
}

impl Tokenizer {
    fn model(&self) -> Arc<Model> {
        self.model.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        let pattern = scanner::pattern(DEFAULT_DIGITS);
        let splitter = Splitter::new(&pattern)?;
        let bytes = (0..=255u8).map(|byte| vec![byte]).zip(0..);
        Ok(Self { model: RwLock::new(Arc::new(Model::new(pattern, splitter, bytes)?)) })
    }

    /// A tokenizer from the (bytes, rank) pairs of another: what get_mergeable_ranks() returns, or a dict's items().
    #[staticmethod]
    #[pyo3(signature = (ranks, pattern=None))]
    fn from_mergeable_ranks(ranks: Vec<(Vec<u8>, u32)>, pattern: Option<String>) -> PyResult<Self> {
        let pattern = pattern.unwrap_or_else(|| scanner::pattern(DEFAULT_DIGITS));
        let splitter = Splitter::new(&pattern)?;
        Ok(Self { model: RwLock::new(Arc::new(Model::new(pattern, splitter, ranks)?)) })
    }

    /// Train on the strings of `iterator`, which is read as a stream: at most `buffer_size` strings or 1 MB at a time.
    ///
    /// The vocabulary is smaller than `vocab_size` when the text has no more pairs to merge. Ties: the highest count,
    /// then the smallest pair of ids. `num_threads` is by default what the machine, or our CPU affinity, offers.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, *, num_threads=None))]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
        buffer_size: usize,
        pattern: Option<String>,
        num_threads: Option<usize>,
    ) -> PyResult<()> {
        if vocab_size < 256 {
            return Err(Error::VocabTooSmall(vocab_size).into());
        }
        if buffer_size == 0 {
            return Err(PyValueError::new_err("buffer_size is 0; it must be at least 1"));
        }
        let texts = iterator.try_iter()?.unbind();
        let pattern = pattern.unwrap_or_else(|| scanner::pattern(DEFAULT_DIGITS));
        let trained = py.detach(move || -> PyResult<Model> {
            let splitter = Splitter::new(&pattern)?;
            let counts = count(&splitter, threads(num_threads), || {
                Python::attach(|py| next_chunk(texts.bind(py), buffer_size))
            })?;
            let tokens = bpe::train(&counts, vocab_size, || Python::attach(|py| py.check_signals()))?;
            Ok(Model::new(pattern, splitter, tokens.into_iter().zip(0..))?)
        })?;
        *self.model.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(trained);
        Ok(())
    }

    /// The split pattern.
    fn get_pattern(&self) -> String {
        self.model().pattern.clone()
    }

    /// [(bytes, rank)] in order of rank: tiktoken's mergeable_ranks once made a dict.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let model = self.model();
        model.encoder.ranks().map(|(bytes, id)| (PyBytes::new(py, bytes), id)).collect()
    }

    /// One more than the highest id.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.model().encoder.vocab_size()
    }

    /// The ids of `text`. Nothing in it is special.
    fn encode<'py>(&self, py: Python<'py>, text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyList>> {
        let (model, text) = (self.model(), utf8(text)?);
        let ids = py.detach(|| model.encoder.encode(&text))?;
        model.list(py, &ids)
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD.
    fn decode(&self, ids: Vec<u32>) -> PyResult<String> {
        let bytes = self.model().encoder.decode(&ids)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The ids of each text, found on several threads.
    #[pyo3(signature = (texts, *, num_threads=None))]
    fn batch_encode<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        num_threads: Option<usize>,
    ) -> PyResult<Vec<Bound<'py, PyList>>> {
        let model = self.model();
        let texts = texts.iter().map(utf8).collect::<PyResult<Vec<_>>>()?;
        let all = py.detach(|| model.encoder.encode_batch(&texts, threads(num_threads)))?;
        all.iter().map(|ids| model.list(py, ids)).collect()
    }
}

/// The pieces that a split pattern cuts `text` into.
#[pyfunction]
#[pyo3(signature = (text, pattern=None))]
fn split(py: Python<'_>, text: &Bound<'_, PyString>, pattern: Option<String>) -> PyResult<Vec<String>> {
    let pattern = pattern.unwrap_or_else(|| scanner::pattern(DEFAULT_DIGITS));
    let text = utf8(text)?;
    let pieces = py.detach(|| -> Result<Vec<String>, Error> {
        Ok(Splitter::new(&pattern)?.pieces(&text)?.into_iter().map(String::from).collect())
    })?;
    Ok(pieces)
}

/// The text as UTF-8, without a copy where Python can lend it. A lone surrogate, which has no UTF-8, becomes U+FFFD and
/// a pair of them the character that they stand for, as in tiktoken.
fn utf8(text: &Bound<'_, PyString>) -> PyResult<PyBackedStr> {
    if let Ok(lent) = PyBackedStr::try_from(text.clone()) {
        return Ok(lent);
    }
    let encoded = text.call_method1("encode", ("utf-16-le", "surrogatepass"))?.cast_into::<PyBytes>()?;
    let units: Vec<u16> =
        encoded.as_bytes().chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    PyBackedStr::try_from(PyString::new(text.py(), &String::from_utf16_lossy(&units)))
}

fn next_chunk(texts: &Bound<'_, PyIterator>, buffer_size: usize) -> PyResult<Option<Chunk>> {
    let mut chunk = Chunk::default();
    while chunk.num_texts() < buffer_size && chunk.num_bytes() < CHUNK_BYTES {
        let Some(item) = texts.clone().next() else { break };
        let item = item?;
        let Ok(text) = item.cast::<PyString>() else {
            let kind = item.get_type();
            return Err(PyTypeError::new_err(format!("texts must be str, not {}", kind.name()?)));
        };
        chunk.push(&utf8(text)?);
    }
    Ok((chunk.num_texts() > 0).then_some(chunk))
}

fn threads(asked: Option<usize>) -> usize {
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()?;
    module.add_function(wrap_pyfunction!(split, module)?)
}
