//! Every length on every instruction set against the definition.

use super::*;
use crate::kernels::tests::values;

/// Coefficient `j` of the product of lane `source` of `x` and the lags of lane `lane`, as plain polynomials.
fn coefficient<T: Real>(x: &[T], source: usize, lags: &[T], lane: usize, j: usize) -> f64 {
    let (n, count) = (x.len() / LANES, lags.len() / LANES);
    let of = |i: usize| x[i * LANES + source].as_f64() * lags[lane * count + j - i].as_f64();
    (0..n).filter(|i| *i <= j && j - i < count).map(of).sum()
}

fn lags<T: Real>(filters: &[T], rows: usize) -> Lags<'_, T> {
    let stride = filters.len() / LANES;
    Lags { filters, stride, rows, range: 0..stride, scale: T::of_f64(1.0) }
}

/// The FutureFill of a block, by its two halves, in one go and from a kept spectrum.
fn every_length<T: Real>() {
    let eps = if T::BYTES == 4 { 1e-6 } else { 1e-14 };
    let lengths = (1..13).flat_map(|bits| [1 << bits, 3 << (bits - 1)]).chain([1, 5, 7, 25, 100, 300, 1000, 2100]);
    for (isa, n) in lengths.flat_map(|n| Isa::available().into_iter().map(move |isa| (isa, n))) {
        let t = WideTransform::<T>::new(isa, n);
        let (len, bound) = (t.spectrum_len(), 8.0 * eps * (n as f64).sqrt());
        let x = values::<T>(n * LANES, 1);
        let f = values::<T>(2 * n * LANES, 2);
        for shared in [false, true] {
            let mut work = t.work().unwrap();
            let mut slots = vec![T::ZERO; 2 * len];
            let mut filters = vec![T::ZERO; t.filter_len(shared)];
            t.input(&x, &mut slots[len..], &mut work);
            t.filter(&lags(&f, if shared { 1 } else { LANES }), shared, &mut filters, &mut work);
            let products = Products { slots: &slots, newest: 1, filters: &filters, count: 1, shared };
            let before = values::<T>(n * LANES, 5);
            let (mut set, mut added, mut whole) = (before.clone(), before.clone(), before.clone());
            t.future(&products, &mut set, Write::Set, &mut work);
            t.future(&products, &mut added, Write::Add, &mut work);
            let tile = |out, write| Tile {
                input: &x,
                slots: &mut [],
                newest: 0,
                filters: &filters,
                count: 1,
                shared,
                out,
                write,
            };
            t.tile(tile(&mut whole, Write::Set), &mut work, &mut Prefetch::nothing());
            assert_eq!(set, whole, "{n} on {}", isa.name());
            for j in (0..n).step_by(1 + n / 5) {
                for lane in [0, 7, 15] {
                    let right = coefficient(&x, lane, &f, if shared { 0 } else { lane }, n + j);
                    let at = j * LANES + lane;
                    for got in [set[at], added[at] - before[at]].map(T::as_f64) {
                        assert!((got - right).abs() < bound, "{j} of {n} on {}: {got}, {right}", isa.name());
                    }
                }
            }
        }
        for k in (0..t.n).step_by(1 + t.n / 7) {
            let mut z = vec![T::ZERO; len];
            t.input(&x, &mut z, &mut t.work().unwrap());
            // Angles in exact fractions of a turn.
            let angle = |j: usize| TAU * ((4 * t.n + 1 - 4 * k) * j % (4 * t.n)) as f64 / (4 * t.n) as f64;
            let sum =
                |part: fn(f64) -> f64| -> f64 { (0..n).map(|j| x[j * LANES + 3].as_f64() * part(angle(j))).sum() };
            let at = t.place(k) + 3;
            let error = (z[at].as_f64() - sum(f64::cos)).hypot(z[at + LANES].as_f64() - sum(f64::sin));
            assert!(error < bound, "bin {k} of {n} on {}: {error}", isa.name());
        }
    }
}

#[test]
fn blocks_of_every_length_on_every_instruction_set() {
    every_length::<f32>();
    every_length::<f64>();
}

#[test]
fn all_coefficients_of_a_product() {
    for n in [2, 8, 24, 64, 512] {
        let t = WideTransform::<f64>::new(Isa::get(), n);
        let mut work = t.work().unwrap();
        let (x, f) = (values::<f64>(n * LANES, 1), values::<f64>(n * LANES, 2));
        let (mut slots, mut filters) = (vec![0.0; t.spectrum_len()], vec![0.0; t.filter_len(false)]);
        t.input(&x, &mut slots, &mut work);
        t.filter(&lags(&f, LANES), false, &mut filters, &mut work);
        let products = Products { slots: &slots, newest: 0, filters: &filters, count: 1, shared: false };
        let mut z = vec![0.0; n * BIN];
        t.both(&products, &mut z, &mut work);
        for j in 0..2 * n - 1 {
            let got = z[j % n * BIN + j / n * LANES + 3] / n as f64;
            assert!((got - coefficient(&x, 3, &f, 3, j)).abs() < 1e-12, "{j} of {n}");
        }
    }
}

#[test]
fn parts_make_the_whole() {
    for n in [2, 96, 1024, 3000, 6144] {
        let t = WideTransform::<f32>::new(Isa::get(), n);
        let (len, mut work) = (t.spectrum_len(), t.work().unwrap());
        let (x, mut filters) = (values::<f32>(n * LANES, 1), values::<f32>(t.filter_len(false), 2));
        filters[t.n * BIN..].fill(0.0);
        let (mut slots, mut cut) = (vec![0.0; len], vec![0.0; len]);
        let (mut whole, mut out) = (vec![0.0; n * LANES], vec![0.0; n * LANES]);
        t.input(&x, &mut slots, &mut work);
        let ranges = |units: usize| {
            let mut at = 0;
            std::iter::from_fn(move || {
                let from = at;
                at = (at + 1 + from % 3).min(units);
                (from < units).then_some(from..at)
            })
        };
        ranges(t.input_units()).for_each(|range| t.input_parts(&x, &mut cut, range, &mut work));
        assert_eq!(slots, cut, "{n}");
        let products = Products { slots: &slots, newest: 0, filters: &filters, count: 1, shared: false };
        t.future(&products, &mut whole, Write::Set, &mut work);
        ranges(t.future_units()).for_each(|range| t.future_parts(&products, &mut out, Write::Set, range, &mut work));
        assert_eq!(whole, out, "{n}");
    }
}

#[test]
fn sums_go_around_the_ring_and_a_tile_is_its_two_halves() {
    let ring = 5;
    for n in [2, 4, 24, 100, 512, 2048] {
        for (isa, shared) in Isa::available().into_iter().flat_map(|isa| [(isa, false), (isa, true)]) {
            let t = WideTransform::<f32>::new(isa, n);
            let (len, filter_len, mut work) = (t.spectrum_len(), t.filter_len(shared), t.work().unwrap());
            let (x, filters) = (values::<f32>(n * LANES, 1), values::<f32>(ring * filter_len, 2));
            for (newest, count) in [(0, 1), (0, 5), (2, 3), (2, 4), (4, 5), (3, 2)] {
                let mut slots = values::<f32>(ring * len, 3);
                let mut kept = slots.clone();
                let (mut halves, mut whole) = (values::<f32>(n * LANES, 4), values::<f32>(n * LANES, 4));
                let mut each = halves.clone();
                t.input(&x, &mut slots[newest * len..], &mut work);
                let products = Products { slots: &slots, newest, filters: &filters, count, shared };
                t.future(&products, &mut halves, Write::Add, &mut work);
                let (filters, input, write, out) = (&filters[..], &x[..], Write::Add, &mut whole[..]);
                let tile = Tile { input, slots: &mut kept, newest, filters, count, shared, out, write };
                t.tile(tile, &mut work, &mut Prefetch::nothing());
                assert_eq!(halves, whole, "{n}, {newest}, {count} on {}", isa.name());
                assert_eq!(slots, kept, "{n}, {newest} on {}", isa.name());
                for p in 0..count {
                    let newest = (newest + ring - p) % ring;
                    let filters = &filters[p * filter_len..];
                    t.future(&Products { newest, filters, count: 1, ..products }, &mut each, Write::Add, &mut work);
                }
                let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4 * (1.0 + a.abs());
                assert!(halves.iter().zip(&each).all(close), "{n}, {newest}, {count}");
            }
        }
    }
}
