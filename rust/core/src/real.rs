//! The two precisions of the engine.

use crate::simd::Vectors;
use rustfft::FftNum;

/// `f32` or `f64`.
pub trait Real: FftNum + Default + PartialOrd + Vectors {
    const ZERO: Self;
    const BYTES: usize;
    const NAME: &'static str;

    fn mul_add(self, a: Self, b: Self) -> Self;
    fn of_f64(x: f64) -> Self;
    fn as_f64(self) -> f64;
}

macro_rules! real {
    ($t:ty, $name:literal) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const BYTES: usize = size_of::<$t>();
            const NAME: &'static str = $name;

            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                <$t>::mul_add(self, a, b)
            }
            #[inline(always)]
            fn of_f64(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn as_f64(self) -> f64 {
                f64::from(self)
            }
        }
    };
}

real!(f32, "float32");
real!(f64, "float64");
