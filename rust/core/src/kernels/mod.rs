//! The inner loops, as pure functions on slices, compiled once per instruction set.
//!
//! Each body is written once, generic over the precision, over whether a fused multiply-add is cheap and over the
//! width it works in; the `dispatch!` macro compiles it for every instruction set and picks one at run time. On
//! targets other than x86-64 the baseline is used, which on AArch64 means NEON.

pub mod direct;
pub mod spectra;
pub mod transpose;

pub use direct::{DirectPart, Group, direct_sum, direct_sum_row};
pub use spectra::{load_spectrum, multiply_accumulate, store_spectrum, twist, untwist_imaginary};

use crate::real::Real;

/// Rows side by side in a wide unit, and bins side by side in a stored spectrum.
pub const LANES: usize = 16;

macro_rules! dispatch {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident;)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<T: Real>(isa: crate::isa::Isa, $($arg: $ty),*) {
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
                match isa.set() {
                    // SAFETY: an `Isa` is made by `Isa::available` alone, after it has found these features.
                    crate::isa::Set::Avx2 => return unsafe { avx2($($arg),*) },
                    // SAFETY: as above.
                    crate::isa::Set::Avx512 => return unsafe { avx512($($arg),*) },
                    crate::isa::Set::Baseline => {}
                }
            }
            let _ = isa;
            $body::<T, { cfg!(target_arch = "aarch64") }, 4>($($arg),*)
        }
    )*};
}
pub(crate) use dispatch;

#[inline(always)]
pub(crate) fn fma<T: Real, const FMA: bool>(a: T, b: T, c: T) -> T {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
pub(crate) fn load<T: Real, const W: usize>(s: &[T], at: usize) -> [T; W] {
    let mut v = [T::ZERO; W];
    v.copy_from_slice(&s[at..at + W]);
    v
}

#[inline(always)]
pub(crate) fn fma_all<T: Real, const FMA: bool, const W: usize>(acc: &mut [T; W], a: &[T; W], b: &[T; W]) {
    for q in 0..W {
        acc[q] = fma::<T, FMA>(a[q], b[q], acc[q]);
    }
}

#[inline(always)]
pub(crate) fn add_all<T: Real, const W: usize>(acc: &mut [T; W], a: &[T; W]) {
    for q in 0..W {
        acc[q] = acc[q] + a[q];
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::isa::{Isa, Set};
    use rustfft::num_complex::Complex;

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

    pub(crate) fn complex<T: Real>(n: usize, seed: u64) -> Vec<Complex<T>> {
        values(2 * n, seed).chunks_exact(2).map(|z| Complex::new(z[0], z[1])).collect()
    }

    pub(crate) fn flat<T: Real>(z: &[Complex<T>]) -> Vec<T> {
        z.iter().flat_map(|z| [z.re, z.im]).collect()
    }

    /// Every instruction set against the baseline, within rounding.
    pub(crate) fn all_agree<T: Real>(what: &str, run: impl Fn(Isa) -> Vec<T>) {
        let truth = run(Isa(Set::Baseline));
        let eps = if T::BYTES == 4 { 1e-6 } else { 1e-14 };
        for isa in Isa::available() {
            let got = run(isa);
            let norm: f64 = truth.iter().map(|x| x.as_f64().powi(2)).sum();
            let error: f64 = got.iter().zip(&truth).map(|(a, b)| (a.as_f64() - b.as_f64()).powi(2)).sum();
            assert!(got.len() == truth.len() && error <= eps * eps * 64.0 * norm, "{what} on {}", isa.name());
        }
    }
}
