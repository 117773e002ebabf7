//! The immutable half: filters and how they will be used.

use std::sync::Arc;

use futurefill::{Error, Execution, Latency, Method, PlanOptions, State, watch};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};

use crate::args::{self, optional_size, shape_text, type_name};
use crate::arrays::{Float, Input, Output, Precision, filled};
use crate::cache::Cache;
use crate::engine::Engine;
use crate::errors;
use crate::schedule::Schedule;
use crate::watch::watched;

/// A plan of the engine, of either precision.
trait Prepared: Send + Sync {
    fn precision(&self) -> Precision;
    fn schedule(&self) -> &futurefill::Schedule;
    fn filter_length(&self) -> usize;
    fn filter_shape(&self) -> &[usize];
    fn horizon(&self) -> Option<usize>;
    fn nbytes(&self) -> usize;
    fn workers(&self) -> usize;
    fn execution_for(&self, capacity: Option<usize>) -> Execution;
    fn cache_bytes(&self, shape: &[usize], capacity: Option<usize>) -> PyResult<f64>;
    fn filters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>>;
    fn new_cache(&self, py: Python<'_>, shape: &[usize]) -> PyResult<Box<dyn Engine>>;
    fn prefill<'py>(
        &self,
        prompt: &Input<'py>,
        max_new: Option<usize>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyAny>, Box<dyn Engine>)>;
    /// `state`: the fields that `_state.unseal` has found.
    fn load(&self, state: &Bound<'_, PyAny>) -> PyResult<Box<dyn Engine>>;
}

/// Filters prepared for generation: immutable, shared by any number of caches and threads. Made by `plan`.
///
/// | method | argument | result |
/// | --- | --- | --- |
/// | `new_cache(shape=None)` | shape `C` of one input position, default the filters' `F` | an empty cache |
/// | `prefill(prompt, max_new=None)` | prompt `(*C, P)` | `y (*broadcast(C, F), P)` and a cache for `max_new` more |
/// | `load_cache(state)` | a dict of `Cache.state_dict` | a cache that goes on where it was taken |
#[pyclass(frozen, module = "futurefill_rs._core")]
pub struct Plan {
    plan: Box<dyn Prepared>,
    /// crc32 of the filters' bytes: ties a saved state to its filters.
    pub digest: u32,
    pub latency: Latency,
}

#[pymethods]
impl Plan {
    /// The schedule in use.
    #[getter]
    fn schedule(&self) -> Schedule {
        Schedule(self.plan.schedule().clone())
    }

    /// Number of lags L.
    #[getter]
    pub fn filter_length(&self) -> usize {
        self.plan.filter_length()
    }

    /// Shape F of the filters without their lag axis.
    #[getter]
    fn filter_shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.filter_dims())
    }

    /// The filters `(*F, L)` in the plan's precision: a copy.
    #[getter]
    fn filters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.plan.filters(py)
    }

    /// `"throughput"` or `"smooth"`.
    #[getter]
    fn latency(&self) -> &'static str {
        match self.latency {
            Latency::Throughput => "throughput",
            Latency::Smooth => "smooth",
        }
    }

    /// How many positions one cache serves; None: without bound.
    #[getter]
    pub fn horizon(&self) -> Option<usize> {
        self.plan.horizon()
    }

    /// Precision of caches and arithmetic, as a numpy dtype.
    #[getter]
    fn dtype<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        py.import("numpy")?.call_method1("dtype", (self.precision().name(),))
    }

    /// Bytes held by the plan: filters and their spectra.
    #[getter]
    fn nbytes(&self) -> usize {
        self.plan.nbytes()
    }

    /// Number of threads that work on a large tile.
    #[getter]
    fn workers(&self) -> usize {
        self.plan.workers()
    }

    /// An empty cache at position 0.
    ///
    /// `shape`: shape `C` of one input position (default: the filters' `F`); it must broadcast with `F`.
    /// Raises ValueError for a shape that does not, MemoryError where the machine has not enough memory.
    #[pyo3(signature = (shape=None))]
    fn new_cache(slf: &Bound<'_, Self>, shape: Option<&Bound<'_, PyAny>>) -> PyResult<Cache> {
        let this = slf.get();
        let shape = match shape {
            Some(shape) => args::shape(shape, "shape")?,
            None => this.filter_dims().to_vec(),
        };
        args::broadcast("shape", &shape, this.filter_dims())?;
        this.check_room(&shape, this.horizon())?;
        let engine = errors::shielded(|| this.plan.new_cache(slf.py(), &shape))?;
        Ok(Cache::new(slf.clone().unbind(), engine))
    }

    /// Outputs at every position of a prompt, and a cache that goes on behind it.
    ///
    /// `prompt (*C, P)`, P >= 0, of at most the plan's precision -> `(y, cache)`, `y (*broadcast(C, F), P)` in the
    /// prompt's dtype.
    /// `max_new`: how many more positions the cache serves, which alone decides its size (None: what is left of the
    /// horizon). `progress(done, total)` is told how much of the work is done. Raises CapacityError if P + max_new
    /// exceeds the horizon.
    #[pyo3(signature = (prompt, max_new=None, *, progress=None))]
    fn prefill<'py>(
        slf: &Bound<'py, Self>,
        prompt: &Bound<'py, PyAny>,
        max_new: Option<&Bound<'py, PyAny>>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyAny>, Cache)> {
        let this = slf.get();
        let prompt = Input::of_plan(prompt, "prompt", this.precision())?;
        let max_new = optional_size(max_new, "max_new", 0)?;
        let (channels, len) = split_time(prompt.shape(), "prompt", "positions")?;
        args::broadcast("prompt", channels, this.filter_dims())?;
        this.check_room(channels, max_new.or(this.horizon().map(|horizon| horizon.saturating_sub(len))))?;
        let (y, engine) = errors::shielded(|| this.plan.prefill(&prompt, max_new, progress))?;
        Ok((y, Cache::new(slf.clone().unbind(), engine)))
    }

    /// A cache that continues a saved one: bit for bit where schedule, horizon and latency are the plan's own.
    ///
    /// `state`: what `Cache.state_dict` gave, in this or another process, also through `np.savez` or safetensors.
    /// Raises ValueError if it is damaged or of other filters.
    fn load_cache(slf: &Bound<'_, Self>, state: &Bound<'_, PyAny>) -> PyResult<Cache> {
        let this = slf.get();
        let py = slf.py();
        let plan_side = PyDict::new(py);
        plan_side.set_item("dtype", this.plan.precision().name())?;
        plan_side.set_item("base", this.plan.schedule().base())?;
        plan_side.set_item("fans", PyTuple::new(py, this.plan.schedule().fans())?)?;
        plan_side.set_item("smooth", this.latency == Latency::Smooth)?;
        plan_side.set_item("horizon", this.plan.horizon())?;
        plan_side.set_item("filter_shape", PyTuple::new(py, this.filter_dims())?)?;
        plan_side.set_item("filter_length", this.plan.filter_length())?;
        plan_side.set_item("filter_digest", this.digest)?;
        let state = py.import("futurefill_rs._state")?.call_method("unseal", (state,), Some(&plan_side))?;
        let engine = errors::shielded(|| this.plan.load(&state))?;
        Ok(Cache::new(slf.clone().unbind(), engine))
    }

    /// Immutable, and therefore its own copy.
    fn __copy__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    /// Pickled as filters, options and schedule; spectra are made again.
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let filters = self.filters(py)?;
        let options = (filters, self.horizon(), self.schedule(), self.workers(), self.latency());
        Ok((py.import("futurefill_rs._state")?.getattr("plan")?, options.into_pyobject(py)?))
    }

    fn __repr__(&self) -> String {
        let horizon = self.horizon().map_or_else(|| "None".to_owned(), |horizon| horizon.to_string());
        let shape: Vec<usize> = self.filter_dims().iter().copied().chain([self.filter_length()]).collect();
        format!(
            "Plan(filters={}, horizon={horizon}, schedule={}, dtype={})",
            shape_text(&shape),
            self.plan.schedule(),
            self.precision().name(),
        )
    }
}

impl Plan {
    pub fn precision(&self) -> Precision {
        self.plan.precision()
    }

    pub fn filter_dims(&self) -> &[usize] {
        self.plan.filter_shape()
    }

    /// What a cache of this capacity executes.
    pub fn execution_for(&self, capacity: Option<usize>) -> Execution {
        self.plan.execution_for(capacity)
    }

    /// Refuses a cache that no memory of this machine could hold, before any part of it is touched: systems that
    /// promise more than they have end the process instead.
    fn check_room(&self, shape: &[usize], capacity: Option<usize>) -> PyResult<()> {
        let outputs = args::broadcast("shape", shape, self.filter_dims())?;
        let rows = |shape: &[usize]| shape.iter().map(|&n| n as f64).product::<f64>();
        // Besides its numbers, each row takes some words of book-keeping.
        let mut bytes = (16.0 * (rows(shape) + rows(&outputs))) as usize;
        if bytes < 1 << 40 {
            bytes = bytes.saturating_add(self.plan.cache_bytes(shape, capacity)? as usize);
        }
        let mut room = Vec::<u8>::new();
        room.try_reserve_exact(bytes).map_err(|_| errors::out_of_memory(bytes))?;
        std::hint::black_box(&room);
        Ok(())
    }
}

/// Prepares filters for generation.
///
/// `filters (*F, L)`, lag 0 first, float32 or float64; see `futurefill_rs.plan` for the other arguments. `workers` is
/// a number of threads here, `method` a name or a `Schedule`.
#[pyfunction]
#[pyo3(signature = (filters, horizon=None, method=None, *, workers=1, max_memory=None, latency="throughput",
                    progress=None))]
#[allow(clippy::too_many_arguments)]
pub fn plan(
    py: Python<'_>,
    filters: &Bound<'_, PyAny>,
    horizon: Option<&Bound<'_, PyAny>>,
    method: Option<&Bound<'_, PyAny>>,
    workers: usize,
    max_memory: Option<&Bound<'_, PyAny>>,
    latency: &str,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<Plan> {
    let filters = Input::new(filters, "filters")?;
    let latency = args::latency(latency)?;
    let options = PlanOptions {
        horizon: optional_size(horizon, "horizon", 1)?,
        method: method.map_or(Ok(Method::Auto), parse_method)?,
        workers: if workers == 0 { return Err(errors::value("workers", "a positive integer", "0")) } else { workers },
        max_memory: optional_size(max_memory, "max_memory", 1)?,
        latency,
    };
    let (plan, digest) = errors::shielded(|| match filters.precision {
        Precision::F32 => build::<f32>(py, &filters, options, progress),
        Precision::F64 => build::<f64>(py, &filters, options, progress),
    })?;
    Ok(Plan { plan, digest, latency })
}

fn parse_method(method: &Bound<'_, PyAny>) -> PyResult<Method> {
    if let Ok(schedule) = method.cast::<Schedule>() {
        return Ok(Method::Schedule(schedule.get().0.clone()));
    }
    let expected = "'auto', 'naive', 'epoched', 'continuous' or a Schedule";
    let Ok(name) = method.cast::<PyString>() else {
        return Err(errors::type_error("method", expected, &type_name(method)));
    };
    match &*name.to_string_lossy() {
        "auto" => Ok(Method::Auto),
        "naive" => Ok(Method::Naive),
        "epoched" => Ok(Method::Epoched),
        "continuous" => Ok(Method::Continuous),
        other => Err(errors::value("method", expected, &format!("'{other}'"))),
    }
}

/// Splits a shape at its last axis, which is time or lag.
pub fn split_time<'a>(shape: &'a [usize], arg: &str, axis: &str) -> PyResult<(&'a [usize], usize)> {
    match shape.split_last() {
        Some((&len, channels)) => Ok((channels, len)),
        None => Err(errors::value(arg, &format!("a last axis of {axis}"), "shape ()")),
    }
}

/// Filters need at least one lag.
pub fn split_lags(shape: &[usize]) -> PyResult<(&[usize], usize)> {
    match split_time(shape, "filters", "lags")? {
        (_, 0) => Err(errors::value("filters", "at least one lag", &format!("shape {}", shape_text(shape)))),
        split => Ok(split),
    }
}

fn build<T: Float>(
    py: Python<'_>,
    filters: &Input<'_>,
    options: PlanOptions,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<(Box<dyn Prepared>, u32)> {
    let (dims, lags) = split_lags(filters.shape())?;
    let array = filters.contiguous()?;
    let numbers = array.numbers();
    let total = filters.shape().iter().product();
    let (plan, digest) = watched(py, total, progress, || {
        let values = numbers.to::<T>()?;
        let digest = digest(&values, entry_name(dims, lags))?;
        Ok((futurefill::Plan::new(&values, dims, lags, options)?, digest))
    })?;
    Ok((Box::new(plan), digest))
}

/// crc32 of the filters' bytes. Refuses NaN, which would spread to every output.
fn digest<T: Float>(filters: &[T], shape: impl Fn(usize) -> String) -> Result<u32, Error> {
    const PIECE: usize = 1 << 20;
    let mut hasher = crc32fast::Hasher::new();
    for (k, piece) in filters.chunks(PIECE).enumerate() {
        if let Some(at) = piece.iter().position(|value| value.as_f64().is_nan()) {
            let got = format!("NaN at {}", shape(k * PIECE + at));
            return Err(Error::Value { arg: "filters", expected: "numbers".into(), got });
        }
        // SAFETY: any initialised numbers may be read as bytes.
        hasher.update(unsafe { std::slice::from_raw_parts(piece.as_ptr().cast::<u8>(), size_of_val(piece)) });
        watch::check();
    }
    Ok(hasher.finalize())
}

/// The index of an entry of filters `(*dims, lags)` in Python's notation, by its place in C order.
fn entry_name(dims: &[usize], lags: usize) -> impl Fn(usize) -> String {
    move |mut at| {
        let mut index: Vec<usize> = dims
            .iter()
            .chain([&lags])
            .rev()
            .map(|n| {
                let i = at % n;
                at /= n;
                i
            })
            .collect();
        index.reverse();
        format!("index {}", shape_text(&index))
    }
}

impl<T: Float> Prepared for Arc<futurefill::Plan<T>> {
    fn precision(&self) -> Precision {
        T::PRECISION
    }

    fn schedule(&self) -> &futurefill::Schedule {
        futurefill::Plan::schedule(self)
    }

    fn filter_length(&self) -> usize {
        futurefill::Plan::filter_length(self)
    }

    fn filter_shape(&self) -> &[usize] {
        futurefill::Plan::filter_shape(self)
    }

    fn horizon(&self) -> Option<usize> {
        futurefill::Plan::horizon(self)
    }

    fn nbytes(&self) -> usize {
        futurefill::Plan::nbytes(self)
    }

    fn workers(&self) -> usize {
        futurefill::Plan::workers(self)
    }

    fn execution_for(&self, capacity: Option<usize>) -> Execution {
        futurefill::Plan::execution_for(self, capacity)
    }

    fn cache_bytes(&self, shape: &[usize], capacity: Option<usize>) -> PyResult<f64> {
        futurefill::Plan::cache_bytes(self, shape, capacity).map_err(errors::engine)
    }

    fn filters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let shape: Vec<usize> = (**self).filter_shape().iter().copied().chain([(**self).filter_length()]).collect();
        filled(py, &shape, futurefill::Plan::filters(self)).map(Bound::into_any)
    }

    fn new_cache(&self, py: Python<'_>, shape: &[usize]) -> PyResult<Box<dyn Engine>> {
        Ok(Box::new(watched(py, 0, None, || futurefill::Plan::new_cache(self, shape))?))
    }

    fn prefill<'py>(
        &self,
        prompt: &Input<'py>,
        max_new: Option<usize>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyAny>, Box<dyn Engine>)> {
        let (channels, len) = split_time(prompt.shape(), "prompt", "positions")?;
        let mut shape = args::broadcast("prompt", channels, (**self).filter_shape())?;
        shape.push(len);
        if let Some(horizon) = (**self).horizon() {
            let needed = len.saturating_add(max_new.unwrap_or(0));
            if needed > horizon {
                return Err(errors::engine(Error::Capacity { needed, remaining: horizon }));
            }
        }
        let source = prompt.contiguous()?;
        let (py, x) = (prompt.py(), source.numbers());
        let output = Output::new(py, None, prompt.precision, &shape, None)?;
        // SAFETY: new.
        let room = unsafe { output.room() };
        let cache = watched(py, output.len(), progress, || {
            let x = x.to::<T>()?;
            room.fill(|y| futurefill::Plan::prefill(self, &x, channels, len, max_new, y))
        })?;
        Ok((output.finish()?, Box::new(cache)))
    }

    fn load(&self, state: &Bound<'_, PyAny>) -> PyResult<Box<dyn Engine>> {
        let py = state.py();
        let array = |name: &str| -> PyResult<Vec<T>> {
            Input::new(&state.get_item(name)?, name)?.contiguous()?.numbers().to_vec().map_err(errors::engine)
        };
        let levels: usize = state.get_item("levels")?.extract()?;
        let state = State {
            shape: state.get_item("shape")?.extract()?,
            base: state.get_item("base")?.extract()?,
            fans: state.get_item("fans")?.extract()?,
            latency: if state.get_item("smooth")?.is_truthy()? { Latency::Smooth } else { Latency::Throughput },
            capacity: state.get_item("capacity")?.extract()?,
            clock: state.get_item("clock")?.extract()?,
            position: state.get_item("position")?.extract()?,
            history: array("history")?,
            pending: array("pending")?,
            seed: array("seed")?,
            spectra: (0..levels).map(|k| array(&format!("spectra_{k}"))).collect::<PyResult<_>>()?,
        };
        Ok(Box::new(watched(py, 0, None, || self.load_cache(&state))?))
    }
}
