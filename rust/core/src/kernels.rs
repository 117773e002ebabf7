//! The inner loops, as pure functions on slices, compiled once per instruction set.
//!
//! Each body is written once, generic over the precision, over whether a fused multiply-add is cheap and over the
//! width it works in; the `dispatch!` macro compiles it for every instruction set and picks one at run time. On
//! targets other than x86-64 the baseline is used, which on AArch64 means NEON.

use crate::real::Real;
use rustfft::num_complex::Complex;

/// Channels side by side in a base block, and bins side by side in a stored spectrum.
pub const LANES: usize = 16;

/// Inputs that one direct tile pushes at the lowest level; larger direct tiles are powers of it.
pub(crate) const PUSH: usize = 8;

/// Inputs summed in registers before they are added to memory: keeps long direct sums accurate.
const CHAIN: usize = 64;

/// An instruction set that this processor has. Only [`Isa::get`] makes one, which is what makes the dispatch sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Set {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The best instruction set of this processor; `FUTUREFILL_ISA=baseline|avx2` asks for a lesser one.
    pub fn get() -> Self {
        static BEST: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| {
            let all = Self::available();
            let wish = std::env::var("FUTUREFILL_ISA").unwrap_or_default();
            all.iter().copied().find(|isa| isa.name() == wish).unwrap_or(all[all.len() - 1])
        })
    }

    /// Every instruction set that this processor has, weakest first.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Isa(Set::Baseline)];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Isa(Set::Avx2));
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                {
                    all.push(Isa(Set::Avx512));
                }
            }
        }
        all
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn set(self) -> Set {
        self.0
    }

    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "aarch64")]
            Set::Baseline => "neon",
            #[cfg(not(target_arch = "aarch64"))]
            Set::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
    }
}

macro_rules! dispatch {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident;)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<T: Real>(isa: Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2<T: Real>($($arg: $ty),*) {
                    $body::<T, true, 8>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512<T: Real>($($arg: $ty),*) {
                    $body::<T, true, 16>($($arg),*)
                }
                match isa.0 {
                    // SAFETY: an `Isa` is made by `Isa::available` alone, after it has found these features.
                    Set::Avx2 => return unsafe { avx2($($arg),*) },
                    // SAFETY: as above.
                    Set::Avx512 => return unsafe { avx512($($arg),*) },
                    Set::Baseline => {}
                }
            }
            let _ = isa;
            $body::<T, { cfg!(target_arch = "aarch64") }, 4>($($arg),*)
        }
    )*};
}

/// Where the 16 lanes of one output group come from: its base-block inputs and its first filter lags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    pub input: usize,
    pub filter: usize,
}

dispatch! {
    /// Completes positions `from..to` of the base block for each group, in place in `pending`, and pushes finished
    /// sub-blocks to the rest of the block. `taps [filter][stride][16]`, `inputs [input][block][16]`,
    /// `pending [group][block][16]`.
    pub fn advance(
        groups: &[Group], taps: &[T], stride: usize, inputs: &[T], pending: &mut [T], block: usize, from: usize, to: usize,
    ) = advance_body;

    /// Direct sum of all lags for one output position of one group, newest input first, in partial sums.
    /// `newer` and `older` are the two runs of a ring of inputs `[time][16]`, both in order of time.
    pub fn direct_sum(taps: &[T], newer: &[T], older: &[T], out: &mut [T]) = direct_sum_body;

    /// `z_j = x_j w^j`, zero beyond the inputs.
    pub fn twist(x: &[T], w: &[Complex<T>], z: &mut [Complex<T>]) = twist_body;

    /// Interleaved bins to blocks of 16 real and 16 imaginary parts, zero-padded.
    pub fn store_spectrum(z: &[Complex<T>], spectrum: &mut [T]) = store_spectrum_body;

    /// Blocks of 16 real and 16 imaginary parts to interleaved bins.
    pub fn load_spectrum(spectrum: &[T], z: &mut [Complex<T>]) = load_spectrum_body;

    /// `sum = sum_p slots[newest - p + 1] * filters[p - 1]` over `count` partitions, all in registers.
    pub fn multiply_accumulate(
        sum: &mut [T], slots: &[T], newest: usize, filters: &[T], count: usize,
    ) = multiply_accumulate_body;

    /// `z_j *= h_j`.
    pub fn multiply(z: &mut [Complex<T>], h: &[Complex<T>]) = multiply_body;

    /// `out_j (+)= Im(z_j conj(w^j)) * scale`.
    pub fn untwist_im(z: &[Complex<T>], w: &[Complex<T>], scale: T, out: &mut [T], add: bool) = untwist_im_body;

    /// `out_j (+)= Re(z_j conj(w^j)) * scale`.
    pub fn untwist_re(z: &[Complex<T>], w: &[Complex<T>], scale: T, out: &mut [T], add: bool) = untwist_re_body;
}

#[inline(always)]
fn fma<T: Real, const FMA: bool>(a: T, b: T, c: T) -> T {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn load<T: Real, const W: usize>(s: &[T], at: usize) -> [T; W] {
    let mut v = [T::ZERO; W];
    v.copy_from_slice(&s[at..at + W]);
    v
}

#[inline(always)]
fn fma_all<T: Real, const FMA: bool, const W: usize>(acc: &mut [T; W], a: &[T; W], b: &[T; W]) {
    for q in 0..W {
        acc[q] = fma::<T, FMA>(a[q], b[q], acc[q]);
    }
}

#[inline(always)]
fn add_all<T: Real, const W: usize>(acc: &mut [T; W], a: &[T; W]) {
    for q in 0..W {
        acc[q] = acc[q] + a[q];
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn advance_body<T: Real, const FMA: bool, const W: usize>(
    groups: &[Group],
    taps: &[T],
    stride: usize,
    inputs: &[T],
    pending: &mut [T],
    block: usize,
    from: usize,
    to: usize,
) {
    for (group, c) in groups.iter().zip(pending.chunks_exact_mut(block * LANES)) {
        let h = &taps[group.filter * stride * LANES..][..block * LANES];
        let u = &inputs[group.input * block * LANES..][..block * LANES];
        for s in from..to {
            pull::<T, FMA, W>(h, u, c, s);
            let done = s + 1;
            if done % PUSH == 0 && done < block {
                let mut size = PUSH;
                while done % (size * PUSH) == 0 {
                    size *= PUSH;
                }
                let end = done.next_multiple_of(size * PUSH).min(block);
                push::<T, FMA, W>(h, u, c, done - size, done, end);
            }
        }
    }
}

/// `c[s] += sum of the lags inside the sub-block of s`.
#[inline(always)]
fn pull<T: Real, const FMA: bool, const W: usize>(h: &[T], u: &[T], c: &mut [T], s: usize) {
    let first = s / PUSH * PUSH;
    let h = &h[..(s - first + 1) * LANES];
    let u = &u[first * LANES..(s + 1) * LANES];
    for lane in (0..LANES).step_by(W) {
        let mut acc: [T; W] = load(c, s * LANES + lane);
        for (h, u) in h.chunks_exact(LANES).zip(u.chunks_exact(LANES).rev()) {
            fma_all::<T, FMA, W>(&mut acc, &load(h, lane), &load(u, lane));
        }
        c[s * LANES + lane..][..W].copy_from_slice(&acc);
    }
}

/// A direct tile: inputs `lo..hi` to outputs `hi..end` of the block, four outputs at a time.
#[inline(always)]
fn push<T: Real, const FMA: bool, const W: usize>(h: &[T], u: &[T], c: &mut [T], lo: usize, hi: usize, end: usize) {
    for lane in (0..LANES).step_by(W) {
        let mut o = hi;
        while o < end {
            let count = (end - o).min(4);
            let mut total = [[T::ZERO; W]; 4];
            for from in (lo..hi).step_by(CHAIN) {
                let to = hi.min(from + CHAIN);
                let x = &u[from * LANES..to * LANES];
                // Outputs o..o + 4 use the lags from o + 1 - to on, for the newest input first.
                let first = (o + 1 - to) * LANES;
                if count == 4 {
                    let taps = &h[first..(o + 4 - from) * LANES];
                    let sums = correlate4::<T, FMA, W>(x, taps, lane);
                    for (total, sum) in total.iter_mut().zip(&sums) {
                        add_all(total, sum);
                    }
                } else {
                    for (q, total) in total.iter_mut().enumerate().take(count) {
                        let taps = &h[first + q * LANES..(o + q + 1 - from) * LANES];
                        let mut sum = [T::ZERO; W];
                        for (x, taps) in x.chunks_exact(LANES).rev().zip(taps.chunks_exact(LANES)) {
                            fma_all::<T, FMA, W>(&mut sum, &load(x, lane), &load(taps, lane));
                        }
                        add_all(total, &sum);
                    }
                }
            }
            for (q, total) in total.iter_mut().enumerate().take(count) {
                let at = (o + q) * LANES + lane;
                add_all(total, &load(c, at));
                c[at..at + W].copy_from_slice(total);
            }
            o += count;
        }
    }
}

/// Four neighbouring outputs of a direct tile, whose inputs are a multiple of four: the window of taps rotates
/// through registers, so that each is read once.
#[inline(always)]
fn correlate4<T: Real, const FMA: bool, const W: usize>(x: &[T], taps: &[T], lane: usize) -> [[T; W]; 4] {
    let mut acc = [[T::ZERO; W]; 4];
    let mut window: [[T; W]; 4] =
        [load(taps, lane), load(taps, LANES + lane), load(taps, 2 * LANES + lane), [T::ZERO; W]];
    for (x, ahead) in x.rchunks_exact(4 * LANES).zip(taps[3 * LANES..].chunks_exact(4 * LANES)) {
        for turn in 0..4 {
            window[(turn + 3) % 4] = load(ahead, turn * LANES + lane);
            let v: [T; W] = load(x, (3 - turn) * LANES + lane);
            for q in 0..4 {
                fma_all::<T, FMA, W>(&mut acc[q], &v, &window[(turn + q) % 4]);
            }
        }
    }
    acc
}

#[inline(always)]
fn direct_sum_body<T: Real, const FMA: bool, const W: usize>(taps: &[T], newer: &[T], older: &[T], out: &mut [T]) {
    let (recent, rest) = taps.split_at(newer.len().min(taps.len()));
    let mut total = [[T::ZERO; 2]; LANES];
    for (taps, inputs) in [(recent, newer), (rest, older)] {
        let n = taps.len();
        let inputs = &inputs[inputs.len() - n..];
        for (h, u) in taps.chunks(2 * CHAIN * LANES).zip(inputs.rchunks(2 * CHAIN * LANES)) {
            let mut even = [T::ZERO; LANES];
            let mut odd = [T::ZERO; LANES];
            let mut hs = h.chunks_exact(2 * LANES);
            let mut us = u.rchunks_exact(2 * LANES);
            for (h, u) in hs.by_ref().zip(us.by_ref()) {
                fma_all::<T, FMA, LANES>(&mut even, &load(h, 0), &load(u, LANES));
                fma_all::<T, FMA, LANES>(&mut odd, &load(h, LANES), &load(u, 0));
            }
            if let (h, u) = (hs.remainder(), us.remainder())
                && h.len() == LANES
            {
                fma_all::<T, FMA, LANES>(&mut even, &load(h, 0), &load(u, 0));
            }
            for q in 0..LANES {
                // Kahan's compensated addition of the partial sums.
                let term = even[q] + odd[q] - total[q][1];
                let sum = total[q][0] + term;
                total[q][1] = (sum - total[q][0]) - term;
                total[q][0] = sum;
            }
        }
    }
    for q in 0..LANES {
        out[q] = total[q][0];
    }
}

#[inline(always)]
fn twist_body<T: Real, const FMA: bool, const W: usize>(x: &[T], w: &[Complex<T>], z: &mut [Complex<T>]) {
    let (head, tail) = z.split_at_mut(x.len());
    for ((z, x), w) in head.iter_mut().zip(x).zip(w) {
        *z = Complex::new(*x * w.re, *x * w.im);
    }
    tail.fill(Complex::new(T::ZERO, T::ZERO));
}

#[inline(always)]
fn store_spectrum_body<T: Real, const FMA: bool, const W: usize>(z: &[Complex<T>], spectrum: &mut [T]) {
    let mut blocks = spectrum.chunks_exact_mut(2 * LANES);
    let mut bins = z.chunks_exact(LANES);
    for (z, s) in bins.by_ref().zip(blocks.by_ref()) {
        let (re, im) = s.split_at_mut(LANES);
        for q in 0..LANES {
            re[q] = z[q].re;
            im[q] = z[q].im;
        }
    }
    let mut rest = bins.remainder();
    for s in blocks {
        s.fill(T::ZERO);
        for (q, z) in std::mem::take(&mut rest).iter().enumerate() {
            s[q] = z.re;
            s[LANES + q] = z.im;
        }
    }
}

#[inline(always)]
fn load_spectrum_body<T: Real, const FMA: bool, const W: usize>(spectrum: &[T], z: &mut [Complex<T>]) {
    let mut bins = z.chunks_exact_mut(LANES);
    let mut blocks = spectrum.chunks_exact(2 * LANES);
    for (z, s) in bins.by_ref().zip(blocks.by_ref()) {
        let (re, im) = s.split_at(LANES);
        for q in 0..LANES {
            z[q] = Complex::new(re[q], im[q]);
        }
    }
    if let Some(s) = blocks.next() {
        for (q, z) in bins.into_remainder().iter_mut().enumerate() {
            *z = Complex::new(s[q], s[LANES + q]);
        }
    }
}

#[inline(always)]
fn multiply_accumulate_body<T: Real, const FMA: bool, const W: usize>(
    sum: &mut [T],
    slots: &[T],
    newest: usize,
    filters: &[T],
    count: usize,
) {
    let n = sum.len();
    let ring = slots.len() / n;
    // Partitions 1..=before pair with slots newest, newest - 1, .., 0; the others start again at the ring's end.
    let before = count.min(newest + 1);
    let first = &slots[(newest + 1 - before) * n..(newest + 1) * n];
    let second = &slots[(ring + before - count) * n..];
    let (near, far) = filters[..count * n].split_at(before * n);
    for (b, sum) in sum.chunks_exact_mut(2 * LANES).enumerate() {
        let at = b * 2 * LANES;
        let mut rr = [T::ZERO; LANES];
        let mut ii = [T::ZERO; LANES];
        let mut ri = [T::ZERO; LANES];
        let mut ir = [T::ZERO; LANES];
        for (x, h) in [(first, near), (second, far)] {
            for (x, h) in x.chunks_exact(n).rev().zip(h.chunks_exact(n)) {
                let (x, h) = (&x[at..at + 2 * LANES], &h[at..at + 2 * LANES]);
                let (xr, xi): ([T; LANES], [T; LANES]) = (load(x, 0), load(x, LANES));
                let (hr, hi): ([T; LANES], [T; LANES]) = (load(h, 0), load(h, LANES));
                fma_all::<T, FMA, LANES>(&mut rr, &xr, &hr);
                fma_all::<T, FMA, LANES>(&mut ii, &xi, &hi);
                fma_all::<T, FMA, LANES>(&mut ri, &xr, &hi);
                fma_all::<T, FMA, LANES>(&mut ir, &xi, &hr);
            }
        }
        let (re, im) = sum.split_at_mut(LANES);
        for q in 0..LANES {
            re[q] = rr[q] - ii[q];
        }
        for q in 0..LANES {
            im[q] = ri[q] + ir[q];
        }
    }
}

#[inline(always)]
fn multiply_body<T: Real, const FMA: bool, const W: usize>(z: &mut [Complex<T>], h: &[Complex<T>]) {
    for (z, h) in z.iter_mut().zip(h) {
        *z = Complex::new(z.re * h.re - z.im * h.im, z.re * h.im + z.im * h.re);
    }
}

#[inline(always)]
fn untwist_im_body<T: Real, const FMA: bool, const W: usize>(
    z: &[Complex<T>],
    w: &[Complex<T>],
    scale: T,
    out: &mut [T],
    add: bool,
) {
    untwist::<T, true>(z, w, scale, out, add);
}

#[inline(always)]
fn untwist_re_body<T: Real, const FMA: bool, const W: usize>(
    z: &[Complex<T>],
    w: &[Complex<T>],
    scale: T,
    out: &mut [T],
    add: bool,
) {
    untwist::<T, false>(z, w, scale, out, add);
}

#[inline(always)]
fn untwist<T: Real, const IM: bool>(z: &[Complex<T>], w: &[Complex<T>], scale: T, out: &mut [T], add: bool) {
    for ((out, z), w) in out.iter_mut().zip(z).zip(w) {
        let part = if IM { z.im * w.re - z.re * w.im } else { z.re * w.re + z.im * w.im };
        let old = if add { *out } else { T::ZERO };
        *out = old + part * scale;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn values<T: Real>(n: usize, seed: u64) -> Vec<T> {
        let mut s = seed | 1;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            T::of_f64((s >> 40) as f64 / (1u64 << 23) as f64 - 1.0)
        };
        (0..n).map(|_| next()).collect()
    }

    fn complex<T: Real>(n: usize, seed: u64) -> Vec<Complex<T>> {
        values(2 * n, seed).chunks_exact(2).map(|z| Complex::new(z[0], z[1])).collect()
    }

    fn flat<T: Real>(z: &[Complex<T>]) -> Vec<T> {
        z.iter().flat_map(|z| [z.re, z.im]).collect()
    }

    /// Every instruction set against the baseline, within rounding.
    fn all_agree<T: Real>(what: &str, run: impl Fn(Isa) -> Vec<T>) {
        let truth = run(Isa(Set::Baseline));
        let eps = if T::BYTES == 4 { 1e-6 } else { 1e-14 };
        for isa in Isa::available() {
            let got = run(isa);
            let norm: f64 = truth.iter().map(|x| x.as_f64().powi(2)).sum();
            let error: f64 = got.iter().zip(&truth).map(|(a, b)| (a.as_f64() - b.as_f64()).powi(2)).sum();
            assert!(got.len() == truth.len() && error <= eps * eps * 64.0 * norm, "{what} on {}", isa.name());
        }
    }

    fn every_kernel<T: Real>() {
        for block in [1, 3, 8, 20, 64, 65, 130, 600] {
            let (taps, inputs) = (values::<T>(2 * block * LANES, 1), values::<T>(3 * block * LANES, 2));
            let groups = [Group { input: 2, filter: 1 }, Group { input: 0, filter: 0 }];
            let run = |isa| {
                let mut c = values::<T>(2 * block * LANES, 3);
                advance(isa, &groups, &taps, block, &inputs, &mut c, block, 0, block);
                c
            };
            all_agree("advance", run);
            // The direct part is the causal convolution of the block.
            let (start, done) = (values::<T>(2 * block * LANES, 3), run(Isa::get()));
            for s in [0, block / 2, block - 1] {
                let lane = 5;
                let sum: f64 = (0..=s)
                    .map(|j| {
                        let h = taps[(block + j) * LANES + lane].as_f64();
                        h * inputs[(2 * block + s - j) * LANES + lane].as_f64()
                    })
                    .sum();
                let got = done[s * LANES + lane].as_f64() - start[s * LANES + lane].as_f64();
                assert!((got - sum).abs() < 1e-4, "position {s} of {block}: {got} for {sum}");
            }
            all_agree("direct_sum", |isa| {
                let mut out = vec![T::ZERO; LANES];
                let (newer, older) = inputs.split_at((block / 3 + 1) * LANES);
                direct_sum(isa, &taps[..block * LANES], newer, older, &mut out);
                out
            });
        }
        for n in [1, 2, 15, 16, 17, 48, 100, 256] {
            let (x, w, z) = (values::<T>(n, 1), complex::<T>(n, 2), complex::<T>(n, 3));
            let bins = n.next_multiple_of(LANES) * 2;
            all_agree("twist", |isa| {
                let mut out = complex::<T>(n, 9);
                twist(isa, &x[..n - n / 3], &w, &mut out);
                flat(&out)
            });
            all_agree("store_spectrum", |isa| {
                let mut out = values::<T>(bins, 9);
                store_spectrum(isa, &z, &mut out);
                out
            });
            let mut spectrum = values::<T>(bins, 9);
            store_spectrum(Isa::get(), &z, &mut spectrum);
            all_agree("load_spectrum", |isa| {
                let mut out = complex::<T>(n, 9);
                load_spectrum(isa, &spectrum, &mut out);
                assert_eq!(out, z);
                flat(&out)
            });
            for add in [false, true] {
                all_agree("untwist", |isa| {
                    let mut out = values::<T>(2 * n, 9);
                    let (im, re) = out.split_at_mut(n);
                    untwist_im(isa, &z, &w, T::of_f64(0.5), im, add);
                    untwist_re(isa, &z, &w, T::of_f64(0.5), re, add);
                    out
                });
            }
            let ring = 5;
            let (slots, filters) = (values::<T>(ring * bins, 4), values::<T>(ring * bins, 5));
            for (newest, count) in [(0, 1), (0, 5), (2, 3), (2, 4), (4, 5), (3, 2)] {
                let mac = |isa| {
                    let mut sum = values::<T>(bins, 9);
                    multiply_accumulate(isa, &mut sum, &slots, newest, &filters, count);
                    sum
                };
                all_agree("multiply_accumulate", mac);
                let got = mac(Isa::get());
                let bin = |s: &[T], slot: usize| (s[slot * bins].as_f64(), s[slot * bins + LANES].as_f64());
                let (mut re, mut im) = (0.0, 0.0);
                for p in 0..count {
                    let (x, h) = (bin(&slots, (newest + ring - p) % ring), bin(&filters, p));
                    re += x.0 * h.0 - x.1 * h.1;
                    im += x.0 * h.1 + x.1 * h.0;
                }
                assert!((got[0].as_f64() - re).abs() < 1e-5 && (got[LANES].as_f64() - im).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn every_kernel_on_every_instruction_set() {
        every_kernel::<f32>();
        every_kernel::<f64>();
    }
}
