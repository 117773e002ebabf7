//! `Latency::Smooth`: delayed tiles in slices are as exact as everything else, wherever the stream is interrupted.

mod common;

use common::*;
use futurefill::{Latency, Method, Plan, PlanOptions, Real, oracle};
use proptest::prelude::*;
use std::sync::Arc;

fn smooth<T: Real>(f: &[T], shape: &[usize], l: usize, horizon: Option<usize>, method: Method) -> Arc<Plan<T>> {
    Plan::new(f, shape, l, PlanOptions { horizon, method, latency: Latency::Smooth, ..Default::default() }).unwrap()
}

fn methods() -> Vec<Method> {
    vec![
        Method::Auto,
        Method::Continuous,
        Method::Epoched,
        schedule(1, &[2, 2, 2, 2]),
        schedule(3, &[2, 3, 2]),
        schedule(8, &[4, 4]),
        schedule(4, &[2, 2, 2, 2, 2]),
    ]
}

#[test]
fn lengths_filters_and_horizons() {
    let mut random = Random::new(21);
    for t in (1..100).chain([127, 128, 129, 300, 511, 700]) {
        for l in [1, 7, 40, t, 3 * t] {
            let (u, f) = (random.values::<f64>(3 * t), random.values::<f64>(3 * l));
            let truth = oracle::causal_conv(&u, &[3], t, &f, &[3], l);
            for method in methods() {
                for horizon in [Some(t), None] {
                    let plan = smooth(&f, &[3], l, horizon, method.clone());
                    let y = stream(&mut plan.new_cache(&[3]).unwrap(), &u, t, || 1);
                    assert_close(&y, &truth, t, format!("{method:?} T = {t} L = {l} {horizon:?}"));
                }
            }
        }
    }
}

#[test]
fn interruptions_change_no_bit() {
    let mut random = Random::new(22);
    let (t, l) = (500, 400);
    let shapes = [
        (vec![3usize, 5], vec![5usize]),
        (vec![3, 1, 5], vec![4, 1]),
        (vec![3, 18], vec![18]),
        (vec![3, 16], vec![16]),
        (vec![3, 1], vec![31]),
    ];
    for (c, f_shape) in shapes {
        let f = random.values::<f32>(rows(&f_shape) * l);
        let u = random.values::<f32>(rows(&c) * t);
        for method in methods() {
            let plan = smooth(&f, &f_shape, l, Some(t), method.clone());
            let whole = stream(&mut plan.new_cache(&c).unwrap(), &u, t, || 1);
            assert_close(&whole, &oracle::causal_conv(&u, &c, t, &f, &f_shape, l), t, format!("{method:?}"));
            assert!(whole == stream(&mut plan.new_cache(&c).unwrap(), &u, t, || 37), "chunks");
            for cut in [1, 13, 64, 200, 257, 384] {
                let mut cache = plan.new_cache(&c).unwrap();
                let mut y = whole.clone();
                stream_from(&mut cache, &u, t, 0, cut, || 1, &mut y);
                let mut fork = cache.fork().unwrap();
                let state = cache.state().unwrap();
                let mut loaded = plan.load_cache(&state).unwrap();
                assert!(loaded.state().unwrap() == state);
                cache.reorder(&[0, 1, 2]).unwrap();
                for cache in [&mut cache, &mut fork, &mut loaded] {
                    let mut z = whole.clone();
                    stream_from(cache, &u, t, cut, t, || 1, &mut z);
                    assert!(z == whole, "{method:?} interrupted at {cut}");
                }
                // A row that starts again sees nothing of its past; the others go on.
                let mut cache = plan.new_cache(&c).unwrap();
                stream_from(&mut cache, &u, t, 0, cut, || 1, &mut y);
                cache.reset_rows(&[1]).unwrap();
                let mut z = whole.clone();
                stream_from(&mut cache, &u, t, cut, t, || 1, &mut z);
                let per = rows(&c) / 3;
                let mut fresh = u.clone();
                fresh[per * t..2 * per * t].chunks_mut(t).for_each(|row| row[..cut].fill(0.0));
                let truth = oracle::causal_conv(&fresh, &c, t, &f, &f_shape, l);
                for (z, truth) in z.chunks(t).zip(truth.chunks(t)) {
                    assert_close(&z[cut..], &truth[cut..], t, format!("{method:?} reset at {cut}"));
                }
                // Beams multiply in the middle of a slice.
                let mut beams = plan.new_cache(&c).unwrap();
                stream_from(&mut beams, &u, t, 0, cut, || 1, &mut y);
                beams.reorder(&[1, 1, 0, 2, 1]).unwrap();
                let entry = |i: usize| u[i * per * t..(i + 1) * per * t].to_vec();
                let gathered: Vec<f32> = [1, 1, 0, 2, 1].into_iter().flat_map(entry).collect();
                let outs = whole.len() / 3;
                let mut z = vec![0.0; 5 * outs];
                stream_from(&mut beams, &gathered, t, cut, t, || 1, &mut z);
                for (z, i) in z.chunks(outs).zip([1, 1, 0, 2, 1]) {
                    for (z, whole) in z.chunks(t).zip(whole[i * outs..].chunks(t)) {
                        assert!(z[cut..] == whole[cut..], "{method:?} beams at {cut}");
                    }
                }
                cache.reset();
                assert!(whole == stream(&mut cache, &u, t, || 1), "after a full reset");
            }
        }
    }
}

#[test]
fn prompts() {
    let mut random = Random::new(23);
    let (new, l) = (300, 350);
    for p in [1, 5, 100, 400] {
        let t = p + new;
        let (u, f) = (random.values::<f64>(4 * t), random.values::<f64>(4 * l));
        let truth = oracle::causal_conv(&u, &[4], t, &f, &[4], l);
        let prompt: Vec<f64> = u.chunks(t).flat_map(|row| row[..p].to_vec()).collect();
        for max_new in [Some(new), None] {
            let plan = smooth(&f, &[4], l, None, schedule(8, &[2, 4]));
            let mut head = vec![0.0; 4 * p];
            let mut cache = plan.prefill(&prompt, &[4], p, max_new, &mut head).unwrap();
            let mut y = truth.iter().map(|_| 0.0).collect::<Vec<f64>>();
            y.chunks_mut(t).zip(head.chunks(p)).for_each(|(y, head)| y[..p].copy_from_slice(head));
            stream_from(&mut cache, &u, t, p, t, || 1, &mut y);
            assert_close(&y, &truth, t, format!("P = {p}, {max_new:?}"));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_schedule_any_chunking(
        base in 1usize..20,
        fans in prop::collection::vec(2usize..6, 0..4),
        t in 1usize..500,
        l in 1usize..500,
        bounded in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let (u, f) = (random.values::<f64>(6 * t), random.values::<f64>(3 * l));
        let plan = smooth(&f, &[3], l, bounded.then_some(t), schedule(base, &fans));
        let truth = oracle::causal_conv(&u, &[2, 3], t, &f, &[3], l);
        let y = stream(&mut plan.new_cache(&[2, 3]).unwrap(), &u, t, || 1 + random.below(60));
        assert_close(&y, &truth, t, format!("base {base} fans {fans:?} T = {t} L = {l}"));
    }
}
