//! Complex numbers of a few rows, their twiddle factors, and the short Fourier transforms that passes are made of.

// One index runs over several arrays.
#![allow(clippy::needless_range_loop)]

use super::BIN;
use crate::kernels::LANES;
use crate::real::Real;
use crate::simd::Vector;
use std::f64::consts::FRAC_1_SQRT_2;

/// Real and imaginary parts of a few rows.
#[derive(Clone, Copy)]
pub(super) struct Pair<V> {
    pub(super) re: V,
    pub(super) im: V,
}

#[inline(always)]
pub(super) fn load<T, V: Vector<T>>(bin: &[T; BIN], lane: usize) -> Pair<V> {
    Pair { re: V::load(&bin[lane..]), im: V::load(&bin[LANES + lane..]) }
}

#[inline(always)]
pub(super) fn store<T, V: Vector<T>>(bin: &mut [T; BIN], lane: usize, v: Pair<V>) {
    v.re.store(&mut bin[lane..]);
    v.im.store(&mut bin[LANES + lane..]);
}

/// `R` runs of `m` units of `N` reals. In this form no index needs to be checked in the loops over them.
#[inline(always)]
pub(super) fn runs<T, const N: usize, const R: usize>(z: &[T], m: usize) -> [&[[T; N]]; R] {
    let mut rest = z.as_chunks().0;
    std::array::from_fn(|_| {
        let (run, more) = rest.split_at(m);
        rest = more;
        run
    })
}

#[inline(always)]
pub(super) fn runs_mut<T, const N: usize, const R: usize>(z: &mut [T], m: usize) -> [&mut [[T; N]]; R] {
    let mut rest = z.as_chunks_mut().0;
    std::array::from_fn(|_| {
        let (run, more) = std::mem::take(&mut rest).split_at_mut(m);
        rest = more;
        run
    })
}

#[inline(always)]
pub(super) fn add<T, V: Vector<T>>(a: Pair<V>, b: Pair<V>) -> Pair<V> {
    Pair { re: a.re.add(b.re), im: a.im.add(b.im) }
}

#[inline(always)]
pub(super) fn sub<T, V: Vector<T>>(a: Pair<V>, b: Pair<V>) -> Pair<V> {
    Pair { re: a.re.sub(b.re), im: a.im.sub(b.im) }
}

/// `a + i b`.
#[inline(always)]
pub(super) fn add_i<T, V: Vector<T>>(a: Pair<V>, b: Pair<V>) -> Pair<V> {
    Pair { re: a.re.sub(b.im), im: a.im.add(b.re) }
}

/// `a - i b`.
#[inline(always)]
pub(super) fn sub_i<T, V: Vector<T>>(a: Pair<V>, b: Pair<V>) -> Pair<V> {
    Pair { re: a.re.add(b.im), im: a.im.sub(b.re) }
}

/// `a * (re + i im)`, or times its conjugate.
#[inline(always)]
pub(super) fn twiddle<T: Real, V: Vector<T>, const INVERSE: bool>(a: Pair<V>, root: &[T]) -> Pair<V> {
    let (re, im) = (V::splat(root[0]), V::splat(root[1]));
    let (x, y) = (a.re.mul(re), a.im.mul(re));
    match INVERSE {
        false => Pair { re: a.im.neg_mul_add(im, x), im: a.re.mul_add(im, y) },
        true => Pair { re: a.im.mul_add(im, x), im: a.re.neg_mul_add(im, y) },
    }
}

/// `y_k = sum_j x_j exp(+-2 pi i j k / R)`, in place.
#[inline(always)]
pub(super) fn butterfly<T: Real, V: Vector<T>, const R: usize, const INVERSE: bool>(x: &mut [Pair<V>; R]) {
    if R == 2 {
        (x[0], x[1]) = (add(x[0], x[1]), sub(x[0], x[1]));
    } else if R == 3 {
        let (sum, difference) = (add(x[1], x[2]), sub(x[1], x[2]));
        let half = V::splat(T::of_f64(0.5));
        let middle = Pair { re: sum.re.neg_mul_add(half, x[0].re), im: sum.im.neg_mul_add(half, x[0].im) };
        let side = V::splat(T::of_f64(0.75f64.sqrt()));
        let side = Pair { re: difference.re.mul(side), im: difference.im.mul(side) };
        x[0] = add(x[0], sum);
        (x[1], x[2]) = (add_i(middle, side), sub_i(middle, side));
        if INVERSE {
            x.swap(1, 2);
        }
    } else if R == 4 {
        let y = butterfly4::<T, V, INVERSE>(x[0], x[1], x[2], x[3]);
        x.copy_from_slice(&y);
    } else {
        let e = butterfly4::<T, V, INVERSE>(x[0], x[2], x[4], x[6]);
        let o = butterfly4::<T, V, INVERSE>(x[1], x[3], x[5], x[7]);
        let half = V::splat(T::of_f64(FRAC_1_SQRT_2));
        // exp(i pi / 4) o and exp(3 i pi / 4) o up to the factor `half`.
        let (o1, o3) = match INVERSE {
            false => (add_i(o[1], o[1]), add_i(o[3], o[3])),
            true => (sub_i(o[1], o[1]), sub_i(o[3], o[3])),
        };
        (x[0], x[4]) = (add(e[0], o[0]), sub(e[0], o[0]));
        x[1] = Pair { re: o1.re.mul_add(half, e[1].re), im: o1.im.mul_add(half, e[1].im) };
        x[5] = Pair { re: o1.re.neg_mul_add(half, e[1].re), im: o1.im.neg_mul_add(half, e[1].im) };
        if INVERSE {
            (x[2], x[6]) = (sub_i(e[2], o[2]), add_i(e[2], o[2]));
            x[3] = Pair { re: o3.im.mul_add(half, e[3].re), im: o3.re.neg_mul_add(half, e[3].im) };
            x[7] = Pair { re: o3.im.neg_mul_add(half, e[3].re), im: o3.re.mul_add(half, e[3].im) };
        } else {
            (x[2], x[6]) = (add_i(e[2], o[2]), sub_i(e[2], o[2]));
            x[3] = Pair { re: o3.im.neg_mul_add(half, e[3].re), im: o3.re.mul_add(half, e[3].im) };
            x[7] = Pair { re: o3.im.mul_add(half, e[3].re), im: o3.re.neg_mul_add(half, e[3].im) };
        }
    }
}

#[inline(always)]
pub(super) fn butterfly4<T: Real, V: Vector<T>, const INVERSE: bool>(
    a: Pair<V>,
    b: Pair<V>,
    c: Pair<V>,
    d: Pair<V>,
) -> [Pair<V>; 4] {
    let (even, odd) = (add(a, c), add(b, d));
    let (e, o) = (sub(a, c), sub(b, d));
    match INVERSE {
        false => [add(even, odd), add_i(e, o), sub(even, odd), sub_i(e, o)],
        true => [add(even, odd), sub_i(e, o), sub(even, odd), add_i(e, o)],
    }
}
