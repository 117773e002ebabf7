//! Fetching what is needed next while something else is computed.

use std::ptr;

/// Bytes in a cache line, on all machines this is tuned for.
const LINE: usize = 64;

/// Runs of memory that are to be read soon, brought near a line at a time. Nothing but time depends on them.
///
/// The processor's own prefetching follows runs that are being read; between two of them, and during the passes over
/// what is near already, the memory would be idle.
pub struct Prefetch {
    /// Where each run goes on, and how many lines of it are left.
    runs: [(*const u8, usize); 3],
    run: usize,
}

impl Prefetch {
    pub fn nothing() -> Self {
        Self { runs: [(ptr::null(), 0); 3], run: 3 }
    }

    /// Runs from these places on, so many values each, in this order.
    pub fn of<T>(runs: [(*const T, usize); 3]) -> Self {
        Self { runs: runs.map(|(at, len)| (at.cast(), (len * size_of::<T>()).div_ceil(LINE))), run: 0 }
    }

    /// Asks for up to `count` lines.
    #[inline(always)]
    pub fn lines(&mut self, count: usize) {
        for _ in 0..count {
            let Some((at, left)) = self.runs.get_mut(self.run) else { return };
            if *left == 0 {
                self.run += 1;
            } else {
                prefetch(*at);
                *at = at.wrapping_add(LINE);
                *left -= 1;
            }
        }
    }
}

#[inline(always)]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch reads nothing and never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
