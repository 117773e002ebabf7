//! Whole sequences at once: the stateless functions.

use pyo3::prelude::*;

use crate::args::{broadcast, shape_text};
use crate::arrays::{Float, Input, Output, Precision};
use crate::errors;
use crate::plan::{split_lags, split_time};
use crate::watch::watched;

/// Causal convolution of a whole sequence.
///
/// `u (*C, T)`, `filters (*F, L)`, float32 or float64 -> `(*broadcast(C, F), T)` in u's dtype, computed in the higher
/// of both precisions. With `out=` (u's dtype, the output's shape) the result is stored there. `progress(done, total)`
/// is told how much of the work is done.
#[pyfunction]
#[pyo3(signature = (u, filters, *, workers=1, out=None, progress=None))]
pub fn causal_conv<'py>(
    py: Python<'py>,
    u: &Bound<'py, PyAny>,
    filters: &Bound<'py, PyAny>,
    workers: usize,
    out: Option<&Bound<'py, PyAny>>,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let (u, filters) = (Input::new(u, "u")?, Input::new(filters, "filters")?);
    if workers == 0 {
        return Err(errors::value("workers", "a positive integer", "0"));
    }
    errors::shielded(|| match u.precision.max(filters.precision) {
        Precision::F32 => convolve::<f32>(py, &u, &filters, workers, out, progress),
        Precision::F64 => convolve::<f64>(py, &u, &filters, workers, out, progress),
    })
}

fn convolve<'py, T: Float>(
    py: Python<'py>,
    u: &Input<'py>,
    filters: &Input<'py>,
    workers: usize,
    out: Option<&Bound<'py, PyAny>>,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let (channels, len) = split_time(u.shape(), "u", "positions")?;
    let (dims, lags) = split_lags(filters.shape())?;
    let mut shape = broadcast("u", channels, dims)?;
    shape.push(len);
    let output = Output::new(py, out, u.precision, &shape, Some(u))?;
    let (u, filters) = (u.contiguous()?, filters.contiguous()?);
    let (x, h) = (u.numbers(), filters.numbers());
    // SAFETY: new, or the caller's own.
    let room = unsafe { output.room() };
    watched(py, output.len(), progress, || {
        let (x, h) = (x.to::<T>()?, h.to::<T>()?);
        room.fill(|y| futurefill::causal_conv(&x, channels, len, &h, dims, lags, y, workers))
    })?;
    output.finish()
}

/// The paper's operator: the effect of past inputs `v` on the next outputs under the filter `w`.
///
/// `v (*B, t1)`, `w (*B, t2)`, t2 >= 1, float32 or float64 -> `(*B, t2 - 1)` in v's dtype. Computed in float64: of
/// filters that die out the future has little, and the transform's rounding is that of the whole.
#[pyfunction]
#[pyo3(name = "futurefill", signature = (v, w, *, progress=None))]
pub fn future_fill<'py>(
    py: Python<'py>,
    v: &Bound<'py, PyAny>,
    w: &Bound<'py, PyAny>,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let (v, w) = (Input::new(v, "v")?, Input::new(w, "w")?);
    errors::shielded(|| {
        let (v_shape, t1) = split_time(v.shape(), "v", "positions")?;
        let (w_shape, t2) = split_time(w.shape(), "w", "lags")?;
        if t2 == 0 {
            return Err(errors::value("w", "at least one lag", &format!("shape {}", shape_text(w.shape()))));
        }
        let mut shape = broadcast("v", v_shape, w_shape)?;
        shape.push(t2 - 1);
        let output = Output::new(py, None, v.precision, &shape, None)?;
        let (v, w) = (v.contiguous()?, w.contiguous()?);
        let (x, h) = (v.numbers(), w.numbers());
        // SAFETY: new.
        let room = unsafe { output.room() };
        watched(py, output.len(), progress, || {
            let (x, h) = (x.to::<f64>()?, h.to::<f64>()?);
            room.fill(|y| futurefill::futurefill(&x, v_shape, t1, &h, w_shape, t2, y))
        })?;
        output.finish()
    })
}
