//! Smooth latency: the tiles of the upper levels run in slices, over a whole block of steps.

use super::units::Units;
use super::{Cache, prompt};
use crate::bank::Bank;
use crate::error::Error;
use crate::execution::{Execution, Level};
use crate::layout::Layout;
use crate::real::Real;
use crate::transform::{Products, Work, Write};

/// One level whose tiles run in slices, a whole block of steps long, and are due at that block's end.
///
/// A tile that begins at time `t = tile * block` adds the inputs before `t` to the outputs from `t + block` on. What
/// has become ready is kept apart from what the other levels give, and added in a fixed order, so that no output
/// depends on when its tiles ran.
pub(super) struct SlicedLevel<T: Real> {
    /// `[output unit][2][block][width]`: the present block of outputs and the next.
    pub(super) out: Units<T>,
    /// Reals of one unit in `out`.
    len: usize,
    width: usize,
    /// The tile under way, counted in blocks, and how many of its slices are done.
    pub(super) tile: usize,
    pub(super) done: usize,
    pub(super) work: Work<T>,
}

impl<T: Real> SlicedLevel<T> {
    pub(super) fn all(execution: &Execution, layout: &Layout, bank: &Bank<T>) -> Result<Vec<Self>, Error> {
        let level = |(level, bank): (&Level, &crate::bank::BankLevel<T>)| {
            let (len, width) = (2 * level.block * layout.width, layout.width);
            let out = Units::new(layout.outputs.len(), width, 2 * level.block)?;
            Ok(Self { out, len, width, tile: 0, done: 0, work: bank.transform.work()? })
        };
        execution.delayed_levels().iter().zip(bank.levels.iter().skip(1)).map(level).collect()
    }

    /// Adds what this level gives to the base block of outputs of unit `g` that starts at `clock`.
    pub(super) fn add(&self, clock: usize, g: usize, outputs: &mut [T]) {
        prompt::add(outputs, &self.out.unit(g)[clock % (self.len / self.width) * self.width..]);
    }

    /// All slices of the tile under way at `clock` are done.
    pub(super) fn flushed(&mut self, level: &Level, clock: usize) {
        self.tile = clock.div_ceil(level.block).saturating_sub(1);
        self.done = usize::MAX;
    }
}

impl<T: Real> Cache<T> {
    /// Brings the tile of delayed level `k + 1` as far as it should be at `clock`.
    pub(super) fn slice(&mut self, k: usize, clock: usize) {
        let block = self.execution.levels[k + 1].block;
        // The tile that began at the last end of a block, strictly before this clock.
        let (tile, elapsed) = match clock.checked_sub(1) {
            Some(last) if last >= block => (last / block, last % block + 1),
            _ => return,
        };
        let index = self.execution.delayed(k + 1, tile);
        let (layout, bank) = (&*self.layout, &self.bank.levels[k + 1]);
        let (transform, width) = (&bank.transform, layout.width);
        let level = &mut self.sliced[k];
        if level.tile != tile {
            (level.tile, level.done) = (tile, 0);
        }
        // Slices: those of the transform of each unit of inputs, then those of the sum and inverse of each of outputs.
        let (first, second) = (transform.input_units(), transform.future_units());
        let sources = layout.inputs.len() * first;
        let all = sources + layout.outputs.len() * second;
        let target = (all as u128 * elapsed as u128).div_ceil(block as u128) as usize;
        let len = transform.spectrum_len();
        while level.done < target {
            let left = target - level.done;
            if level.done < sources {
                let (unit, part) = (level.done / first, level.done % first);
                let parts = part..first.min(part + left);
                level.done += parts.len();
                let x = &self.history.unit(unit)[index.from * width..];
                let slot = &mut self.spectra[k + 1].unit_mut(unit)[index.newest * len..][..len];
                transform.input_parts(x, slot, parts, &mut level.work);
            } else {
                let (unit, part) = ((level.done - sources) / second, (level.done - sources) % second);
                let parts = part..second.min(part + left);
                level.done += parts.len();
                let group = layout.groups[unit];
                let products = Products {
                    slots: self.spectra[k + 1].unit(group.input),
                    newest: index.newest,
                    // The partition next to the present block is the lower level's.
                    filters: bank.partitions(group.filter, 1),
                    count: index.count,
                    shared: bank.shared,
                };
                let out = &mut level.out.unit_mut(unit)[index.to * width..];
                transform.future_parts(&products, out, Write::Set, parts, &mut level.work);
            }
        }
    }

    /// Finishes the tiles that are under way before they are due.
    pub(super) fn flush(&mut self) {
        self.finish();
        for k in 0..self.sliced.len() {
            let block = self.execution.levels[k + 1].block;
            self.slice(k, self.clock.next_multiple_of(block));
        }
    }
}
