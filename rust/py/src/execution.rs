//! What a schedule comes to, for engines outside of Rust: they execute the same tiles in the same slots.

use futurefill::Latency;
use pyo3::prelude::*;
use pyo3::types::{PyAny, PyTuple};

use crate::args::{self, optional_size, size};
use crate::schedule::Schedule;

/// A schedule cut to a capacity and a filter length: what a cache executes.
#[pyclass(frozen, module = "futurefill_rs._core")]
pub struct Execution(futurefill::Execution);

/// One level of tiles as it will run.
#[pyclass(frozen, get_all, module = "futurefill_rs._core")]
pub struct Level {
    /// Positions of a block: inputs and outputs of one tile.
    block: usize,
    /// Blocks that take part in one tile at most, and filter partitions.
    parts: usize,
    /// Blocks whose spectra are kept.
    kept: usize,
    /// Whether its tiles begin a block early and give the outputs of the next block but one.
    delayed: bool,
}

/// A tile: which blocks take part, and the columns of the rings that it reads and writes.
#[pyclass(frozen, get_all, module = "futurefill_rs._core")]
pub struct TileIndex {
    /// Place of its level in `Execution.levels`.
    level: usize,
    /// Whether it is a delayed level's: its filter partitions begin with the second.
    delayed: bool,
    /// Slot of the newest block.
    newest: usize,
    /// Kept blocks that take part, the newest included.
    count: usize,
    /// First column of the newest block of inputs.
    source: usize,
    /// First column of its outputs: of the pending ones, or of the two blocks of a delayed level.
    target: usize,
    /// Whether other tiles have added to these outputs already.
    add: bool,
}

#[pymethods]
impl Execution {
    #[new]
    fn new(
        schedule: &Schedule,
        capacity: Option<&Bound<'_, PyAny>>,
        filter_length: &Bound<'_, PyAny>,
        latency: &str,
    ) -> PyResult<Self> {
        let capacity = optional_size(capacity, "capacity", 0)?;
        let filter_length = size(filter_length, "filter_length", 1)?;
        Ok(Self(futurefill::Execution::new(&schedule.0, capacity, filter_length, args::latency(latency)?)))
    }

    /// Length of the base block, None for the direct sum without tiles.
    #[getter]
    fn base(&self) -> Option<usize> {
        (self.0.base > 0).then_some(self.0.base)
    }

    /// Positions of inputs and pending outputs that are kept.
    #[getter]
    fn ring(&self) -> usize {
        self.0.ring
    }

    /// The levels, the lowest first.
    #[getter]
    fn levels<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let smooth = self.0.latency == Latency::Smooth;
        let levels = self.0.levels.iter().enumerate().map(|(k, level)| Level {
            block: level.block,
            parts: level.parts,
            kept: level.kept(),
            delayed: smooth && k > 0,
        });
        PyTuple::new(py, levels.map(|level| Bound::new(py, level)).collect::<PyResult<Vec<_>>>()?)
    }

    /// The tiles whose newest block of inputs ends at `clock`, the highest level's first.
    fn tiles(&self, clock: usize) -> Vec<TileIndex> {
        let run = &self.0;
        if run.levels.is_empty() || clock == 0 || !clock.is_multiple_of(run.base) {
            return Vec::new();
        }
        let delayed = |k: usize| {
            let block = run.levels[k].block;
            clock.is_multiple_of(block).then(|| TileIndex::of(run.delayed(k, clock / block), true))
        };
        let early = (run.levels.len() - run.delayed_levels().len()..run.levels.len()).rev().filter_map(delayed);
        early.chain([TileIndex::of(run.due(clock), false)]).collect()
    }
}

impl TileIndex {
    fn of(tile: futurefill::TileIndex, delayed: bool) -> Self {
        let futurefill::TileIndex { level, newest, count, from, to, add } = tile;
        Self { level, delayed, newest, count, source: from, target: to, add }
    }
}
