//! Vectors of neighbouring lanes, one type per instruction set and precision.
//!
//! The kernels of [`lanes`](crate::lanes) are written once over [`Vector`]. `vectors!` compiles each for every
//! instruction set and picks one at run time; the vectors of an instruction set are used nowhere else.

use crate::real::Real;

/// Lanes computed at once. All operations are lane by lane.
#[doc(hidden)]
pub trait Vector<T>: Copy {
    const WIDTH: usize;

    fn splat(x: T) -> Self;
    /// The first `WIDTH` values of `s`.
    fn load(s: &[T]) -> Self;
    fn store(self, s: &mut [T]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self * a + b`.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// `b - self * a`.
    fn neg_mul_add(self, a: Self, b: Self) -> Self;
}

/// What every processor has; on AArch64 this compiles to NEON.
#[derive(Clone, Copy)]
#[doc(hidden)]
pub struct Plain<T>([T; 4]);

impl<T: Real> Plain<T> {
    #[inline(always)]
    fn map(self, other: Self, f: fn(T, T) -> T) -> Self {
        let (a, b) = (self.0, other.0);
        Self([f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])])
    }
}

impl<T: Real> Vector<T> for Plain<T> {
    const WIDTH: usize = 4;

    #[inline(always)]
    fn splat(x: T) -> Self {
        Self([x; 4])
    }
    #[inline(always)]
    fn load(s: &[T]) -> Self {
        Self([s[0], s[1], s[2], s[3]])
    }
    #[inline(always)]
    fn store(self, s: &mut [T]) {
        s[..4].copy_from_slice(&self.0);
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.map(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.map(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.map(other, |a, b| a * b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        if cfg!(target_arch = "aarch64") {
            let (x, a, b) = (self.0, a.0, b.0);
            let fma = |q: usize| x[q].mul_add(a[q], b[q]);
            return Self([fma(0), fma(1), fma(2), fma(3)]);
        }
        self.mul(a).add(b)
    }
    #[inline(always)]
    fn neg_mul_add(self, a: Self, b: Self) -> Self {
        if cfg!(target_arch = "aarch64") {
            let (x, a, b) = (self.0, a.0, b.0);
            let fma = |q: usize| (-x[q]).mul_add(a[q], b[q]);
            return Self([fma(0), fma(1), fma(2), fma(3)]);
        }
        b.sub(self.mul(a))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Vector;
    use std::arch::x86_64::*;

    macro_rules! vector {
        ($v:ty, $t:ty, $width:literal, $set:ident, $load:ident, $store:ident, $add:ident, $sub:ident, $mul:ident,
         $fma:ident, $fnma:ident) => {
            // SAFETY of every call below: `vectors!` alone uses these types, in functions that enable the
            // instruction set and that run only where the processor has it.
            impl Vector<$t> for $v {
                const WIDTH: usize = $width;

                #[inline(always)]
                fn splat(x: $t) -> Self {
                    unsafe { $set(x) }
                }
                #[inline(always)]
                fn load(s: &[$t]) -> Self {
                    // SAFETY: the slice has WIDTH values.
                    unsafe { $load(s[..$width].as_ptr()) }
                }
                #[inline(always)]
                fn store(self, s: &mut [$t]) {
                    // SAFETY: the slice has WIDTH values.
                    unsafe { $store(s[..$width].as_mut_ptr(), self) }
                }
                #[inline(always)]
                fn add(self, other: Self) -> Self {
                    unsafe { $add(self, other) }
                }
                #[inline(always)]
                fn sub(self, other: Self) -> Self {
                    unsafe { $sub(self, other) }
                }
                #[inline(always)]
                fn mul(self, other: Self) -> Self {
                    unsafe { $mul(self, other) }
                }
                #[inline(always)]
                fn mul_add(self, a: Self, b: Self) -> Self {
                    unsafe { $fma(self, a, b) }
                }
                #[inline(always)]
                fn neg_mul_add(self, a: Self, b: Self) -> Self {
                    unsafe { $fnma(self, a, b) }
                }
            }
        };
    }

    vector!(
        __m256,
        f32,
        8,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_fmadd_ps,
        _mm256_fnmadd_ps
    );
    vector!(
        __m256d,
        f64,
        4,
        _mm256_set1_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_add_pd,
        _mm256_sub_pd,
        _mm256_mul_pd,
        _mm256_fmadd_pd,
        _mm256_fnmadd_pd
    );
    vector!(
        __m512,
        f32,
        16,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_fmadd_ps,
        _mm512_fnmadd_ps
    );
    vector!(
        __m512d,
        f64,
        8,
        _mm512_set1_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_add_pd,
        _mm512_sub_pd,
        _mm512_mul_pd,
        _mm512_fmadd_pd,
        _mm512_fnmadd_pd
    );
}

/// The vector types of one precision.
#[doc(hidden)]
pub trait Vectors: Sized {
    #[cfg(target_arch = "x86_64")]
    type Avx2: Vector<Self>;
    #[cfg(target_arch = "x86_64")]
    type Avx512: Vector<Self>;
}

impl Vectors for f32 {
    #[cfg(target_arch = "x86_64")]
    type Avx2 = std::arch::x86_64::__m256;
    #[cfg(target_arch = "x86_64")]
    type Avx512 = std::arch::x86_64::__m512;
}

impl Vectors for f64 {
    #[cfg(target_arch = "x86_64")]
    type Avx2 = std::arch::x86_64::__m256d;
    #[cfg(target_arch = "x86_64")]
    type Avx512 = std::arch::x86_64::__m512d;
}

/// Kernels `fn name<T>(isa, ..)` from bodies `fn body<T, V: Vector<T>>(..)`.
macro_rules! vectors {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident;)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<T: Real>(isa: Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2<T: Real>($($arg: $ty),*) {
                    $body::<T, T::Avx2>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512<T: Real>($($arg: $ty),*) {
                    $body::<T, T::Avx512>($($arg),*)
                }
                match isa.set() {
                    // SAFETY: an `Isa` is made by `Isa::available` alone, after it has found these features.
                    Set::Avx2 => return unsafe { avx2($($arg),*) },
                    // SAFETY: as above.
                    Set::Avx512 => return unsafe { avx512($($arg),*) },
                    Set::Baseline => {}
                }
            }
            let _ = isa;
            $body::<T, Plain<T>>($($arg),*)
        }
    )*};
}
pub(crate) use vectors;
