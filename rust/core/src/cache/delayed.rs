//! Smooth latency: the tiles of the upper levels run in slices, over a whole block of steps.

use super::{Cache, add_rows};
use crate::buffer::Buffer;
use crate::error::Error;
use crate::kernels::LANES;
use crate::lanes::{LaneTransform, Products};
use crate::layout;
use crate::plan::{Lanes, Plan, Transforms, size};
use crate::real::Real;
use crate::schedule::{Execution, Level};
use crate::transform::{Transform, Workspace};

/// One level whose tiles run in slices, a whole block of steps long, and are due at that block's end.
///
/// A tile that begins at time `t = tile * block` adds the inputs before `t` to the outputs from `t + block` on. What
/// has become ready is kept apart from what the other levels give, and added in a fixed order, so that no output
/// depends on when its tiles ran.
pub(super) struct Delayed<T: Real> {
    /// `[output row][2][block]`, side by side `[output group][2][block][16]`: the present block of outputs and the next.
    pub(super) out: Buffer<T>,
    /// Reals of one row, or of 16.
    pub(super) len: usize,
    /// The tile under way, counted in blocks, and how many of its units are done.
    pub(super) tile: usize,
    pub(super) done: usize,
    pub(super) work: Workspace<T>,
}

impl<T: Real> Delayed<T> {
    pub(super) fn levels(plan: &Plan<T>, execution: &Execution, lanes: &Lanes<T>) -> Result<Vec<Self>, Error> {
        let layout = &lanes.layout;
        let level = |k: usize| {
            let block = execution.levels[k].block;
            let (count, len, work) = match &plan.transforms {
                Transforms::Rows(t) => (layout.output_rows, 2 * block, Workspace::for_transforms([&*t[k]], 0)?),
                Transforms::Lanes(_) => (layout.groups.len(), size(&[2, block, LANES])?, Workspace::for_lanes(block)?),
            };
            Ok(Self { out: Buffer::new(size(&[count, len])?, T::ZERO)?, len, tile: 0, done: 0, work })
        };
        (1..execution.levels.len()).map(level).collect()
    }

    /// Adds what this level gives to the base block of outputs of some rows that starts at `clock`.
    pub(super) fn add(&self, clock: usize, group: &layout::Lanes, outputs: &mut [T]) {
        add_rows(&self.out[group.start * self.len..], self.len, clock % self.len, group.rows, outputs);
    }

    /// The same for output group `g` of rows that go side by side.
    pub(super) fn add_lanes(&self, clock: usize, g: usize, outputs: &mut [T]) {
        let column = clock * LANES % self.len;
        let values = &self.out[g * self.len + column..][..outputs.len()];
        outputs.iter_mut().zip(values).for_each(|(out, v)| *out = *out + *v);
    }

    /// All units of the tile under way at `clock` are done.
    pub(super) fn settled(&mut self, spec: &Level, clock: usize) {
        self.tile = clock.div_ceil(spec.block).saturating_sub(1);
        self.done = usize::MAX;
    }
}

/// The slice of a tile that is to be run now.
struct Slice<'a, T: Real> {
    plan: &'a Plan<T>,
    lanes: &'a Lanes<T>,
    level: usize,
    spec: Level,
    /// Column of the newest inputs in rows of history that are `stride` apart.
    from: usize,
    stride: usize,
    /// Which of the two blocks of outputs is written.
    half: usize,
    newest: usize,
    count: usize,
    /// Elapsed positions of the block in which all units are to be done.
    into: usize,
}

impl<T: Real> Cache<T> {
    /// Brings the delayed tiles of level `k + 1` as far as they should be at `clock`.
    pub(super) fn slice(&mut self, k: usize, clock: usize) {
        if clock == 0 {
            return;
        }
        let (level, spec) = (k + 1, self.execution.levels[k + 1]);
        // The tile that began at the last end of a block, strictly before this clock.
        let (tile, into) = ((clock - 1) / spec.block, (clock - 1) % spec.block + 1);
        if tile == 0 {
            return;
        }
        // Output block `tile + 1`; the super-blocks before the last one belong to the level above.
        let above = spec.fan.map_or(0, |fan| fan * ((tile + 1) / fan).saturating_sub(1));
        let slice = Slice {
            plan: &self.plan,
            lanes: &self.lanes,
            level,
            spec,
            from: (tile - 1) * spec.block % self.execution.ring,
            stride: self.stride,
            half: (tile + 1) % 2,
            newest: (tile - 1) % spec.parts,
            count: (tile - above).min(spec.parts - 1),
            into,
        };
        let delayed = &mut self.delayed[k];
        if delayed.tile != tile {
            (delayed.tile, delayed.done) = (tile, 0);
        }
        let spectra = &mut self.spectra[level];
        match &self.plan.transforms {
            Transforms::Rows(transforms) => slice.by_rows(&transforms[level], &self.history, spectra, delayed),
            Transforms::Lanes(transforms) => slice.side_by_side(&transforms[level], &self.history, spectra, delayed),
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

impl<T: Real> Slice<'_, T> {
    /// How many of `units` units are to be done by now.
    fn target(&self, units: usize) -> usize {
        (units as u128 * self.into as u128).div_ceil(self.spec.block as u128) as usize
    }

    /// Units: a transform per input row, then for each output row a sum and an inverse transform.
    fn by_rows(&self, transform: &Transform<T>, history: &[T], spectra: &mut [T], delayed: &mut Delayed<T>) {
        let layout = &self.lanes.layout;
        let (n, bins) = (self.spec.block, transform.spectrum_len());
        let kept = self.spec.parts * bins;
        let target = self.target(layout.input_rows + 2 * layout.output_rows);
        while delayed.done < target {
            let unit = delayed.done;
            delayed.done += 1;
            if unit < layout.input_rows {
                let slot = &mut spectra[unit * kept + self.newest * bins..][..bins];
                transform.input(&history[unit * self.stride + self.from..][..n], slot, &mut delayed.work);
                continue;
            }
            let (row, inverse) = ((unit - layout.input_rows) / 2, (unit - layout.input_rows) % 2 == 1);
            if inverse {
                transform.invert(&mut delayed.work);
                let out = &mut delayed.out[(2 * row + self.half) * n..][..n];
                transform.future(0, out, false, &delayed.work);
            } else {
                let g = layout.outputs.partition_point(|group| group.start + group.rows <= row);
                let (group, lane) = (layout.groups[g], row - layout.outputs[g].start);
                let source = layout.inputs[group.input].start + layout.input_row(group.input, lane);
                let filter = layout.filter_row(group.filter, lane);
                // The partition next to the present block is the lower level's.
                let filter = &self.lanes.filter_spectra(self.plan, self.level, filter)[bins..];
                let slots = &spectra[source * kept..][..kept];
                transform.accumulate(slots, self.newest, filter, self.count, &mut delayed.work);
            }
        }
    }

    /// Units: the parts of the transform of each source, then those of the sum and inverse of each output group.
    fn side_by_side(&self, transform: &LaneTransform<T>, history: &[T], spectra: &mut [T], delayed: &mut Delayed<T>) {
        let layout = &self.lanes.layout;
        let (n, len, parts) = (self.spec.block, transform.spectrum_len(), transform.parts());
        let kept = self.spec.parts * len;
        let target = self.target((layout.sources() + layout.groups.len()) * parts);
        while delayed.done < target {
            let (unit, part) = (delayed.done / parts, delayed.done % parts);
            let range = part..parts.min(part + target - delayed.done);
            delayed.done += range.len();
            if unit < layout.sources() {
                let block = &history[unit * self.stride + self.from * LANES..];
                transform.input_parts(block, &mut spectra[unit * kept + self.newest * len..][..len], range);
                continue;
            }
            let g = unit - layout.sources();
            let (source, lane) = layout.source(layout.groups[g].input, 0);
            let products = Products {
                slots: &spectra[source * kept..][..kept],
                newest: self.newest,
                // The partition next to the present block is the lower level's.
                filters: &self.lanes.filter_spectra(self.plan, self.level, layout.groups[g].filter)[len..],
                count: self.count,
                len,
                lane: layout.packed.then_some(lane),
            };
            let out = &mut delayed.out[(2 * g + self.half) * n * LANES..];
            transform.future_parts(&products, &mut delayed.work.lanes, out, false, range);
        }
    }
}
