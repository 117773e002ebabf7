//! The mutable half: one stream's inputs, pending outputs and kept spectra, advanced position by position.
//!
//! The invariant: the effect of every past input on the future is either already in the pending outputs, or its block
//! is still to be pushed by the schedule; never both, never neither.

mod delayed;
mod rows;
mod seed;
mod state;
mod tile;

pub use state::State;

use crate::buffer::Buffer;
use crate::error::{Error, tuple};
use crate::kernels::{self, LANES};
use crate::plan::{Lanes, Plan, Transforms, check_len, size};
use crate::pool;
use crate::real::Real;
use crate::schedule::{Execution, Level};
use crate::transform::{Workspace, spread};
use crate::transpose;
use crate::watch;
use delayed::Delayed;
use seed::Seed;
use std::sync::Arc;

/// One stream (or batch of streams) under a plan.
pub struct Cache<T: Real> {
    plan: Arc<Plan<T>>,
    lanes: Arc<Lanes<T>>,
    execution: Execution,
    /// From one row of history or of pending outputs to the next, or from one 16 rows to the next where they go side
    /// by side; 0 without tiles.
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
    /// `[input row][stride]`: rows here and below in the order of the groups. Side by side `[source][ring][16]`.
    history: Buffer<T>,
    /// Per level `[input row][slot][bins]`, side by side `[source][slot][bins][2][16]`: [`Layout::slots`] of them.
    spectra: Vec<Buffer<T>>,
    /// `[output row][stride]`, side by side `[output group][ring][16]`.
    pending: Buffer<T>,
    seed: Seed<T>,
    /// The levels above the first where latency is to be smooth.
    delayed: Vec<Delayed<T>>,
    workspaces: Vec<Workspace<T>>,
}

/// Where one row stands in a buffer: `count` values, every `step`-th from `first` on.
#[derive(Clone, Copy)]
struct Strip {
    first: usize,
    step: usize,
    count: usize,
}

impl Strip {
    fn row(row: usize, stride: usize) -> Self {
        Self { first: row * stride, step: 1, count: stride }
    }

    fn lane(group: usize, lane: usize, stride: usize) -> Self {
        Self { first: group * stride + lane, step: LANES, count: stride / LANES }
    }

    /// All lanes of the group whose first lane this is.
    fn whole_group(self) -> Self {
        Self { first: self.first, step: 1, count: self.count * self.step }
    }

    fn of<T>(self, buffer: &[T]) -> impl Iterator<Item = &T> {
        buffer.get(self.first..).unwrap_or_default().iter().step_by(self.step).take(self.count)
    }

    fn of_mut<T>(self, buffer: &mut [T]) -> impl Iterator<Item = &mut T> {
        buffer.get_mut(self.first..).unwrap_or_default().iter_mut().step_by(self.step).take(self.count)
    }
}

impl<T: Real> Cache<T> {
    pub(crate) fn new(plan: &Arc<Plan<T>>, shape: &[usize], capacity: Option<usize>) -> Result<Self, Error> {
        let lanes = plan.lanes(shape)?;
        let execution = plan.execution_for(capacity);
        let layout = &lanes.layout;
        let block = if execution.base == 0 { execution.ring } else { execution.base };
        let outputs = if execution.base == 0 { 1 } else { execution.base };
        check_memory(execution.reals(layout.input_rows as f64, layout.output_rows as f64) * T::BYTES as f64)?;
        let (rows_in, rows_out, width) = match plan.transforms {
            Transforms::Rows(_) => (layout.input_rows, layout.output_rows, 1),
            Transforms::Lanes(_) => (layout.sources(), layout.groups.len(), LANES),
        };
        let stride = if execution.levels.is_empty() { 0 } else { spread(size(&[execution.ring, width])?) };
        let workers = if execution.levels.is_empty() { 1 } else { plan.workers() };
        let kept = |(k, level): (usize, &Level)| {
            Buffer::new(size(&[rows_in, lanes.layout.slots(level), plan.transforms.spectrum_len(k)])?, T::ZERO)
        };
        Ok(Self {
            inputs: Buffer::new(size(&[layout.inputs.len(), block, LANES])?, T::ZERO)?,
            outputs: Buffer::new(size(&[layout.groups.len(), outputs, LANES])?, T::ZERO)?,
            history: Buffer::new(size(&[rows_in, stride])?, T::ZERO)?,
            spectra: execution.levels.iter().enumerate().map(kept).collect::<Result<_, _>>()?,
            pending: Buffer::new(size(&[rows_out, stride])?, T::ZERO)?,
            seed: Seed::none(),
            delayed: match execution.smooth {
                true => Delayed::levels(plan, &execution, &lanes)?,
                false => Vec::new(),
            },
            workspaces: (0..workers).map(|_| plan.transforms.workspace(&execution.levels)).collect::<Result<_, _>>()?,
            plan: plan.clone(),
            lanes,
            execution,
            stride,
            capacity,
            origin: 0,
            clock: 0,
            due: false,
        })
    }

    /// Puts the effect of a prompt of `len` positions, `seed [output row][reach]`, in front of everything.
    pub(crate) fn start_after(&mut self, len: usize, seed: &[T], reach: usize) -> Result<(), Error> {
        self.origin = len;
        self.set_seed(seed, reach)?;
        self.load_block();
        Ok(())
    }

    /// Takes the effect of a prompt on clock times `0..reach`. As much of it as the ring of pending outputs holds at
    /// the start goes there, where it takes no room of its own.
    fn set_seed(&mut self, seed: &[T], reach: usize) -> Result<(), Error> {
        let lanes = self.lanes.clone();
        let layout = &lanes.layout;
        // The lowest level of a smooth schedule writes where other levels add.
        let rings = !self.execution.levels.is_empty() && !self.execution.smooth;
        let from = if rings { reach.min(self.execution.ring) } else { 0 };
        let block = self.clock.checked_div(self.execution.base).unwrap_or(0) * self.execution.base;
        self.seed = Seed::new(layout.output_rows, from, reach)?;
        for (g, group) in layout.outputs.iter().enumerate() {
            for lane in 0..group.rows {
                watch::poll(g, layout.groups.len());
                let (now, later) = seed[(group.row + lane) * reach..][..reach].split_at(from);
                self.seed.row_mut(group.start + lane).copy_from_slice(later);
                let pending = self.pending_strip(g, lane).of_mut(&mut self.pending);
                // Columns of blocks that are done belong to the ring's next turn.
                pending.zip(now).skip(block).for_each(|(pending, seed)| *pending = *pending + *seed);
            }
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
                    copy_lanes(run, &mut out[group.row..], group.rows);
                } else {
                    let rows = &mut out[group.row * m..(group.row + group.rows) * m];
                    transpose::to_rows(self.plan.isa, run, rows, m, done, group.rows);
                }
            }
            self.clock += r;
            done += r;
            self.due = (k + r == base || self.execution.smooth) && !self.execution.levels.is_empty();
            watch::poll(done, m);
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
                copy_lanes(&u[group.row..], run, group.rows);
            } else {
                let rows = &u[group.row * m..(group.row + group.rows) * m];
                transpose::from_rows(self.plan.isa, rows, m, done, group.rows, run);
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
        // A clock is read at every poll.
        let rest = 1 + (1 << 13) / (ring.saturating_mul(self.lanes.layout.groups.len()) + 1);
        for done in 0..m {
            if done % rest == 0 {
                watch::poll(done, m);
            }
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
                    out[(lanes.row + lane) * m + done] = *sum + self.seed.at(lanes.start + lane, self.clock);
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
        for (g, group) in layout.outputs.iter().enumerate() {
            let outputs = &mut self.outputs[g * base * LANES..][..base * LANES];
            match self.plan.transforms {
                _ if !levels => outputs.fill(T::ZERO),
                Transforms::Rows(_) => {
                    outputs.fill(T::ZERO);
                    let rows = &self.pending[group.start * self.stride..];
                    transpose::from_rows(self.plan.isa, rows, self.stride, column, group.rows, outputs);
                }
                Transforms::Lanes(_) => {
                    outputs.copy_from_slice(&self.pending[g * self.stride + column * LANES..][..base * LANES]);
                }
            }
            self.seed.add(start, group, outputs);
            for level in &self.delayed {
                match self.plan.transforms {
                    Transforms::Rows(_) => level.add(start, group, outputs),
                    Transforms::Lanes(_) => level.add_lanes(start, g, outputs),
                }
            }
        }
    }

    /// Where the history of lane `lane` of input group `group` stands.
    fn history_strip(&self, group: usize, lane: usize) -> Strip {
        self.input_strip(group, lane, self.stride)
    }

    /// Where its kept spectra stand at level `level`.
    fn spectra_strip(&self, level: usize, group: usize, lane: usize) -> Strip {
        self.input_strip(group, lane, self.kept(level))
    }

    /// Reals of kept spectra at a level: of one row, or of 16.
    fn kept(&self, level: usize) -> usize {
        self.lanes.layout.slots(&self.execution.levels[level]) * self.plan.transforms.spectrum_len(level)
    }

    fn input_strip(&self, group: usize, lane: usize, stride: usize) -> Strip {
        let layout = &self.lanes.layout;
        match self.plan.transforms {
            Transforms::Rows(_) => Strip::row(layout.inputs[group].start + lane, stride),
            Transforms::Lanes(_) => {
                let (source, lane) = layout.source(group, lane);
                Strip::lane(source, lane, stride)
            }
        }
    }

    /// Where the pending outputs of lane `lane` of output group `group` stand.
    fn pending_strip(&self, group: usize, lane: usize) -> Strip {
        self.output_strip(group, lane, self.stride)
    }

    /// Where its outputs of delayed level `k + 1` stand.
    fn delayed_strip(&self, k: usize, group: usize, lane: usize) -> Strip {
        self.output_strip(group, lane, self.delayed[k].len)
    }

    fn output_strip(&self, group: usize, lane: usize, stride: usize) -> Strip {
        match self.plan.transforms {
            Transforms::Rows(_) => Strip::row(self.lanes.layout.outputs[group].start + lane, stride),
            Transforms::Lanes(_) => Strip::lane(group, lane, stride),
        }
    }

    /// An empty cache of the same shape and capacity.
    pub fn fresh(&self) -> Result<Self, Error> {
        Self::new(&self.plan, self.input_shape(), self.capacity)
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
        self.seed.values.fill(T::ZERO);
        for level in &mut self.delayed {
            level.out.fill(T::ZERO);
            (level.tile, level.done) = (0, 0);
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
        let state = [&self.inputs, &self.outputs, &self.history, &self.pending, &self.seed.values];
        let later = self.delayed.iter().map(|level| &level.out);
        state.into_iter().chain(&self.spectra).chain(later).map(Buffer::bytes).sum::<usize>()
            + self.delayed.iter().map(|level| &level.work).chain(&self.workspaces).map(Workspace::bytes).sum::<usize>()
    }
}

/// Positions times groups of a direct part below which waking a second thread costs more than it saves.
const PARALLEL_ADVANCE: usize = 1 << 11;

/// Refuses what no machine has room for before any of it is touched.
fn check_memory(bytes: f64) -> Result<(), Error> {
    if bytes > (1u64 << 44) as f64 {
        return Err(Error::Memory { bytes: bytes as usize });
    }
    Ok(())
}

/// The first `rows` lanes, most often all 16: as one vector, not by a call.
#[inline(always)]
fn copy_lanes<T: Copy>(from: &[T], to: &mut [T], rows: usize) {
    match (from.first_chunk::<LANES>(), to.first_chunk_mut::<LANES>()) {
        (Some(from), Some(to)) if rows == LANES => *to = *from,
        _ => to[..rows].copy_from_slice(&from[..rows]),
    }
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
