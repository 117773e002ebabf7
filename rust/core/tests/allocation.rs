//! Stepping allocates nothing: shown with an allocator that counts what each thread asks for.

mod common;

use common::*;
use futurefill::{Latency, Method, Plan, PlanOptions};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn stepping_allocates_nothing() {
    let (t, d) = (1500, 20);
    let f = Random::new(1).values::<f32>(d * t);
    let (u, mut y) = (vec![0.5f32; 2 * d], vec![0.0f32; 2 * d]);
    for method in [Method::Auto, Method::Naive, Method::Epoched, Method::Continuous, schedule(7, &[3, 5])] {
        for horizon in [None, Some(t)] {
            for latency in [Latency::Throughput, Latency::Smooth] {
                let options = PlanOptions { horizon, method: method.clone(), latency, ..Default::default() };
                let plan = Plan::new(&f, &[d], t, options).unwrap();
                let mut cache = plan.new_cache(&[2, d]).unwrap();
                let before = ALLOCATIONS.get();
                for _ in 0..t {
                    cache.step(&u, &mut y).unwrap();
                    cache.finish();
                }
                assert_eq!(ALLOCATIONS.get() - before, 0, "{method:?} {horizon:?} {latency:?}");
            }
        }
    }
}
