//! torch tensors on the CPU read through DLPack's exchange functions: no Python object is made on the way.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use crate::arrays::{Numbers, Precision, Room};

/// `DLTensor` of dlpack.h 1.x.
#[repr(C)]
struct DlTensor {
    data: *mut u8,
    device_type: c_int,
    device_id: c_int,
    ndim: c_int,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// `DLPackExchangeAPI` of dlpack.h 1.x.
#[repr(C)]
struct ExchangeApi {
    major: u32,
    minor: u32,
    older: *const c_void,
    allocate: *const c_void,
    from_object: *const c_void,
    to_object: *const c_void,
    tensor_from_object: Option<unsafe extern "C" fn(*mut ffi::PyObject, *mut DlTensor) -> c_int>,
    stream: *const c_void,
}

const CPU: c_int = 1;
const FLOAT: u8 = 2;

/// Reads tensors of exactly one type.
pub struct Reader {
    kind: Py<PyType>,
    read: unsafe extern "C" fn(*mut ffi::PyObject, *mut DlTensor) -> c_int,
}

static READER: PyOnceLock<Option<Reader>> = PyOnceLock::new();

/// The reader, where torch has been seen and has the exchange functions.
#[inline]
pub fn reader(py: Python<'_>) -> Option<&'static Reader> {
    READER.get(py).and_then(Option::as_ref)
}

/// Makes tensors of this type, `torch.Tensor`, known; whether they can be read so.
#[pyfunction]
pub fn read_tensors(kind: &Bound<'_, PyType>) -> PyResult<bool> {
    let made = READER.get_or_try_init(kind.py(), || Reader::new(kind))?;
    Ok(made.is_some())
}

impl Reader {
    fn new(kind: &Bound<'_, PyType>) -> PyResult<Option<Self>> {
        let Ok(capsule) = kind.getattr("__dlpack_c_exchange_api__") else { return Ok(None) };
        // SAFETY: a live object; another kind of object or name gives null.
        let api = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), c"dlpack_exchange_api".as_ptr()) };
        if api.is_null() {
            return Err(PyErr::fetch(kind.py()));
        }
        // SAFETY: by its name the capsule holds this table, whose head is the same in all versions.
        let ExchangeApi { major: 1, tensor_from_object: Some(read), .. } = (unsafe { &*api.cast::<ExchangeApi>() })
        else {
            return Ok(None);
        };
        Ok(Some(Self { kind: kind.clone().unbind(), read: *read }))
    }

    /// The tensor's memory, if it is contiguous, on the CPU, of this precision and of the very type.
    #[inline]
    pub fn read<'a>(&self, tensor: &'a Bound<'_, PyAny>, precision: Precision) -> PyResult<Option<Tensor<'a>>> {
        // SAFETY: live objects; only the type pointers are compared.
        if !ptr::eq(unsafe { ffi::Py_TYPE(tensor.as_ptr()) }.cast(), self.kind.as_ptr()) {
            return Ok(None);
        }
        let mut view = DlTensor {
            data: ptr::null_mut(),
            device_type: 0,
            device_id: 0,
            ndim: 0,
            code: 0,
            bits: 0,
            lanes: 0,
            shape: ptr::null(),
            strides: ptr::null(),
            byte_offset: 0,
        };
        // SAFETY: a live object of the type the function belongs to, and room for its description.
        if unsafe { (self.read)(tensor.as_ptr(), &mut view) } != 0 {
            // Not to be described so: the general way finds the words for it.
            drop(PyErr::take(tensor.py()));
            return Ok(None);
        }
        let bits = if precision == Precision::F64 { 64 } else { 32 };
        if (view.device_type, view.code, view.bits, view.lanes) != (CPU, FLOAT, bits, 1) {
            return Ok(None);
        }
        let axes = view.ndim as usize;
        // SAFETY: so many numbers lie there while the tensor lives.
        let [shape, strides] = [view.shape, view.strides].map(|start| match axes {
            0 => &[][..],
            _ => unsafe { std::slice::from_raw_parts(start.cast::<usize>(), axes) },
        });
        let mut len = 1;
        for (&n, &stride) in shape.iter().zip(strides).rev() {
            if n != 1 && stride != len && !shape.contains(&0) {
                return Ok(None);
            }
            len *= n;
        }
        let data = view.data.wrapping_add(view.byte_offset as usize);
        if len > 0 && (data.is_null() || !data.addr().is_multiple_of(bits as usize / 8)) {
            return Ok(None);
        }
        let data = if len > 0 { data } else { ptr::without_provenance_mut(8) };
        Ok(Some(Tensor { data, len, shape, precision }))
    }
}

/// Memory of a tensor.
pub struct Tensor<'a> {
    data: *mut u8,
    len: usize,
    shape: &'a [usize],
    precision: Precision,
}

impl Tensor<'_> {
    pub fn shape(&self) -> &[usize] {
        self.shape
    }

    fn range(&self) -> Range<usize> {
        let bytes = if self.precision == Precision::F64 { 8 } else { 4 };
        self.data.addr()..self.data.addr() + self.len * bytes
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (self.range(), other.range());
        a.start < b.end && b.start < a.end
    }

    /// # Safety
    /// Nobody writes to the tensor meanwhile.
    pub unsafe fn numbers(&self) -> Numbers<'_> {
        // SAFETY: `read` has found so many aligned numbers there; unchanged by this function's contract.
        unsafe {
            match self.precision {
                Precision::F32 => Numbers::F32(std::slice::from_raw_parts(self.data.cast(), self.len)),
                Precision::F64 => Numbers::F64(std::slice::from_raw_parts(self.data.cast(), self.len)),
            }
        }
    }

    /// # Safety
    /// Nobody else reads or writes the tensor meanwhile.
    pub unsafe fn room(&self) -> Room<'_> {
        // SAFETY: as for `numbers`; exclusive by this function's contract.
        unsafe {
            match self.precision {
                Precision::F32 => Room::F32(std::slice::from_raw_parts_mut(self.data.cast(), self.len)),
                Precision::F64 => Room::F64(std::slice::from_raw_parts_mut(self.data.cast(), self.len)),
            }
        }
    }
}
