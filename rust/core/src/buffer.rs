//! Zeroed, 64-byte aligned buffers whose pages are touched when they are made.

use crate::error::Error;
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
        let pad = ALIGN / size_of::<T>();
        let memory = || Error::Memory { bytes: len.saturating_mul(size_of::<T>()) };
        let total = len.checked_add(pad).ok_or_else(memory)?;
        let mut storage: Vec<T> = Vec::new();
        storage.try_reserve_exact(total).map_err(|_| memory())?;
        ask_for_huge_pages(storage.as_mut_ptr().cast(), total * size_of::<T>());
        let offset = storage.as_ptr().align_offset(ALIGN);
        let offset = if offset < pad { offset } else { 0 };
        storage.resize(total, zero);
        Ok(Self { storage, offset, len })
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
