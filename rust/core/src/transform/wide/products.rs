//! Sums of products of spectra, alone or between the last forward and the first inverse stage.

// One index runs over several arrays.
#![allow(clippy::needless_range_loop)]

use super::butterfly::{Pair, butterfly, load, store, twiddle};
use super::{BIN, LINES, Stage};
use crate::kernels::LANES;
use crate::real::Real;
use crate::simd::Vector;
use crate::transform::{Prefetch, Products};

/// Reals of a filter's bin: those of 16 rows, or of the one row that serves all lanes.
pub(super) const SHARED_BIN: usize = 2;

/// A bin of `H` reals of a filter's spectrum.
#[inline(always)]
fn filter_bin<T: Real, V: Vector<T>, const H: usize>(bin: &[T; H], lane: usize) -> Pair<V> {
    if H == SHARED_BIN {
        Pair { re: V::splat(bin[0]), im: V::splat(bin[1]) }
    } else {
        Pair { re: V::load(&bin[lane..]), im: V::load(&bin[LANES + lane..]) }
    }
}

/// A sum of products of complex numbers, by parts.
#[derive(Clone, Copy)]
pub(super) struct Sum<V> {
    rr: V,
    ii: V,
    ri: V,
    ir: V,
}

impl<V: Copy> Sum<V> {
    #[inline(always)]
    fn zero<T: Real>() -> Self
    where
        V: Vector<T>,
    {
        let zero = V::splat(T::ZERO);
        Self { rr: zero, ii: zero, ri: zero, ir: zero }
    }

    #[inline(always)]
    fn of<T>(x: Pair<V>, h: Pair<V>) -> Self
    where
        V: Vector<T>,
    {
        Self { rr: x.re.mul(h.re), ii: x.im.mul(h.im), ri: x.re.mul(h.im), ir: x.im.mul(h.re) }
    }

    #[inline(always)]
    fn add<T>(self, x: Pair<V>, h: Pair<V>) -> Self
    where
        V: Vector<T>,
    {
        Self {
            rr: x.re.mul_add(h.re, self.rr),
            ii: x.im.mul_add(h.im, self.ii),
            ri: x.re.mul_add(h.im, self.ri),
            ir: x.im.mul_add(h.re, self.ir),
        }
    }

    #[inline(always)]
    fn total<T>(self) -> Pair<V>
    where
        V: Vector<T>,
    {
        Pair { re: self.rr.sub(self.ii), im: self.ri.add(self.ir) }
    }
}

/// Kept blocks, newest first, and the partitions they meet.
pub(super) struct Sums<'a, T> {
    runs: [(&'a [T], &'a [T]); 2],
    len: usize,
    filter_len: usize,
}

impl<'a, T: Real> Sums<'a, T> {
    /// The last slots of `first`, and then of `second`, as many as there are `filters`.
    #[inline(always)]
    pub(super) fn of(first: &'a [T], second: &'a [T], filters: &'a [T], len: usize, filter_len: usize) -> Self {
        let partitions = filters.len() / filter_len;
        let near = (first.len() / len).min(partitions);
        let (now, later) = filters.split_at(near * filter_len);
        let far = partitions - near;
        let runs = [(&first[first.len() - near * len..], now), (&second[second.len() - far * len..], later)];
        Self { runs, len, filter_len }
    }

    #[inline(always)]
    pub(super) fn of_products(products: &Products<'a, T>, len: usize, filter_len: usize) -> Self {
        let (first, second) = products.slots.split_at((products.newest + 1) * len);
        Self::of(first, second, &products.filters[..products.count * filter_len], len, filter_len)
    }

    /// Adds the products of the bin that begins at real `at` of each input spectrum.
    #[inline(always)]
    fn add_to<V: Vector<T>, const H: usize>(&self, mut sum: Sum<V>, at: usize, lane: usize) -> Sum<V> {
        for (x, h) in self.runs {
            for (x, h) in x.chunks_exact(self.len).rev().zip(h.chunks_exact(self.filter_len)) {
                let (x, h) = (&x[at..at + BIN], &h[at / BIN * H..][..H]);
                let x = Pair { re: V::load(&x[lane..]), im: V::load(&x[LANES + lane..]) };
                let h = h.first_chunk::<H>().expect("H reals");
                sum = sum.add(x, filter_bin::<T, V, H>(h, lane));
            }
        }
        sum
    }
}

/// One inverse stage of neighbouring bins.
#[inline(always)]
fn inverse_bins<T: Real, V: Vector<T>, const R: usize>(
    mut x: [Pair<V>; R],
    z: &mut [[T; BIN]; R],
    roots: &[T],
    lane: usize,
) {
    butterfly::<T, V, R, true>(&mut x);
    store(&mut z[0], lane, x[0]);
    for k in 1..R {
        store(&mut z[k], lane, twiddle::<T, V, true>(x[k], &roots[2 * k - 2..]));
    }
}

/// The last forward stage of the part of a block that begins at real `at`, its products, and the first inverse stage.
/// The spectrum goes to `slot` unless it stands `ALONE`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) fn turn_round<T: Real, V: Vector<T>, const R: usize, const H: usize, const ALONE: bool>(
    z: &mut [T],
    slot: &mut [T],
    filter: &[T],
    older: &Sums<T>,
    stage: &Stage<T>,
    at: usize,
    ahead: &mut Prefetch,
) {
    let size = z.len();
    let z = z.as_chunks_mut::<BIN>().0.as_chunks_mut::<R>().0;
    let h = filter[at / BIN * H..][..size / BIN * H].as_chunks::<H>().0.as_chunks::<R>().0;
    let slot = if ALONE { slot } else { &mut slot[at..at + size] };
    let slot = slot.as_chunks_mut::<BIN>().0.as_chunks_mut::<R>().0;
    for (i, (z, h)) in z.iter_mut().zip(h).enumerate() {
        let at = at + i * R * BIN;
        let roots = stage.node(at / (R * BIN));
        ahead.lines(LINES * R / 8);
        for lane in (0..LANES).step_by(V::WIDTH) {
            let mut x = [load::<T, V>(&z[0], lane); R];
            for k in 1..R {
                x[k] = twiddle::<T, V, false>(load(&z[k], lane), &roots[2 * k - 2..]);
            }
            butterfly::<T, V, R, false>(&mut x);
            for k in 0..R {
                let mut sum = Sum::of(x[k], filter_bin::<T, V, H>(&h[k], lane));
                if !ALONE {
                    store(&mut slot[i][k], lane, x[k]);
                    sum = older.add_to::<V, H>(sum, at + k * BIN, lane);
                }
                x[k] = sum.total();
            }
            inverse_bins(x, z, roots, lane);
        }
    }
}

/// The first inverse stage of sums of products, for the part of a block that begins at real `at`.
#[inline(always)]
pub(super) fn sums_inverse<T: Real, V: Vector<T>, const R: usize, const H: usize>(
    sums: &Sums<T>,
    stage: &Stage<T>,
    at: usize,
    z: &mut [T],
) {
    for (i, z) in z.as_chunks_mut::<BIN>().0.as_chunks_mut::<R>().0.iter_mut().enumerate() {
        let at = at + i * R * BIN;
        let roots = stage.node(at / (R * BIN));
        for lane in (0..LANES).step_by(V::WIDTH) {
            // No closure: one that is not inlined would not have the instruction set of the function it stands in.
            let mut x = [Pair { re: V::splat(T::ZERO), im: V::splat(T::ZERO) }; R];
            for k in 0..R {
                x[k] = sums.add_to::<V, H>(Sum::zero(), at + k * BIN, lane).total();
            }
            inverse_bins(x, z, roots, lane);
        }
    }
}

/// Keeps the bins `z`, and turns them into their sums of products.
#[inline(always)]
pub(super) fn multiply<T: Real, V: Vector<T>, const H: usize>(
    z: &mut [T],
    slot: &mut [T],
    filter: &[T],
    older: &Sums<T>,
) {
    for (b, (z, h)) in z.as_chunks_mut::<BIN>().0.iter_mut().zip(filter.as_chunks::<H>().0).enumerate() {
        if let Some(slot) = slot.get_mut(b * BIN..(b + 1) * BIN) {
            slot.copy_from_slice(z);
        }
        for lane in (0..LANES).step_by(V::WIDTH) {
            let newest = Sum::of(load::<T, V>(z, lane), filter_bin::<T, V, H>(h, lane));
            store(z, lane, older.add_to::<V, H>(newest, b * BIN, lane).total());
        }
    }
}

/// Sums of products alone.
#[inline(always)]
pub(super) fn sum_products<T: Real, V: Vector<T>, const H: usize>(sums: &Sums<T>, z: &mut [T]) {
    for (b, z) in z.as_chunks_mut::<BIN>().0.iter_mut().enumerate() {
        for lane in (0..LANES).step_by(V::WIDTH) {
            store(z, lane, sums.add_to::<V, H>(Sum::zero(), b * BIN, lane).total());
        }
    }
}
