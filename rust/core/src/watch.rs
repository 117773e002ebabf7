//! Long work under watch: it tells how far it is, and ends early where it is told to.
//!
//! [`scope`] lends a [`Watch`] to all work of the calling thread. The engine polls it between pieces of some
//! milliseconds; where the watch says stop, the stack unwinds to `scope`, without a panic hook. What was being written
//! is then of no use: whoever polls must not have taken anything out of a structure that outlives the call.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

/// Looks after long work.
pub trait Watch {
    /// Whether to go on. `done`: share of the work so far, 0 to 1. Called often: keep it cheap.
    fn poll(&self, done: f64) -> bool;
}

/// The watch said stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted;

/// The watch of a thread, and the part of the whole work that runs at present.
struct Watched {
    watch: Rc<dyn Watch>,
    from: f64,
    to: f64,
}

thread_local! {
    static CURRENT: RefCell<Option<Watched>> = const { RefCell::new(None) };
}

/// Puts the former watch back, also on the way of a panic.
struct Restore(Option<Watched>);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

fn under<R>(watched: Option<Watched>, work: impl FnOnce() -> R) -> R {
    let _restore = Restore(CURRENT.replace(watched));
    work()
}

/// Runs `work` under watch.
pub fn scope<R>(watch: Rc<dyn Watch>, work: impl FnOnce() -> R) -> Result<R, Interrupted> {
    let watched = Watched { watch, from: 0.0, to: 1.0 };
    catch_unwind(AssertUnwindSafe(|| under(Some(watched), work)))
        .map_err(|panic| if panic.is::<Interrupted>() { Interrupted } else { resume_unwind(panic) })
}

/// Runs `work` without a watch: nothing ends it early.
pub fn unwatched<R>(work: impl FnOnce() -> R) -> R {
    under(None, work)
}

/// Runs `work` as units `from..to` of `total` equal units of the present work, and polls when it is done.
pub fn part<R>(from: usize, to: usize, total: usize, work: impl FnOnce() -> R) -> R {
    let at = |watched: &Watched, unit: usize| {
        watched.from + (watched.to - watched.from) * (unit as f64 / total.max(1) as f64).min(1.0)
    };
    let inner = CURRENT.with_borrow(|current| {
        let outer = current.as_ref()?;
        Some(Watched { watch: outer.watch.clone(), from: at(outer, from), to: at(outer, to) })
    });
    if inner.is_none() {
        return work();
    }
    let result = under(inner, work);
    poll(to, total);
    result
}

/// Tells the watch that `done` of `total` units of the present work are done; does not return where it says stop.
pub fn poll(done: usize, total: usize) {
    let Some((watch, share)) = CURRENT.with_borrow(|current| {
        let Watched { watch, from, to } = current.as_ref()?;
        Some((watch.clone(), from + (to - from) * (done as f64 / total.max(1) as f64).min(1.0)))
    }) else {
        return;
    };
    // A watch may use the engine itself.
    if !unwatched(|| watch.poll(share)) {
        resume_unwind(Box::new(Interrupted));
    }
}

/// Polls inside a unit whose share is not counted.
pub fn check() {
    poll(0, 1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    struct Log {
        shares: RefCell<Vec<f64>>,
        left: Cell<usize>,
    }

    impl Log {
        fn new(left: usize) -> Rc<Self> {
            Rc::new(Self { shares: RefCell::default(), left: Cell::new(left) })
        }
    }

    impl Watch for Log {
        fn poll(&self, done: f64) -> bool {
            // A watch that uses the engine is not asked about that.
            check();
            self.shares.borrow_mut().push(done);
            self.left.set(self.left.get().saturating_sub(1));
            self.left.get() > 0
        }
    }

    #[test]
    fn parts_nest() {
        let log = Log::new(100);
        let done = scope(log.clone(), || {
            part(0, 1, 4, || (1..=2).for_each(|k| poll(k, 2)));
            unwatched(|| poll(1, 1));
            part(1, 4, 4, || part(1, 2, 3, check));
            7
        });
        assert_eq!(done, Ok(7));
        assert_eq!(*log.shares.borrow(), [0.125, 0.25, 0.25, 0.5, 0.75, 1.0]);
    }

    #[test]
    fn a_stop_unwinds_to_its_scope_and_other_panics_pass() {
        let ended = scope(Log::new(3), || (0..10).for_each(|k| poll(k, 10)));
        assert_eq!(ended, Err(Interrupted));
        check();
        let outer = Log::new(9);
        let ended = scope(outer.clone(), || {
            assert_eq!(scope(Log::new(1), check), Err(Interrupted));
            check();
        });
        assert_eq!((ended, outer.shares.borrow().len()), (Ok(()), 1));
        let panic = catch_unwind(|| scope(Log::new(9), || resume_unwind(Box::new("defect"))));
        assert_eq!(panic.unwrap_err().downcast_ref(), Some(&"defect"));
        check();
    }
}
