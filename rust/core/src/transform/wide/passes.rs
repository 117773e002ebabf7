//! Passes over a block: one stage of the transform, forward or inverse.

// One index runs over several arrays.
#![allow(clippy::needless_range_loop)]

use super::butterfly::{Pair, butterfly, load, runs, runs_mut, store, twiddle};
use super::{BIN, LINES};
use crate::kernels::LANES;
use crate::real::Real;
use crate::simd::Vector;
use crate::transform::{Prefetch, Write};
use std::ops::Range;

/// One stage of the forward transform on one block, in place.
#[inline(always)]
pub(super) fn forward<T: Real, V: Vector<T>, const R: usize>(z: &mut [T], roots: &[T], ahead: &mut Prefetch) {
    let m = z.len() / BIN / R;
    let z: [_; R] = runs_mut(z, m);
    let roots = &roots[..2 * (R - 1)];
    for j in 0..m {
        ahead.lines(LINES * R / 8);
        for lane in (0..LANES).step_by(V::WIDTH) {
            let mut x = [load::<T, V>(&z[0][j], lane); R];
            for k in 1..R {
                x[k] = twiddle::<T, V, false>(load(&z[k][j], lane), &roots[2 * k - 2..]);
            }
            butterfly::<T, V, R, false>(&mut x);
            for k in 0..R {
                store(&mut z[k][j], lane, x[k]);
            }
        }
    }
}

/// The share `parts` of `whole` of the first stage, of real inputs.
#[inline(always)]
pub(super) fn forward_real<T: Real, V: Vector<T>, const R: usize>(
    input: &[T],
    z: &mut [T],
    roots: &[T],
    parts: Range<usize>,
    whole: usize,
    ahead: &mut Prefetch,
) {
    let m = z.len() / BIN / R;
    let (input, z): ([&[[T; LANES]]; R], [_; R]) = (runs(input, m), runs_mut(z, m));
    let roots = &roots[..2 * (R - 1)];
    for j in m * parts.start / whole..(m * parts.end / whole).min(m) {
        ahead.lines(LINES * R / 8);
        for lane in (0..LANES).step_by(V::WIDTH) {
            let mut x = [Pair { re: V::load(&input[0][j][lane..]), im: V::splat(T::ZERO) }; R];
            for k in 1..R {
                let v = V::load(&input[k][j][lane..]);
                x[k] = Pair { re: v.mul(V::splat(roots[2 * k - 2])), im: v.mul(V::splat(roots[2 * k - 1])) };
            }
            butterfly::<T, V, R, false>(&mut x);
            for k in 0..R {
                store(&mut z[k][j], lane, x[k]);
            }
        }
    }
}

/// Undoes [`forward`], but for the factor `R`.
#[inline(always)]
pub(super) fn inverse<T: Real, V: Vector<T>, const R: usize>(z: &mut [T], roots: &[T], ahead: &mut Prefetch) {
    let m = z.len() / BIN / R;
    let z: [_; R] = runs_mut(z, m);
    let roots = &roots[..2 * (R - 1)];
    for j in 0..m {
        ahead.lines(LINES * R / 8);
        for lane in (0..LANES).step_by(V::WIDTH) {
            let mut x = [load::<T, V>(&z[0][j], lane); R];
            for k in 1..R {
                x[k] = load(&z[k][j], lane);
            }
            butterfly::<T, V, R, true>(&mut x);
            store(&mut z[0][j], lane, x[0]);
            for k in 1..R {
                store(&mut z[k][j], lane, twiddle::<T, V, true>(x[k], &roots[2 * k - 2..]));
            }
        }
    }
}

/// The share `parts` of `whole` of the last inverse stage, of which only the imaginary part is wanted.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) fn inverse_imaginary<T: Real, V: Vector<T>, const R: usize>(
    z: &[T],
    roots: &[T],
    scale: T,
    out: &mut [T],
    write: Write,
    parts: Range<usize>,
    whole: usize,
    ahead: &mut Prefetch,
) {
    let m = z.len() / BIN / R;
    let (z, out): ([_; R], [&mut [[T; LANES]]; R]) = (runs(z, m), runs_mut(out, m));
    let roots = &roots[..2 * (R - 1)];
    let scale = V::splat(scale);
    for j in m * parts.start / whole..(m * parts.end / whole).min(m) {
        ahead.lines(LINES * R / 8);
        for lane in (0..LANES).step_by(V::WIDTH) {
            let mut x = [load::<T, V>(&z[0][j], lane); R];
            for k in 1..R {
                x[k] = load(&z[k][j], lane);
            }
            butterfly::<T, V, R, true>(&mut x);
            for k in 0..R {
                let mut v = x[k].im;
                if k > 0 {
                    let (re, im) = (V::splat(roots[2 * k - 2]), V::splat(roots[2 * k - 1]));
                    v = x[k].re.neg_mul_add(im, v.mul(re));
                }
                let out = &mut out[k][j][lane..];
                let v = if write == Write::Add { v.mul_add(scale, V::load(out)) } else { v.mul(scale) };
                v.store(out);
            }
        }
    }
}
