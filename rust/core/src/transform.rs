//! The right-angle middle product: real blocks convolved modulo `z^n - i` by one complex FFT of length `n`.
//!
//! The product of a real block `x` (length `n`) and `2n` real lags `f` has three parts of length `n`,
//! `P0 + P1 z^n + P2 z^2n`. Modulo `z^n - i` it is `(P0 - P2) + i P1`: the imaginary part is the FutureFill of the
//! block, and where `f` has only `n` lags (`P2 = 0`) the real part is the block's own causal convolution.
//! The twist `w^j`, `w = exp(i pi / 2n)`, turns the product modulo `z^n - i` into a cyclic one.
//!
//! Spectra are stored in blocks of [`LANES`] bins, real parts first, so that the multiply-accumulate needs no shuffles.

use crate::buffer::{Buffer, check_room, zeros};
use crate::error::Error;
use crate::kernels::{self, Isa, LANES};
use crate::lanes::BIN;
use crate::real::Real;
use rustfft::num_complex::Complex;
use rustfft::{Fft, FftPlanner};
use std::collections::HashMap;
use std::f64::consts::FRAC_PI_2;
use std::sync::{Arc, Mutex};

/// One transform length: tables and FFT plans, immutable.
pub struct Transform<T: Real> {
    n: usize,
    forward: Arc<dyn Fft<T>>,
    inverse: Arc<dyn Fft<T>>,
    twist: Vec<Complex<T>>,
    scale: T,
    isa: Isa,
}

impl<T: Real> Transform<T> {
    /// The transform of length `n` (at least 1), made once per process.
    pub(crate) fn get(n: usize) -> Result<Arc<Self>, Error> {
        once(T::transforms(), n, || {
            // The twist, and what the FFT keeps for both directions.
            check_room(n.saturating_mul(6 * size_of::<Complex<T>>()))?;
            Ok(Self::new(n))
        })
    }

    fn new(n: usize) -> Self {
        let mut planner = FftPlanner::new();
        let twist = (0..n)
            .map(|j| {
                let (sin, cos) = (FRAC_PI_2 * j as f64 / n as f64).sin_cos();
                Complex::new(T::of_f64(cos), T::of_f64(sin))
            })
            .collect();
        Self {
            n,
            forward: planner.plan_fft_forward(n),
            inverse: planner.plan_fft_inverse(n),
            twist,
            scale: T::of_f64(1.0 / n as f64),
            isa: Isa::get(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.n
    }

    /// Reals in one stored spectrum.
    pub(crate) fn spectrum_len(&self) -> usize {
        spectrum_len(self.n)
    }

    pub(crate) fn scratch_len(&self) -> usize {
        self.forward.get_inplace_scratch_len().max(self.inverse.get_inplace_scratch_len())
    }

    /// Spectrum of up to `n` real inputs, zero-padded.
    pub(crate) fn input(&self, x: &[T], spectrum: &mut [T], work: &mut Workspace<T>) {
        let (z, scratch) = work.split(self);
        kernels::twist(self.isa, x, &self.twist, z);
        self.forward.process_with_scratch(z, scratch);
        kernels::store_spectrum(self.isa, z, spectrum);
    }

    /// Spectrum of up to `2n` real filter lags, folded to `f_j + i f_{j+n}`.
    pub(crate) fn filter(&self, f: &[T], spectrum: &mut [T], work: &mut Workspace<T>) {
        let (z, scratch) = work.split(self);
        self.fold(f, z);
        self.forward.process_with_scratch(z, scratch);
        kernels::store_spectrum(self.isa, z, spectrum);
    }

    /// As [`filter`](Self::filter), with the bins as the transform leaves them.
    pub(crate) fn filter_bins(&self, f: &[T], bins: &mut [Complex<T>], work: &mut Workspace<T>) {
        self.fold(f, bins);
        self.forward.process_with_scratch(bins, work.split(self).1);
    }

    fn fold(&self, f: &[T], z: &mut [Complex<T>]) {
        let (near, far) = f.split_at(f.len().min(self.n));
        kernels::twist(self.isa, near, &self.twist, z);
        for ((z, w), f) in z.iter_mut().zip(&self.twist).zip(far) {
            *z = *z + Complex::new(-w.im * *f, w.re * *f);
        }
    }

    /// Bins of up to `n` real inputs, as the transform leaves them.
    pub(crate) fn input_bins(&self, x: &[T], bins: &mut [Complex<T>], work: &mut Workspace<T>) {
        kernels::twist(self.isa, x, &self.twist, bins);
        self.forward.process_with_scratch(bins, work.split(self).1);
    }

    /// Product of one block with one filter, transformed back into `work` (still twisted).
    pub(crate) fn product(&self, x: &[T], filter: &[Complex<T>], work: &mut Workspace<T>) {
        let (z, scratch) = work.split(self);
        kernels::twist(self.isa, x, &self.twist, z);
        self.forward.process_with_scratch(z, scratch);
        kernels::multiply(self.isa, z, filter);
        self.inverse.process_with_scratch(z, scratch);
    }

    /// The same for a block whose bins are known.
    pub(crate) fn product_of_bins(&self, bins: &[Complex<T>], filter: &[Complex<T>], work: &mut Workspace<T>) {
        let (z, scratch) = work.split(self);
        z.copy_from_slice(bins);
        kernels::multiply(self.isa, z, filter);
        self.inverse.process_with_scratch(z, scratch);
    }

    /// Sum of the products of kept blocks and filter partitions, for [`invert`](Self::invert) to transform back.
    ///
    /// `slots` is a ring of spectra whose newest block is at `newest`; the block `p - 1` places older is paired
    /// with partition `p = 1..=count` of `filters`.
    pub(crate) fn accumulate(&self, slots: &[T], newest: usize, filters: &[T], count: usize, work: &mut Workspace<T>) {
        let sum = &mut work.sum[..self.spectrum_len()];
        kernels::multiply_accumulate(self.isa, sum, slots, newest, filters, count);
    }

    /// The sum's inverse transform (still twisted).
    pub(crate) fn invert(&self, work: &mut Workspace<T>) {
        kernels::load_spectrum(self.isa, &work.sum[..self.spectrum_len()], &mut work.block[..self.n]);
        let (z, scratch) = work.split(self);
        self.inverse.process_with_scratch(z, scratch);
    }

    /// `out[j] (+)= P1[at + j]`: what the block contributes to the `n` outputs that follow it.
    pub(crate) fn future(&self, at: usize, out: &mut [T], add: bool, work: &Workspace<T>) {
        let range = at..at + out.len();
        kernels::untwist_im(self.isa, &work.block[range.clone()], &self.twist[range], self.scale, out, add);
    }

    /// `out[j] (+)= P0[at + j]`: the block's causal convolution with itself.
    pub(crate) fn present(&self, at: usize, out: &mut [T], add: bool, work: &Workspace<T>) {
        let range = at..at + out.len();
        kernels::untwist_re(self.isa, &work.block[range.clone()], &self.twist[range], self.scale, out, add);
    }
}

/// The value for length `n`, made by the first who asks for it in this process; very long ones are not kept.
pub(crate) fn once<V>(
    known: &Mutex<HashMap<usize, Arc<V>>>,
    n: usize,
    make: impl FnOnce() -> Result<V, Error>,
) -> Result<Arc<V>, Error> {
    // A fork can leave the lock taken for ever in the child: never wait for it.
    let known = known.try_lock().ok();
    if let Some(found) = known.as_ref().and_then(|map| map.get(&n)) {
        return Ok(found.clone());
    }
    let made = Arc::new(make()?);
    if let Some(mut map) = known
        && n <= 1 << 18
    {
        map.insert(n, made.clone());
    }
    Ok(made)
}

pub(crate) fn spectrum_len(n: usize) -> usize {
    spread(n.next_multiple_of(LANES).saturating_mul(2))
}

/// Rows a multiple of a page apart fall into the same few cache sets and evict each other: move them apart.
pub(crate) fn spread(len: usize) -> usize {
    if len >= 1024 && len.is_multiple_of(512) { len + 2 * LANES } else { len }
}

/// The position of bin `j` in a stored spectrum: real part, and [`LANES`] further its imaginary part.
pub(crate) fn bin(j: usize) -> usize {
    j / LANES * 2 * LANES + j % LANES
}

/// What fresh buffers hold: in tests not a number, so that a kernel that reads what it has not written is found out.
fn poison<T: Real>() -> T {
    if cfg!(debug_assertions) { T::of_f64(f64::NAN) } else { T::ZERO }
}

/// Buffers of one worker, large enough for every transform of a plan.
pub struct Workspace<T> {
    block: Vec<Complex<T>>,
    scratch: Vec<Complex<T>>,
    sum: Vec<T>,
    /// Room for the spectrum of a block that takes part in one tile only.
    pub(crate) single: Vec<T>,
    /// Room for the bins of 16 rows.
    pub(crate) lanes: Buffer<T>,
}

impl<T: Real> Workspace<T> {
    /// For blocks of 16 rows of up to `n` positions.
    pub(crate) fn for_lanes(n: usize) -> Result<Self, Error> {
        let lanes = Buffer::new(n.saturating_mul(BIN), poison())?;
        Ok(Self { block: Vec::new(), scratch: Vec::new(), sum: Vec::new(), single: Vec::new(), lanes })
    }

    /// For blocks of these transforms, of which those of up to `single` positions may be used once only.
    pub(crate) fn for_transforms<'a>(
        transforms: impl IntoIterator<Item = &'a Transform<T>>,
        single: usize,
    ) -> Result<Self, Error> {
        let (mut n, mut scratch) = (0, 0);
        for t in transforms {
            n = n.max(t.n);
            scratch = scratch.max(t.scratch_len());
        }
        let complex = Complex::new(poison(), poison());
        Ok(Self {
            block: zeros(n, complex)?,
            scratch: zeros(scratch, complex)?,
            sum: zeros(spectrum_len(n), poison())?,
            single: zeros(spectrum_len(single), poison())?,
            lanes: Buffer::empty(),
        })
    }

    fn split(&mut self, t: &Transform<T>) -> (&mut [Complex<T>], &mut [Complex<T>]) {
        (&mut self.block[..t.n], &mut self.scratch[..t.scratch_len()])
    }

    pub(crate) fn bytes(&self) -> usize {
        let complex = (self.block.len() + self.scratch.len()) * size_of::<Complex<T>>();
        complex + (self.sum.len() + self.single.len()) * size_of::<T>() + self.lanes.bytes()
    }
}
