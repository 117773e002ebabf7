//! Worker threads of our own, so that a forked child never waits for threads it does not have.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

struct Pools {
    process: u32,
    by_size: HashMap<usize, Arc<ThreadPool>>,
}

static POOLS: Mutex<Option<Pools>> = Mutex::new(None);

/// Processors this process may use.
pub fn available_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The pool of `threads` threads of this process; `None` for none, or where no thread can be had.
fn pool(threads: usize) -> Option<Arc<ThreadPool>> {
    if threads == 0 {
        return None;
    }
    // A fork may have happened while another thread held the lock: work alone then.
    let mut pools = POOLS.try_lock().ok()?;
    let process = std::process::id();
    if pools.as_ref().is_some_and(|p| p.process != process) {
        // The parent's threads do not exist here, and dropping their pool would wait for them.
        std::mem::forget(pools.take());
    }
    let by_size = &mut pools.get_or_insert_with(|| Pools { process, by_size: HashMap::new() }).by_size;
    if let Some(found) = by_size.get(&threads) {
        return Some(found.clone());
    }
    let made = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("futurefill-{i}")).build().ok()?;
    let made = Arc::new(made);
    by_size.insert(threads, made.clone());
    Some(made)
}

/// Runs `work(job, state)` for every job, in equal runs of consecutive jobs, one run for each of `states`: the first on
/// the calling thread, whose caches may hold what it needs, and which then has nobody to wake.
///
/// Which worker takes a job never changes what the job computes. With one state nothing is allocated.
pub(crate) fn for_each<J: Send, S: Send>(
    jobs: impl ExactSizeIterator<Item = J>,
    states: &mut [S],
    work: impl Fn(J, &mut S) + Sync,
) {
    let workers = states.len().min(jobs.len());
    let Some(pool) = pool(workers.saturating_sub(1)) else {
        return jobs.for_each(|job| work(job, &mut states[0]));
    };
    let share = jobs.len().div_ceil(workers);
    let mut jobs = jobs.collect::<Vec<_>>().into_iter();
    let own: Vec<J> = jobs.by_ref().take(share).collect();
    let work = &work;
    let (first, others) = states.split_first_mut().expect("there are at least two workers");
    pool.in_place_scope(|scope| {
        for state in others {
            let share: Vec<J> = jobs.by_ref().take(share).collect();
            scope.spawn(move |_| share.into_iter().for_each(|job| work(job, state)));
        }
        own.into_iter().for_each(|job| work(job, first));
    });
}
