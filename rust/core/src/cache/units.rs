//! A buffer of units: `[unit][..][width]`, padded from one unit to the next.

use crate::buffer::Buffer;
use crate::error::Error;
use crate::real::Real;
use crate::shape::size;
use crate::transform::pad_pitch;
use crate::watch;

/// Values copied between two polls of a watch.
const STRETCH: usize = 1 << 20;

/// Reals of rows side by side.
pub(super) struct Units<T> {
    data: Buffer<T>,
    width: usize,
    /// Reals of one unit, and from one to the next.
    len: usize,
    pitch: usize,
}

/// Where one row stands: `count` reals, every `step`-th from `first` on.
#[derive(Clone, Copy)]
struct Strip {
    first: usize,
    step: usize,
    count: usize,
}

impl<T: Real> Units<T> {
    /// Zeros for `count` units of `len` reals, `pitch` reals apart.
    fn zeros(count: usize, width: usize, len: usize, pitch: usize) -> Result<Self, Error> {
        Ok(Self { data: Buffer::new(size(&[count, pitch])?, T::ZERO)?, width, len, pitch })
    }

    /// Zeros for `count` units of `positions [time][width]`.
    pub(super) fn new(count: usize, width: usize, positions: usize) -> Result<Self, Error> {
        let len = size(&[positions, width])?;
        Self::zeros(count, width, len, len)
    }

    /// The same, moved apart where units would fall into the same cache sets.
    pub(super) fn padded(count: usize, width: usize, positions: usize) -> Result<Self, Error> {
        let len = size(&[positions, width])?;
        Self::zeros(count, width, len, pad_pitch(len))
    }

    /// Zeros for `count` units of `slots` spectra of `len` reals.
    pub(super) fn spectra(count: usize, width: usize, slots: usize, len: usize) -> Result<Self, Error> {
        let len = size(&[slots, len])?;
        Self::zeros(count, width, len, len)
    }

    /// An independent copy.
    pub(super) fn copy(&self) -> Result<Self, Error> {
        Ok(Self { data: Buffer::of(&self.data)?, ..*self })
    }

    pub(super) fn unit(&self, unit: usize) -> &[T] {
        &self.data[unit * self.pitch..][..self.len]
    }

    pub(super) fn unit_mut(&mut self, unit: usize) -> &mut [T] {
        &mut self.data[unit * self.pitch..][..self.len]
    }

    /// Reals from one unit to the next.
    pub(super) fn pitch(&self) -> usize {
        self.pitch
    }

    /// All units, with their padding, one after another.
    pub(super) fn iter_mut(&mut self, count: usize) -> impl ExactSizeIterator<Item = &mut [T]> {
        let (mut rest, pitch) = (&mut self.data[..], self.pitch);
        (0..count).map(move |_| rest.split_off_mut(..pitch).expect("there are as many units"))
    }

    pub(super) fn all(&self) -> &[T] {
        &self.data
    }

    pub(super) fn all_mut(&mut self) -> &mut [T] {
        &mut self.data
    }

    /// The same values as those of units of the same kind.
    pub(super) fn copy_from(&mut self, other: &Self) {
        for (to, from) in self.data.chunks_mut(STRETCH).zip(other.data.chunks(STRETCH)) {
            to.copy_from_slice(from);
            watch::check();
        }
    }

    pub(super) fn clear(&mut self) {
        self.data.fill(T::ZERO);
    }

    pub(super) fn bytes(&self) -> usize {
        self.data.bytes()
    }

    fn strip(&self, (unit, lane): (usize, usize)) -> Strip {
        Strip { first: unit * self.pitch + lane, step: self.width, count: self.len / self.width }
    }

    /// The values of one row.
    pub(super) fn row(&self, place: (usize, usize)) -> impl Iterator<Item = &T> {
        let strip = self.strip(place);
        self.data[strip.first.min(self.data.len())..].iter().step_by(strip.step).take(strip.count)
    }

    pub(super) fn row_mut(&mut self, place: (usize, usize)) -> impl Iterator<Item = &mut T> {
        let strip = self.strip(place);
        let first = strip.first.min(self.data.len());
        self.data[first..].iter_mut().step_by(strip.step).take(strip.count)
    }

    /// Row `to` becomes a copy of row `from`, or they change places.
    pub(super) fn move_row(&mut self, to: (usize, usize), from: (usize, usize), exchange: bool) {
        let (to, from) = (self.strip(to), self.strip(from));
        for i in 0..to.count {
            let (to, from) = (to.first + i * to.step, from.first + i * from.step);
            if exchange { self.data.swap(to, from) } else { self.data[to] = self.data[from] }
        }
    }

    /// The same with whole units.
    pub(super) fn move_unit(&mut self, to: usize, from: usize, exchange: bool) {
        let (to, from) = (to * self.pitch, from * self.pitch);
        if !exchange {
            self.data.copy_within(from..from + self.len, to);
        } else if to != from {
            let (low, high) = self.data.split_at_mut(to.max(from));
            low[to.min(from)..][..self.len].swap_with_slice(&mut high[..self.len]);
        }
    }
}
