//! Closed-loop generation in the core:
//! `cargo bench -p futurefill --bench online -- CHANNELS LOG2_T [SCHEDULES] [WORKERS] [BATCH] [shared] [endless]`.
//!
//! SCHEDULES, separated by commas, are `auto`, `naive`, `epoched`, `continuous` or `base:fan:fan:..`, `smooth-` in front; their
//! runs are interleaved. `shared`: one filter for all channels. `endless`: filters of half as many lags, and no horizon.
//! Input `t + 1` is output `t`, scaled.
//! Prints nanoseconds per position and channel (minimum of several runs), the worst step and the state.

use futurefill::{Latency, Method, Plan, PlanOptions, Schedule};
use std::time::Instant;

fn method(text: &str) -> Method {
    match text {
        "auto" => Method::Auto,
        "naive" => Method::Naive,
        "epoched" => Method::Epoched,
        "continuous" => Method::Continuous,
        other => {
            let parts: Vec<usize> = other.split(':').map(|p| p.parse().expect("base:fan:fan")).collect();
            Method::Schedule(Schedule::new(Some(parts[0]), parts[1..].to_vec()).expect("a valid schedule"))
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let number = |i: usize, default: usize| args.get(i).map_or(default, |a| a.parse().expect("a number"));
    let (d, t) = (number(0, 256), 1usize << number(1, 14));
    let names: Vec<&str> = args.get(2).map_or("auto", String::as_str).split(',').collect();
    let workers = number(3, 1);
    let batch = number(4, 1);
    let given = |word| args.iter().any(|arg| arg == word);
    let (rows, lags) = (if given("shared") { 1 } else { d }, if given("endless") { t / 2 } else { t });
    let shape = if given("shared") { &[][..] } else { &[d] };
    let horizon = (!given("endless")).then_some(t);
    let mut seed = 88_172_645_463_325_252u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let filters: Vec<f32> = (0..rows * lags).map(|_| random() * (2.0 / lags as f32).sqrt()).collect();
    let plans: Vec<_> = names
        .iter()
        .map(|name| {
            let (name, latency) = match name.strip_prefix("smooth-") {
                Some(name) => (name, Latency::Smooth),
                None => (*name, Latency::Throughput),
            };
            let options = PlanOptions { horizon, method: method(name), workers, latency, ..Default::default() };
            Plan::new(&filters, shape, lags, options).expect("a plan")
        })
        .collect();
    let mut best = vec![(f64::INFINITY, 0.0); plans.len()];
    let rounds = if names.contains(&"naive") || t * d > 1 << 26 { 2 } else { 4 };
    let mut caches: Vec<_> = plans.iter().map(|plan| plan.new_cache(&[batch, d]).expect("a cache")).collect();
    // The last round takes the time of each step, which costs as much as a step of one channel.
    for round in 0..=rounds {
        for (cache, best) in caches.iter_mut().zip(&mut best) {
            cache.reset();
            let mut u = vec![0.25f32; batch * d];
            let mut y = vec![0.0f32; batch * d];
            let mut worst = 0f64;
            let start = Instant::now();
            let mut last = start;
            for _ in 0..t {
                cache.step(&u, &mut y).expect("a step");
                cache.finish();
                for (u, y) in u.iter_mut().zip(&y) {
                    *u = 0.25 + 0.5 * y;
                }
                if round == rounds {
                    let now = Instant::now();
                    worst = worst.max((now - last).as_secs_f64());
                    last = now;
                }
            }
            let each = start.elapsed().as_secs_f64() * 1e9 / (t * d * batch) as f64;
            *best = if round == rounds { (best.0, worst) } else { (best.0.min(each), worst) };
        }
    }
    for ((plan, cache), (each, worst)) in plans.iter().zip(&caches).zip(&best) {
        println!(
            "D={d} T={t} B={batch} workers={workers} {}: {each:.2} ns per position and channel, worst step {:.3} ms, state {} bytes",
            plan.schedule(),
            worst * 1e3,
            cache.nbytes()
        );
    }
}
