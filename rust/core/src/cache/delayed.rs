//! Smooth latency: the tiles of the upper levels run in slices, over a whole block of steps.

use super::{Cache, add_rows};
use crate::buffer::Buffer;
use crate::error::Error;
use crate::layout;
use crate::plan::{Lanes, Plan, Transforms, size};
use crate::real::Real;
use crate::schedule::{Execution, Level};
use crate::transform::{Transform, Workspace};
use std::sync::Arc;

/// One level whose tiles run in slices, a whole block of steps long, and are due at that block's end.
///
/// A tile that begins at time `t = tile * block` adds the inputs before `t` to the outputs from `t + block` on. What
/// has become ready is kept apart from what the other levels give, and added in a fixed order, so that no output
/// depends on when its tiles ran.
pub(super) struct Delayed<T: Real> {
    /// `[output row][2][block]`: the present block of outputs and the next.
    pub(super) out: Buffer<T>,
    /// Per output row, its input row and its filter row.
    pub(super) rows: Vec<(usize, usize)>,
    /// The tile under way, counted in blocks, and how many of its units are done: one transform per input row,
    /// then for each output row a sum and an inverse transform.
    pub(super) tile: usize,
    pub(super) done: usize,
    pub(super) work: Workspace<T>,
}

/// Smooth plans transform row by row.
fn transforms<T: Real>(plan: &Plan<T>) -> &[Arc<Transform<T>>] {
    match &plan.transforms {
        Transforms::Rows(transforms) => transforms,
        Transforms::Lanes(_) => &[],
    }
}

impl<T: Real> Delayed<T> {
    pub(super) fn levels(plan: &Plan<T>, execution: &Execution, lanes: &Lanes<T>) -> Result<Vec<Self>, Error> {
        let layout = &lanes.layout;
        let mut rows = vec![(0, 0); layout.output_rows];
        for (group, out) in layout.groups.iter().zip(&layout.outputs) {
            for lane in 0..out.rows {
                let input = layout.inputs[group.input].start + layout.input_row(group.input, lane);
                rows[out.start + lane] = (input, layout.filter_row(group.filter, lane));
            }
        }
        (execution.levels.iter().zip(transforms(plan)).skip(1))
            .map(|(level, transform)| {
                Ok(Self {
                    out: Buffer::new(size(&[layout.output_rows, 2, level.block])?, T::ZERO)?,
                    rows: rows.clone(),
                    tile: 0,
                    done: 0,
                    work: Workspace::for_transforms([&**transform]),
                })
            })
            .collect()
    }

    pub(super) fn row(&self, row: usize) -> &[T] {
        let len = self.out.len().checked_div(self.rows.len()).unwrap_or(0);
        &self.out[row * len..][..len]
    }

    /// Adds what this level gives to the base block of outputs that starts at `clock`.
    pub(super) fn add(&self, clock: usize, group: &layout::Lanes, outputs: &mut [T]) {
        let len = self.row(0).len();
        add_rows(&self.out[group.start * len..], len, clock % len, group.rows, outputs);
    }

    /// All units of the tile under way at `clock` are done.
    pub(super) fn settled(&mut self, spec: &Level, clock: usize) {
        self.tile = clock.div_ceil(spec.block).saturating_sub(1);
        self.done = usize::MAX;
    }
}

impl<T: Real> Cache<T> {
    /// Brings the delayed tiles of level `k + 1` as far as they should be at `clock`.
    pub(super) fn slice(&mut self, k: usize, clock: usize) {
        if clock == 0 {
            return;
        }
        let Self { plan, lanes, execution, history, spectra, stride, delayed, .. } = self;
        let (level, spec) = (k + 1, execution.levels[k + 1]);
        // The tile that began at the last end of a block, strictly before this clock.
        let (tile, into) = ((clock - 1) / spec.block, (clock - 1) % spec.block + 1);
        if tile == 0 {
            return;
        }
        let layout = &lanes.layout;
        let units = (layout.input_rows + 2 * layout.output_rows) as u128;
        let target = (units * into as u128).div_ceil(spec.block as u128) as usize;
        let transform = &transforms(plan)[level];
        let kept = spec.parts * transform.spectrum_len();
        let delayed = &mut delayed[k];
        if delayed.tile != tile {
            (delayed.tile, delayed.done) = (tile, 0);
        }
        let newest = (tile - 1) % spec.parts;
        // Output block `tile + 1`; the super-blocks before the last one belong to the level above.
        let above = spec.fan.map_or(0, |fan| fan * ((tile + 1) / fan).saturating_sub(1));
        let count = (tile - above).min(spec.parts - 1);
        while delayed.done < target {
            let unit = delayed.done;
            delayed.done += 1;
            if unit < layout.input_rows {
                let block = &history[unit * *stride + (tile - 1) * spec.block % execution.ring..][..spec.block];
                let bins = transform.spectrum_len();
                let slot = &mut spectra[level][unit * kept + newest * bins..][..bins];
                transform.input(block, slot, &mut delayed.work);
                continue;
            }
            let (row, inverse) = ((unit - layout.input_rows) / 2, (unit - layout.input_rows) % 2 == 1);
            if inverse {
                transform.invert(&mut delayed.work);
                let out = &mut delayed.out[(2 * row + (tile + 1) % 2) * spec.block..][..spec.block];
                transform.future(0, out, false, &delayed.work);
            } else {
                let (source, filter) = delayed.rows[row];
                let slots = &spectra[level][source * kept..][..kept];
                // The partition next to the present block is the lower level's.
                let filter = &lanes.filter_spectra(plan, level, filter)[transform.spectrum_len()..];
                transform.accumulate(slots, newest, filter, count, &mut delayed.work);
            }
        }
    }

    /// Finishes the tiles that are under way before they are due.
    pub(super) fn settle(&mut self) {
        self.finish();
        for k in 0..self.delayed.len() {
            let block = self.execution.levels[k + 1].block;
            self.slice(k, self.clock.next_multiple_of(block));
        }
    }
}
