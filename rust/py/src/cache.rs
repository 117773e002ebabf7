//! The mutable half: what one run of generation remembers.

use std::sync::{Mutex, MutexGuard, PoisonError};

use futurefill::{Latency, State};
use pyo3::exceptions::{PyBufferError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyDict, PyTuple};

use crate::args::{Indices, sequence_text, shape_text};
use crate::arrays::{Float, Input, Output, filled, zeros};
use crate::errors;
use crate::plan::{Plan, bulk};

/// Numbers a due tile touches from which on the interpreter lock is worth releasing (some tens of microseconds).
const LONG_TILE: usize = 1 << 14;
/// Multiply-adds of a direct sum from which on a step itself detaches, on copies.
const LONG_STEP: usize = 1 << 20;

pub enum Engine {
    F32(futurefill::Cache<f32>),
    F64(futurefill::Cache<f64>),
}

macro_rules! each {
    ($engine:expr, $cache:ident => $body:expr) => {
        match $engine {
            Engine::F32($cache) => $body,
            Engine::F64($cache) => $body,
        }
    };
}

/// The memory of one run of generation: made by a plan, mutable, safe to use from several threads (calls take turns).
///
/// | method | argument | result |
/// | --- | --- | --- |
/// | `step(u, out=None)` | `u (*C,)` | `y (*broadcast(C, F),)`: the next position |
/// | `extend(u)` | `u (*C, m)` | `y (*broadcast(C, F), m)`: the next m positions |
/// | `fork()` | | an independent copy |
/// | `reorder(index)` | indices into axis 0 | gathers the batch in place |
/// | `reset(rows=None)` | rows of axis 0 | starts these, or everything, again |
/// | `state_dict()` | | a picklable snapshot for `Plan.load_cache` |
///
/// After any error a cache is exactly what it was before the call.
#[pyclass(frozen, module = "futurefill_rs._core")]
pub struct Cache {
    plan: Py<Plan>,
    inner: Mutex<Inner>,
}

struct Inner {
    engine: Engine,
    /// Set when the engine panicked half-way: the contents cannot be trusted any more.
    broken: bool,
}

#[pymethods]
impl Cache {
    /// Outputs of the next position.
    ///
    /// `u (*C,)` of at most the plan's precision, any strides -> `y (*broadcast(C, F),)` in u's dtype. With `out=` (u's
    /// dtype, the output's shape, writable, may overlap u) the result is stored there and `out` is returned: nothing is
    /// allocated.
    /// Raises ValueError or TypeError for a wrong shape or dtype, CapacityError past the horizon.
    #[pyo3(signature = (u, *, out=None))]
    fn step<'py>(
        &self,
        py: Python<'py>,
        u: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let u = Input::of_plan(u, "u", self.plan.get().precision())?;
        self.with(py, |engine| each!(engine, cache => step(py, cache, &u, out)))
    }

    /// `step` on memory of another array library, for that library's wrapper.
    ///
    /// `u` and `out` are addresses of C-contiguous numbers of the plan's own precision, with their shapes; without `out`
    /// a new numpy array is returned. The caller vouches for the memory. Raises BufferError for an address that cannot
    /// be one.
    #[pyo3(signature = (u, u_shape, out=None, out_shape=None, /))]
    fn _step_at<'py>(
        &self,
        py: Python<'py>,
        u: usize,
        u_shape: Vec<usize>,
        out: Option<usize>,
        out_shape: Option<Vec<usize>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let out = out.zip(out_shape);
        self.with(py, |engine| each!(engine, cache => step_at(py, cache, (u, u_shape), out)))
    }

    /// Outputs of the next m positions at once.
    ///
    /// `u (*C, m)`, m >= 0, of at most the plan's precision -> `y (*broadcast(C, F), m)` in u's dtype: what m calls of
    /// `step` give.
    fn extend<'py>(&self, py: Python<'py>, u: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let u = Input::of_plan(u, "u", self.plan.get().precision())?;
        self.with(py, |engine| each!(engine, cache => extend(py, cache, &u)))
    }

    /// An independent copy at the same position (beams, speculation).
    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        let engine = self.with(py, |engine| {
            py.detach(|| {
                errors::shielded(|| {
                    Ok(match engine {
                        Engine::F32(cache) => Engine::F32(cache.fork()?),
                        Engine::F64(cache) => Engine::F64(cache.fork()?),
                    })
                })
            })
        })?;
        Ok(Self::new(self.plan.clone_ref(py), engine))
    }

    /// Makes entry i of the batch (axis 0) what entry `index[i]` was; any length, repeats allowed.
    ///
    /// `index`: integers as in numpy indexing (sequence, array or tensor; no booleans). Raises IndexError for an entry
    /// out of range, ValueError for a cache without a batch axis in front of the filters' axes.
    fn reorder(&self, py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<()> {
        let index = Indices::new(index, "index", false)?;
        self.with(py, |engine| {
            let index = index.resolve("index", self.batch(py, engine)?)?;
            py.detach(|| errors::shielded(|| each!(engine, cache => cache.reorder(&index))))
        })
    }

    /// Starts entries of the batch (axis 0) again while the others go on, or everything at position 0.
    ///
    /// `rows`: integers as in numpy indexing, or a boolean mask (sequence, array or tensor). The clock and the remaining
    /// capacity stay; `reset()` without rows also gives back the whole capacity. Raises as `reorder` does.
    #[pyo3(signature = (rows=None))]
    fn reset(&self, py: Python<'_>, rows: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let rows = rows.map(|rows| Indices::new(rows, "rows", true)).transpose()?;
        self.with(py, |engine| {
            let Some(rows) = rows else {
                return py.detach(|| {
                    errors::shielded(|| {
                        each!(engine, cache => cache.reset());
                        Ok(())
                    })
                });
            };
            let rows = rows.resolve("rows", self.batch(py, engine)?)?;
            py.detach(|| errors::shielded(|| each!(engine, cache => cache.reset_rows(&rows))))
        })
    }

    fn __copy__(&self, py: Python<'_>) -> PyResult<Self> {
        self.fork(py)
    }

    fn __deepcopy__(&self, py: Python<'_>, _memo: &Bound<'_, PyAny>) -> PyResult<Self> {
        self.fork(py)
    }

    /// Pickled as the plan and the state.
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (Py<Plan>, Bound<'py, PyAny>))> {
        let load = py.import("futurefill_rs._state")?.getattr("load")?;
        Ok((load, (self.plan.clone_ref(py), self.state_dict(py)?)))
    }

    /// A picklable snapshot: a dict of numpy arrays that `Plan.load_cache` takes, on any device and in either engine.
    fn state_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        enum Snapshot {
            F32(State<f32>),
            F64(State<f64>),
        }
        let snapshot = self.with(py, |engine| {
            py.detach(|| {
                errors::shielded(|| {
                    Ok(match engine {
                        Engine::F32(cache) => Snapshot::F32(cache.state()?),
                        Engine::F64(cache) => Snapshot::F64(cache.state()?),
                    })
                })
            })
        })?;
        match snapshot {
            Snapshot::F32(state) => state_dict(py, self.plan.get(), &state),
            Snapshot::F64(state) => state_dict(py, self.plan.get(), &state),
        }
    }

    /// Positions so far, the prompt included.
    #[getter]
    fn position(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |engine| Ok(each!(engine, cache => cache.position())))
    }

    /// Positions left; None: without bound.
    #[getter]
    fn remaining(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        self.with(py, |engine| Ok(each!(engine, cache => cache.remaining())))
    }

    /// Bytes this cache holds.
    #[getter]
    fn nbytes(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |engine| Ok(each!(engine, cache => cache.nbytes())))
    }

    /// Shape C of one input position.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let shape = self.with(py, |engine| Ok(each!(engine, cache => cache.input_shape().to_vec())))?;
        PyTuple::new(py, shape)
    }

    /// Shape broadcast(C, F) of one output position.
    #[getter]
    fn output_shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let shape = self.with(py, |engine| Ok(each!(engine, cache => cache.output_shape().to_vec())))?;
        PyTuple::new(py, shape)
    }

    /// The plan this cache belongs to.
    #[getter]
    fn plan(&self, py: Python<'_>) -> Py<Plan> {
        self.plan.clone_ref(py)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |engine| {
            let (shape, position, remaining) = each!(engine, cache => (
                shape_text(cache.input_shape()), cache.position(), cache.remaining()
            ));
            let remaining = remaining.map_or_else(|| "None".to_owned(), |remaining| remaining.to_string());
            Ok(format!("Cache(shape={shape}, position={position}, remaining={remaining})"))
        })
    }
}

impl Cache {
    pub fn new(plan: Py<Plan>, engine: Engine) -> Self {
        Self { plan, inner: Mutex::new(Inner { engine, broken: false }) }
    }

    /// Waits for the cache without holding the interpreter lock, then works on it.
    fn with<R>(&self, py: Python<'_>, work: impl FnOnce(&mut Engine) -> PyResult<R>) -> PyResult<R> {
        let lock = self.inner.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        let mut lock: MutexGuard<'_, Inner> = lock;
        if lock.broken {
            return Err(PyRuntimeError::new_err("this cache is unusable since an internal error of the engine"));
        }
        let result = work(&mut lock.engine);
        if let Err(error) = &result {
            lock.broken = error.is_instance_of::<PyRuntimeError>(py);
        }
        result
    }

    /// Length of axis 0 where it lies in front of the filters' axes.
    fn batch(&self, py: Python<'_>, engine: &Engine) -> PyResult<usize> {
        let filters = self.plan.bind(py).get().filter_dims();
        let shape = each!(engine, cache => cache.input_shape());
        if shape.len() > filters.len() {
            return Ok(shape[0]);
        }
        Err(PyValueError::new_err(format!(
            "cache: expected a batch axis in front of the filters' {}, got shape {}",
            shape_text(filters),
            shape_text(shape)
        )))
    }
}

fn step<'py, T: Float>(
    py: Python<'py>,
    cache: &mut futurefill::Cache<T>,
    u: &Input<'py>,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    check_step(cache, u.shape())?;
    let output = Output::new(py, out, u.precision, cache.output_shape())?;
    if T::PRECISION == u.precision && output.is_plain::<T>() && !output.overlaps(u) {
        let source = u.contiguous::<T>()?;
        // SAFETY: plain, apart from the input, and we stay attached while it is written.
        advance(py, cache, source.slice(), unsafe { output.slice_mut::<T>() })?;
    } else {
        let mut y = zeros::<T>(output.len())?;
        advance(py, cache, &u.to_vec::<T>()?, &mut y)?;
        output.write(&y)?;
    }
    finish_due(py, cache)?;
    Ok(output.into_array())
}

/// A step on bare memory: see `Cache._step_at`.
fn step_at<'py, T: Float>(
    py: Python<'py>,
    cache: &mut futurefill::Cache<T>,
    (u, u_shape): (usize, Vec<usize>),
    out: Option<(usize, Vec<usize>)>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    check_step(cache, &u_shape)?;
    let memory = |address: usize, len: usize| {
        if len > 0 && (address == 0 || !address.is_multiple_of(align_of::<T>())) {
            return Err(PyBufferError::new_err("no aligned memory there"));
        }
        Ok(if len == 0 { std::ptr::NonNull::<T>::dangling().as_ptr() } else { address as *mut T })
    };
    let len = u_shape.iter().product();
    // SAFETY: the caller vouches for that many numbers at this address, alive and unchanged while we are attached.
    let source = unsafe { std::slice::from_raw_parts(memory(u, len)?, len) };
    let array = match out {
        None => {
            let output = Output::new(py, None, T::PRECISION, cache.output_shape())?;
            // SAFETY: new and of the engine's own type.
            advance(py, cache, source, unsafe { output.slice_mut::<T>() })?;
            Some(output.into_array())
        }
        Some((out, shape)) => {
            if shape != cache.output_shape() {
                let expected = format!("shape {}", shape_text(cache.output_shape()));
                return Err(errors::value("out", &expected, &shape_text(&shape)));
            }
            let room: usize = shape.iter().product();
            let target = memory(out, room)?;
            if out < u + len * size_of::<T>() && u < out + room * size_of::<T>() {
                let mut y = zeros::<T>(room)?;
                advance(py, cache, source, &mut y)?;
                // SAFETY: as for the input, and the input is not read any more.
                unsafe { target.copy_from_nonoverlapping(y.as_ptr(), room) };
            } else {
                // SAFETY: as for the input, which lies elsewhere.
                advance(py, cache, source, unsafe { std::slice::from_raw_parts_mut(target, room) })?;
            }
            None
        }
    };
    finish_due(py, cache)?;
    Ok(array)
}

fn check_step<T: Float>(cache: &futurefill::Cache<T>, shape: &[usize]) -> PyResult<()> {
    if shape != cache.input_shape() {
        let expected = format!("shape {}", shape_text(cache.input_shape()));
        return Err(errors::value("u", &expected, &shape_text(shape)));
    }
    if cache.remaining() == Some(0) {
        return Err(errors::engine(futurefill::Error::Capacity { needed: 1, remaining: 0 }));
    }
    Ok(())
}

/// One step of the engine. A long direct sum releases the interpreter lock, on copies: others may then write to `u`.
fn advance<T: Float>(py: Python<'_>, cache: &mut futurefill::Cache<T>, u: &[T], y: &mut [T]) -> PyResult<()> {
    if direct_work(cache) <= LONG_STEP {
        return errors::shielded(|| cache.step(u, y));
    }
    let (mut source, mut result) = (zeros::<T>(u.len())?, zeros::<T>(y.len())?);
    source.copy_from_slice(u);
    py.detach(|| errors::shielded(|| cache.step(&source, &mut result)))?;
    y.copy_from_slice(&result);
    Ok(())
}

/// Runs the tile that has fallen due, if any: a long one without the interpreter lock.
fn finish_due<T: Float>(py: Python<'_>, cache: &mut futurefill::Cache<T>) -> PyResult<()> {
    match cache.due_work() {
        0 => Ok(()),
        work if work < LONG_TILE => finish(cache),
        _ => py.detach(|| finish(cache)),
    }
}

fn finish<T: Float>(cache: &mut futurefill::Cache<T>) -> PyResult<()> {
    errors::shielded(|| {
        cache.finish();
        Ok(())
    })
}

/// Multiply-adds of one step's direct sum at most.
fn direct_work<T: Float>(cache: &futurefill::Cache<T>) -> usize {
    let plan = cache.plan();
    let lags = plan.schedule().base().unwrap_or(usize::MAX).min(plan.filter_length());
    cache.output_shape().iter().fold(lags, |work, &n| work.saturating_mul(n))
}

fn extend<'py, T: Float>(
    py: Python<'py>,
    cache: &mut futurefill::Cache<T>,
    u: &Input<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let len = match u.shape().split_last() {
        Some((&len, channels)) if channels == cache.input_shape() => len,
        _ => {
            let expected = format!("shape {}", sequence_text(cache.input_shape(), "m"));
            return Err(errors::value("u", &expected, &shape_text(u.shape())));
        }
    };
    if let Some(remaining) = cache.remaining()
        && len > remaining
    {
        return Err(errors::engine(futurefill::Error::Capacity { needed: len, remaining }));
    }
    let shape: Vec<usize> = cache.output_shape().iter().copied().chain([len]).collect();
    let output = Output::new(py, None, u.precision, &shape)?;
    let values = u.to_vec::<T>()?;
    bulk(py, &output, |y: &mut [T]| {
        errors::shielded(|| {
            cache.extend(&values, len, y)?;
            cache.finish();
            Ok(())
        })
    })?;
    Ok(output.into_array())
}

fn state_dict<'py, T: Float>(py: Python<'py>, plan: &Plan, state: &State<T>) -> PyResult<Bound<'py, PyAny>> {
    let outputs = errors::shielded(|| futurefill::broadcast(&state.shape, plan.filter_dims()))?;
    let rows_in = state.shape.iter().product::<usize>();
    let rows_out = outputs.iter().product::<usize>();
    let run = plan.execution_for(state.capacity);
    let pending = state.pending.len().checked_div(rows_out).unwrap_or(0);
    let fields = PyDict::new(py);
    fields.set_item("history", filled(py, &[rows_in, run.ring], &state.history)?)?;
    fields.set_item("pending", filled(py, &[rows_out, pending], &state.pending)?)?;
    let seed = state.seed.len().checked_div(rows_out).unwrap_or(0);
    fields.set_item("seed", filled(py, &[rows_out, seed], &state.seed)?)?;
    for (k, (spectra, level)) in state.spectra.iter().zip(&run.levels).enumerate() {
        let bins = spectra.len().checked_div(2 * rows_in * level.kept()).unwrap_or(level.block);
        let shape = [rows_in, level.kept(), bins, 2];
        fields.set_item(format!("spectra_{k}"), filled(py, &shape, spectra)?)?;
    }
    fields.set_item("shape", PyTuple::new(py, &state.shape)?)?;
    fields.set_item("filter_shape", PyTuple::new(py, plan.filter_dims())?)?;
    fields.set_item("filter_length", plan.filter_length())?;
    fields.set_item("filter_digest", plan.digest)?;
    fields.set_item("base", state.base)?;
    fields.set_item("fans", PyTuple::new(py, &state.fans)?)?;
    fields.set_item("smooth", plan.latency == Latency::Smooth)?;
    fields.set_item("horizon", plan.horizon())?;
    fields.set_item("capacity", state.capacity)?;
    fields.set_item("clock", state.clock)?;
    fields.set_item("position", state.position)?;
    py.import("futurefill_rs._state")?.call_method1("seal", (fields,))
}
