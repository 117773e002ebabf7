//! The engine against the direct float64 sum: lengths, methods, schedules, shapes and the exact properties.

mod common;

use common::*;
use futurefill::{Error, Latency, Method, Plan, PlanOptions, Schedule, oracle};
use proptest::prelude::*;
use std::sync::Arc;

fn methods() -> Vec<Method> {
    vec![
        Method::Auto,
        Method::Naive,
        Method::Epoched,
        Method::Continuous,
        schedule(1, &[]),
        schedule(1, &[2, 2, 2, 2, 2]),
        schedule(3, &[5, 2, 7]),
        schedule(8, &[4, 4]),
        schedule(16, &[2, 8]),
    ]
}

#[test]
fn every_short_length_every_method() {
    let mut random = Random::new(1);
    for t in 1..=300 {
        let u = random.values::<f64>(2 * t);
        let f = random.values::<f64>(2 * t);
        let truth = oracle::causal_conv(&u, &[2], t, &f, &[2], t);
        for method in methods() {
            let plan = plan(&f, &[2], t, Some(t), method.clone());
            let y = stream(&mut plan.new_cache(&[2]).unwrap(), &u, t, || 1);
            assert_close(&y, &truth, t, format!("{method:?} T = L = {t}"));
        }
    }
}

#[test]
fn filter_length_and_horizon_are_independent() {
    let mut random = Random::new(2);
    for (t, l) in [(1, 9), (40, 1), (40, 2), (300, 17), (300, 64), (300, 65), (257, 300), (1000, 129), (63, 1000)] {
        let u = random.values::<f32>(3 * t);
        let f = random.values::<f32>(3 * l);
        let truth = oracle::causal_conv(&u, &[3], t, &f, &[3], l);
        for method in methods() {
            for horizon in [None, Some(t), Some(t + 100), Some(1 << 62)] {
                let plan = plan(&f, &[3], l, horizon, method.clone());
                let y = stream(&mut plan.new_cache(&[3]).unwrap(), &u, t, || 1);
                assert_close(&y, &truth, t, format!("{method:?} T = {t} L = {l} horizon {horizon:?}"));
            }
        }
    }
}

#[test]
fn primes_and_neighbours_of_powers_of_two() {
    let mut random = Random::new(3);
    for t in [331, 509, 511, 512, 513, 1021, 1023, 1025, 2047, 2049, 3001, 4095, 4097] {
        let u = random.values::<f32>(17 * t);
        let f = random.values::<f32>(17 * t);
        let truth = oracle::causal_conv(&u, &[17], t, &f, &[17], t);
        for method in [Method::Auto, Method::Epoched, Method::Continuous, schedule(32, &[4, 8])] {
            let plan = plan(&f, &[17], t, Some(t), method.clone());
            let y = stream(&mut plan.new_cache(&[17]).unwrap(), &u, t, || 7);
            assert_close(&y, &truth, t, format!("{method:?} T = {t}"));
        }
    }
}

#[test]
fn long_sums_stay_accurate() {
    let mut random = Random::new(4);
    let t = 1 << 15;
    let (u, f) = (random.values::<f32>(t), random.values::<f32>(t));
    let truth = oracle::causal_conv(&u, &[], t, &f, &[], t);
    for method in
        [Method::Auto, Method::Naive, Method::Epoched, Method::Continuous, schedule(t, &[]), schedule(64, &[])]
    {
        let plan = plan(&f, &[], t, Some(t), method.clone());
        let y = stream(&mut plan.new_cache(&[]).unwrap(), &u, t, || 1000);
        assert_close(&y, &truth, t, format!("{method:?}"));
    }
    // All of one sign: nothing cancels, and rounding errors add up at their worst.
    let (u, f) = (vec![1.1f32; t], vec![0.9f32; t]);
    let truth = oracle::causal_conv(&u, &[], t, &f, &[], t);
    for method in [Method::Auto, Method::Naive, Method::Epoched, schedule(t, &[])] {
        let plan = plan(&f, &[], t, Some(t), method.clone());
        let y = stream(&mut plan.new_cache(&[]).unwrap(), &u, t, || 1000);
        assert_close(&y, &truth, t, format!("{method:?}, one sign"));
    }
}

#[test]
fn broadcasting_shapes() {
    let mut random = Random::new(5);
    let shapes: [(&[usize], &[usize]); 22] = [
        (&[], &[]),
        (&[5], &[]),
        (&[], &[5]),
        (&[3, 40], &[40]),
        (&[2, 1, 20], &[5, 1]),
        (&[2, 1], &[20]),
        (&[2, 3, 4], &[3, 1]),
        (&[1, 4], &[3, 4]),
        (&[1, 2, 4], &[3, 1, 1]),
        (&[0, 3], &[3]),
        (&[2, 33], &[1]),
        (&[4, 2, 2], &[2, 2]),
        // Filters that fill groups of 16 rows.
        (&[16], &[16]),
        (&[3, 47], &[47]),
        (&[3, 1], &[31]),
        (&[20, 1], &[16]),
        (&[], &[16]),
        (&[32], &[3, 32]),
        (&[3, 2, 16], &[2, 16]),
        (&[5, 16, 1], &[16, 1]),
        (&[16, 4], &[16, 1]),
        (&[2, 4, 8], &[4, 1]),
    ];
    let (t, l) = (90, 70);
    for (c, f_shape) in shapes {
        let u = random.values::<f64>(rows(c) * t);
        let f = random.values::<f64>(rows(f_shape) * l);
        let truth = oracle::causal_conv(&u, c, t, &f, f_shape, l);
        for method in [Method::Naive, Method::Continuous, schedule(8, &[2, 2]), schedule(6, &[2]), schedule(5, &[])] {
            let plan = plan(&f, f_shape, l, None, method);
            let mut cache = plan.new_cache(c).unwrap();
            assert_eq!(rows(cache.output_shape()) * t, truth.len());
            assert_close(&stream(&mut cache, &u, t, || 1), &truth, t, format!("{c:?} * {f_shape:?}"));
            let mut y = vec![0.0; truth.len()];
            let mut cache = plan.prefill(&[0.0; 0], c, 0, None, &mut []).unwrap();
            stream_from(&mut cache, &u, t, 0, t, || 13, &mut y);
            assert_close(&y, &truth, t, format!("empty prompt, {c:?} * {f_shape:?}"));
        }
        let mut y = vec![0.0; truth.len()];
        futurefill::causal_conv(&u, c, t, &f, f_shape, l, &mut y, 1).unwrap();
        assert_close(&y, &truth, t, format!("causal_conv {c:?} * {f_shape:?}"));
        let mut two = vec![0.0; truth.len()];
        futurefill::causal_conv(&u, c, t, &f, f_shape, l, &mut two, 2).unwrap();
        assert_eq!(y, two);
    }
    assert!(matches!(plan(&[1.0f32; 6], &[3], 2, None, Method::Auto).new_cache(&[4]), Err(Error::Shape { .. })));
}

#[test]
fn whole_sequences_of_every_length() {
    let mut random = Random::new(6);
    let lengths = (1..=70).chain([255, 256, 257, 383, 384, 385, 511, 513, 1000, 2049, 5000]);
    for t in lengths {
        for l in [1, 2, 3, 31, 64, t, t + 1, 2 * t + 3, 700] {
            let (u, f) = (random.values::<f64>(2 * t), random.values::<f64>(l));
            let mut y = vec![f64::NAN; 2 * t];
            futurefill::causal_conv(&u, &[2], t, &f, &[], l, &mut y, 1).unwrap();
            assert_close(&y, &oracle::causal_conv(&u, &[2], t, &f, &[], l), t, format!("T = {t}, L = {l}"));
        }
    }
}

#[test]
fn whole_sequences_16_rows_at_a_time() {
    let mut random = Random::new(16);
    for t in [1, 2, 3, 15, 16, 17, 47, 100, 255, 256, 257, 300, 769, 1500] {
        for l in [1, 2, 16, 100, 257, t, 2 * t + 3] {
            let (u, f) = (random.values::<f64>(32 * t), random.values::<f64>(16 * l));
            let truth = oracle::causal_conv(&u, &[2, 16], t, &f, &[16], l);
            let run = |shape: &[usize], u: &[f64], workers| {
                let mut y = vec![f64::NAN; u.len()];
                futurefill::causal_conv(u, shape, t, &f, &[16], l, &mut y, workers).unwrap();
                y
            };
            let y = run(&[2, 16], &u, 1);
            assert_close(&y, &truth, t, format!("T = {t}, L = {l}"));
            assert_eq!(y, run(&[2, 16], &u, 3));
            assert_eq!(y[16 * t..], run(&[1, 16], &u[16 * t..], 1));
            let mut fill = vec![f64::NAN; 16 * (l - 1)];
            futurefill::futurefill(&u[..16 * t], &[16], t, &f, &[16], l, &mut fill).unwrap();
            for row in 0..16 {
                let padded: Vec<f64> = u[row * t..][..t].iter().copied().chain(vec![0.0; l - 1]).collect();
                let truth = oracle::causal_conv(&padded, &[], t + l - 1, &f[row * l..][..l], &[], l);
                let norm: f64 = truth.iter().map(|x| x * x).sum::<f64>().sqrt();
                for (fill, truth) in fill[row * (l - 1)..].iter().zip(&truth[t..]) {
                    assert!((fill - truth).abs() <= 1e-14 * norm, "fill T = {t}, L = {l}");
                }
            }
        }
    }
}

#[test]
fn long_sequences_are_cut_into_blocks() {
    let mut random = Random::new(17);
    for (t, l, extra) in
        [(40_000, 40_000, 3000), (33_000, 70_000, 40_000), (70_001, 20_000, 19_999), (16_385, 16_385, 1)]
    {
        let (u, f) = (random.values::<f64>(16 * t), random.values::<f64>(16 * l));
        let plan = plan(&f, &[16], l, None, schedule(64, &[8, 8]));
        let mut y = vec![f64::NAN; 16 * t];
        let mut cache = plan.prefill(&u, &[16], t, Some(extra), &mut y).unwrap();
        let mut rest = vec![f64::NAN; 16 * extra];
        cache.extend(&vec![0.0; 16 * extra], extra, &mut rest).unwrap();
        for row in [0, 9, 15] {
            let at = |s: usize| -> f64 {
                (s.saturating_sub(t - 1)..l.min(s + 1)).map(|j| f[row * l + j] * u[row * t + s - j]).sum()
            };
            for s in (0..t).step_by(977).chain([t - 1]) {
                assert!((y[row * t + s] - at(s)).abs() < 1e-9, "T = {t}, L = {l}: position {s}");
            }
            for s in (0..extra).step_by(97).chain([extra - 1]) {
                assert!((rest[row * extra + s] - at(t + s)).abs() < 1e-9, "T = {t}, L = {l}: {s} later");
            }
        }
    }
}

#[test]
fn futurefill_is_the_tail_of_the_convolution() {
    let mut random = Random::new(7);
    for (t1, t2) in
        [(0, 1), (0, 5), (1, 1), (5, 1), (1, 2), (3, 7), (7, 3), (100, 40), (40, 100), (600, 300), (1000, 9)]
    {
        let (v, w) = (random.values::<f64>(t1), random.values::<f64>(t2));
        let mut out = vec![f64::NAN; t2 - 1];
        futurefill::futurefill(&v, &[], t1, &w, &[], t2, &mut out).unwrap();
        let padded: Vec<f64> = v.iter().copied().chain(std::iter::repeat_n(0.0, t2 - 1)).collect();
        let truth = oracle::causal_conv(&padded, &[], t1 + t2 - 1, &w, &[], t2);
        let norm: f64 = truth.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-300);
        for (s, out) in out.iter().enumerate() {
            assert!((out - truth[t1 + s]).abs() <= 1e-14 * norm, "t1 = {t1}, t2 = {t2}, s = {}", s + 1);
        }
    }
}

#[test]
fn prefill_then_steps() {
    let mut random = Random::new(8);
    let new = 150;
    for l in [1, 5, 64, 200, 1000] {
        for p in [0, 1, 2, 3, 17, 63, 64, 65, 300, 700] {
            let t = p + new;
            let (u, f) = (random.values::<f64>(2 * 3 * t), random.values::<f64>(3 * l));
            let truth = oracle::causal_conv(&u, &[2, 3], t, &f, &[3], l);
            let prompt: Vec<f64> = u.chunks(t).flat_map(|row| row[..p].to_vec()).collect();
            for method in [Method::Naive, Method::Auto, Method::Continuous, schedule(8, &[2, 4]), schedule(16, &[])] {
                for (horizon, max_new) in [(Some(t), Some(new)), (None, Some(new)), (None, None), (Some(t + 5), None)] {
                    let plan = plan(&f, &[3], l, horizon, method.clone());
                    let mut head = vec![f64::NAN; 6 * p];
                    let mut cache = plan.prefill(&prompt, &[2, 3], p, max_new, &mut head).unwrap();
                    assert_eq!(cache.position(), p);
                    assert_eq!(cache.remaining(), max_new.or(horizon.map(|h| h - p)));
                    let mut y = vec![f64::NAN; 6 * t];
                    for (y, head) in y.chunks_mut(t).zip(head.chunks(p.max(1))) {
                        y[..p].copy_from_slice(head);
                    }
                    stream_from(&mut cache, &u, t, p, t, || 1, &mut y);
                    assert_close(&y, &truth, t, format!("{method:?} P = {p}, L = {l}, {horizon:?}, {max_new:?}"));
                }
            }
        }
    }
}

#[test]
fn prefilled_state_depends_on_new_tokens_alone() {
    let l = 1 << 14;
    for rows in [16, 64] {
        let f = Random::new(9).values::<f32>(rows * l);
        let plan = plan(&f, &[rows], l, None, Method::Auto);
        let after = |p: usize| {
            plan.prefill(&vec![0.5; rows * p], &[rows], p, Some(4096), &mut vec![0.0; rows * p]).unwrap().nbytes()
        };
        let bytes = after(16);
        assert_eq!([after(1000), after(40_000)], [bytes, bytes]);
        assert!(bytes <= 4 * 4096 * rows * 4, "{bytes} bytes for {rows} rows");
    }
}

#[test]
fn outputs_never_depend_on_later_inputs() {
    let mut random = Random::new(10);
    let (t, l) = (400, 400);
    for (method, rows) in methods().into_iter().flat_map(|method| [(method.clone(), 20), (method, 32)]) {
        let f = random.values::<f32>(rows * l);
        let u = random.values::<f32>(rows * t);
        let plan = plan(&f, &[rows], l, Some(t), method);
        let whole = stream(&mut plan.new_cache(&[rows]).unwrap(), &u, t, || 1);
        for cut in [1, 8, 31, 64, 129, 256, 399] {
            let mut other = u.clone();
            for row in other.chunks_mut(t) {
                row[cut..].fill(f32::NAN);
            }
            let y = stream(&mut plan.new_cache(&[rows]).unwrap(), &other, t, || 1);
            for (y, whole) in y.chunks(t).zip(whole.chunks(t)) {
                assert_eq!(y[..cut], whole[..cut]);
            }
        }
    }
}

#[test]
fn rows_never_depend_on_each_other() {
    let mut random = Random::new(11);
    let (t, l) = (300, 300);
    for (method, rows) in methods().into_iter().flat_map(|method| [(method.clone(), 3), (method, 16)]) {
        let f = random.values::<f32>(rows * l);
        let u = random.values::<f32>(2 * rows * t);
        let plan = plan(&f, &[rows], l, Some(t), method);
        let whole = stream(&mut plan.new_cache(&[2, rows]).unwrap(), &u, t, || 1);
        let mut other = u.clone();
        other[t..2 * t].fill(f32::NAN);
        let y = stream(&mut plan.new_cache(&[2, rows]).unwrap(), &other, t, || 1);
        for row in (0..2 * rows).filter(|row| *row != 1) {
            assert_eq!(y[row * t..(row + 1) * t], whole[row * t..(row + 1) * t]);
        }
        // The same rows alone give the same bits where they run as wide as in a batch, and are as exact in any case.
        let alone = stream(&mut plan.new_cache(&[1, rows]).unwrap(), &u[rows * t..], t, || 1);
        if rows == 16 {
            assert_eq!(alone[..], whole[rows * t..]);
        }
        let truth: Vec<f64> = whole[rows * t..].iter().map(|v| f64::from(*v)).collect();
        assert!(oracle::relative_error(&alone, &truth) < 2.0 * oracle::bound::<f32>(t));
    }
}

#[test]
fn any_number_of_workers_gives_the_same_bits() {
    let mut random = Random::new(12);
    let (t, l) = (4000, 4000);
    let f = random.values::<f32>(70 * l);
    let u = random.values::<f32>(2 * 70 * t);
    // Row by row, as blocks of an odd length go, and 16 rows at a time.
    for method in [schedule(65, &[8]), schedule(64, &[8]), schedule(512, &[2, 2]), Method::Naive] {
        let run = |workers| {
            let options = PlanOptions { horizon: Some(t), method: method.clone(), workers, ..Default::default() };
            let plan = Plan::new(&f, &[70], l, options).unwrap();
            let mut head = vec![0.0; 140 * 1000];
            let prompt: Vec<f32> = u.chunks(t).flat_map(|row| row[..1000].to_vec()).collect();
            let mut cache = plan.prefill(&prompt, &[2, 70], 1000, None, &mut head).unwrap();
            let mut y = vec![0.0; 140 * t];
            stream_from(&mut cache, &u, t, 1000, if method == Method::Naive { 1100 } else { t }, || 333, &mut y);
            (head, y)
        };
        let one = run(1);
        for workers in [2, 3, 8] {
            assert!(one == run(workers), "{workers} workers");
        }
    }
}

/// A gather that keeps the number of entries happens in place, any other in a new cache: they agree to the bit.
#[test]
fn reordering_in_place_is_reordering() {
    let mut random = Random::new(31);
    let (t, l) = (200, 150);
    for (c, f_shape) in [
        (vec![3usize, 5], vec![5usize]),
        (vec![4, 32], vec![32]),
        (vec![4, 18], vec![18]),
        (vec![17], vec![]),
        (vec![20], vec![]),
        (vec![18, 1], vec![31]),
        (vec![3, 1, 16], vec![4, 1]),
    ] {
        let f = random.values::<f64>(rows(&f_shape) * l);
        let batch = c[0];
        for (method, latency) in [
            (Method::Naive, Latency::Throughput),
            (schedule(4, &[2, 3]), Latency::Throughput),
            (schedule(4, &[3, 2]), Latency::Smooth),
        ] {
            let options = PlanOptions { method: method.clone(), latency, ..PlanOptions::default() };
            let plan = Arc::new(Plan::new(&f, &f_shape, l, options).unwrap());
            for case in 0..6 {
                let entry = |i: usize| match case {
                    0 => i,
                    1 => (i + 1) % batch,
                    2 => (i ^ 1).min(batch - 1),
                    _ => random.below(batch),
                };
                let index: Vec<usize> = (0..batch).map(entry).collect();
                let longer: Vec<usize> = index.iter().copied().chain([0]).collect();
                let prompt = random.values::<f64>(rows(&c) * 20);
                let outs = rows(plan.new_cache(&c).unwrap().output_shape());
                let mut y = vec![0.0; outs * 20];
                let mut cache = plan.prefill(&prompt, &c, 20, None, &mut y).unwrap();
                let u = random.values::<f64>((rows(&c) + rows(&c) / batch) * t);
                let mut y = vec![0.0; outs * t];
                stream_from(&mut cache, &u[..rows(&c) * t], t, 0, 61, || 1, &mut y);
                let mut other = cache.fork().unwrap();
                cache.reorder(&index).unwrap();
                other.reorder(&longer).unwrap();
                let mut z = vec![0.0; (outs + outs / batch) * t];
                stream_from(&mut cache, &u[..rows(&c) * t], t, 61, t, || 1, &mut y);
                stream_from(&mut other, &u, t, 61, t, || 1, &mut z);
                for (y, z) in y.chunks(t).zip(z.chunks(t)) {
                    assert!(y[61..] == z[61..], "{method:?} {c:?} {f_shape:?} {index:?}");
                }
            }
        }
    }
}

#[test]
fn fork_reorder_reset() {
    let mut random = Random::new(13);
    let (t, l) = (260, 200);
    for (c, f_shape) in [
        (vec![3usize, 5], vec![5usize]),
        (vec![3, 1, 5], vec![4, 1]),
        (vec![3], vec![]),
        (vec![3, 18], vec![18]),
        (vec![3, 16], vec![16]),
        (vec![3, 1], vec![31]),
    ] {
        let f = random.values::<f64>(rows(&f_shape) * l);
        let u = random.values::<f64>(rows(&c) * t);
        let per = rows(&c) / 3;
        for method in [Method::Naive, schedule(4, &[2, 3]), schedule(16, &[]), Method::Continuous] {
            for cut in [0, 3, 50, 96, 131] {
                let plan = plan(&f, &f_shape, l, Some(t), method.clone());
                let mut cache = plan.new_cache(&c).unwrap();
                let outs = rows(cache.output_shape()) / 3;
                let mut y = vec![0.0; 3 * outs * t];
                stream_from(&mut cache, &u, t, 0, cut, || 1, &mut y);
                let mut fork = cache.fork().unwrap();
                stream_from(&mut cache, &u, t, cut, t, || 1, &mut y);
                let mut z = y.clone();
                stream_from(&mut fork, &u, t, cut, t, || 1, &mut z);
                assert!(y == z, "a fork goes on as the original does");

                // Beams: entry 0 twice, then entry 2; the inputs follow.
                let mut beams = plan.new_cache(&c).unwrap();
                stream_from(&mut beams, &u, t, 0, cut, || 1, &mut z);
                beams.reorder(&[0, 0, 2, 1]).unwrap();
                let entry = |i: usize| u[i * per * t..(i + 1) * per * t].to_vec();
                let gathered: Vec<f64> = [0, 0, 2, 1].into_iter().flat_map(entry).collect();
                let mut z = vec![0.0; 4 * outs * t];
                stream_from(&mut beams, &gathered, t, cut, t, || 1, &mut z);
                for (i, from) in [0, 0, 2, 1].into_iter().enumerate() {
                    for row in 0..outs {
                        let (a, b) = ((i * outs + row) * t, (from * outs + row) * t);
                        assert!(z[a + cut..a + t] == y[b + cut..b + t]);
                    }
                }

                // A row that starts again sees nothing of its past; the others go on.
                let mut cache = plan.new_cache(&c).unwrap();
                let mut z = vec![0.0; 3 * outs * t];
                stream_from(&mut cache, &u, t, 0, cut, || 1, &mut z);
                cache.reset_rows(&[1]).unwrap();
                stream_from(&mut cache, &u, t, cut, t, || 1, &mut z);
                let mut fresh = u.clone();
                for row in fresh[per * t..2 * per * t].chunks_mut(t) {
                    row[..cut].fill(0.0);
                }
                let truth = oracle::causal_conv(&fresh, &c, t, &f, &f_shape, l);
                for i in [0, 1, 2] {
                    for row in i * outs..(i + 1) * outs {
                        let (z, truth) = (&z[row * t + cut..(row + 1) * t], &truth[row * t + cut..(row + 1) * t]);
                        assert_close(z, truth, t, format!("{method:?} entry {i} after {cut}"));
                    }
                }
                cache.reset();
                assert_eq!((cache.position(), cache.remaining()), (0, Some(t)));
                assert!(stream(&mut cache, &u, t, || 1) == y, "after a full reset");
            }
        }
    }
    let plan = plan(&[1.0f32; 5], &[5], 1, None, Method::Auto);
    assert!(plan.new_cache(&[5]).unwrap().reset_rows(&[0]).is_err());
    assert!(plan.new_cache(&[2, 5]).unwrap().reorder(&[2]).is_err());
}

#[test]
fn a_state_goes_on_bit_by_bit() {
    let mut random = Random::new(14);
    let (t, l) = (300, 220);
    let shapes =
        [(vec![2usize, 5], vec![5usize]), (vec![2, 1, 3], vec![4, 1]), (vec![2, 16], vec![16]), (vec![2, 1], vec![31])];
    for (c, f_shape) in shapes {
        let f = random.values::<f32>(rows(&f_shape) * l);
        let u = random.values::<f32>(rows(&c) * t);
        for method in methods() {
            for cut in [0, 1, 7, 64, 100, 192, 299] {
                for horizon in [None, Some(t)] {
                    let plan = plan(&f, &f_shape, l, horizon, method.clone());
                    let prompt: Vec<f32> = u.chunks(t).flat_map(|row| row[..cut.min(20)].to_vec()).collect();
                    let p = cut.min(20);
                    let outs = rows(&futurefill::broadcast(&c, &f_shape).unwrap());
                    let mut cache = plan.prefill(&prompt, &c, p, None, &mut vec![0.0; outs * p]).unwrap();
                    let mut y = vec![0.0; outs * t];
                    stream_from(&mut cache, &u, t, p, cut, || 1, &mut y);
                    let state = cache.state().unwrap();
                    stream_from(&mut cache, &u, t, cut, t, || 1, &mut y);
                    let mut loaded = plan.load_cache(&state).unwrap();
                    assert!(loaded.state().unwrap() == state);
                    let mut z = y.clone();
                    stream_from(&mut loaded, &u, t, cut, t, || 1, &mut z);
                    assert!(y == z, "{method:?} cut {cut}");
                    let mut broken = state.clone();
                    broken.history.pop();
                    assert!(matches!(plan.load_cache(&broken), Err(Error::State(_))));
                }
            }
        }
    }
}

#[test]
fn errors_leave_the_cache_alone() {
    let mut random = Random::new(15);
    let t = 40;
    let f = random.values::<f64>(3 * t);
    let u = random.values::<f64>(3 * t);
    let plan = plan(&f, &[3], t, Some(t), schedule(4, &[2]));
    let mut cache = plan.new_cache(&[3]).unwrap();
    let mut y = vec![0.0; 3 * t];
    stream_from(&mut cache, &u, t, 0, 20, || 1, &mut y);
    let before = cache.state().unwrap();
    let mut out = [0.0; 3];
    assert_eq!(cache.step(&[0.0; 7], &mut out).unwrap_err().to_string(), "u: expected shape (3,), got 7 values");
    assert!(cache.step(&[0.0; 3], &mut out[..2]).is_err());
    let needed = cache.extend(&[0.0; 63], 21, &mut [0.0; 63]).unwrap_err();
    assert_eq!(needed, Error::Capacity { needed: 21, remaining: 20 });
    assert!(cache.state().unwrap() == before);
    stream_from(&mut cache, &u, t, 20, t, || 1, &mut y);
    assert_close(&y, &oracle::causal_conv(&u, &[3], t, &f, &[3], t), t, "after the errors");
    assert!(matches!(cache.step(&[0.0; 3], &mut out), Err(Error::Capacity { .. })));
    assert!(plan.prefill(&u, &[3], t, Some(1), &mut y).is_err());
    for bad in
        [PlanOptions { horizon: Some(0), ..Default::default() }, PlanOptions { workers: 0, ..Default::default() }]
    {
        assert!(Plan::new(&f, &[3], t, bad).is_err());
    }
    assert!(Plan::<f64>::new(&[], &[3], 0, PlanOptions::default()).is_err());
}

#[test]
fn absurd_sizes_are_errors_or_work() {
    let f = [1.0f32, 0.5];
    for method in
        [Method::Auto, Method::Naive, Method::Epoched, Method::Continuous, schedule(1 << 60, &[usize::MAX, 7])]
    {
        let plan = plan(&f, &[], 2, Some(usize::MAX), method);
        let mut out = [0.0];
        let mut cache = plan.new_cache(&[]).unwrap();
        cache.step(&[1.0], &mut out).unwrap();
        cache.step(&[0.0], &mut out).unwrap();
        assert_eq!(out, [0.5]);
        assert!(matches!(plan.new_cache(&[1 << 50]), Err(Error::Memory { .. })));
        assert!(matches!(plan.new_cache(&[usize::MAX, 16]), Err(Error::Memory { .. })));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_schedule_any_chunking(
        base in 1usize..40,
        fans in prop::collection::vec(2usize..7, 0..4),
        t in 1usize..500,
        l in 1usize..500,
        channels in 1usize..20,
        bounded in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let f = random.values::<f64>(channels * l);
        let u = random.values::<f64>(2 * channels * t);
        let plan = plan(&f, &[channels], l, bounded.then_some(t), schedule(base, &fans));
        let truth = oracle::causal_conv(&u, &[2, channels], t, &f, &[channels], l);
        let mut cache = plan.new_cache(&[2, channels]).unwrap();
        let y = stream(&mut cache, &u, t, || 1 + random.below(60));
        assert_close(&y, &truth, t, format!("base {base} fans {fans:?} T = {t} L = {l}"));
    }

    #[test]
    fn schedules_cost_what_they_are(base in 1usize..300, fans in prop::collection::vec(2usize..9, 0..5), l in 1usize..5000) {
        let schedule = Schedule::new(Some(base), fans).unwrap();
        let run = schedule.execution(Some(5000), l);
        prop_assert!(run.base <= base && run.ring.is_multiple_of(run.base));
        let cost = schedule.cost(Some(5000), l);
        prop_assert!(cost.flops > 0.0 && cost.bytes_moved > 0.0 && cost.state_bytes > 0.0);
    }
}
