//! Worker threads of our own. They look out for work for a moment before they sleep, because one tile soon follows
//! another; nobody waits for one that has not started; and a forked child does not count on threads it does not have.

use crate::watch;
use std::any::Any;
use std::panic::{self, AssertUnwindSafe};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a worker looks out for more work. A base block of a few hundred channels takes about as long.
const LOOK_OUT: Duration = Duration::from_micros(200);

/// Processors this process may use.
pub fn available_workers() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Runs `work(job, state)` for every job, with as many threads as there are `states`. Each thread has a run of
/// consecutive jobs of its own, the calling thread the first, whose caches may hold what it needs; whoever is done with
/// their own takes from the end of another's.
///
/// Which thread takes a job never changes what the job computes. With one state nothing is allocated. The calling
/// thread polls its watch after each of its jobs; where that ends the work, or a job panics, no thread begins another.
pub(crate) fn for_each<J: Send, S: Send>(
    jobs: impl ExactSizeIterator<Item = J>,
    states: &mut [S],
    work: impl Fn(J, &mut S) + Sync,
) {
    let count = jobs.len();
    let workers = states.len().min(count);
    let helpers = if workers > 1 { helpers(workers - 1) } else { Vec::new() };
    if helpers.is_empty() {
        return jobs.enumerate().for_each(|(k, job)| watch::part(k, k + 1, count, || work(job, &mut states[0])));
    }
    let workers = helpers.len() + 1;
    let share = jobs.len().div_ceil(workers);
    let mut jobs = jobs.collect::<Vec<_>>().into_iter();
    let shares: Vec<_> =
        (0..workers).map(|_| Mutex::new(jobs.by_ref().take(share).collect::<Vec<_>>().into_iter())).collect();
    let states: Vec<_> = states.iter_mut().map(Mutex::new).collect();
    let (begun, ended) = (AtomicUsize::new(0), AtomicBool::new(false));
    // By functions, so that no share stays locked while a job of it runs.
    let first = |share: usize| lock(&shares[share]).next();
    let last = |share: usize| lock(&shares[share]).next_back();
    let go_on = || !ended.load(Ordering::Relaxed);
    let take = |own: usize| {
        let _end = EndOnPanic(&ended);
        let mut state = lock(&states[own]);
        let mut run = |job| {
            let k = begun.fetch_add(1, Ordering::Relaxed);
            watch::part(k, k + 1, count, || work(job, &mut state));
        };
        while let Some(job) = first(own).filter(|_| go_on()) {
            run(job);
        }
        for other in (1..workers).map(|k| (own + k) % workers) {
            while let Some(job) = last(other).filter(|_| go_on()) {
                run(job);
            }
        }
    };
    together(&helpers, &take);
}

/// Tells the other threads of a common work that one is unwinding.
struct EndOnPanic<'a>(&'a AtomicBool);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic on one thread reaches the caller; the others need not add to it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls `run(0)` here and `run(1)`, `run(2)`, .. on those helpers that get to it before this thread is done.
fn together(helpers: &[Arc<Helper>], run: &(dyn Fn(usize) + Sync)) {
    let panic = Mutex::new(None);
    let calls: Vec<Call> = (1..=helpers.len()).map(|number| Call { run, number, panic: &panic }).collect();
    let posted = Posted(helpers.iter().zip(&calls).filter(|(helper, call)| helper.post(call)).collect());
    run(0);
    drop(posted);
    if let Some(payload) = panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        panic::resume_unwind(payload);
    }
}

/// One thread's part of a common work.
struct Call<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    number: usize,
    panic: &'a Mutex<Option<Box<dyn Any + Send>>>,
}

/// Calls lent to helpers; leaving takes them back, or waits for those that have begun.
struct Posted<'a, 'c>(Vec<(&'a Arc<Helper>, &'a Call<'c>)>);

impl Drop for Posted<'_, '_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|(helper, call)| helper.recall(call));
    }
}

/// A thread that runs calls.
struct Helper {
    /// The call to run next, null where there is none, or `BUSY`.
    seat: AtomicPtr<Call<'static>>,
    thread: Thread,
}

const BUSY: *mut Call<'static> = ptr::without_provenance_mut(1);

impl Helper {
    fn start(number: usize) -> Option<Arc<Self>> {
        let (send, receive) = std::sync::mpsc::channel::<Arc<Self>>();
        let made = thread::Builder::new()
            .name(format!("futurefill-{number}"))
            .spawn(move || {
                if let Ok(helper) = receive.recv() {
                    helper.serve()
                }
            })
            .ok()?;
        let helper = Arc::new(Self { seat: AtomicPtr::new(ptr::null_mut()), thread: made.thread().clone() });
        send.send(helper.clone()).ok()?;
        Some(helper)
    }

    /// Whether the helper was free and will look at `call`, which has to be recalled before it ends.
    fn post(&self, call: &Call) -> bool {
        let call = ptr::from_ref(call).cast::<Call<'static>>().cast_mut();
        // What the caller wrote before is to be seen by the helper.
        let free = self.seat.compare_exchange(ptr::null_mut(), call, Ordering::Release, Ordering::Relaxed).is_ok();
        if free {
            self.thread.unpark();
        }
        free
    }

    /// Takes a posted call back; where the helper has begun, waits until it is done.
    fn recall(&self, call: &Call) {
        let call = ptr::from_ref(call).cast::<Call<'static>>().cast_mut();
        if self.seat.compare_exchange(call, ptr::null_mut(), Ordering::Relaxed, Ordering::Acquire).is_ok() {
            return;
        }
        let mut rounds = 0;
        while self.seat.load(Ordering::Acquire) == BUSY {
            pause(rounds);
            rounds += 1;
        }
    }

    fn serve(&self) -> ! {
        loop {
            let call = self.wait();
            if self.seat.compare_exchange(call, BUSY, Ordering::Acquire, Ordering::Relaxed).is_err() {
                continue;
            }
            // SAFETY: a call that was in the seat lives until it is recalled, which waits while the seat is `BUSY`.
            let Call { run, number, panic } = unsafe { &*call };
            if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(|| run(*number))) {
                lock(panic).get_or_insert(payload);
            }
            self.seat.store(ptr::null_mut(), Ordering::Release);
        }
    }

    fn wait(&self) -> *mut Call<'static> {
        loop {
            let start = Instant::now();
            let mut rounds = 0;
            while start.elapsed() < LOOK_OUT {
                let call = self.seat.load(Ordering::Relaxed);
                if !call.is_null() {
                    return call;
                }
                pause(rounds);
                rounds += 1;
            }
            thread::park();
        }
    }
}

/// Waits a little; after some rounds in such a way that others on this processor come first.
fn pause(rounds: usize) {
    if rounds < 64 {
        (0..16).for_each(|_| std::hint::spin_loop());
    } else {
        thread::yield_now();
    }
}

/// A number that differs between a process and its forked children.
#[cfg(unix)]
pub fn process() -> usize {
    static FORKS: AtomicUsize = AtomicUsize::new(0);
    static NOTED: std::sync::Once = std::sync::Once::new();
    extern "C" fn forked() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the handler only counts, which may be done between fork and exec.
    NOTED.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(forked));
    });
    FORKS.load(Ordering::Relaxed)
}

#[cfg(not(unix))]
pub fn process() -> usize {
    0
}

struct Team {
    process: usize,
    helpers: Vec<Arc<Helper>>,
}

static TEAM: Mutex<Team> = Mutex::new(Team { process: 0, helpers: Vec::new() });

/// `count` threads of this process, or as many as can be had.
fn helpers(count: usize) -> Vec<Arc<Helper>> {
    let mut team = match TEAM.try_lock() {
        Ok(team) => team,
        Err(TryLockError::Poisoned(team)) => team.into_inner(),
        // Another caller is at it, or was when this process was forked: work alone.
        Err(TryLockError::WouldBlock) => return Vec::new(),
    };
    let process = process();
    if team.process != process {
        // The parent's threads do not exist here.
        team.helpers.clear();
        team.process = process;
    }
    while team.helpers.len() < count {
        let Some(helper) = Helper::start(team.helpers.len()) else { break };
        team.helpers.push(helper);
    }
    team.helpers.iter().take(count).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    /// Jobs of very different length, so that threads take from each other.
    fn work(job: &mut usize, state: &mut usize) {
        let rounds = if job.is_multiple_of(16) { 2000 } else { 1 };
        (0..rounds).for_each(|_| std::hint::spin_loop());
        *job += 1000;
        *state += 1;
    }

    #[test]
    fn every_job_runs_once_whoever_takes_it() {
        for (jobs, workers) in [(0, 3), (1, 3), (2, 3), (7, 1), (64, 2), (1000, 5)] {
            let mut done: Vec<usize> = (0..jobs).collect();
            let mut states = vec![0; workers];
            for_each(done.iter_mut(), &mut states, work);
            assert!(done.iter().enumerate().all(|(i, job)| *job == i + 1000), "{jobs} jobs, {workers} workers");
            assert_eq!(states.iter().sum::<usize>(), jobs, "{jobs} jobs, {workers} workers");
        }
    }

    #[test]
    fn callers_share_the_helpers() {
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let mut done = [0usize; 40];
                        for_each(done.iter_mut(), &mut [0; 3], work);
                        total.fetch_add(done.iter().filter(|job| **job == 1000).count(), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 200 * 40);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_helpers_go_on() {
        for bad in [0, 20, 39] {
            let result = panic::catch_unwind(|| {
                for_each((0..40).map(|i| i == bad), &mut [(); 2], |fails, ()| assert!(!fails, "job {bad}"));
            });
            let message = result.expect_err("one job fails");
            assert_eq!(message.downcast_ref::<String>(), Some(&format!("job {bad}")));
            every_job_runs_once_whoever_takes_it();
        }
    }
}
