//! What a prompt contributes to the outputs after it.

use super::add_rows;
use crate::buffer::Buffer;
use crate::error::Error;
use crate::layout;
use crate::real::Real;

/// The effect of a prompt on the outputs of clock times `from..to`, `[output row][to - from]`. What comes before `from`
/// stands in the pending outputs.
pub(super) struct Seed<T> {
    pub(super) values: Buffer<T>,
    pub(super) from: usize,
    pub(super) to: usize,
}

impl<T: Real> Seed<T> {
    pub(super) fn none() -> Self {
        Self { values: Buffer::empty(), from: 0, to: 0 }
    }

    /// Zeros for `rows` output rows.
    pub(super) fn new(rows: usize, from: usize, to: usize) -> Result<Self, Error> {
        let len = rows.checked_mul(to - from).ok_or(Error::Memory { bytes: usize::MAX })?;
        Ok(Self { values: Buffer::new(len, T::ZERO)?, from, to })
    }

    fn width(&self) -> usize {
        self.to - self.from
    }

    pub(super) fn row(&self, row: usize) -> &[T] {
        &self.values[row * self.width()..][..self.width()]
    }

    pub(super) fn row_mut(&mut self, row: usize) -> &mut [T] {
        let width = self.width();
        &mut self.values[row * width..][..width]
    }

    /// The effect on one output.
    pub(super) fn at(&self, row: usize, clock: usize) -> T {
        match (self.from..self.to).contains(&clock) {
            true => self.row(row)[clock - self.from],
            false => T::ZERO,
        }
    }

    /// Adds the effect on the base block of outputs that starts at `clock`.
    pub(super) fn add(&self, clock: usize, group: &layout::Lanes, outputs: &mut [T]) {
        if (self.from..self.to).contains(&clock) {
            add_rows(&self.values[group.start * self.width()..], self.width(), clock - self.from, group.rows, outputs);
        }
    }
}
