//! One tile: what the kept blocks of a level contribute to its next block of outputs.

use super::seed::Seed;
use super::{Cache, Delayed};
use crate::ahead::Ahead;
use crate::kernels::LANES;
use crate::lanes::{LaneTransform, Products};
use crate::layout;
use crate::plan::{Lanes, Plan, Transforms};
use crate::pool;
use crate::real::Real;
use crate::schedule::Level;
use crate::transform::{Transform, Workspace};
use crate::transpose;
use std::iter::repeat_n;

/// Output values below which waking a second thread costs more than it saves.
const PARALLEL_TILE: usize = 1 << 13;

/// Bytes of a level's filter spectra from which on they have to be fetched from afar at every tile, and its longest block
/// whose data has room in a core's own cache beside what the core works on.
const FAR: usize = 1 << 21;
const NEAR: usize = 2048;

/// A tile that is due.
struct Tile<'a, T: Real> {
    plan: &'a Plan<T>,
    lanes: &'a Lanes<T>,
    level: usize,
    spec: Level,
    base: usize,
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
}

impl<T: Real> Cache<T> {
    pub(super) fn due_level(&self) -> usize {
        if self.execution.smooth {
            return 0;
        }
        let fires = |level: &Level| self.clock.is_multiple_of(level.block);
        self.execution.levels.iter().rposition(fires).expect("the base block divides the clock")
    }

    pub(super) fn tile(&mut self) {
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
            base,
            stride: self.stride,
            from: (clock - n) % ring,
            to: clock % ring,
            base_from: (clock - base) % ring,
            newest: if self.execution.smooth { clock / n - 1 } else { index - 1 } % spec.parts,
            count: index.min(spec.parts),
            add: spec.fan.is_some() && !self.execution.smooth,
            clock,
        };
        let parallel = n.saturating_mul(self.lanes.layout.output_rows) >= PARALLEL_TILE;
        let workspaces = if parallel { &mut self.workspaces[..] } else { &mut self.workspaces[..1] };
        let buffers = Buffers {
            inputs: &self.inputs,
            history: &mut self.history,
            spectra: &mut self.spectra[level],
            pending: &mut self.pending,
            outputs: &mut self.outputs,
            seed: &self.seed,
            delayed: &self.delayed,
        };
        match &self.plan.transforms {
            Transforms::Rows(transforms) => tile.by_rows(&transforms[level], buffers, workspaces),
            Transforms::Lanes(transforms) => tile.side_by_side(&transforms[level], buffers, workspaces),
        }
    }
}

/// What a tile reads and writes.
struct Buffers<'a, T: Real> {
    inputs: &'a [T],
    history: &'a mut [T],
    spectra: &'a mut [T],
    pending: &'a mut [T],
    outputs: &'a mut [T],
    seed: &'a Seed<T>,
    delayed: &'a [Delayed<T>],
}

impl<T: Real> Tile<'_, T> {
    /// 16 rows at a time.
    fn side_by_side(&self, transform: &LaneTransform<T>, buffers: Buffers<T>, workspaces: &mut [Workspace<T>]) {
        let layout = &self.lanes.layout;
        let Buffers { inputs, history, spectra, pending, outputs, seed, delayed } = buffers;
        let len = transform.spectrum_len();
        let (block, kept) = (self.base * LANES, layout.slots(&self.spec) * len);
        let packed = if layout.packed { LANES } else { 1 };
        let keep = |inputs: &[T], history: &mut [T]| {
            let base = &mut history[self.base_from * LANES..][..block];
            if layout.packed {
                for (lane, inputs) in inputs.chunks_exact(block).enumerate() {
                    let inputs = inputs.iter().step_by(LANES);
                    base[lane..].iter_mut().step_by(LANES).zip(inputs).for_each(|(to, from)| *to = *from);
                }
            } else {
                base.copy_from_slice(inputs);
            }
        };
        let push = |g: usize, spectra: &[T], pending: &mut [T], work: &mut Workspace<T>| {
            let group = layout.groups[g];
            let products = Products {
                slots: spectra,
                newest: self.newest,
                filters: self.lanes.filter_spectra(self.plan, self.level, group.filter),
                count: self.count,
                len,
                lane: layout.packed.then(|| layout.source(group.input, 0).1),
            };
            transform.future(&products, &mut work.lanes, &mut pending[self.to * LANES..], self.add);
        };
        let load = |g: usize, pending: &[T], outputs: &mut [T]| {
            outputs.copy_from_slice(&pending[self.to * LANES..][..block]);
            seed.add(self.clock, &layout.outputs[g], outputs);
            delayed.iter().for_each(|level| level.add_lanes(self.clock, g, outputs));
        };
        let sources = inputs.chunks(packed * block).zip(history.chunks_exact_mut(self.stride));
        let sinks = pending.chunks_exact_mut(self.stride).zip(outputs.chunks_exact_mut(block)).enumerate();
        if layout.one_to_one && !layout.packed {
            let spectra = Rows::new(spectra, repeat_n(1, layout.groups.len()), kept);
            let far = self.spec.block <= NEAR && layout.groups.len() * self.count * len * T::BYTES >= FAR;
            let jobs = sources.zip(spectra).zip(sinks);
            pool::for_each(jobs, workspaces, |(((inputs, history), spectra), (g, (pending, outputs))), work| {
                keep(inputs, history);
                let filters = |g: usize| self.lanes.filter_spectra(self.plan, self.level, layout.groups[g].filter);
                let (block, out) = (&history[self.from * LANES..], &mut pending[self.to * LANES..]);
                // This thread's next group follows this one in memory.
                let mut ahead = if far && g + 1 < layout.groups.len() {
                    let (reals, next) = (self.spec.block * LANES, filters(g + 1));
                    let after = |at: *const T| at.wrapping_add(self.stride);
                    let shared = layout.groups[g].filter == layout.groups[g + 1].filter;
                    Ahead::of([
                        (after(block.as_ptr()), reals),
                        (next.as_ptr(), if shared { 0 } else { self.count * len }),
                        (after(out.as_ptr()), reals),
                    ])
                } else {
                    Ahead::nothing()
                };
                let (z, filters) = (&mut work.lanes, filters(g));
                transform.tile(block, spectra, self.newest, filters, self.count, z, out, self.add, &mut ahead);
                load(g, pending, outputs);
            });
        } else {
            let jobs = sources.zip(spectra.chunks_exact_mut(kept));
            pool::for_each(jobs, workspaces, |((inputs, history), spectra), _| {
                keep(inputs, history);
                transform.input(&history[self.from * LANES..], &mut spectra[self.newest * len..][..len]);
            });
            pool::for_each(sinks, workspaces, |(g, (pending, outputs)), work| {
                let source = layout.source(layout.groups[g].input, 0).0;
                push(g, &spectra[source * kept..][..kept], pending, work);
                load(g, pending, outputs);
            });
        }
    }

    /// Row by row.
    fn by_rows(&self, transform: &Transform<T>, buffers: Buffers<T>, workspaces: &mut [Workspace<T>]) {
        let layout = &self.lanes.layout;
        let Buffers { inputs, history, spectra, pending, outputs, seed, delayed } = buffers;
        let bundle = layout.bundle;
        let block = self.base * LANES;
        let kept = layout.slots(&self.spec) * transform.spectrum_len();
        let row_counts = |groups: &[layout::Lanes]| groups.iter().map(|l| l.rows).sum::<usize>();
        let outputs = outputs.chunks_mut(bundle * block);
        let pending = Rows::new(pending, layout.outputs.chunks(bundle).map(row_counts), self.stride);
        let sinks = layout.outputs.chunks(bundle).zip(outputs.zip(pending)).enumerate();
        if layout.one_to_one {
            let spectra = Rows::new(spectra, layout.inputs.chunks(bundle).map(row_counts), kept);
            let history = Rows::new(history, layout.inputs.chunks(bundle).map(row_counts), self.stride);
            let sources = inputs.chunks(bundle * block).zip(history.zip(spectra));
            let jobs = sources.zip(sinks);
            pool::for_each(
                jobs,
                workspaces,
                |((inputs, (history, spectra)), (i, (groups, (outputs, pending)))), work| {
                    let first = groups[0].start;
                    let mut single = std::mem::take(&mut work.single);
                    for (group, inputs) in groups.iter().zip(inputs.chunks_exact(block)) {
                        let history = &mut history[(group.start - first) * self.stride..][..group.rows * self.stride];
                        self.keep_inputs(history, inputs);
                    }
                    for lane in 0..groups[0].rows {
                        let filter = self.filter_row(i, lane);
                        // Members of a bundle may be of different width.
                        for group in groups.iter().filter(|group| lane < group.rows) {
                            let row = group.start - first + lane;
                            let spectra = if kept == 0 { &mut single[..] } else { &mut spectra[row * kept..][..kept] };
                            self.transform_input(transform, &history[row * self.stride..], spectra, work);
                            self.push(transform, spectra, filter, &mut pending[row * self.stride..], work);
                        }
                    }
                    work.single = single;
                    self.load_outputs(groups, pending, seed, delayed, outputs);
                },
            );
        } else {
            let spectra_rows = Rows::new(spectra, layout.inputs.iter().map(|l| l.rows), kept);
            let history = Rows::new(history, layout.inputs.iter().map(|l| l.rows), self.stride);
            let jobs = inputs.chunks_exact(block).zip(history.zip(spectra_rows));
            pool::for_each(jobs, workspaces, |(inputs, (history, spectra)), work| {
                self.keep_inputs(history, inputs);
                for (history, spectra) in history.chunks_exact(self.stride).zip(spectra.chunks_exact_mut(kept)) {
                    self.transform_input(transform, history, spectra, work);
                }
            });
            pool::for_each(sinks, workspaces, |(i, (groups, (outputs, pending))), work| {
                let first = groups[0].start;
                let sources = &layout.groups[i * bundle..];
                for lane in 0..groups[0].rows {
                    let filter = self.filter_row(i, lane);
                    for (group, source) in groups.iter().zip(sources).filter(|(group, _)| lane < group.rows) {
                        let row = layout.inputs[source.input].start + layout.input_row(source.input, lane);
                        let pending = &mut pending[(group.start - first + lane) * self.stride..];
                        self.push(transform, &spectra[row * kept..][..kept], filter, pending, work);
                    }
                }
                self.load_outputs(groups, pending, seed, delayed, outputs);
            });
        }
    }

    /// Spectra of the filter row of lane `lane` of a bundle.
    fn filter_row(&self, bundle: usize, lane: usize) -> &[T] {
        let layout = &self.lanes.layout;
        let group = layout.groups[bundle * layout.bundle].filter;
        self.lanes.filter_spectra(self.plan, self.level, layout.filter_row(group, lane))
    }

    /// The finished base block of one group becomes history.
    fn keep_inputs(&self, history: &mut [T], inputs: &[T]) {
        let rows = history.len() / self.stride;
        transpose::to_rows(self.plan.isa, inputs, history, self.stride, self.base_from, rows);
    }

    /// The newest block of one row is transformed once and kept.
    fn transform_input(&self, transform: &Transform<T>, history: &[T], spectra: &mut [T], work: &mut Workspace<T>) {
        let bins = transform.spectrum_len();
        let block = &history[self.from..][..self.spec.block];
        transform.input(block, &mut spectra[self.newest * bins..][..bins], work);
    }

    /// What all kept blocks of one row contribute to the next block of outputs.
    fn push(&self, transform: &Transform<T>, spectra: &[T], filter: &[T], pending: &mut [T], work: &mut Workspace<T>) {
        transform.accumulate(spectra, self.newest, filter, self.count, work);
        transform.invert(work);
        transform.future(0, &mut pending[self.to..][..self.spec.block], self.add, work);
    }

    /// The next base block of outputs of neighbouring groups leaves the rows.
    fn load_outputs(
        &self,
        groups: &[layout::Lanes],
        pending: &[T],
        seed: &Seed<T>,
        delayed: &[Delayed<T>],
        outputs: &mut [T],
    ) {
        let first = groups[0].start;
        let block = outputs.len() / groups.len();
        for (group, outputs) in groups.iter().zip(outputs.chunks_exact_mut(block)) {
            let rows = &pending[(group.start - first) * self.stride..];
            transpose::from_rows(self.plan.isa, rows, self.stride, self.to, group.rows, outputs);
            seed.add(self.clock, group, outputs);
            delayed.iter().for_each(|level| level.add(self.clock, group, outputs));
        }
    }
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
