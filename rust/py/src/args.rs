//! Scalars, shapes and index lists as Python users pass them.

use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyIndexError, PyOverflowError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt};

use crate::errors;
use futurefill::Latency;

/// Largest size accepted anywhere: the indices of numpy are signed.
const LARGEST: usize = isize::MAX as usize;

/// Python's notation of a shape.
pub fn shape_text(shape: &[usize]) -> String {
    axes_text(shape.iter().map(usize::to_string))
}

/// A shape with a named last axis, such as `(2, 3, m)`.
pub fn sequence_text(shape: &[usize], time: &str) -> String {
    axes_text(shape.iter().map(usize::to_string).chain([time.to_owned()]))
}

fn axes_text(axes: impl Iterator<Item = String>) -> String {
    let axes: Vec<String> = axes.collect();
    match axes.as_slice() {
        [only] => format!("({only},)"),
        _ => format!("({})", axes.join(", ")),
    }
}

/// numpy's broadcasting of an argument's leading axes with the filters'.
pub fn broadcast(arg: &str, shape: &[usize], filters: &[usize]) -> PyResult<Vec<usize>> {
    futurefill::broadcast(shape, filters).map_err(|_| {
        let expected = format!("shape broadcastable to {}", shape_text(filters));
        errors::value(arg, &expected, &shape_text(shape))
    })
}

pub fn type_name(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "?".to_owned(), |name| name.to_string())
}

/// An integer of at least `least`; floats and booleans are no integers.
pub fn size(value: &Bound<'_, PyAny>, arg: &str, least: usize) -> PyResult<usize> {
    let expected = match least {
        0 => "a non-negative integer",
        1 => "a positive integer",
        _ => &format!("an integer of at least {least}"),
    };
    if value.is_instance_of::<PyBool>() {
        return Err(errors::type_error(arg, expected, "bool"));
    }
    match value.extract::<i64>() {
        Ok(number) => usize::try_from(number)
            .ok()
            .filter(|number| (least..=LARGEST).contains(number))
            .ok_or_else(|| errors::value(arg, expected, &number.to_string())),
        Err(error) if error.is_instance_of::<PyOverflowError>(value.py()) => {
            let expected = format!("{expected} below 2**63");
            Err(errors::value(arg, &expected, "one out of range"))
        }
        Err(_) => Err(errors::type_error(arg, expected, &type_name(value))),
    }
}

pub fn optional_size(value: Option<&Bound<'_, PyAny>>, arg: &str, least: usize) -> PyResult<Option<usize>> {
    value.map(|value| size(value, arg, least)).transpose()
}

/// A shape: a sequence of sizes, or one integer for one axis.
pub fn shape(value: &Bound<'_, PyAny>, arg: &str) -> PyResult<Vec<usize>> {
    if value.is_instance_of::<PyInt>() {
        return Ok(vec![size(value, arg, 0)?]);
    }
    let axes =
        value.try_iter().map_err(|_| errors::type_error(arg, "a shape (tuple of integers)", &type_name(value)))?;
    axes.map(|axis| size(&axis?, arg, 0)).collect()
}

/// Indices into axis 0 as users pass them, not yet tied to a length.
pub enum Indices {
    Mask(Vec<bool>),
    List(Vec<i64>),
}

impl Indices {
    /// `mask`: whether one integer or a boolean mask may stand for a list (rows), or not (a gather).
    pub fn new(value: &Bound<'_, PyAny>, arg: &str, mask: bool) -> PyResult<Self> {
        let expected = if mask { "integers or a boolean mask" } else { "integers" };
        let array = value
            .py()
            .import("numpy")?
            .call_method1("asarray", (value,))
            .map_err(|_| errors::type_error(arg, expected, &type_name(value)))?
            .cast_into::<PyUntypedArray>()?;
        let kind = array.dtype().kind();
        let given = value.is_instance_of::<PyUntypedArray>();
        if !matches!(kind, b'b' | b'i' | b'u' | b'O') && (given || !array.is_empty())
            || array.ndim() == 0 && !matches!(kind, b'b' | b'i' | b'u')
        {
            let got = if given || array.ndim() > 0 { array.dtype().to_string() } else { type_name(value) };
            return Err(errors::type_error(arg, expected, &got));
        }
        match array.ndim() {
            1 => {}
            0 if mask && matches!(kind, b'i' | b'u') => {}
            ndim => return Err(errors::value(arg, "one axis", &format!("{ndim} axes"))),
        }
        if array.is_empty() && !given {
            return Ok(Self::List(Vec::new()));
        }
        let entries = array.call_method1("reshape", (-1,))?.call_method0("tolist")?;
        match kind {
            b'b' if mask => Ok(Self::Mask(entries.extract()?)),
            b'i' | b'u' => {
                entries.try_iter()?.map(|entry| index(&entry?, arg)).collect::<PyResult<_>>().map(Self::List)
            }
            // Python integers too large for any of numpy's types become an object array.
            b'O' if entries.try_iter()?.all(|entry| entry.is_ok_and(|entry| entry.is_exact_instance_of::<PyInt>())) => {
                entries.try_iter()?.map(|entry| index(&entry?, arg)).collect::<PyResult<_>>().map(Self::List)
            }
            _ => Err(errors::type_error(arg, expected, &array.dtype().to_string())),
        }
    }

    /// Positions in an axis of `len` entries, as numpy indexing reads them: negative ones count from the end.
    pub fn resolve(self, arg: &str, len: usize) -> PyResult<Vec<usize>> {
        match self {
            Self::List(entries) => entries.into_iter().map(|entry| wrapped(entry, arg, len)).collect(),
            Self::Mask(flags) if flags.len() == len => Ok((0..len).filter(|&row| flags[row]).collect()),
            Self::Mask(flags) => {
                let expected = format!("a mask of shape {}", shape_text(&[len]));
                Err(errors::value(arg, &expected, &shape_text(&[flags.len()])))
            }
        }
    }
}

fn index(value: &Bound<'_, PyAny>, arg: &str) -> PyResult<i64> {
    value.extract::<i64>().map_err(|_| PyIndexError::new_err(format!("{arg}: {value} is out of range")))
}

fn wrapped(entry: i64, arg: &str, len: usize) -> PyResult<usize> {
    let position = if entry < 0 { i128::from(entry) + len as i128 } else { i128::from(entry) };
    usize::try_from(position)
        .ok()
        .filter(|&position| position < len)
        .ok_or_else(|| PyIndexError::new_err(format!("{arg}: {entry} is out of range for axis 0 of size {len}")))
}

/// The latency by its name.
pub fn latency(name: &str) -> PyResult<Latency> {
    match name {
        "throughput" => Ok(Latency::Throughput),
        "smooth" => Ok(Latency::Smooth),
        _ => Err(errors::value("latency", "'throughput' or 'smooth'", &format!("'{name}'"))),
    }
}
