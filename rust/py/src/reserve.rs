//! Book-keeping never fails for want of memory.
//!
//! What is large is asked for and may be refused (`futurefill::Error::Memory`). What is small, such as a vector of
//! pointers or the text of an error, is Rust's own to allocate, and ends the process where there is no room left. So
//! a reserve lies ready: an allocation that fails gets it, and the next large one is refused.

use crate::errors;
use pyo3::PyResult;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering::AcqRel, Ordering::Relaxed};

/// Above the sum of small allocations in one call. Nobody writes to it, so it costs addresses and no memory.
const RESERVE: Layout = match Layout::from_size_align(1 << 23, 64) {
    Ok(layout) => layout,
    Err(_) => unreachable!(),
};
/// What is larger is asked for by code that takes a refusal.
const SMALL: usize = 1 << 20;

static HELD: AtomicPtr<u8> = AtomicPtr::new(null_mut());

#[global_allocator]
static ALLOCATOR: Reserved = Reserved;

struct Reserved;

/// Lays the reserve aside where it was given: no call begins without it.
pub fn restore() -> PyResult<()> {
    if !HELD.load(Relaxed).is_null() {
        return Ok(());
    }
    // SAFETY: the layout's size is not zero.
    let fresh = unsafe { System.alloc(RESERVE) };
    if fresh.is_null() {
        return Err(errors::out_of_memory(RESERVE.size()));
    }
    if HELD.compare_exchange(null_mut(), fresh, AcqRel, Relaxed).is_err() {
        free(fresh);
    }
    Ok(())
}

/// Gives the reserve to whoever allocates next; false where another did so before.
#[cold]
fn release() -> bool {
    let held = HELD.swap(null_mut(), AcqRel);
    free(held);
    !held.is_null()
}

fn free(reserve: *mut u8) {
    if !reserve.is_null() {
        // SAFETY: `restore` allocated it with this layout, and whoever calls took it out of `HELD` or never put it in.
        unsafe { System.dealloc(reserve, RESERVE) };
    }
}

/// What `ask` gets, at the second try with the reserve where the first fails for something small.
#[inline]
fn sure(size: usize, ask: impl Fn() -> *mut u8) -> *mut u8 {
    let got = ask();
    if got.is_null() && size <= SMALL && release() { ask() } else { got }
}

// SAFETY: all memory is the system allocator's, asked for with the caller's own layout.
unsafe impl GlobalAlloc for Reserved {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the system allocator's.
        sure(layout.size(), || unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        sure(layout.size(), || unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as in `alloc`; memory that could not be moved is still the caller's.
        sure(size, || unsafe { System.realloc(old, layout, size) })
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(old, layout) };
    }
}
