//! Between rustfft's interleaved bins and stored spectra, and their products.

use super::{LANES, dispatch, fma_all, load};
use crate::real::Real;
use crate::transform::Write;
use rustfft::num_complex::Complex;

dispatch! {
    /// `z_j = x_j w^j`, zero beyond the inputs.
    pub fn twist(x: &[T], w: &[Complex<T>], z: &mut [Complex<T>]) = twist_body;

    /// Interleaved bins to groups of 16 real and 16 imaginary parts, zero-padded.
    pub fn store_spectrum(z: &[Complex<T>], spectrum: &mut [T]) = store_spectrum_body;

    /// Groups of 16 real and 16 imaginary parts to interleaved bins.
    pub fn load_spectrum(spectrum: &[T], z: &mut [Complex<T>]) = load_spectrum_body;

    /// `sum = sum_p slots[newest - p + 1] * filters[p - 1]` over `count` partitions, all in registers.
    pub fn multiply_accumulate(
        sum: &mut [T], slots: &[T], newest: usize, filters: &[T], count: usize,
    ) = multiply_accumulate_body;

    /// `out_j (+)= Im(z_j conj(w^j)) * scale`.
    pub fn untwist_imaginary(
        z: &[Complex<T>], w: &[Complex<T>], scale: T, out: &mut [T], write: Write,
    ) = untwist_imaginary_body;
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
fn untwist_imaginary_body<T: Real, const FMA: bool, const W: usize>(
    z: &[Complex<T>],
    w: &[Complex<T>],
    scale: T,
    out: &mut [T],
    write: Write,
) {
    for ((out, z), w) in out.iter_mut().zip(z).zip(w) {
        let part = z.im * w.re - z.re * w.im;
        let old = if write == Write::Add { *out } else { T::ZERO };
        *out = old + part * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::kernels::tests::{all_agree, complex, flat, values};

    fn every_kernel<T: Real>() {
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
            for write in [Write::Set, Write::Add] {
                all_agree("untwist", |isa| {
                    let mut out = values::<T>(n, 9);
                    untwist_imaginary(isa, &z, &w, T::of_f64(0.5), &mut out, write);
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
