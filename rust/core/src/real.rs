//! The two precisions of the engine.

use crate::lanes::LaneTransform;
use crate::simd::Vectors;
use crate::transform::Transform;
use rustfft::FftNum;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// `f32` or `f64`.
pub trait Real: FftNum + Default + PartialOrd + Vectors {
    const ZERO: Self;
    const BYTES: usize;
    const NAME: &'static str;

    fn mul_add(self, a: Self, b: Self) -> Self;
    fn of_f64(x: f64) -> Self;
    fn as_f64(self) -> f64;

    /// Transforms made so far in this process: planning one costs more than running it.
    #[doc(hidden)]
    fn transforms() -> &'static Mutex<HashMap<usize, Arc<Transform<Self>>>>;
    #[doc(hidden)]
    fn lane_transforms() -> &'static Mutex<HashMap<usize, Arc<LaneTransform<Self>>>>;
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
            fn transforms() -> &'static Mutex<HashMap<usize, Arc<Transform<Self>>>> {
                static CACHE: std::sync::LazyLock<Mutex<HashMap<usize, Arc<Transform<$t>>>>> =
                    std::sync::LazyLock::new(Default::default);
                &CACHE
            }
            fn lane_transforms() -> &'static Mutex<HashMap<usize, Arc<LaneTransform<Self>>>> {
                static CACHE: std::sync::LazyLock<Mutex<HashMap<usize, Arc<LaneTransform<$t>>>>> =
                    std::sync::LazyLock::new(Default::default);
                &CACHE
            }
        }
    };
}

real!(f32, "float32");
real!(f64, "float64");
