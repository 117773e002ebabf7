//! Schedules as Python data.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use futurefill::{AutoOptions, Profile};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::args::{self, optional_size, shape_text, size, type_name};
use crate::errors;

/// How the triangle (input time, output time) is tiled: a base block and the factors that multiply it.
///
/// `base` positions wait in the base block and are summed directly (None: no tiles at all, the direct sum);
/// `fans` multiply it level by level up to the top block. Immutable, hashable, picklable, comparable.
/// Any base of at least 1 and any fans of at least 2 give the exact result.
#[pyclass(frozen, eq, module = "futurefill_rs")]
#[derive(Clone, PartialEq)]
pub struct Schedule(pub futurefill::Schedule);

#[pymethods]
impl Schedule {
    #[new]
    #[pyo3(signature = (base, fans=None))]
    fn new(base: Option<&Bound<'_, PyAny>>, fans: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let base = optional_size(base, "base", 1)?;
        let fans = match fans {
            None => Vec::new(),
            Some(fans) => fans
                .try_iter()
                .map_err(|_| errors::type_error("fans", "a sequence of integers", &type_name(fans)))?
                .map(|fan| size(&fan?, "fans", 2))
                .collect::<PyResult<_>>()?,
        };
        futurefill::Schedule::new(base, fans).map(Self).map_err(errors::engine)
    }

    /// No tiles: the direct sum over all lags.
    #[staticmethod]
    fn naive() -> Self {
        Self(futurefill::Schedule::naive())
    }

    /// The paper's Algorithm 1: one level of blocks of `epoch` positions (default: about sqrt(horizon log horizon)).
    #[staticmethod]
    #[pyo3(signature = (horizon, epoch=None))]
    fn epoched(horizon: &Bound<'_, PyAny>, epoch: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let (horizon, epoch) = (size(horizon, "horizon", 1)?, optional_size(epoch, "epoch", 1)?);
        futurefill::Schedule::epoched(horizon, epoch).map(Self).map_err(errors::engine)
    }

    /// The paper's Algorithm 2: block lengths double from a small base up to the horizon.
    #[staticmethod]
    fn continuous(horizon: &Bound<'_, PyAny>) -> PyResult<Self> {
        let horizon = size(horizon, "horizon", 1)?;
        errors::shielded(|| Ok(futurefill::Schedule::continuous(horizon))).map(Self)
    }

    /// The schedule the cost model prefers.
    ///
    /// `horizon` (None: unbounded) and `filter_len` are lengths, `rows` the number of channels of all sequences,
    /// `itemsize` the bytes of one number (4 or 8), `max_memory` bytes of cache per sequence, `device` "cpu" or "gpu",
    /// `latency` "throughput" or "smooth".
    #[staticmethod]
    #[pyo3(signature = (horizon, filter_len, *, rows=None, itemsize=None, max_memory=None, device="cpu", latency="throughput"))]
    fn auto(
        horizon: Option<&Bound<'_, PyAny>>,
        filter_len: &Bound<'_, PyAny>,
        rows: Option<&Bound<'_, PyAny>>,
        itemsize: Option<&Bound<'_, PyAny>>,
        max_memory: Option<&Bound<'_, PyAny>>,
        device: &str,
        latency: &str,
    ) -> PyResult<Self> {
        let horizon = optional_size(horizon, "horizon", 1)?;
        let filter_len = size(filter_len, "filter_len", 1)?;
        let options = AutoOptions {
            rows: optional_size(rows, "rows", 0)?.unwrap_or(1),
            elem_bytes: match optional_size(itemsize, "itemsize", 1)?.unwrap_or(4) {
                bytes @ (4 | 8) => bytes,
                bytes => return Err(errors::value("itemsize", "4 or 8", &bytes.to_string())),
            },
            max_memory: optional_size(max_memory, "max_memory", 1)?,
            profile: match device {
                "cpu" => Profile::Cpu,
                "gpu" => Profile::Gpu,
                _ => return Err(errors::value("device", "'cpu' or 'gpu'", &format!("{device:?}"))),
            },
            latency: args::latency(latency)?,
        };
        futurefill::Schedule::auto(horizon, filter_len, &options).map(Self).map_err(errors::engine)
    }

    /// Length of the base block, None for the direct sum.
    #[getter]
    fn base(&self) -> Option<usize> {
        self.0.base()
    }

    /// Factors from one block length to the next.
    #[getter]
    fn fans<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.fans())
    }

    /// What this schedule costs over `horizon` positions (None: a stream without end) with filters of `filter_len` lags.
    fn cost(&self, horizon: Option<&Bound<'_, PyAny>>, filter_len: &Bound<'_, PyAny>) -> PyResult<Cost> {
        let horizon = optional_size(horizon, "horizon", 1)?;
        let filter_len = size(filter_len, "filter_len", 1)?;
        let cost = errors::shielded(|| Ok(self.0.cost(horizon, filter_len)))?;
        Ok(Cost { flops: cost.flops, bytes_moved: cost.bytes_moved, state_bytes: cost.state_bytes })
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        hasher.finish()
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let fans = slf.get().fans(slf.py())?;
        Ok((slf.get_type().into_any(), (slf.get().base(), fans).into_pyobject(slf.py())?))
    }

    fn __repr__(&self) -> String {
        let base = self.0.base().map_or_else(|| "None".to_owned(), |base| base.to_string());
        format!("Schedule(base={base}, fans={})", shape_text(self.0.fans()))
    }
}

/// Analytic cost of a schedule in float32.
#[pyclass(frozen, get_all, module = "futurefill_rs._core")]
pub struct Cost {
    /// Floating-point operations per position and channel.
    flops: f64,
    /// Bytes moved per position and channel.
    bytes_moved: f64,
    /// Bytes of cache per channel.
    state_bytes: f64,
}

#[pymethods]
impl Cost {
    fn __repr__(&self) -> String {
        format!("Cost(flops={}, bytes_moved={}, state_bytes={})", self.flops, self.bytes_moved, self.state_bytes)
    }
}
