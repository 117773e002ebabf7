//! The right-angle transform of [`transform`](crate::transform) for 16 rows side by side.
//!
//! A block `[time][16]` becomes bins `[bin][real 16, imaginary 16]`: every operation works on 16 rows at once, nothing
//! is transposed, and the twist costs nothing. A polynomial modulo `z^n - c` splits into its remainders modulo
//! `z^(n/r) - c'` for the `r` roots `c'` of `c`, one [`Stage`] after another until `n = 1`, from `c = i`. Bins come
//! out in the order of these splits; products do not mind, and [`LaneTransform::natural`] tells the usual number.

// One index runs over several arrays.
#![allow(clippy::needless_range_loop)]

use crate::ahead::Ahead;
use crate::buffer::check_room;
use crate::error::Error;
use crate::kernels::{Isa, LANES};
use crate::real::Real;
use crate::simd::{Vector, vectors};
use crate::transform::{once, spread};
use crate::transpose;
use std::f64::consts::{FRAC_1_SQRT_2, TAU};
use std::ops::Range;
use std::sync::Arc;

/// Reals in one bin of 16 rows.
pub const BIN: usize = 2 * LANES;

/// Bins of a part that is transformed to the end before the next is begun: it stays in the innermost caches.
const LEAF: usize = 256;

/// Lines fetched ahead per eight bins in every pass over them: a few passes then cover the four per bin of a block that
/// takes part once, the filter's two, the inputs' and the outputs'.
const LINES: usize = 6;

/// One length: tables, immutable.
pub struct LaneTransform<T> {
    n: usize,
    stages: Vec<Stage<T>>,
    /// Stages whose blocks are longer than [`LEAF`], after the first.
    upper: usize,
    natural: Vec<usize>,
    isa: Isa,
}

/// Whether there is a transform of length `n`: a power of two from 2 on, or three times one.
pub(crate) fn supports(n: usize) -> bool {
    n >= 2 && (n.is_power_of_two() || n.is_multiple_of(3) && (n / 3).is_power_of_two())
}

/// One split of every block into `radix` shorter ones.
struct Stage<T> {
    radix: usize,
    /// Block length before the split.
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

/// Kept blocks and filter partitions whose products are summed: block `newest - p` with partition `p`, for `p` below
/// `count`, around the ring of `slots`. Both are rows of `len` reals.
#[derive(Clone, Copy)]
pub struct Products<'a, T> {
    pub slots: &'a [T],
    pub newest: usize,
    pub filters: &'a [T],
    pub count: usize,
    pub len: usize,
    /// The one row of `slots` that feeds all lanes, if it is one.
    pub lane: Option<usize>,
}

impl<T: Real> LaneTransform<T> {
    /// The transform of a length that is supported, made once per process.
    pub(crate) fn get(n: usize) -> Result<Arc<Self>, Error> {
        once(T::lane_transforms(), n, || {
            // Roots, angles and the order of bins.
            check_room(n.saturating_mul(64))?;
            Ok(Self::new(Isa::get(), n))
        })
    }

    /// The transform of a length that is supported, on one instruction set.
    pub fn new(isa: Isa, n: usize) -> Self {
        assert!(supports(n));
        let mut stages = Vec::new();
        // A node is the constant exp(2 pi i angle); the turn and a quarter is the root's.
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
        // The transform proper numbers its points exp(2 pi i (1/4 - k) / n).
        let natural = angles.iter().map(|a| (n - (a * n as f64 - 0.25).round() as usize) % n).collect();
        let upper = stages.iter().skip(1).take_while(|stage| stage.size > LEAF).count();
        Self { n, stages, upper, natural, isa }
    }

    /// Reals from one stored spectrum of 16 rows to the next.
    pub fn spectrum_len(&self) -> usize {
        lane_spectrum_len(self.n)
    }

    /// The usual number of each bin.
    pub(crate) fn natural(&self) -> &[usize] {
        &self.natural
    }

    /// Parts of nearly equal work that [`input`](Self::input) and [`future`](Self::future) consist of.
    pub(crate) fn parts(&self) -> usize {
        2 * self.leaves()
    }

    /// Parts of the bins that are transformed to the end one after another.
    #[inline(always)]
    fn leaves(&self) -> usize {
        self.stages.get(1 + self.upper).map_or(1, |leaf| self.n / leaf.size)
    }

    /// Spectra `z` of 16 rows of `n` reals, `x [time][16]`.
    pub fn input(&self, x: &[T], z: &mut [T]) {
        self.input_parts(x, z, 0..self.parts());
    }

    /// Some parts of the same; they follow each other.
    pub(crate) fn input_parts(&self, x: &[T], z: &mut [T], parts: Range<usize>) {
        input(self.isa, self, &x[..self.n * LANES], &mut z[..self.n * BIN], parts);
    }

    /// Spectra of 16 filter rows in place; `z` holds lag `j` as real and lag `j + n` as imaginary part of bin `j`.
    pub fn filter(&self, z: &mut [T]) {
        filter(self.isa, self, &mut z[..self.n * BIN]);
    }

    /// `out [time][16] (+)=` the imaginary part of the sum of products, transformed back: what the blocks
    /// contribute to the `n` outputs that follow the newest. `z` is room for `n` bins.
    pub fn future(&self, products: &Products<T>, z: &mut [T], out: &mut [T], add: bool) {
        self.future_parts(products, z, out, add, 0..self.parts());
    }

    /// Some parts of the same; they follow each other, and `z` stays as it is between them.
    pub(crate) fn future_parts(
        &self,
        products: &Products<T>,
        z: &mut [T],
        out: &mut [T],
        add: bool,
        parts: Range<usize>,
    ) {
        future(self.isa, self, products, &mut z[..self.n * BIN], &mut out[..self.n * LANES], add, parts);
    }

    /// [`input`](Self::input) and [`future`](Self::future) in one: the block `x` is transformed, kept as slot `newest`
    /// of `kept`, and multiplied by the first of `count` partitions `filters`; older slots follow. No slots at all
    /// stand for a block that takes part this once. What is wanted next is fetched `ahead` meanwhile.
    #[allow(clippy::too_many_arguments)]
    pub fn tile(
        &self,
        x: &[T],
        kept: &mut [T],
        newest: usize,
        filters: &[T],
        count: usize,
        z: &mut [T],
        out: &mut [T],
        add: bool,
        ahead: &mut Ahead,
    ) {
        let (bins, reals) = (self.n * BIN, self.n * LANES);
        let filters = &filters[..count * self.spectrum_len()];
        tile(self.isa, self, &x[..reals], kept, newest, filters, &mut z[..bins], &mut out[..reals], add, ahead);
    }

    /// The sum of products, transformed back into `z`: real parts are the causal outputs of the block.
    pub fn both(&self, products: &Products<T>, z: &mut [T]) {
        both(self.isa, self, products, &mut z[..self.n * BIN]);
    }
}

/// The lags `range` of up to 16 filter rows `stride` apart, times `scale`, as [`LaneTransform::filter`] takes them:
/// `z` comes zeroed, one row feeds all lanes.
pub(crate) fn fold<T: Real>(
    isa: Isa,
    filters: &[T],
    stride: usize,
    range: Range<usize>,
    rows: usize,
    scale: T,
    z: &mut [T],
) {
    let n = z.len() / BIN;
    let near = range.len().min(n);
    let far = range.len() - near;
    let parts = [(0, range.start, near), (LANES, range.start + near, far)];
    for (part, at, count) in parts.into_iter().filter(|(_, _, count)| *count > 0) {
        let bins = &mut z[part..(count - 1) * BIN + part + LANES];
        transpose::bins_from_rows(isa, filters, stride, at, rows, scale, bins);
        if rows == 1 {
            for bin in bins.chunks_mut(BIN) {
                let lag = bin[0];
                bin[..LANES].fill(lag);
            }
        }
    }
}

pub(crate) fn lane_spectrum_len(n: usize) -> usize {
    spread(n.saturating_mul(BIN))
}

vectors! {
    fn input(t: &LaneTransform<T>, x: &[T], z: &mut [T], parts: Range<usize>) = input_body on Avx512;
    fn filter(t: &LaneTransform<T>, z: &mut [T]) = filter_body on Avx512;
    fn future(
        t: &LaneTransform<T>, products: &Products<T>, z: &mut [T], out: &mut [T], add: bool, parts: Range<usize>,
    ) = future_body on Avx512;
    fn tile(
        t: &LaneTransform<T>, x: &[T], kept: &mut [T], newest: usize, filters: &[T], z: &mut [T], out: &mut [T],
        add: bool, ahead: &mut Ahead,
    ) = tile_body on Avx512;
    fn both(t: &LaneTransform<T>, products: &Products<T>, z: &mut [T]) = both_body on Avx512;
}

/// Real and imaginary parts of a few rows.
#[derive(Clone, Copy)]
struct Pair<V> {
    re: V,
    im: V,
}

#[inline(always)]
fn load<T, V: Vector<T>>(bin: &[T; BIN], lane: usize) -> Pair<V> {
    Pair { re: V::load(&bin[lane..]), im: V::load(&bin[LANES + lane..]) }
}

#[inline(always)]
fn store<T, V: Vector<T>>(bin: &mut [T; BIN], lane: usize, v: Pair<V>) {
    v.re.store(&mut bin[lane..]);
    v.im.store(&mut bin[LANES + lane..]);
}

/// `R` runs of `m` units of `N` reals. In this form no index needs to be checked in the loops over them.
#[inline(always)]
fn runs<T, const N: usize, const R: usize>(z: &[T], m: usize) -> [&[[T; N]]; R] {
    let mut rest = z.as_chunks().0;
    std::array::from_fn(|_| {
        let (run, more) = rest.split_at(m);
        rest = more;
        run
    })
}

#[inline(always)]
fn runs_mut<T, const N: usize, const R: usize>(z: &mut [T], m: usize) -> [&mut [[T; N]]; R] {
    let mut rest = z.as_chunks_mut().0;
    std::array::from_fn(|_| {
        let (run, more) = std::mem::take(&mut rest).split_at_mut(m);
        rest = more;
        run
    })
}

#[inline(always)]
fn add<T, V: Vector<T>>(a: Pair<V>, b: Pair<V>) -> Pair<V> {
    Pair { re: a.re.add(b.re), im: a.im.add(b.im) }
}

#[inline(always)]
fn sub<T, V: Vector<T>>(a: Pair<V>, b: Pair<V>) -> Pair<V> {
    Pair { re: a.re.sub(b.re), im: a.im.sub(b.im) }
}

/// `a + i b`.
#[inline(always)]
fn add_i<T, V: Vector<T>>(a: Pair<V>, b: Pair<V>) -> Pair<V> {
    Pair { re: a.re.sub(b.im), im: a.im.add(b.re) }
}

/// `a - i b`.
#[inline(always)]
fn sub_i<T, V: Vector<T>>(a: Pair<V>, b: Pair<V>) -> Pair<V> {
    Pair { re: a.re.add(b.im), im: a.im.sub(b.re) }
}

/// `a * (re + i im)`, or times its conjugate.
#[inline(always)]
fn turn<T: Real, V: Vector<T>, const BACK: bool>(a: Pair<V>, root: &[T]) -> Pair<V> {
    let (re, im) = (V::splat(root[0]), V::splat(root[1]));
    let (x, y) = (a.re.mul(re), a.im.mul(re));
    match BACK {
        false => Pair { re: a.im.neg_mul_add(im, x), im: a.re.mul_add(im, y) },
        true => Pair { re: a.im.mul_add(im, x), im: a.re.neg_mul_add(im, y) },
    }
}

/// `y_k = sum_j x_j exp(+-2 pi i j k / R)`, in place.
#[inline(always)]
fn fourier<T: Real, V: Vector<T>, const R: usize, const BACK: bool>(x: &mut [Pair<V>; R]) {
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
        if BACK {
            x.swap(1, 2);
        }
    } else if R == 4 {
        let y = fourier4::<T, V, BACK>(x[0], x[1], x[2], x[3]);
        x.copy_from_slice(&y);
    } else {
        let e = fourier4::<T, V, BACK>(x[0], x[2], x[4], x[6]);
        let o = fourier4::<T, V, BACK>(x[1], x[3], x[5], x[7]);
        let half = V::splat(T::of_f64(FRAC_1_SQRT_2));
        // exp(i pi / 4) o and exp(3 i pi / 4) o up to the factor `half`.
        let (o1, o3) = match BACK {
            false => (add_i(o[1], o[1]), add_i(o[3], o[3])),
            true => (sub_i(o[1], o[1]), sub_i(o[3], o[3])),
        };
        (x[0], x[4]) = (add(e[0], o[0]), sub(e[0], o[0]));
        x[1] = Pair { re: o1.re.mul_add(half, e[1].re), im: o1.im.mul_add(half, e[1].im) };
        x[5] = Pair { re: o1.re.neg_mul_add(half, e[1].re), im: o1.im.neg_mul_add(half, e[1].im) };
        if BACK {
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
fn fourier4<T: Real, V: Vector<T>, const BACK: bool>(a: Pair<V>, b: Pair<V>, c: Pair<V>, d: Pair<V>) -> [Pair<V>; 4] {
    let (even, odd) = (add(a, c), add(b, d));
    let (e, o) = (sub(a, c), sub(b, d));
    match BACK {
        false => [add(even, odd), add_i(e, o), sub(even, odd), sub_i(e, o)],
        true => [add(even, odd), sub_i(e, o), sub(even, odd), add_i(e, o)],
    }
}

/// Splits one block in place.
#[inline(always)]
fn split<T: Real, V: Vector<T>, const R: usize>(z: &mut [T], roots: &[T], ahead: &mut Ahead) {
    let m = z.len() / BIN / R;
    let z: [_; R] = runs_mut(z, m);
    let roots = &roots[..2 * (R - 1)];
    for j in 0..m {
        ahead.lines(LINES * R / 8);
        for lane in (0..LANES).step_by(V::WIDTH) {
            let mut x = [load::<T, V>(&z[0][j], lane); R];
            for k in 1..R {
                x[k] = turn::<T, V, false>(load(&z[k][j], lane), &roots[2 * k - 2..]);
            }
            fourier::<T, V, R, false>(&mut x);
            for k in 0..R {
                store(&mut z[k][j], lane, x[k]);
            }
        }
    }
}

/// The share `parts` of `whole` of the first split, of real inputs.
#[inline(always)]
fn split_real<T: Real, V: Vector<T>, const R: usize>(
    input: &[T],
    z: &mut [T],
    roots: &[T],
    parts: Range<usize>,
    whole: usize,
    ahead: &mut Ahead,
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
            fourier::<T, V, R, false>(&mut x);
            for k in 0..R {
                store(&mut z[k][j], lane, x[k]);
            }
        }
    }
}

/// Undoes [`split`], but for the factor `R`.
#[inline(always)]
fn join<T: Real, V: Vector<T>, const R: usize>(z: &mut [T], roots: &[T], ahead: &mut Ahead) {
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
            fourier::<T, V, R, true>(&mut x);
            store(&mut z[0][j], lane, x[0]);
            for k in 1..R {
                store(&mut z[k][j], lane, turn::<T, V, true>(x[k], &roots[2 * k - 2..]));
            }
        }
    }
}

/// The share `parts` of `whole` of the last join, of which only the imaginary part is wanted.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn join_imaginary<T: Real, V: Vector<T>, const R: usize>(
    z: &[T],
    roots: &[T],
    scale: T,
    out: &mut [T],
    add: bool,
    parts: Range<usize>,
    whole: usize,
    ahead: &mut Ahead,
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
            fourier::<T, V, R, true>(&mut x);
            for k in 0..R {
                let mut v = x[k].im;
                if k > 0 {
                    let (re, im) = (V::splat(roots[2 * k - 2]), V::splat(roots[2 * k - 1]));
                    v = x[k].re.neg_mul_add(im, v.mul(re));
                }
                let out = &mut out[k][j][lane..];
                let v = if add { v.mul_add(scale, V::load(out)) } else { v.mul(scale) };
                v.store(out);
            }
        }
    }
}

/// Splits neighbouring bins of part `at` of the reals, keeps them, and joins their sums of products; or of what is not
/// kept and stands `ALONE`, the products.
#[inline(always)]
fn turn_round<T: Real, V: Vector<T>, const R: usize, const ALONE: bool>(
    z: &mut [T],
    slot: &mut [T],
    filter: &[T],
    older: &Sums<T>,
    stage: &Stage<T>,
    at: usize,
    ahead: &mut Ahead,
) {
    let size = z.len();
    let z = z.as_chunks_mut::<BIN>().0.as_chunks_mut::<R>().0;
    let h = filter[at..at + size].as_chunks::<BIN>().0.as_chunks::<R>().0;
    let slot = if ALONE { slot } else { &mut slot[at..at + size] };
    let slot = slot.as_chunks_mut::<BIN>().0.as_chunks_mut::<R>().0;
    for (i, (z, h)) in z.iter_mut().zip(h).enumerate() {
        let at = at + i * R * BIN;
        let roots = stage.node(at / (R * BIN));
        ahead.lines(LINES * R / 8);
        for lane in (0..LANES).step_by(V::WIDTH) {
            let mut x = [load::<T, V>(&z[0], lane); R];
            for k in 1..R {
                x[k] = turn::<T, V, false>(load(&z[k], lane), &roots[2 * k - 2..]);
            }
            fourier::<T, V, R, false>(&mut x);
            for k in 0..R {
                let mut sum = Sum::of(x[k], load(&h[k], lane));
                if !ALONE {
                    store(&mut slot[i][k], lane, x[k]);
                    sum = older.add_to::<V, false>(sum, at + k * BIN, lane);
                }
                x[k] = sum.total();
            }
            join_pairs(x, z, roots, lane);
        }
    }
}

/// Joins neighbouring bins.
#[inline(always)]
fn join_pairs<T: Real, V: Vector<T>, const R: usize>(
    mut x: [Pair<V>; R],
    z: &mut [[T; BIN]; R],
    roots: &[T],
    lane: usize,
) {
    fourier::<T, V, R, true>(&mut x);
    store(&mut z[0], lane, x[0]);
    for k in 1..R {
        store(&mut z[k], lane, turn::<T, V, true>(x[k], &roots[2 * k - 2..]));
    }
}

/// Joins neighbouring bins, sums of products, of part `at` of the reals.
#[inline(always)]
fn join_sums<T: Real, V: Vector<T>, const R: usize, const ONE: bool>(
    products: &Products<T>,
    stage: &Stage<T>,
    at: usize,
    z: &mut [T],
) {
    let sums = products.sums();
    for (i, z) in z.as_chunks_mut::<BIN>().0.as_chunks_mut::<R>().0.iter_mut().enumerate() {
        let at = at + i * R * BIN;
        let roots = stage.node(at / (R * BIN));
        for lane in (0..LANES).step_by(V::WIDTH) {
            // No closure: one that is not inlined would not have the instruction set of the function it stands in.
            let mut x = [Pair { re: V::splat(T::ZERO), im: V::splat(T::ZERO) }; R];
            for k in 0..R {
                x[k] = sums.add_to::<V, ONE>(Sum::zero(), at + k * BIN, lane).total();
            }
            join_pairs(x, z, roots, lane);
        }
    }
}

macro_rules! by_radix {
    ($radix:expr, $f:ident$(::<$one:literal>)?($($arg:expr),*)) => {
        match $radix {
            8 => $f::<T, V, 8 $(, $one)?>($($arg),*),
            4 => $f::<T, V, 4 $(, $one)?>($($arg),*),
            3 => $f::<T, V, 3 $(, $one)?>($($arg),*),
            _ => $f::<T, V, 2 $(, $one)?>($($arg),*),
        }
    };
}

impl<T: Real> LaneTransform<T> {
    /// The last stage, which splits neighbouring bins from each other; `None` where it is the first.
    #[inline(always)]
    fn last(&self) -> Option<&Stage<T>> {
        self.stages[1..].last()
    }

    /// Stages after the first, depth first: all, or all but the last `spare`.
    #[inline(always)]
    fn split_on<V: Vector<T>>(&self, z: &mut [T], parts: Range<usize>, spare: usize, ahead: &mut Ahead) {
        let Some(leaf) = self.stages.get(1 + self.upper) else { return };
        let size = leaf.size * BIN;
        for part in parts {
            let at = part * size;
            for stage in &self.stages[1..][..self.upper] {
                let len = stage.size * BIN;
                if at.is_multiple_of(len) {
                    by_radix!(stage.radix, split(&mut z[at..at + len], stage.node(at / len), ahead));
                }
            }
            for stage in &self.stages[1 + self.upper..self.stages.len() - spare] {
                let len = stage.size * BIN;
                for (i, block) in z[at..at + size].chunks_exact_mut(len).enumerate() {
                    by_radix!(stage.radix, split(block, stage.node(at / len + i), ahead));
                }
            }
        }
    }

    /// Joins one part at all stages but the first and the last, depth first.
    #[inline(always)]
    fn join_up<V: Vector<T>>(&self, z: &mut [T], at: usize, end: usize, ahead: &mut Ahead) {
        let Some((_, stages)) = self.stages[1..].split_last() else { return };
        for stage in stages[self.upper..].iter().rev() {
            let len = stage.size * BIN;
            for (i, block) in z[at..end].chunks_exact_mut(len).enumerate() {
                by_radix!(stage.radix, join(block, stage.node(at / len + i), ahead));
            }
        }
        for stage in stages[..self.upper].iter().rev() {
            let len = stage.size * BIN;
            if end.is_multiple_of(len) {
                by_radix!(stage.radix, join(&mut z[end - len..end], stage.node(end / len - 1), ahead));
            }
        }
    }

    /// Sums the products, and joins all stages but the first.
    #[inline(always)]
    fn sum_and_join<V: Vector<T>>(&self, products: &Products<T>, z: &mut [T], parts: Range<usize>) {
        let size = z.len() / self.leaves();
        for part in parts {
            let (at, end) = (part * size, (part + 1) * size);
            let part = &mut z[at..end];
            match (self.last(), products.lane) {
                (Some(last), None) => by_radix!(last.radix, join_sums::<false>(products, last, at, part)),
                (Some(last), Some(_)) => by_radix!(last.radix, join_sums::<true>(products, last, at, part)),
                (None, None) => sum_products::<T, V, false>(products, part),
                (None, Some(_)) => sum_products::<T, V, true>(products, part),
            }
            self.join_up::<V>(z, at, end, &mut Ahead::nothing());
        }
    }

    /// The last join, for the share `parts` of [`leaves`](Self::leaves).
    #[inline(always)]
    fn finish<V: Vector<T>>(&self, z: &[T], out: &mut [T], add: bool, parts: Range<usize>, ahead: &mut Ahead) {
        let (scale, whole) = (T::of_f64(1.0 / self.n as f64), self.leaves());
        by_radix!(
            self.stages[0].radix,
            join_imaginary(z, self.stages[0].node(0), scale, out, add, parts.clone(), whole, ahead)
        );
    }
}

/// Parts `0..whole` and `whole..` of a range.
#[inline(always)]
fn halves(parts: Range<usize>, whole: usize) -> (Range<usize>, Range<usize>) {
    let (from, to) = (parts.start, parts.end);
    (from.min(whole)..to.min(whole), from.max(whole) - whole..to.max(whole) - whole)
}

#[inline(always)]
fn input_body<T: Real, V: Vector<T>>(t: &LaneTransform<T>, x: &[T], z: &mut [T], parts: Range<usize>) {
    let whole = t.leaves();
    let (first, rest) = halves(parts, whole);
    by_radix!(t.stages[0].radix, split_real(x, z, t.stages[0].node(0), first.clone(), whole, &mut Ahead::nothing()));
    t.split_on::<V>(z, rest, 0, &mut Ahead::nothing());
}

#[inline(always)]
fn filter_body<T: Real, V: Vector<T>>(t: &LaneTransform<T>, z: &mut [T]) {
    by_radix!(t.stages[0].radix, split(z, t.stages[0].node(0), &mut Ahead::nothing()));
    t.split_on::<V>(z, 0..t.leaves(), 0, &mut Ahead::nothing());
}

#[inline(always)]
fn future_body<T: Real, V: Vector<T>>(
    t: &LaneTransform<T>,
    products: &Products<T>,
    z: &mut [T],
    out: &mut [T],
    add: bool,
    parts: Range<usize>,
) {
    let (first, rest) = halves(parts, t.leaves());
    t.sum_and_join::<V>(products, z, first);
    t.finish::<V>(z, out, add, rest, &mut Ahead::nothing());
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn tile_body<T: Real, V: Vector<T>>(
    t: &LaneTransform<T>,
    x: &[T],
    kept: &mut [T],
    newest: usize,
    filters: &[T],
    z: &mut [T],
    out: &mut [T],
    add: bool,
    ahead: &mut Ahead,
) {
    let (whole, len) = (t.leaves(), t.spectrum_len());
    let alone = kept.is_empty();
    let (before, rest) = kept.split_at_mut(if alone { 0 } else { newest * len });
    let (slot, after) = rest.split_at_mut(if alone { 0 } else { len });
    let (filter, others) = filters.split_at(len);
    let older = Sums::of(before, after, others, len, None);
    by_radix!(t.stages[0].radix, split_real(x, z, t.stages[0].node(0), 0..whole, whole, ahead));
    let size = z.len() / whole;
    for part in 0..whole {
        let (at, end) = (part * size, (part + 1) * size);
        t.split_on::<V>(z, part..part + 1, 1, ahead);
        match t.last() {
            Some(last) if alone => {
                by_radix!(last.radix, turn_round::<true>(&mut z[at..end], slot, filter, &older, last, at, ahead))
            }
            Some(last) => {
                by_radix!(last.radix, turn_round::<false>(&mut z[at..end], slot, filter, &older, last, at, ahead))
            }
            None => multiply::<T, V>(z, slot, filter, &older),
        }
        t.join_up::<V>(z, at, end, ahead);
    }
    t.finish::<V>(z, out, add, 0..whole, ahead);
}

#[inline(always)]
fn both_body<T: Real, V: Vector<T>>(t: &LaneTransform<T>, products: &Products<T>, z: &mut [T]) {
    t.sum_and_join::<V>(products, z, 0..t.leaves());
    by_radix!(t.stages[0].radix, join(z, t.stages[0].node(0), &mut Ahead::nothing()));
}

/// A sum of products of complex numbers, by parts.
#[derive(Clone, Copy)]
struct Sum<V> {
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
struct Sums<'a, T> {
    runs: [(&'a [T], &'a [T]); 2],
    len: usize,
    /// The row of the slots that feeds all lanes where one does.
    one: usize,
}

impl<'a, T: Real> Sums<'a, T> {
    /// The last slots of `first`, and then of `second`, as many as there are `filters`.
    #[inline(always)]
    fn of(first: &'a [T], second: &'a [T], filters: &'a [T], len: usize, lane: Option<usize>) -> Self {
        let (near, far) = filters.split_at(first.len().min(filters.len()));
        let runs = [(&first[first.len() - near.len()..], near), (&second[second.len() - far.len()..], far)];
        Self { runs, len, one: lane.unwrap_or(0) }
    }

    /// Adds the products of the bin from real `at` of each spectrum on; `ONE` row may feed all lanes.
    #[inline(always)]
    fn add_to<V: Vector<T>, const ONE: bool>(&self, mut sum: Sum<V>, at: usize, lane: usize) -> Sum<V> {
        for (x, h) in self.runs {
            for (x, h) in x.chunks_exact(self.len).rev().zip(h.chunks_exact(self.len)) {
                let (x, h) = (&x[at..at + BIN], &h[at..at + BIN]);
                let x = match ONE {
                    false => Pair { re: V::load(&x[lane..]), im: V::load(&x[LANES + lane..]) },
                    true => Pair { re: V::splat(x[self.one]), im: V::splat(x[LANES + self.one]) },
                };
                sum = sum.add(x, Pair { re: V::load(&h[lane..]), im: V::load(&h[LANES + lane..]) });
            }
        }
        sum
    }
}

impl<'a, T: Real> Products<'a, T> {
    #[inline(always)]
    fn sums(&self) -> Sums<'a, T> {
        let (first, second) = self.slots.split_at((self.newest + 1) * self.len);
        Sums::of(first, second, &self.filters[..self.count * self.len], self.len, self.lane)
    }
}

/// Keeps the bins `z`, and turns them into their sums of products.
#[inline(always)]
fn multiply<T: Real, V: Vector<T>>(z: &mut [T], slot: &mut [T], filter: &[T], older: &Sums<T>) {
    for (b, (z, h)) in z.as_chunks_mut::<BIN>().0.iter_mut().zip(filter.as_chunks::<BIN>().0).enumerate() {
        if let Some(slot) = slot.get_mut(b * BIN..(b + 1) * BIN) {
            slot.copy_from_slice(z);
        }
        for lane in (0..LANES).step_by(V::WIDTH) {
            let newest = Sum::of(load::<T, V>(z, lane), load(h, lane));
            store(z, lane, older.add_to::<V, false>(newest, b * BIN, lane).total());
        }
    }
}

#[inline(always)]
fn sum_products<T: Real, V: Vector<T>, const ONE: bool>(products: &Products<T>, sum: &mut [T]) {
    let sums = products.sums();
    for (b, sum) in sum.as_chunks_mut::<BIN>().0.iter_mut().enumerate() {
        for lane in (0..LANES).step_by(V::WIDTH) {
            store(sum, lane, sums.add_to::<V, ONE>(Sum::zero(), b * BIN, lane).total());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::values;

    /// Product of `x`, lane `source`, and the folded filter `f` of lane `lane`, modulo `z^n - i`, coefficient `j`.
    fn product<T: Real>(x: &[T], source: usize, f: &[T], lane: usize, n: usize, j: usize) -> (f64, f64) {
        let (mut re, mut im) = (0.0, 0.0);
        for i in 0..n {
            let v = x[i * LANES + source].as_f64();
            let at = (n + j - i) % n * BIN + lane;
            let (a, b) = (f[at].as_f64(), f[at + LANES].as_f64());
            let (a, b) = if i > j { (-b, a) } else { (a, b) };
            (re, im) = (re + v * a, im + v * b);
        }
        (re, im)
    }

    fn every_length<T: Real>() {
        let eps = if T::BYTES == 4 { 1e-6 } else { 1e-14 };
        for isa in Isa::available() {
            for n in (1..13).flat_map(|bits| [1 << bits, 3 << (bits - 1)]) {
                let t = LaneTransform::<T>::new(isa, n);
                let len = t.spectrum_len();
                let x = values::<T>(n * LANES, 1);
                let f = values::<T>(n * BIN, 2);
                let (mut slots, mut filters) = (vec![T::ZERO; 2 * len], vec![T::ZERO; len]);
                t.input(&x, &mut slots[len..]);
                filters[..n * BIN].copy_from_slice(&f);
                t.filter(&mut filters);
                for (b, k) in t.natural().iter().enumerate().step_by(1 + n / 7) {
                    // Angles in exact fractions of a turn.
                    let angle = |j: usize| TAU * ((4 * n + 1 - 4 * k) * j % (4 * n)) as f64 / (4 * n) as f64;
                    let sum = |part: fn(f64) -> f64| -> f64 {
                        (0..n).map(|j| x[j * LANES + 3].as_f64() * part(angle(j))).sum()
                    };
                    let (re, im) = (slots[len + b * BIN + 3].as_f64(), slots[len + b * BIN + LANES + 3].as_f64());
                    let error = (re - sum(f64::cos)).hypot(im - sum(f64::sin));
                    assert!(error < 8.0 * eps * (n as f64).sqrt(), "bin {k} of {n} on {}: {error}", isa.name());
                }
                for one in [None, Some(5)] {
                    let products = Products { slots: &slots, newest: 1, filters: &filters, count: 1, len, lane: one };
                    let (mut z, mut whole) = (values::<T>(n * BIN, 3), values::<T>(n * BIN, 4));
                    let before = values::<T>(n * LANES, 5);
                    let (mut set, mut added) = (before.clone(), before.clone());
                    t.future(&products, &mut z, &mut set, false);
                    t.future(&products, &mut z, &mut added, true);
                    t.both(&products, &mut whole);
                    for j in (0..n).step_by(1 + n / 5) {
                        for lane in [0, 7, 15] {
                            let (re, im) = product(&x, one.unwrap_or(lane), &f, lane, n, j);
                            let at = j * LANES + lane;
                            let got = [set[at], added[at] - before[at]].map(T::as_f64);
                            let scaled = [whole[j * BIN + lane], whole[j * BIN + LANES + lane]];
                            let scaled = scaled.map(|v| v.as_f64() / n as f64);
                            for (got, sum) in [(got[0], im), (got[1], im), (scaled[0], re), (scaled[1], im)] {
                                let error = (got - sum).abs();
                                assert!(error < 8.0 * eps * (n as f64).sqrt(), "{j} of {n} on {}: {error}", isa.name());
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn products_of_every_length_on_every_instruction_set() {
        every_length::<f32>();
        every_length::<f64>();
    }

    #[test]
    fn parts_change_no_bit() {
        let mut steps = [1, 2, 5, 3].into_iter().cycle();
        for n in [2, 8, 48, 256, 1024, 8192] {
            let t = LaneTransform::<f32>::new(Isa::get(), n);
            let len = t.spectrum_len();
            let (x, filters) = (values::<f32>(n * LANES, 1), values::<f32>(len, 2));
            let (mut slots, mut cut, mut z) = (vec![0.0; len], vec![0.0; len], vec![0.0; n * BIN]);
            let (mut whole, mut out) = (vec![0.0; n * LANES], vec![0.0; n * LANES]);
            t.input(&x, &mut slots);
            let mut ranges = || {
                let ends = std::iter::successors(Some(0), |at| Some((at + steps.next()?).min(t.parts())));
                let ends: Vec<_> = ends.take(t.parts() + 1).collect();
                ends.windows(2).map(|pair| pair[0]..pair[1]).collect::<Vec<_>>()
            };
            ranges().into_iter().for_each(|range| t.input_parts(&x, &mut cut, range));
            assert_eq!(slots, cut, "{n}");
            let products = Products { slots: &slots, newest: 0, filters: &filters, count: 1, len, lane: None };
            t.future(&products, &mut z, &mut whole, false);
            ranges().into_iter().for_each(|range| t.future_parts(&products, &mut z, &mut out, false, range));
            assert_eq!(whole, out, "{n}");
        }
    }

    #[test]
    fn sums_go_around_the_ring() {
        let (n, ring) = (4, 5);
        let t = LaneTransform::<f64>::new(Isa::get(), n);
        let len = t.spectrum_len();
        let (slots, filters) = (values::<f64>(ring * len, 1), values::<f64>(ring * len, 2));
        for (newest, count) in [(0, 1), (0, 5), (2, 3), (2, 4), (4, 5), (3, 2)] {
            let products = Products { slots: &slots, newest, filters: &filters, count, len, lane: None };
            let (mut all, mut each, mut one) = (vec![0.0; n * LANES], vec![0.0; n * LANES], vec![0.0; n * BIN]);
            t.future(&products, &mut one, &mut all, false);
            for p in 0..count {
                let single =
                    Products { newest: (newest + ring - p) % ring, filters: &filters[p * len..], count: 1, ..products };
                t.future(&single, &mut one, &mut each, true);
            }
            assert!(all.iter().zip(&each).all(|(a, b)| (a - b).abs() < 1e-12), "{newest} {count}");
        }
    }

    #[test]
    fn a_tile_is_its_two_halves_in_one() {
        let ring = 5;
        for n in [2, 8, 24, 64, 512, 2048] {
            for isa in Isa::available() {
                let t = LaneTransform::<f32>::new(isa, n);
                let len = t.spectrum_len();
                let (x, filters) = (values::<f32>(n * LANES, 1), values::<f32>(ring * len, 2));
                for (newest, count) in [(0, 1), (0, 5), (2, 3), (2, 4), (4, 5)] {
                    let (mut slots, mut z) = (values::<f32>(ring * len, 3), vec![0.0; n * BIN]);
                    let mut kept = slots.clone();
                    let (mut halves, mut whole) = (values::<f32>(n * LANES, 4), values::<f32>(n * LANES, 4));
                    t.input(&x, &mut slots[newest * len..]);
                    let products = Products { slots: &slots, newest, filters: &filters, count, len, lane: None };
                    t.future(&products, &mut z, &mut halves, true);
                    t.tile(&x, &mut kept, newest, &filters, count, &mut z, &mut whole, true, &mut Ahead::nothing());
                    assert_eq!(halves, whole, "{n}, {newest}, {count} on {}", isa.name());
                    assert_eq!(slots, kept, "{n}, {newest} on {}", isa.name());
                }
                let (mut slots, mut z) = (vec![0.0; len], vec![0.0; n * BIN]);
                let (mut halves, mut whole) = (vec![0.0; n * LANES], vec![0.0; n * LANES]);
                t.input(&x, &mut slots);
                let products = Products { slots: &slots, newest: 0, filters: &filters, count: 1, len, lane: None };
                t.future(&products, &mut z, &mut halves, false);
                t.tile(&x, &mut [], 0, &filters, 1, &mut z, &mut whole, false, &mut Ahead::nothing());
                assert_eq!(halves, whole, "{n}, not kept, on {}", isa.name());
            }
        }
    }
}
