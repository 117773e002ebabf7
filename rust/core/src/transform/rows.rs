//! One row at a time: the product modulo `z^n - i` as a cyclic one, by rustfft's complex transforms of any length.
//!
//! The twist `w^j`, `w = exp(i pi / 2n)`, turns the product modulo `z^n - i` into a cyclic one. Spectra are stored in
//! groups of [`LANES`] bins, real parts first, so that the multiply-accumulate needs no shuffles.

use super::{BlockTransform, Lags, Prefetch, Products, Tile, Work, Write, once, pad_pitch};
use crate::buffer::{check_room, with_room};
use crate::error::Error;
use crate::isa::Isa;
use crate::kernels::{self, LANES};
use crate::real::Real;
use rustfft::num_complex::Complex;
use rustfft::{Fft, FftPlanner};
use std::f64::consts::FRAC_PI_2;
use std::ops::Range;
use std::sync::Arc;

/// One block length: tables and FFT plans, immutable.
pub struct RowTransform<T: Real> {
    n: usize,
    forward: Arc<dyn Fft<T>>,
    inverse: Arc<dyn Fft<T>>,
    twist: Vec<Complex<T>>,
    scale: T,
    isa: Isa,
}

impl<T: Real> RowTransform<T> {
    /// The transform of length `n` (at least 1), made once per process.
    pub(crate) fn get(n: usize) -> Result<Arc<Self>, Error> {
        once(n, || {
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

    fn scratch_len(&self) -> usize {
        self.forward.get_inplace_scratch_len().max(self.inverse.get_inplace_scratch_len())
    }

    fn split<'a>(&self, work: &'a mut [Complex<T>]) -> (&'a mut [Complex<T>], &'a mut [Complex<T>]) {
        let (z, scratch) = work.split_at_mut(self.n);
        (z, &mut scratch[..self.scratch_len()])
    }

    /// Sum of the products, for [`invert`](Self::invert) to transform back.
    fn accumulate(&self, products: &Products<T>, sum: &mut [T]) {
        let Products { slots, newest, filters, count, .. } = *products;
        kernels::multiply_accumulate(self.isa, sum, slots, newest, filters, count);
    }

    /// The sum's inverse transform, still twisted.
    fn invert(&self, sum: &[T], work: &mut [Complex<T>]) {
        let (z, scratch) = self.split(work);
        kernels::load_spectrum(self.isa, sum, z);
        self.inverse.process_with_scratch(z, scratch);
    }

    fn untwist(&self, z: &[Complex<T>], out: &mut [T], write: Write) {
        kernels::untwist_imaginary(self.isa, &z[..self.n], &self.twist, self.scale, out, write);
    }
}

impl<T: Real> BlockTransform<T> for RowTransform<T> {
    fn spectrum_len(&self) -> usize {
        pad_pitch(self.n.next_multiple_of(LANES).saturating_mul(2))
    }

    fn filter_len(&self, _shared: bool) -> usize {
        self.spectrum_len()
    }

    fn bins(&self) -> usize {
        self.n
    }

    fn place(&self, k: usize) -> usize {
        k / LANES * 2 * LANES + k % LANES
    }

    fn work(&self) -> Result<Work<T>, Error> {
        // A sum, and the spectrum of a block that is not kept.
        Work::new(2 * self.spectrum_len(), 0, self.n + self.scratch_len())
    }

    fn filter(&self, lags: &Lags<T>, _shared: bool, spectrum: &mut [T], work: &mut Work<T>) {
        let (z, scratch) = self.split(&mut work.complex);
        let row = lags.row(0);
        let (near, far) = row.split_at(row.len().min(self.n));
        kernels::twist(self.isa, near, &self.twist, z);
        for ((z, w), f) in z.iter_mut().zip(&self.twist).zip(far) {
            *z = *z + Complex::new(-w.im * *f, w.re * *f);
        }
        z.iter_mut().for_each(|z| *z = Complex::new(z.re * lags.scale, z.im * lags.scale));
        self.forward.process_with_scratch(z, scratch);
        kernels::store_spectrum(self.isa, z, &mut spectrum[..self.spectrum_len()]);
    }

    fn both(&self, products: &Products<T>, z: &mut [T], work: &mut Work<T>) {
        let sum = &mut work.reals[..self.spectrum_len()];
        self.accumulate(products, sum);
        self.invert(sum, &mut work.complex);
        for ((z, v), w) in z.as_chunks_mut::<2>().0.iter_mut().zip(&work.complex[..self.n]).zip(&self.twist) {
            *z = [v.re * w.re + v.im * w.im, v.im * w.re - v.re * w.im];
        }
    }

    fn tile(&self, tile: Tile<T>, work: &mut Work<T>, _ahead: &mut Prefetch) {
        let len = self.spectrum_len();
        let (sum, single) = work.reals.split_at_mut(len);
        let (slots, newest) = match tile.slots.is_empty() {
            true => (&mut single[..len], 0),
            false => (tile.slots, tile.newest),
        };
        let (z, scratch) = self.split(&mut work.complex);
        kernels::twist(self.isa, &tile.input[..self.n], &self.twist, z);
        self.forward.process_with_scratch(z, scratch);
        kernels::store_spectrum(self.isa, z, &mut slots[newest * len..][..len]);
        let Tile { filters, count, shared, .. } = tile;
        self.accumulate(&Products { slots, newest, filters, count, shared }, sum);
        self.invert(sum, &mut work.complex);
        self.untwist(&work.complex, &mut tile.out[..self.n], tile.write);
    }

    fn input_units(&self) -> usize {
        1
    }

    fn input_parts(&self, x: &[T], spectrum: &mut [T], parts: Range<usize>, work: &mut Work<T>) {
        if parts.is_empty() {
            return;
        }
        let (z, scratch) = self.split(&mut work.complex);
        kernels::twist(self.isa, &x[..self.n], &self.twist, z);
        self.forward.process_with_scratch(z, scratch);
        kernels::store_spectrum(self.isa, z, &mut spectrum[..self.spectrum_len()]);
    }

    /// The sum, and its inverse transform.
    fn future_units(&self) -> usize {
        2
    }

    fn future_parts(
        &self,
        products: &Products<T>,
        out: &mut [T],
        write: Write,
        parts: Range<usize>,
        work: &mut Work<T>,
    ) {
        let sum = &mut work.reals[..self.spectrum_len()];
        for part in parts {
            if part == 0 {
                self.accumulate(products, sum);
            } else {
                self.invert(sum, &mut work.complex);
                self.untwist(&work.complex, &mut out[..self.n], write);
            }
        }
    }
}

/// Spectra `(slot, theirs, 2)` of blocks of `block` reals, as spectra `(slot, ours, 2)`.
pub(crate) fn rebin<T: Real>(spectra: &[T], theirs: usize, block: usize, ours: usize) -> Result<Vec<T>, Error> {
    let (from, to) = (RowTransform::<T>::get(theirs)?, RowTransform::<T>::get(ours)?);
    let mut out = with_room(spectra.len() / theirs * ours)?;
    for slot in spectra.chunks_exact(2 * theirs) {
        let mut z: Vec<_> = slot.chunks_exact(2).map(|z| Complex::new(z[0], z[1])).collect();
        from.inverse.process(&mut z);
        let real = |(z, w): (&Complex<T>, &Complex<T>)| (z.re * w.re + z.im * w.im) * from.scale;
        let x: Vec<T> = z.iter().zip(&from.twist).map(real).take(block).collect();
        let mut z = vec![Complex::new(T::ZERO, T::ZERO); ours];
        kernels::twist(to.isa, &x, &to.twist, &mut z);
        to.forward.process(&mut z);
        out.extend(z.iter().flat_map(|z| [z.re, z.im]));
    }
    Ok(out)
}
