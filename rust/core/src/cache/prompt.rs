//! What a prompt contributes to the outputs after it.

use super::units::Units;
use crate::error::Error;
use crate::real::Real;

/// The effect of a prompt on the outputs of clock times `from..to`, `[output unit][time][width]`. What comes before `from`
/// stands in the pending outputs.
pub(super) struct PromptTail<T> {
    pub(super) values: Units<T>,
    width: usize,
    pub(super) from: usize,
    pub(super) to: usize,
}

impl<T: Real> PromptTail<T> {
    /// Zeros for `units` of outputs.
    pub(super) fn new(units: usize, width: usize, from: usize, to: usize) -> Result<Self, Error> {
        Ok(Self { values: Units::new(units, width, to - from)?, width, from, to })
    }

    pub(super) fn copy(&self) -> Result<Self, Error> {
        Ok(Self { values: self.values.copy()?, ..*self })
    }

    /// The effect on the outputs of `unit` from `clock` on, `[time][width]`; empty where there is none any more.
    pub(super) fn from(&self, unit: usize, clock: usize) -> &[T] {
        match (self.from..self.to).contains(&clock) {
            true => &self.values.unit(unit)[(clock - self.from) * self.width..],
            false => &[],
        }
    }
}

/// Adds values to a block of outputs, as far as they go.
pub(super) fn add<T: Real>(outputs: &mut [T], values: &[T]) {
    outputs.iter_mut().zip(values).for_each(|(out, v)| *out = *out + *v);
}
