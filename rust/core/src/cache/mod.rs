//! The mutable half: one stream's inputs, pending outputs and kept spectra, advanced position by position.
//!
//! The invariant: the effect of every past input on the future is either already in the pending outputs, or its block
//! is still to be pushed by the schedule; never both, never neither.

mod batch;
mod pending;
mod prompt;
mod sliced;
mod state;
mod tile;
mod units;

pub use state::State;

use crate::bank::Bank;
use crate::buffer::Buffer;
use crate::error::{Error, tuple};
use crate::execution::{Execution, Level};
use crate::isa::Isa;
use crate::kernels::{self, DirectPart, LANES, transpose};
use crate::layout::{Layout, Unit};
use crate::plan::Plan;
use crate::pool;
use crate::real::Real;
use crate::shape::check_len;
use crate::transform::Work;
use crate::watch;
use prompt::PromptTail;
use sliced::SlicedLevel;
use std::sync::Arc;
use units::Units;

/// One stream (or batch of streams) under a plan.
pub struct Cache<T: Real> {
    plan: Arc<Plan<T>>,
    layout: Arc<Layout>,
    bank: Arc<Bank<T>>,
    execution: Execution,
    capacity: Option<usize>,
    /// Prompt positions before the clock began.
    origin: usize,
    clock: usize,
    /// The base block is full and its tile has not run, or slices are due.
    due: bool,
    /// `[input unit][block][width]`: inputs of the base block, or for the direct sum the ring of all that count.
    inputs: Units<T>,
    /// `[output unit][block][width]`: outputs of the base block, completed in place.
    outputs: Units<T>,
    /// `[input unit][ring][width]`.
    history: Units<T>,
    /// Per level `[input unit][slot][bins]`: [`Level::kept`] slots.
    spectra: Vec<Units<T>>,
    /// `[output unit][ring][width]`.
    pending: Units<T>,
    tail: PromptTail<T>,
    /// The levels above the first where latency is to be smooth.
    sliced: Vec<SlicedLevel<T>>,
    /// `[input unit][bins]`: spectra that several outputs read in one tile and that are not kept.
    passing: Buffer<T>,
    work: Vec<Work<T>>,
}

impl<T: Real> Cache<T> {
    pub(crate) fn new(plan: &Arc<Plan<T>>, shape: &[usize], capacity: Option<usize>) -> Result<Self, Error> {
        let (layout, bank) = plan.arrangement(shape)?;
        let execution = plan.execution_for(capacity);
        check_memory(plan.room(&execution, &layout))?;
        let (ins, outs, width) = (layout.inputs.len(), layout.outputs.len(), layout.width);
        let levels = &bank.levels[..execution.levels.len()];
        let kept =
            |(k, level): (usize, &Level)| Units::spectra(ins, width, level.kept(), levels[k].transform.spectrum_len());
        let passing = if layout.one_to_one {
            0
        } else {
            let lens = execution.levels.iter().zip(levels).filter(|(level, _)| level.kept() == 0);
            ins.saturating_mul(lens.map(|(_, bank)| bank.transform.spectrum_len()).max().unwrap_or(0))
        };
        let workers = if levels.is_empty() { 1 } else { plan.workers() };
        let work = || Work::for_all(levels.iter().map(|level| level.transform.work()).collect::<Result<Vec<_>, _>>()?);
        Ok(Self {
            inputs: Units::new(ins, width, execution.block())?,
            outputs: Units::new(outs, width, execution.open())?,
            history: Units::padded(ins, width, execution.columns())?,
            spectra: execution.levels.iter().enumerate().map(kept).collect::<Result<_, _>>()?,
            pending: Units::padded(outs, width, execution.columns())?,
            tail: PromptTail::new(0, width, 0, 0)?,
            sliced: SlicedLevel::all(&execution, &layout, &bank)?,
            passing: Buffer::new(passing, T::ZERO)?,
            work: (0..workers).map(|_| work()).collect::<Result<_, _>>()?,
            plan: plan.clone(),
            layout,
            bank,
            execution,
            capacity,
            origin: 0,
            clock: 0,
            due: false,
        })
    }

    /// Puts the effect of what came before, `len` positions, in front of everything: `tail [output row][reach]`.
    pub(crate) fn start_after(&mut self, len: usize, tail: &[T], reach: usize) -> Result<(), Error> {
        self.origin = len;
        self.set_tail(tail, reach)?;
        self.load_block();
        Ok(())
    }

    /// Takes the effect of a prompt on clock times `0..reach`. As much of it as the ring of pending outputs holds at
    /// the start goes there, where it takes no room of its own.
    fn set_tail(&mut self, tail: &[T], reach: usize) -> Result<(), Error> {
        // The lowest level of a smooth schedule writes where other levels add.
        let from = if self.execution.smooth() { 0 } else { reach.min(self.execution.columns()) };
        let block = self.clock.checked_div(self.execution.base).unwrap_or(0) * self.execution.base;
        let layout = self.layout.clone();
        self.tail = PromptTail::new(layout.outputs.len(), layout.width, from, reach)?;
        for (g, unit) in layout.outputs.iter().enumerate() {
            watch::poll(g, layout.outputs.len());
            for lane in 0..unit.rows {
                let (now, later) = tail[(unit.row + lane) * reach..][..reach].split_at(from);
                self.tail.values.row_mut((g, lane)).zip(later).for_each(|(to, v)| *to = *v);
                // Columns of blocks that are done belong to the ring's next turn.
                let pending = self.pending.row_mut((g, lane)).zip(now).skip(block);
                pending.for_each(|(pending, v)| *pending = *pending + *v);
            }
        }
        Ok(())
    }

    /// The output at this position for the input `u (*C,)` at this position, into `out`.
    ///
    /// Never runs a tile: if one has become due, [`finish`](Self::finish) or the next call runs it.
    pub fn step(&mut self, u: &[T], out: &mut [T]) -> Result<(), Error> {
        if u.len() != self.layout.input_rows {
            let got = format_args!("{} values", u.len());
            return Err(Error::shape("u", tuple(&self.layout.input_shape), got));
        }
        self.run(u, 1, out)
    }

    /// The outputs for a block of `m` known inputs `(*C, m)`: the same as `m` steps.
    pub fn extend(&mut self, u: &[T], m: usize, out: &mut [T]) -> Result<(), Error> {
        check_len("u", u.len(), self.layout.input_rows, &self.layout.input_shape, m)?;
        self.run(u, m, out)
    }

    fn run(&mut self, u: &[T], m: usize, out: &mut [T]) -> Result<(), Error> {
        check_len("out", out.len(), self.layout.output_rows, &self.layout.output_shape, m)?;
        if let Some(remaining) = self.remaining()
            && m > remaining
        {
            return Err(Error::Capacity { needed: m, remaining });
        }
        self.finish();
        if self.layout.output_rows == 0 {
            self.clock += m;
        } else if self.execution.base == 0 {
            self.run_direct(u, m, out);
        } else {
            self.run_blocks(u, m, out);
        }
        Ok(())
    }

    fn run_blocks(&mut self, u: &[T], m: usize, out: &mut [T]) {
        let (base, width) = (self.execution.base, self.layout.width);
        let mut done = 0;
        while done < m {
            let k = self.clock % base;
            let r = (base - k).min(m - done);
            watch::part(done, done + r, m, || {
                self.finish();
                self.gather(u, m, done, k, r);
                self.advance(k, k + r);
            });
            if width == 1 && m == 1 {
                let outputs = self.outputs.all()[k..].iter().step_by(self.outputs.pitch());
                outputs.zip(&self.layout.outputs).for_each(|(from, unit)| out[unit.row] = *from);
            } else {
                for (g, unit) in self.layout.outputs.iter().enumerate() {
                    let run = &self.outputs.unit(g)[k * width..(k + r) * width];
                    scatter(self.plan.isa, width, run, unit, out, m, done);
                }
            }
            self.clock += r;
            done += r;
            self.due = (k + r == base || self.execution.smooth()) && !self.execution.levels.is_empty();
        }
    }

    /// Inputs `done..done + r` of each row to positions `k..k + r` of the base block.
    fn gather(&mut self, u: &[T], m: usize, done: usize, k: usize, r: usize) {
        let layout = &self.layout;
        let width = layout.width;
        if width == 1 && m == 1 {
            let pitch = self.inputs.pitch();
            let inputs = self.inputs.all_mut()[k..].iter_mut().step_by(pitch);
            return inputs.zip(&layout.inputs).for_each(|(to, unit)| *to = u[unit.row]);
        }
        for (g, unit) in layout.inputs.iter().enumerate() {
            let run = &mut self.inputs.unit_mut(g)[k * width..(k + r) * width];
            let rows = &u[unit.row * m..(unit.row + unit.rows) * m];
            if layout.replicated {
                for (lanes, v) in run.chunks_exact_mut(width).zip(&rows[done..]) {
                    lanes.fill(*v);
                }
            } else if m == 1 {
                copy_rows(rows, run, width);
            } else if width == 1 {
                run.copy_from_slice(&rows[done..][..r]);
            } else {
                transpose::from_rows(self.plan.isa, rows, m, done, unit.rows, run);
            }
        }
    }

    /// The direct part of the base block: positions `from..to` become final.
    fn advance(&mut self, from: usize, to: usize) {
        let (base, width, isa) = (self.execution.base, self.layout.width, self.plan.isa);
        let layout = &*self.layout;
        let part = |groups| DirectPart {
            groups,
            taps: &self.bank.taps,
            lags: self.bank.lags,
            inputs: self.inputs.all(),
            block: base,
            width,
        };
        let heavy = (to - from) * layout.groups.len() >= PARALLEL_ADVANCE;
        if self.work.len() == 1 || !heavy {
            return part(&layout.groups).complete(isa, self.outputs.all_mut(), from..to);
        }
        let share = layout.groups.len().div_ceil(self.work.len());
        let jobs = layout.groups.chunks(share).zip(self.outputs.all_mut().chunks_mut(share * base * width));
        pool::for_each(jobs, &mut self.work, |(groups, outputs), _| part(groups).complete(isa, outputs, from..to));
    }

    fn run_direct(&mut self, u: &[T], m: usize, out: &mut [T]) {
        let (ring, width, isa) = (self.execution.ring, self.layout.width, self.plan.isa);
        let mut sum = [T::ZERO; LANES];
        // A clock is read at every poll.
        let rest = 1 + (1 << 13) / (ring.saturating_mul(self.layout.groups.len()) + 1);
        for done in 0..m {
            if done % rest == 0 {
                watch::poll(done, m);
            }
            let k = self.clock % ring;
            self.gather(u, m, done, k, 1);
            let lags = ring.min(self.clock + 1);
            for (g, (group, unit)) in self.layout.groups.iter().zip(&self.layout.outputs).enumerate() {
                let taps = &self.bank.taps[group.filter * self.bank.lags * width..][..self.bank.lags * width];
                let (newer, older) = self.inputs.unit(group.input).split_at((k + 1) * width);
                if width == 1 {
                    kernels::direct_sum_row(isa, &taps[self.bank.lags - lags..], newer, older, &mut sum[0]);
                } else {
                    kernels::direct_sum(isa, &taps[..lags * width], newer, older, &mut sum);
                }
                prompt::add(&mut sum[..width], self.tail.from(g, self.clock));
                for (lane, sum) in sum.iter().enumerate().take(unit.rows) {
                    out[(unit.row + lane) * m + done] = *sum;
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
        let level = self.execution.levels[self.execution.due(self.clock).level];
        level.block.saturating_mul(self.layout.output_rows)
    }

    /// Runs the tile that is due, if one is, or the slices of tiles that are due later.
    pub fn finish(&mut self) {
        if !std::mem::take(&mut self.due) || self.remaining() == Some(0) {
            return;
        }
        let block_ends = self.clock.is_multiple_of(self.execution.base);
        for k in 0..self.sliced.len() {
            self.slice(k, self.clock);
        }
        if block_ends {
            self.tile();
        }
    }

    /// Starts the base block at the present clock from the pending outputs.
    fn load_block(&mut self) {
        if self.execution.base == 0 {
            return;
        }
        let start = self.clock / self.execution.base * self.execution.base;
        let len = self.execution.base * self.layout.width;
        for g in 0..self.layout.outputs.len() {
            let outputs = self.outputs.unit_mut(g);
            match self.execution.columns() {
                0 => outputs.fill(T::ZERO),
                ring => outputs.copy_from_slice(&self.pending.unit(g)[start % ring * self.layout.width..][..len]),
            }
            prompt::add(outputs, self.tail.from(g, start));
            self.sliced.iter().for_each(|level| level.add(start, g, outputs));
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
        self.row_buffers(Side::Input).for_each(Units::clear);
        self.row_buffers(Side::Output).for_each(Units::clear);
        for level in &mut self.sliced {
            (level.tile, level.done) = (0, 0);
        }
    }

    /// The plan this cache runs under.
    pub fn plan(&self) -> &Arc<Plan<T>> {
        &self.plan
    }

    /// Shape of one input position.
    pub fn input_shape(&self) -> &[usize] {
        &self.layout.input_shape
    }

    /// Shape of one output position.
    pub fn output_shape(&self) -> &[usize] {
        &self.layout.output_shape
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
        let units = [&self.inputs, &self.outputs, &self.history, &self.pending, &self.tail.values];
        let sliced = self.sliced.iter().map(|level| level.out.bytes() + level.work.bytes());
        units.into_iter().chain(&self.spectra).map(Units::bytes).sum::<usize>()
            + self.passing.bytes()
            + self.work.iter().map(Work::bytes).chain(sliced).sum::<usize>()
    }

    /// All that is kept row by row: of inputs, or of outputs.
    fn row_buffers(&mut self, side: Side) -> Box<dyn Iterator<Item = &mut Units<T>> + '_> {
        match side {
            Side::Input => Box::new([&mut self.inputs, &mut self.history].into_iter().chain(&mut self.spectra)),
            Side::Output => {
                let later = self.sliced.iter_mut().map(|level| &mut level.out);
                let now = [&mut self.outputs, &mut self.pending, &mut self.tail.values];
                Box::new(now.into_iter().chain(later))
            }
        }
    }
}

/// Whose rows a buffer has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Input,
    Output,
}

/// Positions times units of a direct part below which waking a second thread costs more than it saves.
const PARALLEL_ADVANCE: usize = 1 << 11;

/// Refuses what no machine has room for before any of it is touched.
fn check_memory(bytes: f64) -> Result<(), Error> {
    if bytes > (1u64 << 44) as f64 {
        return Err(Error::Memory { bytes: bytes as usize });
    }
    Ok(())
}

/// Up to 16 rows of one value each to lanes, most often all 16: as one vector, not by a call.
#[inline(always)]
fn copy_rows<T: Copy>(from: &[T], to: &mut [T], width: usize) {
    match (from.first_chunk::<LANES>(), to.first_chunk_mut::<LANES>()) {
        (Some(from), Some(to)) if width == LANES => *to = *from,
        _ => to[..from.len()].copy_from_slice(from),
    }
}

/// A run `[time][width]` of one unit to columns `done..` of its rows of `m` values.
fn scatter<T: Real>(isa: Isa, width: usize, run: &[T], unit: &Unit, out: &mut [T], m: usize, done: usize) {
    let rows = &mut out[unit.row * m..(unit.row + unit.rows) * m];
    if m == 1 {
        match (run.first_chunk::<LANES>(), rows.first_chunk_mut::<LANES>()) {
            (Some(run), Some(rows)) => *rows = *run,
            _ => rows.copy_from_slice(&run[..unit.rows]),
        }
    } else if width == 1 {
        rows[done..][..run.len()].copy_from_slice(run);
    } else {
        transpose::to_rows(isa, run, rows, m, done, unit.rows);
    }
}
