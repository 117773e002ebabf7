//! Helpers shared by the integration tests.
#![allow(dead_code)]

use futurefill::{Cache, Method, Plan, PlanOptions, Real, Schedule, oracle};
use proptest::prelude::ProptestConfig;
use std::sync::Arc;

/// So many cases, or as many as the environment variable PROPTEST_CASES says.
pub fn cases(count: u32) -> ProptestConfig {
    let config = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { config.cases } else { count };
    ProptestConfig { cases, max_shrink_iters: 20_000, failure_persistence: None, ..config }
}

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    pub fn values<T: Real>(&mut self, n: usize) -> Vec<T> {
        (0..n).map(|_| T::of_f64((self.next() >> 40) as f64 / (1u64 << 23) as f64 - 1.0)).collect()
    }
}

pub fn schedule(base: usize, fans: &[usize]) -> Method {
    Method::Schedule(Schedule::new(Some(base), fans.to_vec()).unwrap())
}

pub fn plan<T: Real>(f: &[T], shape: &[usize], l: usize, horizon: Option<usize>, method: Method) -> Arc<Plan<T>> {
    Plan::new(f, shape, l, PlanOptions { horizon, method, ..Default::default() }).unwrap()
}

pub fn rows(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// Steps through all positions of `u (*C, t)`, or through `chunks` of them; returns `(*O, t)`.
pub fn stream<T: Real>(cache: &mut Cache<T>, u: &[T], t: usize, chunk: impl FnMut() -> usize) -> Vec<T> {
    let total = rows(cache.output_shape());
    let mut y = vec![T::of_f64(f64::NAN); total * t];
    stream_from(cache, u, t, 0, t, chunk, &mut y);
    y
}

pub fn stream_from<T: Real>(
    cache: &mut Cache<T>,
    u: &[T],
    t: usize,
    from: usize,
    to: usize,
    mut chunk: impl FnMut() -> usize,
    y: &mut [T],
) {
    let (ins, outs) = (rows(cache.input_shape()), rows(cache.output_shape()));
    let mut s = from;
    while s < to {
        let m = chunk().min(to - s);
        let block: Vec<T> = (0..ins).flat_map(|r| u[r * t + s..r * t + s + m].to_vec()).collect();
        let mut out = vec![T::of_f64(f64::NAN); outs * m];
        if m == 1 {
            cache.step(&block, &mut out).unwrap();
        } else {
            cache.extend(&block, m, &mut out).unwrap();
        }
        for r in 0..outs {
            y[r * t + s..r * t + s + m].copy_from_slice(&out[r * m..(r + 1) * m]);
        }
        s += m;
    }
}

#[track_caller]
pub fn assert_close<T: Real>(y: &[T], truth: &[f64], t: usize, what: impl std::fmt::Display) {
    let error = oracle::relative_error(y, truth);
    assert!(error <= oracle::bound::<T>(t), "{what}: relative error {error:e} above {:e}", oracle::bound::<T>(t));
}
