//! Caches of either precision behind one face: numbers of arrays in, numbers of arrays out.

use futurefill::{Error, Latency, State, watch};
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::args::{sequence_text, shape_text};
use crate::arrays::{Float, Input, Numbers, Output, Precision, Room, filled};
use crate::errors;
use crate::plan::Plan;
use crate::watch::{on_main_thread, watched};

/// Numbers a due tile touches from which on the interpreter lock is worth releasing (some tens of microseconds).
const LONG_TILE: usize = 1 << 14;
/// Multiply-adds of a direct sum from which on a step itself detaches, on copies.
const LONG_STEP: usize = 1 << 20;
/// Nanoseconds from which on an `extend` looks for signals, on a copy of the cache.
const LONG_EXTEND: f64 = 1e8;

/// A cache of the engine.
pub trait Engine: Send {
    fn precision(&self) -> Precision;
    fn input_shape(&self) -> &[usize];
    fn output_shape(&self) -> &[usize];
    fn position(&self) -> usize;
    fn remaining(&self) -> Option<usize>;
    fn nbytes(&self) -> usize;

    /// One step, then the tile that has fallen due.
    fn step(&mut self, py: Python<'_>, u: Numbers<'_>, y: Room<'_>) -> PyResult<()>;
    /// `stale` is set where the cache was empty before a call that failed, and is to be reset before the next.
    fn extend<'py>(
        &mut self,
        u: &Input<'py>,
        out: Option<&Bound<'py, PyAny>>,
        progress: Option<&Bound<'py, PyAny>>,
        stale: &mut bool,
    ) -> PyResult<Bound<'py, PyAny>>;
    /// What the past adds to the next `k` outputs.
    fn pending<'py>(&mut self, py: Python<'py>, k: usize) -> PyResult<Bound<'py, PyAny>>;
    fn fork(&mut self, py: Python<'_>) -> PyResult<Box<dyn Engine>>;
    fn reorder(&mut self, py: Python<'_>, index: &[usize]) -> PyResult<()>;
    fn reset_rows(&mut self, py: Python<'_>, rows: &[usize]) -> PyResult<()>;
    fn reset(&mut self, py: Python<'_>);
    /// As `reset`, where nothing in here can be trusted any more.
    fn renew(&mut self, py: Python<'_>) -> PyResult<()>;
    fn state_dict<'py>(&mut self, py: Python<'py>, plan: &Plan) -> PyResult<Bound<'py, PyAny>>;
}

impl<T: Float> Engine for futurefill::Cache<T> {
    fn precision(&self) -> Precision {
        T::PRECISION
    }

    fn input_shape(&self) -> &[usize] {
        self.input_shape()
    }

    fn output_shape(&self) -> &[usize] {
        self.output_shape()
    }

    fn position(&self) -> usize {
        self.position()
    }

    fn remaining(&self) -> Option<usize> {
        self.remaining()
    }

    fn nbytes(&self) -> usize {
        self.nbytes()
    }

    fn step(&mut self, py: Python<'_>, u: Numbers<'_>, y: Room<'_>) -> PyResult<()> {
        let outputs = self.output_shape().iter().product::<usize>();
        y.fill(|y| {
            let u = u.to::<T>()?;
            if outputs.saturating_mul(direct_lags(self)) <= LONG_STEP {
                return self.step(&u, y);
            }
            // Others may write to the arrays meanwhile.
            let (mut source, mut result) = (futurefill::zeros(u.len(), T::ZERO)?, futurefill::zeros(y.len(), T::ZERO)?);
            source.copy_from_slice(&u);
            py.detach(|| self.step(&source, &mut result))?;
            y.copy_from_slice(&result);
            Ok(())
        })
        .map_err(errors::engine)?;
        match self.due_work() {
            0 => {}
            work if work < LONG_TILE => self.finish(),
            _ => py.detach(|| self.finish()),
        }
        Ok(())
    }

    fn extend<'py>(
        &mut self,
        u: &Input<'py>,
        out: Option<&Bound<'py, PyAny>>,
        progress: Option<&Bound<'py, PyAny>>,
        stale: &mut bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = u.py();
        let len = match u.shape().split_last() {
            Some((&len, channels)) if channels == self.input_shape() => len,
            split => {
                let expected = format!("shape {}", sequence_text(self.input_shape(), "m"));
                let got = shape_text(u.shape()) + &batch_hint(self, split.map_or(&[], |(_, channels)| channels));
                return Err(errors::value("u", &expected, &got));
            }
        };
        if let Some(remaining) = self.remaining()
            && len > remaining
        {
            return Err(errors::engine(Error::Capacity { needed: len, remaining }));
        }
        let shape: Vec<usize> = self.output_shape().iter().copied().chain([len]).collect();
        let output = Output::new(py, out, u.precision, &shape, Some(u))?;
        let source = u.contiguous()?;
        // SAFETY: new, or the caller's own.
        let (x, y) = (source.numbers(), unsafe { output.room() });
        let rows = self.output_shape().iter().product::<usize>().max(8);
        let nanoseconds = rows as f64 * len as f64 * (10.0 + 0.1 * direct_lags(self) as f64);
        if progress.is_none() && (nanoseconds < LONG_EXTEND || !on_main_thread(py)?) {
            py.detach(|| run(self, x, len, y)).map_err(errors::engine)?;
        } else if self.position() == 0 {
            watched(py, output.len(), progress, || run(self, x, len, y)).inspect_err(|_| *stale = true)?;
        } else {
            match watched(py, 0, None, || self.fork()) {
                Ok(mut copy) => {
                    watched(py, output.len(), progress, || run(&mut copy, x, len, y))?;
                    py.detach(|| *self = copy);
                }
                // There is no room for a copy, and so no way back.
                Err(error) if error.is_instance_of::<PyMemoryError>(py) => {
                    py.detach(|| run(self, x, len, y)).map_err(errors::engine)?;
                }
                Err(error) => return Err(error),
            }
        }
        output.finish()
    }

    fn pending<'py>(&mut self, py: Python<'py>, k: usize) -> PyResult<Bound<'py, PyAny>> {
        if let Some(remaining) = self.remaining()
            && k > remaining
        {
            return Err(errors::engine(Error::Capacity { needed: k, remaining }));
        }
        let shape: Vec<usize> = self.output_shape().iter().copied().chain([k]).collect();
        let output = Output::new(py, None, T::PRECISION, &shape, None)?;
        // SAFETY: new.
        let room = unsafe { output.room() };
        let work = |cache: &mut Self| room.fill(|y| cache.pending(k, y));
        if k == 1 { work(self) } else { py.detach(|| work(self)) }.map_err(errors::engine)?;
        output.finish()
    }

    fn fork(&mut self, py: Python<'_>) -> PyResult<Box<dyn Engine>> {
        Ok(Box::new(watched(py, 0, None, || self.fork())?))
    }

    fn reorder(&mut self, py: Python<'_>, index: &[usize]) -> PyResult<()> {
        py.detach(|| self.reorder(index)).map_err(errors::engine)
    }

    fn reset_rows(&mut self, py: Python<'_>, rows: &[usize]) -> PyResult<()> {
        py.detach(|| self.reset_rows(rows)).map_err(errors::engine)
    }

    fn reset(&mut self, py: Python<'_>) {
        py.detach(|| self.reset());
    }

    fn renew(&mut self, py: Python<'_>) -> PyResult<()> {
        *self = py.detach(|| self.fresh()).map_err(errors::engine)?;
        Ok(())
    }

    fn state_dict<'py>(&mut self, py: Python<'py>, plan: &Plan) -> PyResult<Bound<'py, PyAny>> {
        let state = py.detach(|| self.state()).map_err(errors::engine)?;
        state_dict(py, plan, &state)
    }
}

/// The next `m` positions, with the tile behind them.
fn run<T: Float>(cache: &mut futurefill::Cache<T>, u: Numbers<'_>, m: usize, y: Room<'_>) -> Result<(), Error> {
    let u = u.to::<T>()?;
    y.fill(|y| {
        watch::part(0, 19, 20, || cache.extend(&u, m, y))?;
        watch::part(19, 20, 20, || cache.finish());
        Ok(())
    })
}

/// Lags of one position's direct sum at most.
fn direct_lags<T: Float>(cache: &futurefill::Cache<T>) -> usize {
    let plan = cache.plan();
    plan.schedule().base().unwrap_or(usize::MAX).min(plan.filter_length())
}

/// Refuses an input that is not one position of the cache, or one too many.
#[inline]
pub fn check_step(cache: &dyn Engine, shape: &[usize]) -> PyResult<()> {
    if shape != cache.input_shape() {
        let expected = format!("shape {}", shape_text(cache.input_shape()));
        return Err(errors::value("u", &expected, &(shape_text(shape) + &batch_hint(cache, shape))));
    }
    if cache.remaining() == Some(0) {
        return Err(errors::engine(Error::Capacity { needed: 1, remaining: 0 }));
    }
    Ok(())
}

/// How to make a cache for inputs that are a batch of what this one takes.
#[cold]
fn batch_hint(cache: &dyn Engine, shape: &[usize]) -> String {
    match shape.len() > cache.input_shape().len() && shape.ends_with(cache.input_shape()) {
        true => format!(": make the cache for a batch by new_cache({})", shape_text(shape)),
        false => String::new(),
    }
}

fn state_dict<'py, T: Float>(py: Python<'py>, plan: &Plan, state: &State<T>) -> PyResult<Bound<'py, PyAny>> {
    let outputs = futurefill::broadcast(&state.shape, plan.filter_dims()).map_err(errors::engine)?;
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
