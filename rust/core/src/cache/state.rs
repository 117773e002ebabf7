//! Snapshots of a cache in plain arrays.

use super::Cache;
use crate::buffer::zeros;
use crate::error::{Error, tuple};
use crate::kernels::LANES;
use crate::lanes::BIN;
use crate::layout;
use crate::plan::{Plan, Transforms};
use crate::real::Real;
use crate::schedule::Level;
use crate::transform::bin;
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
    /// `(rows_out, k)`: the effect of a prompt on the outputs of clock times `0..k`, as far as it is not pending.
    pub seed: Vec<T>,
    /// Per level `(rows_in, kept, block, 2)`: kept block spectra, real and imaginary parts.
    pub spectra: Vec<Vec<T>>,
}

impl<T: Real> Cache<T> {
    /// A snapshot.
    pub fn state(&mut self) -> Result<State<T>, Error> {
        self.settle();
        let layout = &self.lanes.layout;
        let ring = self.execution.ring;
        let block = self.block();
        let mut history = zeros(layout.input_rows * ring, T::ZERO)?;
        let kept = |level: &Level| zeros(layout.input_rows * level.kept() * level.block * 2, T::ZERO);
        let mut spectra = self.execution.levels.iter().map(kept).collect::<Result<Vec<_>, _>>()?;
        for (g, group) in layout.inputs.iter().enumerate() {
            let inputs = &self.inputs[g * block * LANES..][..block * LANES];
            for lane in 0..group.rows {
                let row = &mut history[(group.row + lane) * ring..][..ring];
                let (start, count) = if self.execution.base == 0 {
                    (0, ring)
                } else if self.execution.levels.is_empty() {
                    (0, self.clock.min(block))
                } else {
                    row.iter_mut()
                        .zip(self.history_strip(g, lane).of(&self.history))
                        .for_each(|(to, from)| *to = *from);
                    (self.clock / block * block % ring, self.clock % block)
                };
                for (v, lanes) in row[start..][..count].iter_mut().zip(inputs.chunks_exact(LANES)) {
                    *v = lanes[lane];
                }
                for (k, (level, flat)) in self.execution.levels.iter().zip(&mut spectra).enumerate() {
                    let len = level.kept() * level.block * 2;
                    let flat = &mut flat[(group.row + lane) * len..][..len];
                    let places = self.bins(k, g, lane);
                    flat.chunks_exact_mut(2).zip(places).for_each(|(z, (re, im))| {
                        z.copy_from_slice(&[self.spectra[k][re], self.spectra[k][im]]);
                    });
                }
            }
        }
        let columns = if self.execution.levels.is_empty() { 0 } else { ring };
        let width = self.pending_width();
        let mut pending = zeros(layout.output_rows * width, T::ZERO)?;
        let mut seed = zeros(layout.output_rows * self.seed.to, T::ZERO)?;
        for (g, group) in layout.outputs.iter().enumerate() {
            for lane in 0..group.rows {
                let (from, to) = (group.start + lane, group.row + lane);
                let row = &mut pending[to * width..][..columns];
                row.iter_mut().zip(self.pending_strip(g, lane).of(&self.pending)).for_each(|(to, from)| *to = *from);
                let mut at = to * width + columns;
                for (k, level) in self.delayed.iter().enumerate() {
                    let strip = self.delayed_strip(k, g, lane);
                    pending[at..].iter_mut().zip(strip.of(&level.out)).for_each(|(to, from)| *to = *from);
                    at += strip.count;
                }
                let row = &mut seed[to * self.seed.to..][..self.seed.to];
                row[self.seed.from..].copy_from_slice(self.seed.row(from));
            }
        }
        Ok(State {
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
        })
    }

    pub(crate) fn from_state(plan: &Arc<Plan<T>>, state: &State<T>) -> Result<Self, Error> {
        let wrong = |what: &str| Error::State(format!("{what} does not fit this plan"));
        if (state.base, &state.fans[..]) != (plan.schedule().base(), plan.schedule().fans()) {
            let base = state.base.map_or_else(|| "None".into(), |base| base.to_string());
            let theirs = format!("Schedule(base={base}, fans={})", tuple(&state.fans));
            let text = format!("expected {} of this plan, got {theirs}: plan with method={theirs}", plan.schedule());
            return Err(Error::State(text));
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
                .all(|(s, l)| s.len() == layout.input_rows * l.kept() * l.block * 2);
        if state.history.len() != layout.input_rows * ring
            || state.pending.len() != layout.output_rows * width
            || state.seed.len() != layout.output_rows * reach
            || !spectra_fit
        {
            return Err(wrong("the size of its arrays"));
        }
        cache.origin = state.position - state.clock;
        cache.clock = state.clock;
        let columns = if cache.execution.levels.is_empty() { 0 } else { ring };
        for (g, group) in layout.outputs.iter().enumerate() {
            for lane in 0..group.rows {
                let pending = &state.pending[(group.row + lane) * width..][..width];
                let strip = cache.pending_strip(g, lane);
                strip.of_mut(&mut cache.pending).zip(&pending[..columns]).for_each(|(to, from)| *to = *from);
                let mut at = columns;
                for k in 0..cache.delayed.len() {
                    let from = cache.delayed_strip(k, g, lane);
                    let out = from.of_mut(&mut cache.delayed[k].out);
                    out.zip(&pending[at..]).for_each(|(to, from)| *to = *from);
                    at += from.count;
                }
            }
        }
        for (level, spec) in cache.delayed.iter_mut().zip(cache.execution.levels.iter().skip(1)) {
            level.settled(spec, state.clock);
        }
        cache.set_seed(&state.seed, reach)?;
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
        ring + self.execution.levels.iter().skip(1).take(self.delayed.len()).map(|level| 2 * level.block).sum::<usize>()
    }

    fn load_inputs(&mut self, state: &State<T>) {
        let layout = &self.lanes.layout;
        let ring = self.execution.ring;
        let block = self.block();
        for (g, group) in layout.inputs.iter().enumerate() {
            for lane in 0..group.rows {
                let row = &state.history[(group.row + lane) * ring..][..ring];
                let (start, count) = if self.execution.levels.is_empty() {
                    (0, ring)
                } else {
                    let strip = self.history_strip(g, lane);
                    strip.of_mut(&mut self.history).zip(row).for_each(|(to, from)| *to = *from);
                    (self.clock / block * block % ring, self.clock % block)
                };
                let inputs = &mut self.inputs[g * block * LANES..][..block * LANES];
                for (v, lanes) in row[start..][..count].iter().zip(inputs.chunks_exact_mut(LANES)) {
                    if group.rows == 1 { lanes.fill(*v) } else { lanes[lane] = *v }
                }
                for (k, flat) in state.spectra.iter().enumerate() {
                    let len = self.execution.levels[k].kept() * self.execution.levels[k].block * 2;
                    let flat = &flat[(group.row + lane) * len..][..len];
                    for (z, (re, im)) in flat.chunks_exact(2).zip(self.bins(k, g, lane)) {
                        (self.spectra[k][re], self.spectra[k][im]) = (z[0], z[1]);
                    }
                }
            }
        }
    }

    /// Where the real and the imaginary part of every kept bin of a row stand at level `k`: slot by slot, in the
    /// usual order of bins.
    fn bins(&self, k: usize, group: usize, lane: usize) -> impl Iterator<Item = (usize, usize)> + use<T> {
        let level = self.execution.levels[k];
        let (first, slot) = (self.spectra_strip(k, group, lane).first, self.plan.transforms.spectrum_len(k));
        let mut order: Vec<_> = (0..level.block).map(bin).collect();
        if let Transforms::Lanes(transforms) = &self.plan.transforms {
            transforms[k].natural().iter().enumerate().for_each(|(b, natural)| order[*natural] = b * BIN);
        }
        (0..level.kept() * level.block).map(move |i| {
            let at = first + i / level.block * slot + order[i % level.block];
            (at, at + LANES)
        })
    }
}
