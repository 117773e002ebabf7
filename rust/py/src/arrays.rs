//! numpy arrays in and out: what is accepted, when it is copied, where results are written.
//!
//! Contiguous native arrays are read and written in place. Steps stay attached to the interpreter. Work on whole
//! sequences detaches and reads the caller's arrays meanwhile, and writes to `out`, as numpy's own functions do: a thread
//! that writes to them at the same time gets a result made of old and new numbers.

use std::borrow::Cow;
use std::ffi::c_int;
use std::ops::Range;
use std::ptr;

use futurefill::{Error, Real, watch};
use numpy::npyffi::flags::{NPY_ARRAY_CARRAY, NPY_ARRAY_CARRAY_RO, NPY_ARRAY_WRITEABLE};
use numpy::npyffi::{NPY_TYPES, NpyTypes, PY_ARRAY_API, get_type_object};
use numpy::{Element, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyFloat, PySlice, PyTuple};

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

/// Numbers of an array.
#[derive(Clone, Copy)]
pub enum Numbers<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
}

/// Room for numbers in an array.
pub enum Room<'a> {
    F32(&'a mut [f32]),
    F64(&'a mut [f64]),
}

/// The two precisions of the engine as numpy knows them.
pub trait Float: Real + Element + Copy + 'static {
    const PRECISION: Precision;

    /// The numbers, if they are of this type.
    fn own(numbers: Numbers<'_>) -> Option<&[Self]>;
    fn own_room(room: Room<'_>) -> Result<&mut [Self], Room<'_>>;
}

macro_rules! float {
    ($t:ty, $precision:ident) => {
        impl Float for $t {
            const PRECISION: Precision = Precision::$precision;

            #[inline(always)]
            fn own(numbers: Numbers<'_>) -> Option<&[Self]> {
                if let Numbers::$precision(own) = numbers { Some(own) } else { None }
            }
            #[inline(always)]
            fn own_room(room: Room<'_>) -> Result<&mut [Self], Room<'_>> {
                if let Room::$precision(own) = room { Ok(own) } else { Err(room) }
            }
        }
    };
}

float!(f32, F32);
float!(f64, F64);

impl<'a> Numbers<'a> {
    /// In the engine's precision: the numbers themselves wherever they are in it already.
    pub fn to<T: Float>(self) -> Result<Cow<'a, [T]>, Error> {
        T::own(self).map_or_else(|| self.to_vec().map(Cow::Owned), |own| Ok(Cow::Borrowed(own)))
    }

    /// An own copy in the engine's precision.
    pub fn to_vec<T: Float>(self) -> Result<Vec<T>, Error> {
        match self {
            Self::F32(numbers) => converted(numbers),
            Self::F64(numbers) => converted(numbers),
        }
    }
}

impl Room<'_> {
    /// Has `work` write numbers of the engine's precision into it.
    pub fn fill<T: Float, R>(self, work: impl FnOnce(&mut [T]) -> Result<R, Error>) -> Result<R, Error> {
        let room = match T::own_room(self) {
            Ok(own) => return work(own),
            Err(room) => room,
        };
        let mut numbers = futurefill::zeros(room.len(), T::ZERO)?;
        let result = work(&mut numbers)?;
        match room {
            Room::F32(room) => convert(&numbers, room),
            Room::F64(room) => convert(&numbers, room),
        }
        Ok(result)
    }

    fn len(&self) -> usize {
        match self {
            Self::F32(room) => room.len(),
            Self::F64(room) => room.len(),
        }
    }
}

fn converted<T: Float, U: Float>(numbers: &[U]) -> Result<Vec<T>, Error> {
    let mut to = futurefill::zeros(numbers.len(), T::ZERO)?;
    convert(numbers, &mut to);
    Ok(to)
}

fn convert<T: Float, U: Float>(from: &[T], to: &mut [U]) {
    for (from, to) in from.chunks(1 << 20).zip(to.chunks_mut(1 << 20)) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = U::of_f64(from.as_f64()));
        watch::check();
    }
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
    let output = Output::new(py, None, T::PRECISION, shape, None)?;
    // SAFETY: a new array.
    let room = unsafe { output.room() };
    room.fill(|to: &mut [T]| {
        to.copy_from_slice(values);
        Ok(())
    })
    .map_err(errors::engine)?;
    Ok(output.target)
}

/// An argument of the engine: float32 or float64, any strides, any byte order.
pub struct Input<'py> {
    array: Bound<'py, PyUntypedArray>,
    pub precision: Precision,
}

impl<'py> Input<'py> {
    pub fn new(value: &Bound<'py, PyAny>, arg: &str) -> PyResult<Self> {
        Self::of(value, arg, None)
    }

    /// `weak`: the precision of a Python float, where one is an input.
    fn of(value: &Bound<'py, PyAny>, arg: &str, weak: Option<Precision>) -> PyResult<Self> {
        let array = match value.cast::<PyUntypedArray>() {
            Ok(array) => array.clone(),
            Err(_) => scalar_array(value, arg, weak)?,
        };
        refuse_masks(&array, arg)?;
        let precision = match array.dtype().num() {
            num if num == NPY_TYPES::NPY_FLOAT as c_int => Precision::F32,
            num if num == NPY_TYPES::NPY_DOUBLE as c_int => Precision::F64,
            _ => return Err(errors::type_error(arg, ALLOWED, &format!("dtype {}", array.dtype()))),
        };
        Ok(Self { array, precision })
    }

    /// An input of a plan that computes in `precision`: nothing is computed in less than it came in. A Python float has
    /// the plan's own.
    pub fn of_plan(value: &Bound<'py, PyAny>, arg: &str, precision: Precision) -> PyResult<Self> {
        let input = Self::of(value, arg, Some(precision)).map_err(|error| match value.cast::<PyUntypedArray>() {
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

    pub fn py(&self) -> Python<'py> {
        self.array.py()
    }

    pub fn shape(&self) -> &[usize] {
        self.array.shape()
    }

    /// The same numbers contiguous, aligned and in native byte order: the array itself wherever it is so already.
    pub fn contiguous(&self) -> PyResult<Contiguous<'py>> {
        if flags(&self.array) & NPY_ARRAY_CARRAY_RO == NPY_ARRAY_CARRAY_RO && native(&self.array) {
            return Ok(Contiguous { array: self.array.clone(), precision: self.precision });
        }
        let array = empty(self.array.py(), self.precision, self.array.shape())?;
        copy(&self.array, &array)?;
        Ok(Contiguous { array, precision: self.precision })
    }
}

/// One entry of a one-axis array is a numpy scalar, no array; a Python float is of the precision it is taken for.
#[cold]
fn scalar_array<'py>(
    value: &Bound<'py, PyAny>,
    arg: &str,
    weak: Option<Precision>,
) -> PyResult<Bound<'py, PyUntypedArray>> {
    let numpy = value.py().import("numpy")?;
    if value.is_instance(&numpy.getattr("generic")?)? {
        return Ok(numpy.call_method1("asarray", (value,))?.cast_into()?);
    }
    match weak {
        Some(precision) if value.is_instance_of::<PyFloat>() => {
            Ok(numpy.call_method1("asarray", (value, precision.name()))?.cast_into()?)
        }
        _ => Err(errors::type_error(arg, ALLOWED, &type_name(value))),
    }
}

/// Masked entries have numbers too, which would be computed with.
#[inline]
fn refuse_masks(array: &Bound<'_, PyUntypedArray>, arg: &str) -> PyResult<()> {
    // SAFETY: two live objects; only the type pointers are compared.
    let exact = unsafe { ffi::Py_TYPE(array.as_ptr()) == get_type_object(array.py(), NpyTypes::PyArray_Type) };
    if exact { Ok(()) } else { refuse_masked_array(array, arg) }
}

#[cold]
fn refuse_masked_array(array: &Bound<'_, PyUntypedArray>, arg: &str) -> PyResult<()> {
    let masked = array.py().import("numpy.ma")?.getattr("MaskedArray")?;
    if array.is_instance(&masked)? {
        return Err(errors::type_error(arg, &format!("{ALLOWED} without a mask"), "a masked array"));
    }
    Ok(())
}

/// A C-contiguous, aligned array in native byte order.
pub struct Contiguous<'py> {
    array: Bound<'py, PyUntypedArray>,
    precision: Precision,
}

impl Contiguous<'_> {
    pub fn numbers(&self) -> Numbers<'_> {
        let len = self.array.len();
        let start = if len == 0 { ptr::without_provenance(align_of::<f64>()) } else { data(&self.array).cast_const() };
        // SAFETY: `len` aligned numbers of this type lie there, and numpy keeps them while the array lives.
        unsafe {
            match self.precision {
                Precision::F32 => Numbers::F32(std::slice::from_raw_parts(start.cast(), len)),
                Precision::F64 => Numbers::F64(std::slice::from_raw_parts(start.cast(), len)),
            }
        }
    }
}

/// Bytes copied between two looks for signals.
const PIECE: usize = 1 << 26;

/// Copies numbers of the same shape and type between arrays of any strides and byte order.
fn copy(from: &Bound<'_, PyUntypedArray>, to: &Bound<'_, PyUntypedArray>) -> PyResult<()> {
    let py = from.py();
    let whole = |from: &Bound<'_, PyAny>, to: &Bound<'_, PyAny>| {
        // SAFETY: two live arrays.
        let failed = unsafe { PY_ARRAY_API.PyArray_CopyInto(py, to.as_ptr().cast(), from.as_ptr().cast()) < 0 };
        if failed { Err(PyErr::fetch(py)) } else { Ok(()) }
    };
    let pieces = from.len() * from.dtype().itemsize() / PIECE + 1;
    let longest = from.shape().iter().copied().enumerate().max_by_key(|(_, len)| *len);
    let Some((axis, len)) = longest.filter(|_| pieces > 1) else { return whole(from, to) };
    for k in 0..pieces {
        let [start, stop] = [k, k + 1].map(|k| (len as u128 * k as u128 / pieces as u128) as isize);
        let index = (0..axis).map(|_| PySlice::full(py)).chain([PySlice::new(py, start, stop, 1)]);
        let index = PyTuple::new(py, index.collect::<Vec<_>>())?;
        whole(&from.get_item(&index)?, &to.get_item(&index)?)?;
        py.check_signals()?;
    }
    Ok(())
}

/// Where results go: a new array, or the caller's `out`.
pub struct Output<'py> {
    target: Bound<'py, PyUntypedArray>,
    /// The target where it can be written to as it is, or else an array to be copied from.
    plain: Bound<'py, PyUntypedArray>,
    precision: Precision,
}

impl<'py> Output<'py> {
    /// `out` must have the input's precision and the output's shape, and must be writable; its strides are free, and it
    /// may overlap `input`.
    pub fn new(
        py: Python<'py>,
        out: Option<&Bound<'py, PyAny>>,
        precision: Precision,
        shape: &[usize],
        input: Option<&Input<'py>>,
    ) -> PyResult<Self> {
        let target = match out {
            None => empty(py, precision, shape)?,
            Some(out) => checked_out(out, precision, shape)?,
        };
        let plain = if flags(&target) & NPY_ARRAY_CARRAY == NPY_ARRAY_CARRAY && !overlap(&target, input) {
            target.clone()
        } else {
            empty(py, precision, shape)?
        };
        Ok(Self { target, plain, precision })
    }

    pub fn len(&self) -> usize {
        self.plain.len()
    }

    /// The memory to write to.
    ///
    /// # Safety
    /// Nobody else reads or writes the array while the room lives: it is new, or the caller's own `out`.
    pub unsafe fn room(&self) -> Room<'_> {
        let len = self.plain.len();
        let start = if len == 0 { ptr::without_provenance_mut(align_of::<f64>()) } else { data(&self.plain) };
        // SAFETY: `len` aligned numbers of this type lie there; exclusive by this function's contract.
        unsafe {
            match self.precision {
                Precision::F32 => Room::F32(std::slice::from_raw_parts_mut(start.cast(), len)),
                Precision::F64 => Room::F64(std::slice::from_raw_parts_mut(start.cast(), len)),
            }
        }
    }

    /// The array with its results.
    pub fn finish(self) -> PyResult<Bound<'py, PyAny>> {
        if !self.plain.is(&self.target) {
            copy(&self.plain, &self.target)?;
        }
        Ok(self.target.into_any())
    }
}

fn overlap(target: &Bound<'_, PyUntypedArray>, input: Option<&Input<'_>>) -> bool {
    let Some(input) = input else { return false };
    let (a, b) = (extent(target), extent(&input.array));
    a.start < b.end && b.start < a.end
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
    refuse_masks(array, "out")?;
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
