//! 16 rows side by side: the transform modulo `z^N - i` of a block `[time][16]`.
//!
//! A block becomes bins `[bin][real 16, imaginary 16]`: every operation works on 16 rows at once, nothing is
//! transposed, and the twist costs nothing. A polynomial modulo `z^n - c` has its remainders modulo `z^(n/r) - c'` for
//! the `r` roots `c'` of `c`, one [`Stage`] after another until `n = 1`, from `c = i`. Bins come out in the order of
//! these remainders; products do not mind, and [`BlockTransform::place`] tells where the usual bin stands.

mod butterfly;
mod passes;
mod products;

use super::{BIN, BlockTransform, Lags, Prefetch, Products, Tile, Work, Write, fast_len, once, pad_pitch};
use crate::buffer::check_room;
use crate::error::Error;
use crate::isa::Isa;
use crate::kernels::{LANES, transpose};
use crate::real::Real;
use crate::simd::{Vector, vectors};
use passes::{forward, forward_real, inverse, inverse_imaginary};
use products::{SHARED_BIN, Sums, multiply, sum_products, sums_inverse, turn_round};
use std::f64::consts::TAU;
use std::ops::Range;
use std::sync::Arc;

/// Bins of a part that is transformed to the end before the next is begun: it stays in the innermost caches.
const LEAF: usize = 256;

/// Lines fetched ahead per eight bins in every pass over them: a few passes then cover the four per bin of a block that
/// takes part once, the filter's two, the inputs' and the outputs'.
const LINES: usize = 6;

/// One block length; immutable tables.
pub struct WideTransform<T> {
    /// Positions of a block.
    block: usize,
    /// Bins, at least as many.
    n: usize,
    stages: Vec<Stage<T>>,
    /// Stages whose blocks are longer than [`LEAF`], after the first.
    upper: usize,
    /// Where the usual bin stands.
    places: Vec<usize>,
    isa: Isa,
}

/// One step of every block to `radix` shorter ones.
struct Stage<T> {
    radix: usize,
    /// Block length before the step.
    size: usize,
    /// `[node][radix - 1][2]`: the powers of the first root of each node.
    roots: Vec<T>,
}

impl<T> Stage<T> {
    #[inline(always)]
    fn node(&self, node: usize) -> &[T] {
        let len = 2 * (self.radix - 1);
        &self.roots[node * len..][..len]
    }
}

impl<T: Real> WideTransform<T> {
    /// The transform of blocks of `block` positions, made once per process.
    pub(crate) fn get(block: usize) -> Result<Arc<Self>, Error> {
        once(block, || {
            // Roots, angles and the order of bins.
            check_room(fast_len(block).saturating_mul(64))?;
            Ok(Self::new(Isa::get(), block))
        })
    }

    /// The transform of blocks of `block` positions (at least 1), on one instruction set.
    pub fn new(isa: Isa, block: usize) -> Self {
        let n = fast_len(block);
        let mut stages = Vec::new();
        // A node is the constant exp(2 pi i angle).
        let mut angles = vec![0.25f64];
        let mut size = n;
        while size > 1 {
            let radix = match size.trailing_zeros() {
                _ if size.is_multiple_of(3) => 3,
                1 => 2,
                2 | 4 => 4,
                _ => 8,
            };
            let mut roots = Vec::with_capacity(angles.len() * 2 * (radix - 1));
            let mut below = Vec::with_capacity(angles.len() * radix);
            for angle in angles {
                let first = angle / radix as f64;
                for power in 1..radix {
                    let (sin, cos) = (TAU * first * power as f64).sin_cos();
                    roots.extend([T::of_f64(cos), T::of_f64(sin)]);
                }
                below.extend((0..radix).map(|k| (first + k as f64 / radix as f64).fract()));
            }
            stages.push(Stage { radix, size, roots });
            angles = below;
            size /= radix;
        }
        let mut places = vec![0; n];
        for (b, angle) in angles.iter().enumerate() {
            // The usual transform numbers its points exp(2 pi i (1/4 - k) / n).
            let k = (n - (angle * n as f64 - 0.25).round() as usize) % n;
            places[k] = b * BIN;
        }
        let upper = stages.iter().skip(1).take_while(|stage| stage.size > LEAF).count();
        Self { block, n, stages, upper, places, isa }
    }

    /// Parts of the bins that are transformed to the end one after another.
    #[inline(always)]
    fn leaves(&self) -> usize {
        self.stages.get(1 + self.upper).map_or(1, |leaf| self.n / leaf.size)
    }

    /// The block as the transform takes it: as long as there are bins.
    fn padded<'a>(&self, x: &'a [T], room: &'a mut [T]) -> &'a [T] {
        if self.block == self.n {
            return &x[..self.n * LANES];
        }
        let (block, rest) = room[..self.n * LANES].split_at_mut(self.block * LANES);
        block.copy_from_slice(&x[..self.block * LANES]);
        rest.fill(T::ZERO);
        room
    }

    /// The lags as bins: lag `j` as real and lag `j + n` as imaginary part of bin `j`.
    fn fold(&self, lags: &Lags<T>, z: &mut [T]) {
        z.fill(T::ZERO);
        let near = lags.range.len().min(self.n);
        let (start, middle, end) = (lags.range.start, lags.range.start + near, lags.range.end);
        for (part, range) in [(0, start..middle), (LANES, middle..end)] {
            if range.is_empty() {
                continue;
            }
            let bins = &mut z[part..(range.len() - 1) * BIN + part + LANES];
            transpose::bins_from_rows(self.isa, lags.filters, lags.stride, range.start, lags.rows, lags.scale, bins);
            for bin in bins.chunks_mut(BIN).filter(|_| lags.rows < LANES) {
                (lags.rows..LANES).for_each(|lane| bin[lane] = bin[lane % lags.rows]);
            }
        }
    }
}

impl<T: Real> BlockTransform<T> for WideTransform<T> {
    fn spectrum_len(&self) -> usize {
        pad_pitch(self.n.saturating_mul(BIN))
    }

    fn filter_len(&self, shared: bool) -> usize {
        if shared { pad_pitch(self.n.saturating_mul(SHARED_BIN)) } else { self.spectrum_len() }
    }

    fn bins(&self) -> usize {
        self.n
    }

    fn place(&self, k: usize) -> usize {
        self.places[k]
    }

    fn work(&self) -> Result<Work<T>, Error> {
        let block = if self.block == self.n { 0 } else { self.n.saturating_mul(LANES) };
        Work::new(self.spectrum_len(), block, 0)
    }

    fn filter(&self, lags: &Lags<T>, shared: bool, spectrum: &mut [T], work: &mut Work<T>) {
        let len = self.n * BIN;
        if !shared {
            self.fold(lags, &mut spectrum[..len]);
            return filter(self.isa, self, &mut spectrum[..len]);
        }
        let z = &mut work.reals[..len];
        self.fold(lags, z);
        filter(self.isa, self, z);
        for (bin, z) in spectrum.as_chunks_mut::<SHARED_BIN>().0.iter_mut().zip(z.as_chunks::<BIN>().0) {
            *bin = [z[0], z[LANES]];
        }
    }

    fn both(&self, products: &Products<T>, z: &mut [T], _work: &mut Work<T>) {
        both(self.isa, self, products, &mut z[..self.n * BIN]);
    }

    fn tile(&self, t: Tile<T>, work: &mut Work<T>, ahead: &mut Prefetch) {
        let Tile { input, slots, newest, filters, count, shared, out, write } = t;
        let x = self.padded(input, &mut work.block);
        let filters = &filters[..count * self.filter_len(shared)];
        let (z, out) = (&mut work.reals[..self.n * BIN], &mut out[..self.block * LANES]);
        tile(self.isa, self, x, slots, newest, filters, shared, z, out, write, ahead);
    }

    fn input_units(&self) -> usize {
        2 * self.leaves()
    }

    fn input_parts(&self, x: &[T], spectrum: &mut [T], parts: Range<usize>, work: &mut Work<T>) {
        let x = self.padded(x, &mut work.block);
        input(self.isa, self, x, &mut spectrum[..self.n * BIN], parts);
    }

    fn future_units(&self) -> usize {
        2 * self.leaves()
    }

    fn future_parts(
        &self,
        products: &Products<T>,
        out: &mut [T],
        write: Write,
        parts: Range<usize>,
        work: &mut Work<T>,
    ) {
        let (z, out) = (&mut work.reals[..self.n * BIN], &mut out[..self.block * LANES]);
        future(self.isa, self, products, z, out, write, parts);
    }
}

vectors! {
    fn input(t: &WideTransform<T>, x: &[T], z: &mut [T], parts: Range<usize>) = input_body on Avx512;
    fn filter(t: &WideTransform<T>, z: &mut [T]) = filter_body on Avx512;
    fn future(
        t: &WideTransform<T>, products: &Products<T>, z: &mut [T], out: &mut [T], write: Write, parts: Range<usize>,
    ) = future_body on Avx512;
    fn tile(
        t: &WideTransform<T>, x: &[T], kept: &mut [T], newest: usize, filters: &[T], shared: bool, z: &mut [T],
        out: &mut [T], write: Write, ahead: &mut Prefetch,
    ) = tile_body on Avx512;
    fn both(t: &WideTransform<T>, products: &Products<T>, z: &mut [T]) = both_body on Avx512;
}

/// `f` for a radix, and for filters of 16 rows or of one.
macro_rules! by_radix {
    ($radix:expr, $f:ident $(::<$h:ident $(, $alone:literal)?>)? ($($arg:expr),* $(,)?)) => {
        match $radix {
            8 => $f::<T, V, 8 $(, $h $(, $alone)?)?>($($arg),*),
            4 => $f::<T, V, 4 $(, $h $(, $alone)?)?>($($arg),*),
            3 => $f::<T, V, 3 $(, $h $(, $alone)?)?>($($arg),*),
            _ => $f::<T, V, 2 $(, $h $(, $alone)?)?>($($arg),*),
        }
    };
}

impl<T: Real> WideTransform<T> {
    /// The last stage, whose blocks are neighbouring bins; `None` where it is the first.
    #[inline(always)]
    fn last(&self) -> Option<&Stage<T>> {
        self.stages[1..].last()
    }

    /// Forward stages after the first, depth first: all, or all but the last `spare`.
    #[inline(always)]
    fn forward_rest<V: Vector<T>>(&self, z: &mut [T], parts: Range<usize>, spare: usize, ahead: &mut Prefetch) {
        let Some(leaf) = self.stages.get(1 + self.upper) else { return };
        let size = leaf.size * BIN;
        for part in parts {
            let at = part * size;
            for stage in &self.stages[1..][..self.upper] {
                let len = stage.size * BIN;
                if at.is_multiple_of(len) {
                    by_radix!(stage.radix, forward(&mut z[at..at + len], stage.node(at / len), ahead));
                }
            }
            for stage in &self.stages[1 + self.upper..self.stages.len() - spare] {
                let len = stage.size * BIN;
                for (i, block) in z[at..at + size].chunks_exact_mut(len).enumerate() {
                    by_radix!(stage.radix, forward(block, stage.node(at / len + i), ahead));
                }
            }
        }
    }

    /// Inverse stages of one part, but for the first and the last, depth first.
    #[inline(always)]
    fn inverse_rest<V: Vector<T>>(&self, z: &mut [T], at: usize, end: usize, ahead: &mut Prefetch) {
        let Some((_, stages)) = self.stages[1..].split_last() else { return };
        for stage in stages[self.upper..].iter().rev() {
            let len = stage.size * BIN;
            for (i, block) in z[at..end].chunks_exact_mut(len).enumerate() {
                by_radix!(stage.radix, inverse(block, stage.node(at / len + i), ahead));
            }
        }
        for stage in stages[..self.upper].iter().rev() {
            let len = stage.size * BIN;
            if end.is_multiple_of(len) {
                by_radix!(stage.radix, inverse(&mut z[end - len..end], stage.node(end / len - 1), ahead));
            }
        }
    }

    /// Sums the products, and takes all inverse stages but the last.
    #[inline(always)]
    fn sum_and_inverse<V: Vector<T>>(&self, products: &Products<T>, z: &mut [T], parts: Range<usize>) {
        let size = z.len() / self.leaves();
        let sums = Sums::of_products(products, self.spectrum_len(), self.filter_len(products.shared));
        for part in parts {
            let (at, end) = (part * size, (part + 1) * size);
            let part = &mut z[at..end];
            match (self.last(), products.shared) {
                (Some(last), false) => by_radix!(last.radix, sums_inverse::<BIN>(&sums, last, at, part)),
                (Some(last), true) => by_radix!(last.radix, sums_inverse::<SHARED_BIN>(&sums, last, at, part)),
                (None, false) => sum_products::<T, V, BIN>(&sums, part),
                (None, true) => sum_products::<T, V, SHARED_BIN>(&sums, part),
            }
            self.inverse_rest::<V>(z, at, end, &mut Prefetch::nothing());
        }
    }

    /// The last inverse stage, for the share `parts` of [`leaves`](Self::leaves).
    #[inline(always)]
    fn finish<V: Vector<T>>(
        &self,
        z: &mut [T],
        out: &mut [T],
        write: Write,
        parts: Range<usize>,
        ahead: &mut Prefetch,
    ) {
        let (first, whole) = (&self.stages[0], self.leaves());
        let scale = T::of_f64(1.0 / self.n as f64);
        if self.block == self.n {
            by_radix!(first.radix, inverse_imaginary(z, first.node(0), scale, out, write, parts.clone(), whole, ahead));
        } else if parts.end == whole && !parts.is_empty() {
            by_radix!(first.radix, inverse(z, first.node(0), ahead));
            self.read_off(z, scale, out, write);
        }
    }

    /// Coefficients `block..2 * block` of the product: real parts first, then imaginary parts.
    #[inline(always)]
    fn read_off(&self, z: &[T], scale: T, out: &mut [T], write: Write) {
        let bins = z.as_chunks::<BIN>().0;
        let near = bins[self.block..].iter().map(|bin| &bin[..LANES]);
        let far = bins.iter().map(|bin| &bin[LANES..]);
        for (out, v) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(near.chain(far)) {
            for (out, v) in out.iter_mut().zip(v) {
                *out = if write == Write::Add { *v * scale + *out } else { *v * scale };
            }
        }
    }
}

/// Parts `0..whole` and `whole..` of a range.
#[inline(always)]
fn halves(parts: Range<usize>, whole: usize) -> (Range<usize>, Range<usize>) {
    let (from, to) = (parts.start, parts.end);
    (from.min(whole)..to.min(whole), from.max(whole) - whole..to.max(whole) - whole)
}

#[inline(always)]
fn input_body<T: Real, V: Vector<T>>(t: &WideTransform<T>, x: &[T], z: &mut [T], parts: Range<usize>) {
    let whole = t.leaves();
    let (first, rest) = halves(parts, whole);
    by_radix!(
        t.stages[0].radix,
        forward_real(x, z, t.stages[0].node(0), first.clone(), whole, &mut Prefetch::nothing())
    );
    t.forward_rest::<V>(z, rest, 0, &mut Prefetch::nothing());
}

#[inline(always)]
fn filter_body<T: Real, V: Vector<T>>(t: &WideTransform<T>, z: &mut [T]) {
    by_radix!(t.stages[0].radix, forward(z, t.stages[0].node(0), &mut Prefetch::nothing()));
    t.forward_rest::<V>(z, 0..t.leaves(), 0, &mut Prefetch::nothing());
}

#[inline(always)]
fn future_body<T: Real, V: Vector<T>>(
    t: &WideTransform<T>,
    products: &Products<T>,
    z: &mut [T],
    out: &mut [T],
    write: Write,
    parts: Range<usize>,
) {
    let (first, rest) = halves(parts, t.leaves());
    t.sum_and_inverse::<V>(products, z, first);
    t.finish::<V>(z, out, write, rest, &mut Prefetch::nothing());
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn tile_body<T: Real, V: Vector<T>>(
    t: &WideTransform<T>,
    x: &[T],
    kept: &mut [T],
    newest: usize,
    filters: &[T],
    shared: bool,
    z: &mut [T],
    out: &mut [T],
    write: Write,
    ahead: &mut Prefetch,
) {
    let (whole, len, filter_len) = (t.leaves(), t.spectrum_len(), t.filter_len(shared));
    let alone = kept.is_empty();
    let (before, rest) = kept.split_at_mut(if alone { 0 } else { newest * len });
    let (slot, after) = rest.split_at_mut(if alone { 0 } else { len });
    let (filter, others) = filters.split_at(filter_len);
    let older = Sums::of(before, after, others, len, filter_len);
    by_radix!(t.stages[0].radix, forward_real(x, z, t.stages[0].node(0), 0..whole, whole, ahead));
    let size = z.len() / whole;
    for part in 0..whole {
        let (at, end) = (part * size, (part + 1) * size);
        t.forward_rest::<V>(z, part..part + 1, 1, ahead);
        let z_part = &mut z[at..end];
        match (t.last(), shared, alone) {
            (Some(last), false, true) => {
                by_radix!(last.radix, turn_round::<BIN, true>(z_part, slot, filter, &older, last, at, ahead))
            }
            (Some(last), false, false) => {
                by_radix!(last.radix, turn_round::<BIN, false>(z_part, slot, filter, &older, last, at, ahead))
            }
            (Some(last), true, true) => {
                by_radix!(last.radix, turn_round::<SHARED_BIN, true>(z_part, slot, filter, &older, last, at, ahead))
            }
            (Some(last), true, false) => {
                by_radix!(last.radix, turn_round::<SHARED_BIN, false>(z_part, slot, filter, &older, last, at, ahead))
            }
            (None, false, _) => multiply::<T, V, BIN>(z_part, slot, filter, &older),
            (None, true, _) => multiply::<T, V, SHARED_BIN>(z_part, slot, filter, &older),
        }
        t.inverse_rest::<V>(z, at, end, ahead);
    }
    t.finish::<V>(z, out, write, 0..whole, ahead);
}

#[inline(always)]
fn both_body<T: Real, V: Vector<T>>(t: &WideTransform<T>, products: &Products<T>, z: &mut [T]) {
    t.sum_and_inverse::<V>(products, z, 0..t.leaves());
    by_radix!(t.stages[0].radix, inverse(z, t.stages[0].node(0), &mut Prefetch::nothing()));
}

#[cfg(test)]
mod tests;
