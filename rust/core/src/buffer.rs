//! Memory of a size that is a matter of the data: had or refused, never the end of the process.

use crate::error::Error;
use crate::watch;
use std::ops::{Deref, DerefMut};

const ALIGN: usize = 64;

/// Tiles stream whole buffers: with small pages every 4 KiB costs a page walk and ends the prefetchers' run.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages(start: *mut libc::c_void, bytes: usize) {
    const HUGE: usize = 2 << 20;
    const PAGE: usize = 4096;
    if bytes < HUGE {
        return;
    }
    let skip = start.align_offset(PAGE).min(bytes);
    // SAFETY: the range lies inside one fresh allocation of ours, and the advice never changes what it holds.
    unsafe { libc::madvise(start.byte_add(skip), bytes - skip, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_start: *mut std::ffi::c_void, _bytes: usize) {}

/// Bytes written between two polls of a watch: a few milliseconds.
const STRETCH: usize = 1 << 23;

/// An empty vector with room for exactly `len` values.
pub(crate) fn with_room<T>(len: usize) -> Result<Vec<T>, Error> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(len).map_err(|_| Error::Memory { bytes: len.saturating_mul(size_of::<T>()) })?;
    Ok(vec)
}

/// `len` copies of a value.
pub fn zeros<T: Copy>(len: usize, zero: T) -> Result<Vec<T>, Error> {
    let mut vec = with_room(len)?;
    fill(&mut vec, len, zero);
    Ok(vec)
}

/// Appends `len` copies of a value where there is room for them.
fn fill<T: Copy>(vec: &mut Vec<T>, len: usize, zero: T) {
    let end = vec.len() + len;
    while vec.len() < end {
        vec.resize(end.min(vec.len() + STRETCH / size_of::<T>().max(1)), zero);
        watch::check();
    }
}

/// Appends all values where there is room for them.
fn append<T: Copy>(vec: &mut Vec<T>, values: &[T]) {
    for stretch in values.chunks(STRETCH / size_of::<T>().max(1)) {
        vec.extend_from_slice(stretch);
        watch::check();
    }
}

/// Refuses what memory has no room for, on behalf of code that would end the process instead.
pub(crate) fn check_room(bytes: usize) -> Result<(), Error> {
    let room = with_room::<u8>(bytes)?;
    std::hint::black_box(&room);
    Ok(())
}

/// A fixed-length buffer that starts on a cache line.
///
/// Creating writes every page, so that the first pass over it does not pay for page faults.
#[derive(Debug)]
pub(crate) struct Buffer<T> {
    storage: Vec<T>,
    offset: usize,
    len: usize,
}

impl<T: Copy> Buffer<T> {
    pub(crate) fn new(len: usize, zero: T) -> Result<Self, Error> {
        let (mut storage, offset) = Self::reserve(len)?;
        fill(&mut storage, offset + len, zero);
        Ok(Self { storage, offset, len })
    }

    /// A buffer of the same values.
    pub(crate) fn of(values: &[T]) -> Result<Self, Error> {
        let Some(first) = values.first() else { return Ok(Self::empty()) };
        let (mut storage, offset) = Self::reserve(values.len())?;
        fill(&mut storage, offset, *first);
        append(&mut storage, values);
        Ok(Self { storage, offset, len: values.len() })
    }

    /// An empty vector with room for `len` values from a cache line on, and where in it that line begins.
    fn reserve(len: usize) -> Result<(Vec<T>, usize), Error> {
        let pad = ALIGN / size_of::<T>();
        let total = len.checked_add(pad).ok_or(Error::Memory { bytes: usize::MAX })?;
        let mut storage: Vec<T> = with_room(total)?;
        ask_for_huge_pages(storage.as_mut_ptr().cast(), total * size_of::<T>());
        let offset = storage.as_ptr().align_offset(ALIGN);
        Ok((storage, if offset < pad { offset } else { 0 }))
    }

    pub(crate) fn empty() -> Self {
        Self { storage: Vec::new(), offset: 0, len: 0 }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.storage[self.offset..self.offset + self.len]
    }
}

impl<T> DerefMut for Buffer<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.storage[self.offset..self.offset + self.len]
    }
}
