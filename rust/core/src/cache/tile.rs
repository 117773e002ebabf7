//! One tile: what the kept blocks of a level contribute to its next block of outputs.

use super::units::Units;
use super::{Cache, SlicedLevel, prompt};
use crate::bank::BankLevel;
use crate::buffer::Buffer;
use crate::execution::{Level, TileIndex};
use crate::layout::Layout;
use crate::pool;
use crate::real::Real;
use crate::transform::{Prefetch, Products, Tile, Work, Write};

/// Output values below which waking a second thread costs more than it saves.
const PARALLEL_TILE: usize = 1 << 13;

/// Prefetch when a level's filter spectra exceed `FAR` bytes and its block is at most `NEAR` positions.
const FAR: usize = 1 << 21;
const NEAR: usize = 2048;

/// A tile that is due.
struct DueTile<'a, T: Real> {
    layout: &'a Layout,
    bank: &'a BankLevel<T>,
    level: Level,
    index: TileIndex,
    /// Reals of a base block of one unit, and the column of the finished one.
    base: usize,
    base_from: usize,
    clock: usize,
}

/// What a tile reads and writes.
struct Buffers<'a, T: Real> {
    inputs: &'a Units<T>,
    history: &'a mut Units<T>,
    spectra: &'a mut Units<T>,
    pending: &'a mut Units<T>,
    outputs: &'a mut Units<T>,
    passing: &'a mut Buffer<T>,
    tail: &'a prompt::PromptTail<T>,
    sliced: &'a [SlicedLevel<T>],
}

impl<T: Real> Cache<T> {
    pub(super) fn tile(&mut self) {
        let index = self.execution.due(self.clock);
        let level = self.execution.levels[index.level];
        let (ring, base) = (self.execution.ring, self.execution.base);
        let tile = DueTile {
            layout: &self.layout,
            bank: &self.bank.levels[index.level],
            level,
            index,
            base: base * self.layout.width,
            base_from: (self.clock - base) % ring,
            clock: self.clock,
        };
        let parallel = level.block.saturating_mul(self.layout.output_rows) >= PARALLEL_TILE;
        let work = if parallel { &mut self.work[..] } else { &mut self.work[..1] };
        let buffers = Buffers {
            inputs: &self.inputs,
            history: &mut self.history,
            spectra: &mut self.spectra[index.level],
            pending: &mut self.pending,
            outputs: &mut self.outputs,
            passing: &mut self.passing,
            tail: &self.tail,
            sliced: &self.sliced,
        };
        if self.layout.one_to_one { tile.in_one_pass(buffers, work) } else { tile.in_two_passes(buffers, work) }
    }
}

impl<T: Real> DueTile<'_, T> {
    /// Each unit of inputs feeds one unit of outputs: transformed, multiplied and transformed back while it is at hand.
    fn in_one_pass(&self, buffers: Buffers<T>, work: &mut [Work<T>]) {
        let count = self.layout.groups.len();
        let Buffers { inputs, history, spectra, pending, outputs, tail, sliced, .. } = buffers;
        let pitches = (history.pitch(), pending.pitch());
        let bytes = count * self.index.count * self.bank.len * T::BYTES;
        let far = self.layout.width > 1 && self.level.block <= NEAR && bytes >= FAR;
        let rings = history.iter_mut(count).zip(spectra.iter_mut(count)).zip(pending.iter_mut(count));
        let jobs = rings.zip(outputs.iter_mut(count)).enumerate();
        pool::for_each(jobs, work, |(g, (((history, slots), pending), outputs)), work| {
            self.keep(inputs.unit(g), history);
            let (input, out) = (self.block(history, self.index.from), self.block_mut(pending, self.index.to));
            let mut ahead = if far { self.next(g, input, out, pitches) } else { Prefetch::nothing() };
            let tile = Tile {
                input,
                slots,
                newest: self.index.newest,
                filters: self.filters(g),
                count: self.index.count,
                shared: self.bank.shared,
                out,
                write: self.write(),
            };
            self.bank.transform.tile(tile, work, &mut ahead);
            self.load(g, pending, tail, sliced, outputs);
        });
    }

    /// Inputs that several units of outputs read are transformed first.
    fn in_two_passes(&self, buffers: Buffers<T>, work: &mut [Work<T>]) {
        let (ins, outs) = (self.layout.inputs.len(), self.layout.outputs.len());
        let Buffers { inputs, history, spectra, pending, outputs, passing, tail, sliced } = buffers;
        let len = self.bank.transform.spectrum_len();
        let newest = if self.level.kept() == 0 { 0 } else { self.index.newest };
        let (slots, pitch): (&mut [T], usize) = match self.level.kept() {
            0 => (passing, len),
            _ => (spectra.all_mut(), self.level.kept() * len),
        };
        let sources = history.iter_mut(ins).zip(slots.chunks_exact_mut(pitch)).enumerate();
        pool::for_each(sources, work, |(i, (history, slots)), work| {
            self.keep(inputs.unit(i), history);
            let spectrum = &mut slots[newest * len..][..len];
            self.bank.transform.input(self.block(history, self.index.from), spectrum, work);
        });
        let slots = &*slots;
        let sinks = pending.iter_mut(outs).zip(outputs.iter_mut(outs)).enumerate();
        pool::for_each(sinks, work, |(g, (pending, outputs)), work| {
            let products = Products {
                slots: &slots[self.layout.groups[g].input * pitch..][..pitch],
                newest,
                filters: self.filters(g),
                count: self.index.count,
                shared: self.bank.shared,
            };
            let out = self.block_mut(pending, self.index.to);
            self.bank.transform.future(&products, out, self.write(), work);
            self.load(g, pending, tail, sliced, outputs);
        });
    }

    fn write(&self) -> Write {
        if self.index.add { Write::Add } else { Write::Set }
    }

    fn filters(&self, group: usize) -> &[T] {
        self.bank.partitions(self.layout.groups[group].filter, 0)
    }

    /// The finished base block of one unit becomes history.
    fn keep(&self, inputs: &[T], history: &mut [T]) {
        history[self.base_from * self.layout.width..][..self.base].copy_from_slice(inputs);
    }

    /// One block of a ring from `column` on.
    fn block<'b>(&self, ring: &'b [T], column: usize) -> &'b [T] {
        &ring[column * self.layout.width..][..self.level.block * self.layout.width]
    }

    fn block_mut<'b>(&self, ring: &'b mut [T], column: usize) -> &'b mut [T] {
        &mut ring[column * self.layout.width..][..self.level.block * self.layout.width]
    }

    /// The next base block of outputs of one unit, from the pending ones.
    fn load(
        &self,
        g: usize,
        pending: &[T],
        tail: &prompt::PromptTail<T>,
        sliced: &[SlicedLevel<T>],
        outputs: &mut [T],
    ) {
        outputs.copy_from_slice(&pending[self.index.to * self.layout.width..][..self.base]);
        prompt::add(outputs, tail.from(g, self.clock));
        sliced.iter().for_each(|level| level.add(self.clock, g, outputs));
    }

    /// Address ranges that this thread's next unit reads and writes; affects speed only.
    fn next(&self, g: usize, input: &[T], out: &[T], pitches: (usize, usize)) -> Prefetch {
        let groups = &self.layout.groups;
        let Some(next) = groups.get(g + 1) else { return Prefetch::nothing() };
        let filters = self.bank.partitions(next.filter, 0);
        let near = groups[g].filter == next.filter || self.bank.shared;
        Prefetch::of([
            (input.as_ptr().wrapping_add(pitches.0), input.len()),
            (filters.as_ptr(), if near { 0 } else { self.index.count * self.bank.len }),
            (out.as_ptr().wrapping_add(pitches.1), out.len()),
        ])
    }
}
