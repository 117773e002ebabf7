//! The mutable half: one stream's inputs, pending outputs and kept spectra, advanced position by position.
//!
//! The invariant: the effect of every past input on the future is either already in the pending outputs, or its block
//! is still to be pushed by the schedule; never both, never neither.

use crate::buffer::Buffer;
use crate::error::{Error, tuple};
use crate::kernels::{self, LANES};
use crate::layout;
use crate::plan::{Lanes, Plan, check_len};
use crate::pool;
use crate::real::Real;
use crate::schedule::{Execution, Level};
use crate::transform::{Workspace, bin, spread};
use std::sync::Arc;

/// A snapshot of a cache, in the user's row order and in plain arrays: any engine can go on from it.
///
/// `rows_in` and `rows_out` count input and output rows; levels and their lengths are those of
/// [`Schedule::execution`](crate::Schedule::execution).
#[derive(Clone, Debug, PartialEq)]
pub struct State<T> {
    pub shape: Vec<usize>,
    pub base: Option<usize>,
    pub fans: Vec<usize>,
    pub capacity: Option<usize>,
    /// Positions since the cache began.
    pub clock: usize,
    /// The same with the prompt included.
    pub position: usize,
    /// `(rows_in, ring)`: the input of clock time `s` stands at column `s % ring`.
    pub history: Vec<T>,
    /// `(rows_out, ring)`: pending outputs without the effect of the unfinished base block.
    pub pending: Vec<T>,
    /// `(rows_out, k)`: the effect of a prompt on the outputs of clock times `0..k`.
    pub seed: Vec<T>,
    /// Per level `(rows_in, parts, block, 2)`: kept block spectra, real and imaginary parts.
    pub spectra: Vec<Vec<T>>,
}

/// One stream (or batch of streams) under a plan.
pub struct Cache<T: Real> {
    plan: Arc<Plan<T>>,
    lanes: Arc<Lanes<T>>,
    execution: Execution,
    /// From one row of history or of pending outputs to the next; 0 without tiles.
    stride: usize,
    capacity: Option<usize>,
    /// Prompt positions before the clock began.
    origin: usize,
    clock: usize,
    /// The base block is full and its tile has not run.
    due: bool,
    /// `[input group][block][16]`: inputs of the base block, or for the direct sum the ring of all that count.
    inputs: Buffer<T>,
    /// `[output group][block][16]`: outputs of the base block, completed in place.
    outputs: Buffer<T>,
    /// `[input row][stride]`: rows here and below in the order of the groups.
    history: Buffer<T>,
    /// Per level `[input row][slot][bins]`.
    spectra: Vec<Buffer<T>>,
    /// `[output row][stride]`.
    pending: Buffer<T>,
    /// `[output row][seeded]`.
    seed: Buffer<T>,
    /// The levels above the first where latency is to be smooth.
    delayed: Vec<Delayed<T>>,
    /// Positions after a prompt that its effect was put aside for.
    seeded: usize,
    workspaces: Vec<Workspace<T>>,
}

/// A tile that is due.
struct Tile<'a, T: Real> {
    plan: &'a Plan<T>,
    lanes: &'a Lanes<T>,
    level: usize,
    spec: Level,
    stride: usize,
    /// Column of the newest inputs, of the outputs to come, and of the finished base block.
    from: usize,
    to: usize,
    base_from: usize,
    /// Slot of the newest block and how many kept blocks take part.
    newest: usize,
    count: usize,
    /// The top level starts its ring anew; the others add to it.
    add: bool,
    clock: usize,
    seeded: usize,
}

fn size(parts: &[usize]) -> Result<usize, Error> {
    parts.iter().try_fold(1usize, |n, &p| n.checked_mul(p)).ok_or(Error::Memory { bytes: usize::MAX })
}

impl<T: Real> Cache<T> {
    pub(crate) fn new(plan: &Arc<Plan<T>>, shape: &[usize], capacity: Option<usize>) -> Result<Self, Error> {
        let lanes = plan.lanes(shape)?;
        let execution = plan.execution_for(capacity);
        let layout = &lanes.layout;
        let block = if execution.base == 0 { execution.ring } else { execution.base };
        let outputs = if execution.base == 0 { 1 } else { execution.base };
        let stride = if execution.levels.is_empty() { 0 } else { spread(execution.ring) };
        let workers = if execution.levels.is_empty() { 1 } else { plan.workers() };
        check_memory(&execution, layout.input_rows, layout.output_rows, T::BYTES)?;
        let (rows_in, rows_out) = (layout.input_rows, layout.output_rows);
        Ok(Self {
            inputs: Buffer::new(size(&[layout.inputs.len(), block, LANES])?, T::ZERO)?,
            outputs: Buffer::new(size(&[layout.groups.len(), outputs, LANES])?, T::ZERO)?,
            history: Buffer::new(size(&[rows_in, stride])?, T::ZERO)?,
            spectra: (execution.levels.iter().zip(&plan.transforms))
                .map(|(l, t)| Buffer::new(size(&[rows_in, l.parts, t.spectrum_len()])?, T::ZERO))
                .collect::<Result<_, _>>()?,
            pending: Buffer::new(size(&[rows_out, stride])?, T::ZERO)?,
            seed: Buffer::new(0, T::ZERO)?,
            delayed: match execution.smooth {
                true => Delayed::levels(plan, &execution, &lanes)?,
                false => Vec::new(),
            },
            workspaces: (0..workers)
                .map(|_| {
                    let used = plan.transforms[..execution.levels.len()].iter().map(|t| &**t);
                    Workspace::for_transforms(used)
                })
                .collect(),
            plan: plan.clone(),
            lanes,
            execution,
            stride,
            capacity,
            origin: 0,
            clock: 0,
            due: false,
            seeded: 0,
        })
    }

    /// Puts the effect of a prompt of `len` positions, `seed [output row][reach]`, in front of everything.
    pub(crate) fn start_after(&mut self, len: usize, seed: &[T], reach: usize) -> Result<(), Error> {
        self.origin = len;
        self.set_seed(seed, reach)?;
        self.load_block();
        Ok(())
    }

    fn set_seed(&mut self, seed: &[T], reach: usize) -> Result<(), Error> {
        self.seeded = reach;
        self.seed = Buffer::new(seed.len(), T::ZERO)?;
        for group in &self.lanes.layout.outputs {
            let from = &seed[group.row * reach..(group.row + group.rows) * reach];
            self.seed[group.start * reach..][..from.len()].copy_from_slice(from);
        }
        Ok(())
    }

    /// The output at this position for the input `u (*C,)` at this position, into `out`.
    ///
    /// Never runs a tile: if one has become due, [`finish`](Self::finish) or the next call runs it.
    pub fn step(&mut self, u: &[T], out: &mut [T]) -> Result<(), Error> {
        self.run(u, 1, out, self.lanes.layout.input_shape.len())
    }

    /// The outputs for a block of `m` known inputs `(*C, m)`: the same as `m` steps.
    pub fn extend(&mut self, u: &[T], m: usize, out: &mut [T]) -> Result<(), Error> {
        self.run(u, m, out, usize::MAX)
    }

    fn run(&mut self, u: &[T], m: usize, out: &mut [T], axes: usize) -> Result<(), Error> {
        let layout = &self.lanes.layout;
        if layout.input_rows.checked_mul(m) != Some(u.len()) {
            if axes == usize::MAX {
                check_len("u", u.len(), layout.input_rows, &layout.input_shape, m)?;
            }
            return Err(Error::shape("u", tuple(&layout.input_shape), format_args!("{} values", u.len())));
        }
        check_len("out", out.len(), layout.output_rows, &layout.output_shape, m)?;
        if let Some(remaining) = self.remaining()
            && m > remaining
        {
            return Err(Error::Capacity { needed: m, remaining });
        }
        let empty = layout.output_rows == 0;
        self.finish();
        if empty {
            self.clock += m;
            return Ok(());
        }
        if self.execution.base == 0 {
            self.run_direct(u, m, out);
        } else {
            self.run_blocks(u, m, out);
        }
        Ok(())
    }

    fn run_blocks(&mut self, u: &[T], m: usize, out: &mut [T]) {
        let base = self.execution.base;
        let mut done = 0;
        while done < m {
            self.finish();
            let k = self.clock % base;
            let r = (base - k).min(m - done);
            self.gather(u, m, done, k, r);
            self.advance(k, k + r);
            for (outputs, group) in self.outputs.chunks_exact(base * LANES).zip(&self.lanes.layout.outputs) {
                let run = &outputs[k * LANES..(k + r) * LANES];
                if m == 1 {
                    out[group.row..group.row + group.rows].copy_from_slice(&run[..group.rows]);
                } else {
                    let rows = &mut out[group.row * m..(group.row + group.rows) * m];
                    kernels::to_rows(self.plan.isa, run, rows, m, done, group.rows);
                }
            }
            self.clock += r;
            done += r;
            self.due = (k + r == base || self.execution.smooth) && !self.execution.levels.is_empty();
        }
    }

    /// Inputs `done..done + r` of each row to positions `k..k + r` of the base block.
    fn gather(&mut self, u: &[T], m: usize, done: usize, k: usize, r: usize) {
        let block = self.block();
        for (inputs, group) in self.inputs.chunks_exact_mut(block * LANES).zip(&self.lanes.layout.inputs) {
            let run = &mut inputs[k * LANES..(k + r) * LANES];
            if group.rows == 1 {
                for (lanes, v) in run.chunks_exact_mut(LANES).zip(&u[group.row * m + done..]) {
                    lanes.fill(*v);
                }
            } else if m == 1 {
                run[..group.rows].copy_from_slice(&u[group.row..group.row + group.rows]);
            } else {
                let rows = &u[group.row * m..(group.row + group.rows) * m];
                kernels::from_rows(self.plan.isa, rows, m, done, group.rows, run);
            }
        }
    }

    /// Positions in `inputs` per group.
    fn block(&self) -> usize {
        if self.execution.base == 0 { self.execution.ring } else { self.execution.base }
    }

    /// The direct part of the base block: positions `from..to` become final.
    fn advance(&mut self, from: usize, to: usize) {
        let base = self.execution.base;
        let (isa, stride, taps) = (self.plan.isa, self.plan.taps_stride(), &self.lanes.taps);
        let (groups, inputs) = (&self.lanes.layout.groups, &self.inputs);
        let heavy = (to - from) * groups.len() >= PARALLEL_ADVANCE;
        if self.workspaces.len() == 1 || !heavy {
            kernels::advance(isa, groups, taps, stride, inputs, &mut self.outputs, base, from, to);
            return;
        }
        let share = groups.len().div_ceil(self.workspaces.len());
        let jobs = groups.chunks(share).zip(self.outputs.chunks_mut(share * base * LANES));
        pool::for_each(jobs, &mut self.workspaces, |(groups, outputs), _| {
            kernels::advance(isa, groups, taps, stride, inputs, outputs, base, from, to);
        });
    }

    fn run_direct(&mut self, u: &[T], m: usize, out: &mut [T]) {
        let ring = self.execution.ring;
        let stride = self.plan.taps_stride();
        for done in 0..m {
            let k = self.clock % ring;
            self.gather(u, m, done, k, 1);
            let lags = ring.min(self.clock + 1);
            let layout = &self.lanes.layout;
            for (group, lanes) in layout.groups.iter().zip(&layout.outputs) {
                let taps = &self.lanes.taps[group.filter * stride * LANES..][..lags * LANES];
                let inputs = &self.inputs[group.input * ring * LANES..][..ring * LANES];
                let (newer, older) = inputs.split_at((k + 1) * LANES);
                let mut sum = [T::ZERO; LANES];
                kernels::direct_sum(self.plan.isa, taps, newer, older, &mut sum);
                for (lane, sum) in sum.iter().enumerate().take(lanes.rows) {
                    let seed = match self.clock < self.seeded {
                        true => self.seed[(lanes.start + lane) * self.seeded + self.clock],
                        false => T::ZERO,
                    };
                    out[(lanes.row + lane) * m + done] = *sum + seed;
                }
            }
            self.clock += 1;
        }
    }

    /// Values that the due tile touches; 0 where none is due.
    pub fn due_work(&self) -> usize {
        if !self.due || self.remaining() == Some(0) {
            return 0;
        }
        if !self.clock.is_multiple_of(self.execution.base) {
            return 1;
        }
        let level = self.execution.levels[self.due_level()];
        level.block.saturating_mul(self.lanes.layout.output_rows)
    }

    /// Runs the tile that is due, if one is, or the slices of tiles that are due later.
    pub fn finish(&mut self) {
        if !std::mem::take(&mut self.due) || self.remaining() == Some(0) {
            return;
        }
        let block_ends = self.clock.is_multiple_of(self.execution.base);
        for k in 0..self.delayed.len() {
            self.slice(k, self.clock);
        }
        if block_ends {
            self.tile();
        }
    }

    /// Brings the delayed tiles of level `k + 1` as far as they should be at `clock`.
    fn slice(&mut self, k: usize, clock: usize) {
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
        let transform = &plan.transforms[level];
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
                let filter = &plan.filter_spectra(level, filter)[transform.spectrum_len()..];
                transform.accumulate(slots, newest, filter, count, &mut delayed.work);
            }
        }
    }

    /// Finishes the tiles that are under way before they are due.
    fn settle(&mut self) {
        self.finish();
        for k in 0..self.delayed.len() {
            let block = self.execution.levels[k + 1].block;
            self.slice(k, self.clock.next_multiple_of(block));
        }
    }

    fn due_level(&self) -> usize {
        if self.execution.smooth {
            return 0;
        }
        let fires = |level: &Level| self.clock.is_multiple_of(level.block);
        self.execution.levels.iter().rposition(fires).expect("the base block divides the clock")
    }

    fn tile(&mut self) {
        let level = self.due_level();
        let spec = self.execution.levels[level];
        let (n, ring, base, clock) = (spec.block, self.execution.ring, self.execution.base, self.clock);
        let index = match (spec.fan, self.execution.smooth) {
            (Some(fan), true) => clock / n - fan * (clock / n / fan).saturating_sub(1),
            (Some(fan), false) => clock / n % fan,
            (None, _) => clock / n,
        };
        let tile = Tile {
            plan: &self.plan,
            lanes: &self.lanes,
            level,
            spec,
            stride: self.stride,
            from: (clock - n) % ring,
            to: clock % ring,
            base_from: (clock - base) % ring,
            newest: if self.execution.smooth { clock / n - 1 } else { index - 1 } % spec.parts,
            count: index.min(spec.parts),
            add: spec.fan.is_some() && !self.execution.smooth,
            clock,
            seeded: self.seeded,
        };
        let layout = &self.lanes.layout;
        let rows = layout.output_rows;
        let few = &mut self.workspaces[..1];
        let parallel = n.saturating_mul(rows) >= PARALLEL_TILE;
        let workspaces = if parallel { &mut self.workspaces[..] } else { few };
        let bundle = layout.bundle;
        let block = base * LANES;
        let kept = spec.parts * self.plan.transforms[level].spectrum_len();
        let spectra = &mut self.spectra[level];
        let row_counts = |groups: &[layout::Lanes]| groups.iter().map(|l| l.rows).sum::<usize>();
        let outputs = self.outputs.chunks_mut(bundle * block);
        let pending = Rows::new(&mut self.pending, layout.outputs.chunks(bundle).map(row_counts), self.stride);
        let sinks = layout.outputs.chunks(bundle).zip(outputs.zip(pending)).enumerate();
        let (seed, delayed) = (&self.seed, &self.delayed);
        if layout.one_to_one {
            let spectra = Rows::new(spectra, layout.inputs.chunks(bundle).map(row_counts), kept);
            let history = Rows::new(&mut self.history, layout.inputs.chunks(bundle).map(row_counts), self.stride);
            let sources = self.inputs.chunks(bundle * block).zip(history.zip(spectra));
            let jobs = sources.zip(sinks);
            pool::for_each(
                jobs,
                workspaces,
                |((inputs, (history, spectra)), (i, (groups, (outputs, pending)))), work| {
                    let first = groups[0].start;
                    for (group, inputs) in groups.iter().zip(inputs.chunks_exact(block)) {
                        let history = &mut history[(group.start - first) * tile.stride..][..group.rows * tile.stride];
                        tile.keep_inputs(history, inputs);
                    }
                    for lane in 0..groups[0].rows {
                        let filter = plan_spectra(&tile, i, lane);
                        // Members of a bundle may be of different width.
                        for group in groups.iter().filter(|group| lane < group.rows) {
                            let row = group.start - first + lane;
                            let spectra = &mut spectra[row * kept..][..kept];
                            tile.transform_input(&history[row * tile.stride..], spectra, work);
                            tile.push(spectra, filter, &mut pending[row * tile.stride..], work);
                        }
                    }
                    tile.load_outputs(groups, pending, seed, delayed, outputs);
                },
            );
        } else {
            let spectra_rows = Rows::new(spectra, layout.inputs.iter().map(|l| l.rows), kept);
            let history = Rows::new(&mut self.history, layout.inputs.iter().map(|l| l.rows), self.stride);
            let jobs = self.inputs.chunks_exact(block).zip(history.zip(spectra_rows));
            pool::for_each(jobs, workspaces, |(inputs, (history, spectra)), work| {
                tile.keep_inputs(history, inputs);
                for (history, spectra) in history.chunks_exact(tile.stride).zip(spectra.chunks_exact_mut(kept)) {
                    tile.transform_input(history, spectra, work);
                }
            });
            let spectra = &self.spectra[level];
            pool::for_each(sinks, workspaces, |(i, (groups, (outputs, pending))), work| {
                let first = groups[0].start;
                let sources = &layout.groups[i * bundle..];
                for lane in 0..groups[0].rows {
                    let filter = plan_spectra(&tile, i, lane);
                    for (group, source) in groups.iter().zip(sources).filter(|(group, _)| lane < group.rows) {
                        let row = layout.inputs[source.input].start + layout.input_row(source.input, lane);
                        let pending = &mut pending[(group.start - first + lane) * tile.stride..];
                        tile.push(&spectra[row * kept..][..kept], filter, pending, work);
                    }
                }
                tile.load_outputs(groups, pending, seed, delayed, outputs);
            });
        }
    }

    /// Starts the base block at the present clock from the pending outputs.
    fn load_block(&mut self) {
        let base = self.execution.base;
        if base == 0 {
            return;
        }
        let start = self.clock / base * base;
        let levels = !self.execution.levels.is_empty();
        let column = if levels { start % self.execution.ring } else { 0 };
        let layout = &self.lanes.layout;
        for (outputs, group) in self.outputs.chunks_exact_mut(base * LANES).zip(&layout.outputs) {
            outputs.fill(T::ZERO);
            if levels {
                let rows = &self.pending[group.start * self.stride..];
                kernels::from_rows(self.plan.isa, rows, self.stride, column, group.rows, outputs);
            }
            add_rows(&self.seed[group.start * self.seeded..], self.seeded, start, group.rows, outputs);
            for level in &self.delayed {
                level.add(start, group, outputs);
            }
        }
    }

    /// An independent copy.
    pub fn fork(&mut self) -> Result<Self, Error> {
        self.settle();
        let batch = self.lanes.layout.input_shape.first().copied().unwrap_or(1);
        let same: Vec<usize> = (0..batch).collect();
        self.select(&self.lanes.layout.input_shape.clone(), &same)
    }

    /// Gathers entries of axis 0: entry `i` becomes a copy of the present entry `index[i]`.
    pub fn reorder(&mut self, index: &[usize]) -> Result<(), Error> {
        let batch = self.batch()?;
        if let Some(bad) = index.iter().find(|i| **i >= batch) {
            return Err(Error::value("index", format!("entries below {batch}"), bad));
        }
        let mut shape = self.lanes.layout.input_shape.clone();
        shape[0] = index.len();
        self.settle();
        *self = self.select(&shape, index)?;
        Ok(())
    }

    fn select(&self, shape: &[usize], index: &[usize]) -> Result<Self, Error> {
        let mut copy = Self::new(&self.plan, shape, self.capacity)?;
        let lanes = copy.lanes.clone();
        let (old, new) = (&self.lanes.layout, &lanes.layout);
        let entries = shape.first().copied().unwrap_or(1).max(1);
        copy.origin = self.origin;
        copy.clock = self.clock;
        copy.seeded = self.seeded;
        copy.seed = Buffer::new(size(&[new.output_rows, self.seeded])?, T::ZERO)?;
        let block = self.block() * LANES;
        let places = places(&old.inputs, old.input_rows);
        for (g, group) in new.inputs.iter().enumerate() {
            for lane in 0..group.rows {
                let (from_group, from_lane) = places[origin_row(group.row + lane, new.input_rows / entries, index)];
                let (from, to) = (old.inputs[from_group].start + from_lane, group.start + lane);
                copy_row(&self.history, from, old.input_rows, &mut copy.history, to, new.input_rows);
                for (kept, copy) in self.spectra.iter().zip(&mut copy.spectra) {
                    copy_row(kept, from, old.input_rows, copy, to, new.input_rows);
                }
                let from = &self.inputs[from_group * block..][..block];
                for (from, to) in from.chunks_exact(LANES).zip(copy.inputs[g * block..].chunks_exact_mut(LANES)) {
                    if group.rows == 1 { to.fill(from[from_lane]) } else { to[lane] = from[from_lane] }
                }
            }
        }
        let block = self.outputs.len().checked_div(old.groups.len()).unwrap_or(0);
        let places = self::places(&old.outputs, old.output_rows);
        for (g, group) in new.outputs.iter().enumerate() {
            for lane in 0..group.rows {
                let (from_group, from_lane) = places[origin_row(group.row + lane, new.output_rows / entries, index)];
                let (from, to) = (old.outputs[from_group].start + from_lane, group.start + lane);
                copy_row(&self.pending, from, old.output_rows, &mut copy.pending, to, new.output_rows);
                copy_row(&self.seed, from, old.output_rows, &mut copy.seed, to, new.output_rows);
                for (level, copy) in self.delayed.iter().zip(&mut copy.delayed) {
                    copy_row(&level.out, from, old.output_rows, &mut copy.out, to, new.output_rows);
                    (copy.tile, copy.done) = (level.tile, level.done);
                }
                let from = &self.outputs[from_group * block..][..block];
                for (from, to) in from.chunks_exact(LANES).zip(copy.outputs[g * block..].chunks_exact_mut(LANES)) {
                    to[lane] = from[from_lane];
                }
            }
        }
        Ok(copy)
    }

    /// Starts the given entries of axis 0 again; the others, the clock and the capacity go on.
    pub fn reset_rows(&mut self, rows: &[usize]) -> Result<(), Error> {
        let batch = self.batch()?;
        if let Some(bad) = rows.iter().find(|r| **r >= batch) {
            return Err(Error::value("rows", format!("entries below {batch}"), bad));
        }
        self.settle();
        let lanes = self.lanes.clone();
        let layout = &lanes.layout;
        let mut chosen = vec![false; batch];
        rows.iter().for_each(|r| chosen[*r] = true);
        let block = self.block() * LANES;
        for (g, group) in layout.inputs.iter().enumerate() {
            for lane in (0..group.rows).filter(|l| chosen[(group.row + l) / (layout.input_rows / batch)]) {
                let row = group.start + lane;
                clear_row(&mut self.history, row, layout.input_rows);
                self.spectra.iter_mut().for_each(|s| clear_row(s, row, layout.input_rows));
                for lanes in self.inputs[g * block..][..block].chunks_exact_mut(LANES) {
                    if group.rows == 1 { lanes.fill(T::ZERO) } else { lanes[lane] = T::ZERO }
                }
            }
        }
        let block = self.outputs.len().checked_div(layout.groups.len()).unwrap_or(0);
        for (g, group) in layout.outputs.iter().enumerate() {
            for lane in (0..group.rows).filter(|l| chosen[(group.row + l) / (layout.output_rows / batch)]) {
                clear_row(&mut self.pending, group.start + lane, layout.output_rows);
                clear_row(&mut self.seed, group.start + lane, layout.output_rows);
                for level in &mut self.delayed {
                    clear_row(&mut level.out, group.start + lane, layout.output_rows);
                }
                for lanes in self.outputs[g * block..][..block].chunks_exact_mut(LANES) {
                    lanes[lane] = T::ZERO;
                }
            }
        }
        Ok(())
    }

    /// Starts everything again at position 0 with the whole capacity.
    pub fn reset(&mut self) {
        self.due = false;
        (self.origin, self.clock) = (0, 0);
        self.inputs.fill(T::ZERO);
        self.outputs.fill(T::ZERO);
        self.history.fill(T::ZERO);
        self.spectra.iter_mut().for_each(|s| s.fill(T::ZERO));
        self.pending.fill(T::ZERO);
        self.seed.fill(T::ZERO);
        for level in &mut self.delayed {
            level.out.fill(T::ZERO);
            (level.tile, level.done) = (0, 0);
        }
    }

    /// Entries of the batch axis, where there is one.
    fn batch(&self) -> Result<usize, Error> {
        let layout = &self.lanes.layout;
        if layout.batch_axes == 0 {
            let expected = "a batch axis in front of the filters' axes";
            return Err(Error::value("cache", expected, tuple(&layout.input_shape)));
        }
        Ok(layout.input_shape[0])
    }

    /// A snapshot.
    pub fn state(&mut self) -> State<T> {
        self.settle();
        let layout = &self.lanes.layout;
        let ring = self.execution.ring;
        let block = self.block();
        let mut history = vec![T::ZERO; layout.input_rows * ring];
        let mut spectra: Vec<_> =
            self.execution.levels.iter().map(|l| vec![T::ZERO; layout.input_rows * l.parts * l.block * 2]).collect();
        for (g, group) in layout.inputs.iter().enumerate() {
            let inputs = &self.inputs[g * block * LANES..][..block * LANES];
            for lane in 0..group.rows {
                let row = &mut history[(group.row + lane) * ring..][..ring];
                let (start, count) = if self.execution.base == 0 {
                    (0, ring)
                } else if self.execution.levels.is_empty() {
                    (0, self.clock.min(block))
                } else {
                    row.copy_from_slice(&self.history[(group.start + lane) * self.stride..][..ring]);
                    (self.clock / block * block % ring, self.clock % block)
                };
                for (v, lanes) in row[start..][..count].iter_mut().zip(inputs.chunks_exact(LANES)) {
                    *v = lanes[lane];
                }
                for ((level, kept), flat) in self.execution.levels.iter().zip(&self.spectra).zip(&mut spectra) {
                    let len = level.parts * level.block * 2;
                    let bins = kept.len() / layout.input_rows / level.parts;
                    let slots = kept[(group.start + lane) * level.parts * bins..].chunks_exact(bins);
                    let flat = &mut flat[(group.row + lane) * len..][..len];
                    for (slot, flat) in slots.zip(flat.chunks_exact_mut(level.block * 2)) {
                        for (j, z) in flat.chunks_exact_mut(2).enumerate() {
                            z.copy_from_slice(&[slot[bin(j)], slot[bin(j) + LANES]]);
                        }
                    }
                }
            }
        }
        let columns = if self.execution.levels.is_empty() { 0 } else { ring };
        let width = self.pending_width();
        let mut pending = vec![T::ZERO; layout.output_rows * width];
        let mut seed = vec![T::ZERO; layout.output_rows * self.seeded];
        for group in &layout.outputs {
            for lane in 0..group.rows {
                let (from, to) = (group.start + lane, group.row + lane);
                pending[to * width..][..columns].copy_from_slice(&self.pending[from * self.stride..][..columns]);
                let mut at = to * width + columns;
                for level in &self.delayed {
                    let out = level.row(from);
                    pending[at..at + out.len()].copy_from_slice(out);
                    at += out.len();
                }
                let seeded = &self.seed[from * self.seeded..][..self.seeded];
                seed[to * self.seeded..][..self.seeded].copy_from_slice(seeded);
            }
        }
        State {
            shape: layout.input_shape.clone(),
            base: self.plan.schedule().base(),
            fans: self.plan.schedule().fans().to_vec(),
            capacity: self.capacity,
            clock: self.clock,
            position: self.position(),
            history,
            pending,
            seed,
            spectra,
        }
    }

    pub(crate) fn from_state(plan: &Arc<Plan<T>>, state: &State<T>) -> Result<Self, Error> {
        let wrong = |what: &str| Error::State(format!("{what} does not fit this plan"));
        if (state.base, &state.fans[..]) != (plan.schedule().base(), plan.schedule().fans()) {
            return Err(wrong("its schedule"));
        }
        if state.capacity == Some(0) && state.clock > 0 || plan.horizon().is_some() && state.capacity.is_none() {
            return Err(wrong("its capacity"));
        }
        let end = state.position.checked_sub(state.clock).and_then(|p| p.checked_add(state.capacity.unwrap_or(0)));
        if end.is_none_or(|end| plan.horizon().is_some_and(|h| end > h))
            || state.capacity.is_some_and(|c| state.clock > c)
        {
            return Err(wrong("its position"));
        }
        layout::broadcast(&state.shape, plan.filter_shape()).map_err(|_| wrong("its shape"))?;
        let mut cache = Self::new(plan, &state.shape, state.capacity)?;
        let lanes = cache.lanes.clone();
        let (layout, ring) = (&lanes.layout, cache.execution.ring);
        let width = cache.pending_width();
        let reach = state.seed.len().checked_div(layout.output_rows).unwrap_or(0);
        let spectra_fit = state.spectra.len() == cache.execution.levels.len()
            && (state.spectra.iter().zip(&cache.execution.levels))
                .all(|(s, l)| s.len() == layout.input_rows * l.parts * l.block * 2);
        if state.history.len() != layout.input_rows * ring
            || state.pending.len() != layout.output_rows * width
            || state.seed.len() != layout.output_rows * reach
            || !spectra_fit
        {
            return Err(wrong("the size of its arrays"));
        }
        cache.origin = state.position - state.clock;
        cache.clock = state.clock;
        cache.set_seed(&state.seed, reach)?;
        let columns = if cache.execution.levels.is_empty() { 0 } else { ring };
        for group in &layout.outputs {
            for lane in 0..group.rows {
                let pending = &state.pending[(group.row + lane) * width..][..width];
                let row = group.start + lane;
                cache.pending[row * cache.stride..][..columns].copy_from_slice(&pending[..columns]);
                let mut at = columns;
                for (level, spec) in cache.delayed.iter_mut().zip(cache.execution.levels.iter().skip(1)) {
                    let out = &mut level.out[row * 2 * spec.block..][..2 * spec.block];
                    out.copy_from_slice(&pending[at..at + out.len()]);
                    at += out.len();
                    level.settled(spec, state.clock);
                }
            }
        }
        cache.load_inputs(state);
        cache.load_block();
        // The direct tiles of the unfinished block run again, in the same order as before.
        let base = cache.execution.base;
        if base > 0 && layout.output_rows > 0 {
            let open = if columns == 0 { state.clock.min(base) } else { state.clock % base };
            cache.advance(0, open);
        }
        Ok(cache)
    }

    /// Columns of pending outputs in a state: the ring, and two blocks of each delayed level.
    fn pending_width(&self) -> usize {
        let ring = if self.execution.base == 0 { 0 } else { self.execution.ring };
        ring + self.delayed.iter().map(|level| level.row(0).len()).sum::<usize>()
    }

    fn load_inputs(&mut self, state: &State<T>) {
        let layout = &self.lanes.layout;
        let ring = self.execution.ring;
        let block = self.block();
        for (g, group) in layout.inputs.iter().enumerate() {
            let inputs = &mut self.inputs[g * block * LANES..][..block * LANES];
            for lane in 0..group.rows {
                let row = &state.history[(group.row + lane) * ring..][..ring];
                let (start, count) = if self.execution.levels.is_empty() {
                    (0, ring)
                } else {
                    self.history[(group.start + lane) * self.stride..][..ring].copy_from_slice(row);
                    (self.clock / block * block % ring, self.clock % block)
                };
                for (v, lanes) in row[start..][..count].iter().zip(inputs.chunks_exact_mut(LANES)) {
                    if group.rows == 1 { lanes.fill(*v) } else { lanes[lane] = *v }
                }
                for ((level, kept), flat) in self.execution.levels.iter().zip(&mut self.spectra).zip(&state.spectra) {
                    let len = level.parts * level.block * 2;
                    let bins = kept.len() / layout.input_rows / level.parts;
                    let slots = kept[(group.start + lane) * level.parts * bins..].chunks_exact_mut(bins);
                    let flat = &flat[(group.row + lane) * len..][..len];
                    for (slot, flat) in slots.zip(flat.chunks_exact(level.block * 2)) {
                        for (j, z) in flat.chunks_exact(2).enumerate() {
                            slot[bin(j)] = z[0];
                            slot[bin(j) + LANES] = z[1];
                        }
                    }
                }
            }
        }
    }

    /// The plan this cache runs under.
    pub fn plan(&self) -> &Arc<Plan<T>> {
        &self.plan
    }

    /// Shape of one input position.
    pub fn input_shape(&self) -> &[usize] {
        &self.lanes.layout.input_shape
    }

    /// Shape of one output position.
    pub fn output_shape(&self) -> &[usize] {
        &self.lanes.layout.output_shape
    }

    /// Positions so far, prompt included.
    pub fn position(&self) -> usize {
        self.origin + self.clock
    }

    /// Positions left; `None` where there is no bound.
    pub fn remaining(&self) -> Option<usize> {
        self.capacity.map(|c| c - self.clock)
    }

    /// Bytes of state.
    pub fn nbytes(&self) -> usize {
        let state = [&self.inputs, &self.outputs, &self.history, &self.pending, &self.seed];
        let later = self.delayed.iter().map(|level| &level.out);
        state.into_iter().chain(&self.spectra).chain(later).map(Buffer::bytes).sum::<usize>()
            + self.delayed.iter().map(|level| &level.work).chain(&self.workspaces).map(Workspace::bytes).sum::<usize>()
    }
}

/// One level whose tiles run in slices, a whole block of steps long, and are due at that block's end.
///
/// A tile that begins at time `t = tile * block` adds the inputs before `t` to the outputs from `t + block` on. What
/// has become ready is kept apart from what the other levels give, and added in a fixed order, so that no output
/// depends on when its tiles ran.
struct Delayed<T: Real> {
    /// `[output row][2][block]`: the present block of outputs and the next.
    out: Buffer<T>,
    /// Per output row, its input row and its filter row.
    rows: Vec<(usize, usize)>,
    /// The tile under way, counted in blocks, and how many of its units are done: one transform per input row,
    /// then for each output row a sum and an inverse transform.
    tile: usize,
    done: usize,
    work: Workspace<T>,
}

impl<T: Real> Delayed<T> {
    fn levels(plan: &Plan<T>, execution: &Execution, lanes: &Lanes<T>) -> Result<Vec<Self>, Error> {
        let layout = &lanes.layout;
        let mut rows = vec![(0, 0); layout.output_rows];
        for (group, out) in layout.groups.iter().zip(&layout.outputs) {
            for lane in 0..out.rows {
                let input = layout.inputs[group.input].start + layout.input_row(group.input, lane);
                rows[out.start + lane] = (input, layout.filter_row(group.filter, lane));
            }
        }
        (execution.levels.iter().zip(&plan.transforms).skip(1))
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

    fn row(&self, row: usize) -> &[T] {
        let len = self.out.len().checked_div(self.rows.len()).unwrap_or(0);
        &self.out[row * len..][..len]
    }

    /// Adds what this level gives to the base block of outputs that starts at `clock`.
    fn add(&self, clock: usize, group: &layout::Lanes, outputs: &mut [T]) {
        let len = self.row(0).len();
        add_rows(&self.out[group.start * len..], len, clock % len, group.rows, outputs);
    }

    /// All units of the tile under way at `clock` are done.
    fn settled(&mut self, spec: &Level, clock: usize) {
        self.tile = clock.div_ceil(spec.block).saturating_sub(1);
        self.done = usize::MAX;
    }
}

/// Output values below which waking a second thread costs more than it saves.
const PARALLEL_TILE: usize = 1 << 15;
const PARALLEL_ADVANCE: usize = 1 << 11;

/// Refuses what no machine has room for before any of it is touched.
fn check_memory(run: &Execution, input_rows: usize, output_rows: usize, bytes: usize) -> Result<(), Error> {
    let spectra = run.levels.iter().map(|l| 2.0 * l.block as f64 * l.parts as f64).sum::<f64>();
    let reals = input_rows as f64 * (spectra + run.ring as f64) + output_rows as f64 * run.ring as f64;
    let needed = reals * bytes as f64;
    if needed > (1u64 << 44) as f64 {
        return Err(Error::Memory { bytes: needed as usize });
    }
    Ok(())
}

/// Group and lane of every row.
fn places(groups: &[layout::Lanes], rows: usize) -> Vec<(usize, usize)> {
    let mut places = vec![(0, 0); rows];
    for (g, group) in groups.iter().enumerate() {
        for lane in 0..group.rows {
            places[group.row + lane] = (g, lane);
        }
    }
    places
}

/// The old row that becomes row `row`, where entries of `per_entry` rows are gathered by `index`.
fn origin_row(row: usize, per_entry: usize, index: &[usize]) -> usize {
    index[row / per_entry] * per_entry + row % per_entry
}

/// Row `from` of `count` equal rows becomes row `to` of another buffer.
fn copy_row<T: Copy>(rows: &[T], from: usize, count: usize, copy: &mut [T], to: usize, copies: usize) {
    let len = rows.len() / count;
    debug_assert_eq!(copy.len() / copies, len);
    copy[to * len..][..len].copy_from_slice(&rows[from * len..][..len]);
}

fn clear_row<T: Real>(rows: &mut [T], row: usize, count: usize) {
    let len = rows.len() / count;
    rows[row * len..][..len].fill(T::ZERO);
}

/// Adds columns `start..` of rows of `len` values to a base block `[time][16]`, as far as they go.
fn add_rows<T: Real>(values: &[T], len: usize, start: usize, rows: usize, block: &mut [T]) {
    let count = len.saturating_sub(start).min(block.len() / LANES);
    for lane in 0..rows {
        let row = values.get(lane * len + start..).unwrap_or_default();
        for (lanes, v) in block.chunks_exact_mut(LANES).zip(row).take(count) {
            lanes[lane] = lanes[lane] + *v;
        }
    }
}

fn plan_spectra<'a, T: Real>(tile: &Tile<'a, T>, bundle: usize, lane: usize) -> &'a [T] {
    let layout = &tile.lanes.layout;
    let group = layout.groups[bundle * layout.bundle].filter;
    tile.plan.filter_spectra(tile.level, layout.filter_row(group, lane))
}

/// A buffer of rows handed out in runs of several rows.
struct Rows<'a, T, I> {
    rest: &'a mut [T],
    counts: I,
    len: usize,
}

impl<'a, T, I> Rows<'a, T, I> {
    fn new(rows: &'a mut [T], counts: I, len: usize) -> Self {
        Self { rest: rows, counts, len }
    }
}

impl<'a, T, I: Iterator<Item = usize>> Iterator for Rows<'a, T, I> {
    type Item = &'a mut [T];

    fn next(&mut self) -> Option<Self::Item> {
        let count = self.counts.next()?;
        self.rest.split_off_mut(..count * self.len)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.counts.size_hint()
    }
}

impl<T, I: ExactSizeIterator<Item = usize>> ExactSizeIterator for Rows<'_, T, I> {}

impl<T: Real> Tile<'_, T> {
    /// The finished base block of one group becomes history.
    fn keep_inputs(&self, history: &mut [T], inputs: &[T]) {
        let rows = history.len() / self.stride;
        kernels::to_rows(self.plan.isa, inputs, history, self.stride, self.base_from, rows);
    }

    /// The newest block of one row is transformed once and kept.
    fn transform_input(&self, history: &[T], spectra: &mut [T], work: &mut Workspace<T>) {
        let transform = &self.plan.transforms[self.level];
        let bins = transform.spectrum_len();
        let block = &history[self.from..][..self.spec.block];
        transform.input(block, &mut spectra[self.newest * bins..][..bins], work);
    }

    /// What all kept blocks of one row contribute to the next block of outputs.
    fn push(&self, spectra: &[T], filter: &[T], pending: &mut [T], work: &mut Workspace<T>) {
        let transform = &self.plan.transforms[self.level];
        transform.accumulate(spectra, self.newest, filter, self.count, work);
        transform.invert(work);
        transform.future(0, &mut pending[self.to..][..self.spec.block], self.add, work);
    }

    /// The next base block of outputs of neighbouring groups leaves the rows.
    fn load_outputs(
        &self,
        groups: &[layout::Lanes],
        pending: &[T],
        seed: &[T],
        delayed: &[Delayed<T>],
        outputs: &mut [T],
    ) {
        let first = groups[0].start;
        let block = outputs.len() / groups.len();
        for (group, outputs) in groups.iter().zip(outputs.chunks_exact_mut(block)) {
            let rows = &pending[(group.start - first) * self.stride..];
            kernels::from_rows(self.plan.isa, rows, self.stride, self.to, group.rows, outputs);
            if self.clock < self.seeded {
                add_rows(&seed[group.start * self.seeded..], self.seeded, self.clock, group.rows, outputs);
            }
            delayed.iter().for_each(|level| level.add(self.clock, group, outputs));
        }
    }
}
