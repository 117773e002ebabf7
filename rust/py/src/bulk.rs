//! Whole sequences at once: the stateless functions.

use pyo3::prelude::*;

use crate::args::{broadcast, shape_text};
use crate::arrays::{Float, Input, Output, Precision};
use crate::errors;
use crate::plan::{bulk, split_lags, split_time};

/// Causal convolution of a whole sequence.
///
/// `u (*C, T)`, `filters (*F, L)`, float32 or float64 -> `(*broadcast(C, F), T)` in u's dtype, computed in the higher
/// of both precisions.
#[pyfunction]
#[pyo3(signature = (u, filters, *, workers=1))]
pub fn causal_conv<'py>(
    py: Python<'py>,
    u: &Bound<'py, PyAny>,
    filters: &Bound<'py, PyAny>,
    workers: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let (u, filters) = (Input::new(u, "u")?, Input::new(filters, "filters")?);
    if workers == 0 {
        return Err(errors::value("workers", "a positive integer", "0"));
    }
    match u.precision.max(filters.precision) {
        Precision::F32 => convolve::<f32>(py, &u, &filters, workers),
        Precision::F64 => convolve::<f64>(py, &u, &filters, workers),
    }
}

fn convolve<'py, T: Float>(
    py: Python<'py>,
    u: &Input<'py>,
    filters: &Input<'py>,
    workers: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let (channels, len) = split_time(u.shape(), "u", "positions")?;
    let (dims, lags) = split_lags(filters.shape())?;
    let mut shape = broadcast("u", channels, dims)?;
    shape.push(len);
    let output = Output::new(py, None, u.precision, &shape)?;
    let (u, filters) = (u.values::<T>()?, filters.values::<T>()?);
    let (x, h) = (u.slice(), filters.slice());
    bulk(py, &output, |y: &mut [T]| {
        errors::shielded(|| futurefill::causal_conv(x, channels, len, h, dims, lags, y, workers))
    })?;
    Ok(output.into_array())
}

/// The paper's operator: the effect of past inputs `v` on the next outputs under the filter `w`.
///
/// `v (*B, t1)`, `w (*B, t2)`, t2 >= 1, float32 or float64 -> `(*B, t2 - 1)` in v's dtype, computed in the higher of
/// both precisions.
#[pyfunction]
#[pyo3(name = "futurefill")]
pub fn future_fill<'py>(py: Python<'py>, v: &Bound<'py, PyAny>, w: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let (v, w) = (Input::new(v, "v")?, Input::new(w, "w")?);
    match v.precision.max(w.precision) {
        Precision::F32 => fill::<f32>(py, &v, &w),
        Precision::F64 => fill::<f64>(py, &v, &w),
    }
}

fn fill<'py, T: Float>(py: Python<'py>, v: &Input<'py>, w: &Input<'py>) -> PyResult<Bound<'py, PyAny>> {
    let (v_shape, t1) = split_time(v.shape(), "v", "positions")?;
    let (w_shape, t2) = split_time(w.shape(), "w", "lags")?;
    if t2 == 0 {
        return Err(errors::value("w", "at least one lag", &format!("shape {}", shape_text(w.shape()))));
    }
    let mut shape = broadcast("v", v_shape, w_shape)?;
    shape.push(t2 - 1);
    let output = Output::new(py, None, v.precision, &shape)?;
    let (v, w) = (v.values::<T>()?, w.values::<T>()?);
    let (x, h) = (v.slice(), w.slice());
    bulk(py, &output, |y: &mut [T]| errors::shielded(|| futurefill::futurefill(x, v_shape, t1, h, w_shape, t2, y)))?;
    Ok(output.into_array())
}
