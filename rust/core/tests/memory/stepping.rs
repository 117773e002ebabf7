//! Stepping allocates nothing.

use crate::ALLOCATIONS;
use crate::common::*;
use futurefill::{Latency, Method, Plan, PlanOptions};

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
