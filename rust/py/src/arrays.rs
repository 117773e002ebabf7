//! numpy arrays in and out: what is accepted, when it is copied, where results are written.
//!
//! Contiguous native arrays are read and written in place. Steps stay attached to the interpreter. Work on whole
//! sequences detaches and reads the caller's arrays meanwhile, as numpy's own functions do: a thread that writes to
//! them at the same time gets a result made of old and new numbers. It writes only to arrays nobody else knows yet.

use std::ffi::c_int;
use std::ops::Range;
use std::ptr;

use futurefill::Real;
use numpy::npyffi::flags::{NPY_ARRAY_CARRAY, NPY_ARRAY_CARRAY_RO, NPY_ARRAY_NOTSWAPPED, NPY_ARRAY_WRITEABLE};
use numpy::npyffi::{NPY_TYPES, NpyTypes, PY_ARRAY_API, get_type_object};
use numpy::{Element, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::args::{shape_text, type_name};
use crate::errors;

pub const ALLOWED: &str = "a numpy array of float32 or float64";

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Precision {
    F32,
    F64,
}

impl Precision {
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
        }
    }

    fn type_num(self) -> c_int {
        match self {
            Self::F32 => NPY_TYPES::NPY_FLOAT as c_int,
            Self::F64 => NPY_TYPES::NPY_DOUBLE as c_int,
        }
    }
}

/// The two precisions of the engine as numpy knows them.
pub trait Float: Real + Element + Copy + 'static {
    const PRECISION: Precision;
}

impl Float for f32 {
    const PRECISION: Precision = Precision::F32;
}

impl Float for f64 {
    const PRECISION: Precision = Precision::F64;
}

/// An empty vector with room for exactly `len` numbers, or a MemoryError.
fn with_room<T>(len: usize) -> PyResult<Vec<T>> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(len).map_err(|_| errors::out_of_memory(len.saturating_mul(size_of::<T>())))?;
    Ok(vec)
}

pub fn zeros<T: Float>(len: usize) -> PyResult<Vec<T>> {
    let mut vec = with_room(len)?;
    vec.resize(len, T::ZERO);
    Ok(vec)
}

fn native(array: &Bound<'_, PyUntypedArray>) -> bool {
    matches!(array.dtype().byteorder(), b'=' | b'|')
}

fn flags(array: &Bound<'_, PyUntypedArray>) -> c_int {
    // SAFETY: the pointer is a live array's.
    unsafe { (*array.as_array_ptr()).fields.flags }
}

fn data(array: &Bound<'_, PyUntypedArray>) -> *mut u8 {
    // SAFETY: as above.
    unsafe { (*array.as_array_ptr()).fields.data.cast() }
}

/// A new array of zeros or of anything at all: never a panic where memory ends.
pub fn empty<'py>(py: Python<'py>, precision: Precision, shape: &[usize]) -> PyResult<Bound<'py, PyUntypedArray>> {
    let bytes = |len: usize| len.checked_mul(8);
    if shape.iter().try_fold(1_usize, |len, &n| len.checked_mul(n)).and_then(bytes).is_none() {
        return Err(errors::out_of_memory(usize::MAX));
    }
    let mut dims: Vec<isize> = shape.iter().map(|&n| n as isize).collect();
    // SAFETY: dims lives through the call; the descriptor's reference is stolen by it; a null is turned into the
    // error numpy has set.
    unsafe {
        let descr = PY_ARRAY_API.PyArray_DescrFromType(py, precision.type_num());
        let array = PY_ARRAY_API.PyArray_NewFromDescr(
            py,
            get_type_object(py, NpyTypes::PyArray_Type),
            descr,
            dims.len() as c_int,
            dims.as_mut_ptr(),
            ptr::null_mut(),
            ptr::null_mut(),
            0,
            ptr::null_mut(),
        );
        Ok(Bound::from_owned_ptr_or_err(py, array)?.cast_into_unchecked())
    }
}

/// A new array with the given numbers.
pub fn filled<'py, T: Float>(py: Python<'py>, shape: &[usize], values: &[T]) -> PyResult<Bound<'py, PyUntypedArray>> {
    let array = empty(py, T::PRECISION, shape)?;
    Output { array: array.clone(), precision: T::PRECISION }.write(values)?;
    Ok(array)
}

/// An argument of the engine: float32 or float64, any strides, any byte order.
pub struct Input<'py> {
    array: Bound<'py, PyUntypedArray>,
    pub precision: Precision,
}

impl<'py> Input<'py> {
    pub fn new(value: &Bound<'py, PyAny>, arg: &str) -> PyResult<Self> {
        let array = match value.cast::<PyUntypedArray>() {
            Ok(array) => array.clone(),
            Err(_) => scalar_array(value, arg)?,
        };
        let precision = match array.dtype().num() {
            num if num == NPY_TYPES::NPY_FLOAT as c_int => Precision::F32,
            num if num == NPY_TYPES::NPY_DOUBLE as c_int => Precision::F64,
            _ => return Err(errors::type_error(arg, ALLOWED, &format!("dtype {}", array.dtype()))),
        };
        Ok(Self { array, precision })
    }

    /// An input of a plan that computes in `precision`: nothing is computed in less than it came in.
    pub fn of_plan(value: &Bound<'py, PyAny>, arg: &str, precision: Precision) -> PyResult<Self> {
        let input = Self::new(value, arg).map_err(|error| match value.cast::<PyUntypedArray>() {
            Ok(array) if array.dtype().kind() == b'c' => {
                let got = format!("dtype {0}: a complex input needs a plan with dtype={0}", array.dtype());
                errors::type_error(arg, ALLOWED, &got)
            }
            _ => error,
        })?;
        if input.precision > precision {
            let (own, name) = (precision.name(), input.precision.name());
            let got = format!("dtype {name}: plan with dtype={name}, or convert {arg} to {own}");
            return Err(errors::type_error(arg, &format!("{own}, the precision of this plan, or less"), &got));
        }
        Ok(input)
    }

    pub fn shape(&self) -> &[usize] {
        self.array.shape()
    }

    fn bytes(&self) -> Range<usize> {
        extent(&self.array)
    }

    /// The same numbers contiguous, aligned and in native byte order: the array itself wherever it is so already.
    pub fn contiguous<T: Float>(&self) -> PyResult<Contiguous<'py>> {
        debug_assert!(T::PRECISION == self.precision);
        if flags(&self.array) & NPY_ARRAY_CARRAY_RO == NPY_ARRAY_CARRAY_RO && native(&self.array) {
            return Ok(Contiguous(self.array.clone()));
        }
        let py = self.array.py();
        // SAFETY: a live array and a fresh descriptor, whose reference is stolen; null is numpy's error.
        unsafe {
            let descr = PY_ARRAY_API.PyArray_DescrFromType(py, self.precision.type_num());
            let wanted = NPY_ARRAY_CARRAY_RO | NPY_ARRAY_NOTSWAPPED;
            let array = PY_ARRAY_API.PyArray_FromArray(py, self.array.as_array_ptr(), descr, wanted);
            Ok(Contiguous(Bound::from_owned_ptr_or_err(py, array)?.cast_into_unchecked()))
        }
    }

    /// The numbers in the engine's precision: the array itself wherever it holds them so.
    pub fn values<T: Float>(&self) -> PyResult<Values<'py, T>> {
        Ok(match T::PRECISION == self.precision {
            true => Values::Array(self.contiguous::<T>()?),
            false => Values::Own(self.to_vec()?),
        })
    }

    /// An own copy in the engine's precision.
    pub fn to_vec<T: Float>(&self) -> PyResult<Vec<T>> {
        let mut vec = with_room(self.array.len())?;
        match self.precision {
            Precision::F32 => vec.extend(self.contiguous::<f32>()?.slice().iter().map(|x: &f32| T::of_f64(x.as_f64()))),
            Precision::F64 => vec.extend(self.contiguous::<f64>()?.slice().iter().map(|x: &f64| T::of_f64(x.as_f64()))),
        }
        Ok(vec)
    }
}

/// One entry of a one-axis array is a numpy scalar, no array; everything else is refused.
#[cold]
fn scalar_array<'py>(value: &Bound<'py, PyAny>, arg: &str) -> PyResult<Bound<'py, PyUntypedArray>> {
    let numpy = value.py().import("numpy")?;
    if !value.is_instance(&numpy.getattr("generic")?)? {
        return Err(errors::type_error(arg, ALLOWED, &type_name(value)));
    }
    Ok(numpy.call_method1("asarray", (value,))?.cast_into()?)
}

/// Numbers to be read.
pub enum Values<'py, T> {
    Array(Contiguous<'py>),
    Own(Vec<T>),
}

impl<T: Float> Values<'_, T> {
    pub fn slice(&self) -> &[T] {
        match self {
            Self::Array(array) => array.slice(),
            Self::Own(vec) => vec,
        }
    }
}

/// A C-contiguous, aligned array in native byte order.
pub struct Contiguous<'py>(Bound<'py, PyUntypedArray>);

impl Contiguous<'_> {
    /// `T` is the array's own type.
    pub fn slice<T: Float>(&self) -> &[T] {
        let len = self.0.len();
        if len == 0 {
            return &[];
        }
        debug_assert!(self.0.dtype().num() == T::PRECISION.type_num());
        // SAFETY: `len` aligned numbers of this type lie there, and numpy keeps them while the array lives.
        unsafe { std::slice::from_raw_parts(data(&self.0).cast::<T>(), len) }
    }
}

/// Where results go: a new array, or the caller's `out`.
pub struct Output<'py> {
    array: Bound<'py, PyUntypedArray>,
    precision: Precision,
}

impl<'py> Output<'py> {
    /// `out` must have the input's precision and the output's shape, and must be writable; its strides are free.
    pub fn new(
        py: Python<'py>,
        out: Option<&Bound<'py, PyAny>>,
        precision: Precision,
        shape: &[usize],
    ) -> PyResult<Self> {
        let array = match out {
            None => empty(py, precision, shape)?,
            Some(out) => checked_out(out, precision, shape)?,
        };
        Ok(Self { array, precision })
    }

    pub fn into_array(self) -> Bound<'py, PyAny> {
        self.array.into_any()
    }

    /// Whether numbers of the engine's type can be written straight into it.
    pub fn is_plain<T: Float>(&self) -> bool {
        T::PRECISION == self.precision && flags(&self.array) & NPY_ARRAY_CARRAY == NPY_ARRAY_CARRAY
    }

    pub fn len(&self) -> usize {
        self.array.len()
    }

    pub fn overlaps(&self, input: &Input<'_>) -> bool {
        let (a, b) = (extent(&self.array), input.bytes());
        a.start < b.end && b.start < a.end
    }

    /// The array's memory.
    ///
    /// # Safety
    /// [`Self::is_plain`] holds, nobody else reads or writes the array while the slice lives: it is new, or the caller
    /// stays attached and the input lies elsewhere.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice_mut<T: Float>(&self) -> &mut [T] {
        let len = self.array.len();
        if len == 0 {
            return &mut [];
        }
        // SAFETY: `len` aligned numbers of this type lie there; exclusive by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(data(&self.array).cast::<T>(), len) }
    }

    /// Stores results (C order), converting to the array's precision.
    pub fn write<T: Float>(&self, values: &[T]) -> PyResult<()> {
        match self.precision {
            Precision::F32 => self.write_as::<T, f32>(values),
            Precision::F64 => self.write_as::<T, f64>(values),
        }
    }

    fn write_as<T: Float, U: Float>(&self, values: &[T]) -> PyResult<()> {
        if self.is_plain::<U>() {
            // SAFETY: plain; attached for the whole call, and `values` is memory of our own.
            let target = unsafe { self.slice_mut::<U>() };
            for (to, from) in target.iter_mut().zip(values) {
                *to = U::of_f64(from.as_f64());
            }
            return Ok(());
        }
        let py = self.array.py();
        let plain = Self { array: empty(py, U::PRECISION, self.array.shape())?, precision: U::PRECISION };
        plain.write_as::<T, U>(values)?;
        // SAFETY: two live arrays of one shape and type.
        let failed =
            unsafe { PY_ARRAY_API.PyArray_CopyInto(py, self.array.as_array_ptr(), plain.array.as_array_ptr()) < 0 };
        if failed { Err(PyErr::fetch(py)) } else { Ok(()) }
    }
}

fn checked_out<'py>(
    out: &Bound<'py, PyAny>,
    precision: Precision,
    shape: &[usize],
) -> PyResult<Bound<'py, PyUntypedArray>> {
    let wanted = || format!("a numpy array of {}", precision.name());
    let array = out.cast::<PyUntypedArray>().map_err(|_| errors::type_error("out", &wanted(), &type_name(out)))?;
    if array.dtype().num() != precision.type_num() || !native(array) {
        return Err(errors::type_error("out", &wanted(), &format!("dtype {}", array.dtype())));
    }
    if array.shape() != shape {
        let expected = format!("shape {}", shape_text(shape));
        return Err(errors::value("out", &expected, &shape_text(array.shape())));
    }
    if flags(array) & NPY_ARRAY_WRITEABLE == 0 {
        return Err(errors::value("out", "a writable array", "a read-only one"));
    }
    Ok(array.clone())
}

/// Addresses from an array's first byte to behind its last.
fn extent(array: &Bound<'_, PyUntypedArray>) -> Range<usize> {
    let start = data(array) as usize;
    if array.is_empty() {
        return start..start;
    }
    if flags(array) & NPY_ARRAY_CARRAY_RO == NPY_ARRAY_CARRAY_RO {
        return start..start + array.len() * array.dtype().itemsize();
    }
    let (mut low, mut high) = (start, start + array.dtype().itemsize());
    for (&n, &stride) in array.shape().iter().zip(array.strides()) {
        let reach = (n - 1) * stride.unsigned_abs();
        if stride < 0 {
            low -= reach;
        } else {
            high += reach;
        }
    }
    low..high
}
