//! One caller at a time: threads take turns, and nobody waits for one who will never leave.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::watch::PAUSE;

/// A value for one caller at a time.
pub struct Turn<T> {
    /// The process and the thread whose turn it is; 0: nobody's.
    holder: AtomicU64,
    /// Locked by the holder alone, so that nobody ever waits for it.
    value: Mutex<T>,
}

impl<T: Send> Turn<T> {
    pub fn new(value: T) -> Self {
        // From here on forks are counted.
        futurefill::process();
        Self { holder: AtomicU64::new(0), value: Mutex::new(value) }
    }

    /// Runs `work` when it is this caller's turn. Waits without the interpreter lock, but not for a call that this very
    /// thread is in, nor for one of a thread that a fork has left behind: these are RuntimeErrors.
    pub fn with<R>(&self, py: Python<'_>, work: impl FnOnce(&mut T) -> PyResult<R>) -> PyResult<R> {
        let me = identity();
        if !self.take(me) {
            self.wait(py, me)?;
        }
        let _leave = Leave(&self.holder);
        // A panic has told its caller what to do.
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        let result = work(&mut value);
        drop(value);
        result
    }

    fn take(&self, me: u64) -> bool {
        self.holder.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    #[cold]
    fn wait(&self, py: Python<'_>, me: u64) -> PyResult<()> {
        let (mut looked, mut rest) = (Instant::now(), Duration::ZERO);
        loop {
            match self.holder.load(Ordering::Relaxed) {
                holder if holder == me => {
                    let text = "cache: this thread is in a call of it already: its progress or a signal handler \
                                cannot use it";
                    return Err(PyRuntimeError::new_err(text));
                }
                holder if holder != 0 && holder >> 32 != me >> 32 => {
                    let text = "cache: another thread was in a call of it when this process was forked; use a fork \
                                or a state of it from before";
                    return Err(PyRuntimeError::new_err(text));
                }
                _ => {}
            }
            let taken = py.detach(|| {
                for _ in 0..64 {
                    if self.take(me) {
                        return true;
                    }
                    if rest < Duration::from_micros(20) {
                        thread::yield_now()
                    } else {
                        thread::sleep(rest)
                    }
                    rest = (rest + Duration::from_nanos(200)).min(Duration::from_micros(500));
                    if looked.elapsed() > PAUSE {
                        break;
                    }
                }
                false
            });
            if taken {
                return Ok(());
            }
            if looked.elapsed() > PAUSE {
                py.check_signals()?;
                looked = Instant::now();
            }
        }
    }
}

/// Ends a turn, also on the way of a panic.
struct Leave<'a>(&'a AtomicU64);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

/// This process and this thread, never 0.
fn identity() -> u64 {
    static THREADS: AtomicU64 = AtomicU64::new(1);
    thread_local! {
        static ME: u64 = THREADS.fetch_add(1, Ordering::Relaxed);
    }
    (futurefill::process() as u64) << 32 | ME.with(|me| *me)
}
