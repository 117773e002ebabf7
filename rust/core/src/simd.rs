//! Vectors of neighbouring lanes, one type per instruction set and precision.
//!
//! The kernels of [`transform`](crate::transform) are written once over [`Vector`]. `vectors!` compiles each for every
//! instruction set and picks one at run time; the vectors of an instruction set are used nowhere else.

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
    /// Lane `j` of vector `i` of the `WIDTH` vectors becomes lane `i` of vector `j`.
    fn transpose(tile: &mut [Self]);
}

#[cfg(not(target_arch = "aarch64"))]
mod plain {
    use super::Vector;
    use crate::real::Real;

    /// What any processor has.
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
            self.mul(a).add(b)
        }
        #[inline(always)]
        fn neg_mul_add(self, a: Self, b: Self) -> Self {
            b.sub(self.mul(a))
        }
        #[inline(always)]
        fn transpose(tile: &mut [Self]) {
            for i in 0..4 {
                for j in 0..i {
                    (tile[i].0[j], tile[j].0[i]) = (tile[j].0[i], tile[i].0[j]);
                }
            }
        }
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! vector {
    ($v:ty, $t:ty, $width:literal, $set:ident, $load:ident, $store:ident, $add:ident, $sub:ident, $mul:ident,
     $fma:ident, $fnma:ident, $transpose:ident) => {
        // SAFETY of every call below: `vectors!` alone uses these types where not every processor has them, in
        // functions that enable the instruction set and that run only where the processor has it.
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
            #[inline(always)]
            fn transpose(tile: &mut [Self]) {
                unsafe { $transpose(tile) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Vector;
    use std::arch::x86_64::*;

    #[inline(always)]
    unsafe fn transpose8(v: &mut [__m256]) {
        // SAFETY: as for all vectors of this instruction set.
        unsafe {
            // Pairs of rows, then quadruples within each half of the registers, then the halves.
            let mut a = [v[0]; 8];
            for i in 0..4 {
                a[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
                a[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
            }
            let mut b = [v[0]; 8];
            for i in 0..2 {
                for j in 0..2 {
                    let (x, y) = (a[4 * i + j], a[4 * i + 2 + j]);
                    b[4 * i + 2 * j] = _mm256_shuffle_ps::<0b01_00_01_00>(x, y);
                    b[4 * i + 2 * j + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(x, y);
                }
            }
            for i in 0..4 {
                v[i] = _mm256_permute2f128_ps::<0x20>(b[i], b[i + 4]);
                v[i + 4] = _mm256_permute2f128_ps::<0x31>(b[i], b[i + 4]);
            }
        }
    }

    #[inline(always)]
    unsafe fn transpose4(v: &mut [__m256d]) {
        // SAFETY: as for all vectors of this instruction set.
        unsafe {
            let (a, b) = (_mm256_unpacklo_pd(v[0], v[1]), _mm256_unpackhi_pd(v[0], v[1]));
            let (c, d) = (_mm256_unpacklo_pd(v[2], v[3]), _mm256_unpackhi_pd(v[2], v[3]));
            v[0] = _mm256_permute2f128_pd::<0x20>(a, c);
            v[1] = _mm256_permute2f128_pd::<0x20>(b, d);
            v[2] = _mm256_permute2f128_pd::<0x31>(a, c);
            v[3] = _mm256_permute2f128_pd::<0x31>(b, d);
        }
    }

    /// Transposing goes by the narrower vectors.
    unsafe fn unused<V>(_tile: &mut [V]) {
        unreachable!("kernels that transpose are compiled for Avx2")
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
        _mm256_fnmadd_ps,
        transpose8
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
        _mm256_fnmadd_pd,
        transpose4
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
        _mm512_fnmadd_ps,
        unused
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
        _mm512_fnmadd_pd,
        unused
    );
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::Vector;
    use std::arch::aarch64::*;

    #[inline(always)]
    unsafe fn transpose4(v: &mut [float32x4_t]) {
        // SAFETY: NEON is part of AArch64.
        unsafe {
            let (a, b) = (vzip1q_f32(v[0], v[2]), vzip2q_f32(v[0], v[2]));
            let (c, d) = (vzip1q_f32(v[1], v[3]), vzip2q_f32(v[1], v[3]));
            (v[0], v[1]) = (vzip1q_f32(a, c), vzip2q_f32(a, c));
            (v[2], v[3]) = (vzip1q_f32(b, d), vzip2q_f32(b, d));
        }
    }

    #[inline(always)]
    unsafe fn transpose2(v: &mut [float64x2_t]) {
        // SAFETY: as above.
        unsafe { (v[0], v[1]) = (vzip1q_f64(v[0], v[1]), vzip2q_f64(v[0], v[1])) }
    }

    // These add the product to their first argument.
    macro_rules! product_last {
        ($name:ident, $v:ty, $f:ident) => {
            #[inline(always)]
            unsafe fn $name(x: $v, a: $v, b: $v) -> $v {
                // SAFETY: as above.
                unsafe { $f(b, x, a) }
            }
        };
    }
    product_last!(fma_f32, float32x4_t, vfmaq_f32);
    product_last!(fnma_f32, float32x4_t, vfmsq_f32);
    product_last!(fma_f64, float64x2_t, vfmaq_f64);
    product_last!(fnma_f64, float64x2_t, vfmsq_f64);

    vector!(
        float32x4_t,
        f32,
        4,
        vdupq_n_f32,
        vld1q_f32,
        vst1q_f32,
        vaddq_f32,
        vsubq_f32,
        vmulq_f32,
        fma_f32,
        fnma_f32,
        transpose4
    );
    vector!(
        float64x2_t,
        f64,
        2,
        vdupq_n_f64,
        vld1q_f64,
        vst1q_f64,
        vaddq_f64,
        vsubq_f64,
        vmulq_f64,
        fma_f64,
        fnma_f64,
        transpose2
    );
}

/// The vector types of one precision.
#[doc(hidden)]
pub trait Vectors: Sized {
    /// What every processor of this target has.
    type Baseline: Vector<Self>;
    #[cfg(target_arch = "x86_64")]
    type Avx2: Vector<Self>;
    #[cfg(target_arch = "x86_64")]
    type Avx512: Vector<Self>;
}

impl Vectors for f32 {
    #[cfg(target_arch = "aarch64")]
    type Baseline = std::arch::aarch64::float32x4_t;
    #[cfg(not(target_arch = "aarch64"))]
    type Baseline = plain::Plain<f32>;
    #[cfg(target_arch = "x86_64")]
    type Avx2 = std::arch::x86_64::__m256;
    #[cfg(target_arch = "x86_64")]
    type Avx512 = std::arch::x86_64::__m512;
}

impl Vectors for f64 {
    #[cfg(target_arch = "aarch64")]
    type Baseline = std::arch::aarch64::float64x2_t;
    #[cfg(not(target_arch = "aarch64"))]
    type Baseline = plain::Plain<f64>;
    #[cfg(target_arch = "x86_64")]
    type Avx2 = std::arch::x86_64::__m256d;
    #[cfg(target_arch = "x86_64")]
    type Avx512 = std::arch::x86_64::__m512d;
}

/// Kernels `fn name<T>(isa, ..)` from bodies `fn body<T, V: Vector<T>>(..)`, up to the vectors named.
macro_rules! vectors {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident on $widest:ident;)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<T: Real>(isa: crate::isa::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                use crate::isa::Set;
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2<T: Real>($($arg: $ty),*) {
                    $body::<T, T::Avx2>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512<T: Real>($($arg: $ty),*) {
                    $body::<T, T::$widest>($($arg),*)
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
            $body::<T, T::Baseline>($($arg),*)
        }
    )*};
}
pub(crate) use vectors;
