//! The mutable half: what one run of generation remembers.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::args::{Indices, shape_text, size};
use crate::arrays::{Input, Output};
use crate::engine::{Engine, check_step};
use crate::plan::Plan;
use crate::tensors;
use crate::turn::Turn;
use crate::{errors, reserve};

/// The memory of one run of generation: made by a plan, mutable, safe to use from several threads (calls take turns).
///
/// | method | argument | result |
/// | --- | --- | --- |
/// | `step(u, out=None)` | `u (*C,)` | `y (*broadcast(C, F),)`: the next position |
/// | `extend(u, out=None)` | `u (*C, m)` | `y (*broadcast(C, F), m)`: the next m positions |
/// | `fork()` | | an independent copy |
/// | `reorder(index)` | indices into axis 0 | gathers the batch in place |
/// | `reset(rows=None)` | rows of axis 0 | starts these, or everything, again |
/// | `state_dict()` | | a picklable snapshot for `Plan.load_cache` |
///
/// After any error a cache is exactly what it was before the call.
#[pyclass(frozen, module = "futurefill_rs._core")]
pub struct Cache {
    plan: Py<Plan>,
    inner: Turn<Inner>,
}

struct Inner {
    engine: Box<dyn Engine>,
    /// Set when the engine panicked half-way: the contents cannot be trusted any more.
    broken: bool,
    /// Set where a call that failed has left an empty cache with something in it.
    stale: bool,
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
        self.with(py, |engine| {
            check_step(engine, u.shape())?;
            let output = Output::new(py, out, u.precision, engine.output_shape(), Some(&u))?;
            // SAFETY: new or the caller's own, and we stay attached while it is written.
            engine.step(py, u.contiguous()?.numbers(), unsafe { output.room() })?;
            output.finish()
        })
    }

    /// `step` of torch tensors, for their wrapper.
    ///
    /// Plain tensors on the CPU, contiguous and of the plan's own precision: returns `out`, or without it a new numpy
    /// array. Returns None, and does nothing, where a tensor is anything else.
    #[pyo3(signature = (u, out=None, /))]
    fn _step_tensor<'py>(
        &self,
        py: Python<'py>,
        u: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(reader) = tensors::reader(py) else { return Ok(None) };
        self.with(py, |engine| {
            let precision = engine.precision();
            let Some(source) = reader.read(u, precision)? else { return Ok(None) };
            check_step(engine, source.shape())?;
            let Some(out) = out else {
                let output = Output::new(py, None, precision, engine.output_shape(), None)?;
                // SAFETY: new, and the tensor's memory is read while we are attached.
                engine.step(py, unsafe { source.numbers() }, unsafe { output.room() })?;
                return output.finish().map(Some);
            };
            let Some(target) = reader.read(out, precision)? else { return Ok(None) };
            if target.shape() != engine.output_shape() || target.overlaps(&source) {
                return Ok(None);
            }
            // SAFETY: as above; the target lies elsewhere, and is the caller's own.
            engine.step(py, unsafe { source.numbers() }, unsafe { target.room() })?;
            Ok(Some(out.clone()))
        })
    }

    /// Outputs of the next m positions at once.
    ///
    /// `u (*C, m)`, m >= 0, of at most the plan's precision -> `y (*broadcast(C, F), m)` in u's dtype: what m calls of
    /// `step` give.
    ///
    /// `out=` as for `step`. `progress(done, total)` is told how much of the work is done. A KeyboardInterrupt meanwhile
    /// leaves the cache as it was.
    #[pyo3(signature = (u, *, out=None, progress=None))]
    fn extend<'py>(
        &self,
        py: Python<'py>,
        u: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let u = Input::of_plan(u, "u", self.plan.get().precision())?;
        self.with_inner(py, |inner| inner.engine.extend(&u, out, progress, &mut inner.stale))
    }

    /// What the past alone adds to the next k outputs, before their inputs are known: `(*broadcast(C, F), k)` in the
    /// plan's precision. The cache stays as it is. Raises CapacityError for more positions than remain.
    fn pending<'py>(&self, py: Python<'py>, k: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let k = size(k, "k", 0)?;
        self.with(py, |engine| engine.pending(py, k))
    }

    /// An independent copy at the same position (beams, speculation).
    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        let engine = self.with(py, |engine| engine.fork(py))?;
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
            engine.reorder(py, &index)
        })
    }

    /// Starts entries of the batch (axis 0) again while the others go on, or everything at position 0.
    ///
    /// `rows`: integers as in numpy indexing, or a boolean mask (sequence, array or tensor). The clock and the remaining
    /// capacity stay; `reset()` without rows also gives back the whole capacity. Raises as `reorder` does.
    #[pyo3(signature = (rows=None))]
    fn reset(&self, py: Python<'_>, rows: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let rows = rows.map(|rows| Indices::new(rows, "rows", true)).transpose()?;
        let Some(rows) = rows else {
            return self.inner.with(py, |inner| {
                if !std::mem::replace(&mut inner.broken, true) {
                    errors::shielded(|| {
                        inner.engine.reset(py);
                        Ok(())
                    })?;
                } else {
                    errors::shielded(|| inner.engine.renew(py))?;
                }
                (inner.broken, inner.stale) = (false, false);
                Ok(())
            });
        };
        self.with(py, |engine| {
            let rows = rows.resolve("rows", self.batch(py, engine)?)?;
            engine.reset_rows(py, &rows)
        })
    }

    fn __copy__(&self, py: Python<'_>) -> PyResult<Self> {
        self.fork(py)
    }

    fn __deepcopy__(&self, py: Python<'_>, _memo: &Bound<'_, PyAny>) -> PyResult<Self> {
        self.fork(py)
    }

    /// Pickled as the plan and the state.
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let load = py.import("futurefill_rs._state")?.getattr("load")?;
        (load, (self.plan.clone_ref(py), self.state_dict(py)?)).into_pyobject(py)
    }

    /// A picklable snapshot: a dict of numpy arrays that `Plan.load_cache` takes, on any device and in either engine.
    fn state_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.with(py, |engine| engine.state_dict(py, self.plan.get()))
    }

    /// Positions so far, the prompt included.
    #[getter]
    fn position(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |engine| Ok(engine.position()))
    }

    /// Positions left; None: without bound.
    #[getter]
    fn remaining(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        self.with(py, |engine| Ok(engine.remaining()))
    }

    /// Bytes this cache holds.
    #[getter]
    fn nbytes(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |engine| Ok(engine.nbytes()))
    }

    /// Shape C of one input position.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let shape = self.with(py, |engine| Ok(engine.input_shape().to_vec()))?;
        PyTuple::new(py, shape)
    }

    /// Shape broadcast(C, F) of one output position.
    #[getter]
    fn output_shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let shape = self.with(py, |engine| Ok(engine.output_shape().to_vec()))?;
        PyTuple::new(py, shape)
    }

    /// The plan this cache belongs to.
    #[getter]
    fn plan(&self, py: Python<'_>) -> Py<Plan> {
        self.plan.clone_ref(py)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |engine| {
            let (shape, position) = (shape_text(engine.input_shape()), engine.position());
            let remaining = engine.remaining().map_or_else(|| "None".to_owned(), |remaining| remaining.to_string());
            Ok(format!("Cache(shape={shape}, position={position}, remaining={remaining})"))
        })
    }
}

impl Cache {
    pub fn new(plan: Py<Plan>, engine: Box<dyn Engine>) -> Self {
        Self { plan, inner: Turn::new(Inner { engine, broken: false, stale: false }) }
    }

    /// Waits for the cache without holding the interpreter lock, then works on it. A panic on the way breaks it.
    fn with<R>(&self, py: Python<'_>, work: impl FnOnce(&mut dyn Engine) -> PyResult<R>) -> PyResult<R> {
        self.with_inner(py, |inner| work(&mut *inner.engine))
    }

    fn with_inner<R>(&self, py: Python<'_>, work: impl FnOnce(&mut Inner) -> PyResult<R>) -> PyResult<R> {
        self.inner.with(py, |inner| {
            if inner.broken {
                let text = "cache: an earlier call failed midway; reset it or continue from a fork";
                return Err(PyRuntimeError::new_err(text));
            }
            let whole = |inner: &mut Inner| {
                if std::mem::take(&mut inner.stale) {
                    inner.engine.reset(py);
                }
                work(inner)
            };
            reserve::restore()?;
            catch_unwind(AssertUnwindSafe(|| whole(inner))).unwrap_or_else(|panic| {
                inner.broken = true;
                Err(errors::defect(&*panic))
            })
        })
    }

    /// Length of axis 0 where it lies in front of the filters' axes.
    fn batch(&self, py: Python<'_>, engine: &dyn Engine) -> PyResult<usize> {
        let filters = self.plan.bind(py).get().filter_dims();
        let shape = engine.input_shape();
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
