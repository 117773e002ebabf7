//! What the past alone adds to the outputs to come.

use super::Cache;
use crate::buffer::Buffer;
use crate::error::Error;
use crate::kernels::DirectPart;
use crate::kernels::direct::PUSH;
use crate::real::Real;
use crate::shape::{check_len, size};

impl<T: Real> Cache<T> {
    /// What the past alone adds to the next `k` outputs, before their inputs are known, as `(*O, k)` into `out`. The
    /// cache goes on as if this had not been asked for.
    pub fn pending(&mut self, k: usize, out: &mut [T]) -> Result<(), Error> {
        check_len("out", out.len(), self.layout.output_rows, self.output_shape(), k)?;
        if let Some(remaining) = self.remaining()
            && k > remaining
        {
            return Err(Error::Capacity { needed: k, remaining });
        }
        if k == 0 || out.is_empty() {
            return Ok(());
        }
        self.finish();
        let at = self.clock.checked_rem(self.execution.base);
        match at {
            Some(at) if at + k <= self.execution.base => self.complete_block(at, k, out),
            _ => {
                // Further on, tiles take part that have not run: zeros go through a copy.
                let zeros = Buffer::new(size(&[self.layout.input_rows, k])?, T::ZERO)?;
                self.fork()?.extend(&zeros, k, out)
            }
        }
    }

    /// Positions `at..at + k` of the base block with inputs of zero, on a copy of what they need.
    fn complete_block(&self, at: usize, k: usize, out: &mut [T]) -> Result<(), Error> {
        let (block, width) = (self.execution.base, self.layout.width);
        let len = block * width;
        let mut room = Buffer::new(2 * len, T::ZERO)?;
        let (inputs, outputs) = room.split_at_mut(len);
        // One position needs no inputs but those that have not been pushed yet; more may meet a push of older ones.
        let first = if k == 1 { at - at % PUSH } else { 0 };
        for (g, unit) in self.layout.outputs.iter().enumerate() {
            let mut group = self.layout.groups[g];
            let known = first * width..at * width;
            inputs[known.clone()].copy_from_slice(&self.inputs.unit(group.input)[known]);
            outputs[at * width..(at + k) * width].copy_from_slice(&self.outputs.unit(g)[at * width..][..k * width]);
            group.input = 0;
            let (groups, taps) = (&[group], &self.bank.taps);
            let part = DirectPart { groups, taps, lags: self.bank.lags, inputs, block, width };
            part.complete(self.plan.isa, outputs, at..at + k);
            super::scatter(self.plan.isa, width, &outputs[at * width..(at + k) * width], unit, out, k, 0);
        }
        Ok(())
    }
}
