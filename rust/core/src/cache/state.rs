//! Snapshots of a cache in plain arrays.

use super::{Cache, Side};
use crate::buffer::{Buffer, with_room, zeros};
use crate::error::{Error, tuple};
use crate::execution::Execution;
use crate::kernels::LANES;
use crate::plan::{Plan, PlanOptions};
use crate::real::Real;
use crate::schedule::{Latency, Method, Schedule};
use crate::shape::{broadcast, rows, size};
use crate::transform::{bins, rebin};
use std::borrow::Cow;
use std::sync::Arc;

/// A snapshot of a cache, in the user's row order and in plain arrays: any engine can go on from it.
///
/// `rows_in` and `rows_out` count input and output rows; levels and their lengths are those of [`Execution`].
#[derive(Clone, Debug, PartialEq)]
pub struct State<T> {
    pub shape: Vec<usize>,
    pub base: Option<usize>,
    pub fans: Vec<usize>,
    pub latency: Latency,
    pub capacity: Option<usize>,
    /// Positions since the cache began.
    pub clock: usize,
    /// The same with the prompt included.
    pub position: usize,
    /// `(rows_in, ring)`: the input of clock time `s` stands at column `s % ring`.
    pub history: Vec<T>,
    /// `(rows_out, ring)`: pending outputs without the effect of the unfinished base block; in smooth mode then two
    /// blocks of each delayed level.
    pub pending: Vec<T>,
    /// `(rows_out, k)`: the effect of a prompt on the outputs of clock times `0..k`, as far as it is not pending.
    pub seed: Vec<T>,
    /// Per level `(rows_in, kept, bins, 2)`: kept block spectra, real and imaginary parts, modulo `z^bins - i`. Bins are
    /// as many as the block's positions, or the next length that has a fast transform.
    pub spectra: Vec<Vec<T>>,
}

/// How long the arrays of a state are.
struct Sizes {
    history: usize,
    pending: usize,
    spectra: Vec<usize>,
}

impl Sizes {
    /// `bins` of a block of so many positions.
    fn of(execution: &Execution, rows: (usize, usize), bins: impl Fn(usize) -> usize) -> Result<Self, Error> {
        Ok(Self {
            history: size(&[rows.0, execution.ring])?,
            pending: size(&[rows.1, pending_columns(execution)])?,
            spectra: (execution.levels.iter().map(|l| size(&[rows.0, l.kept(), bins(l.block), 2])))
                .collect::<Result<_, _>>()?,
        })
    }
}

/// Columns of pending outputs in a state: the ring, and two blocks of each delayed level.
fn pending_columns(execution: &Execution) -> usize {
    let ring = if execution.base == 0 { 0 } else { execution.ring };
    ring + execution.delayed_levels().iter().map(|level| 2 * level.block).sum::<usize>()
}

impl<T: Real> State<T> {
    /// Gathers entries of axis 0, of which there are `batch`.
    pub(super) fn select(&mut self, batch: usize, index: &[usize]) -> Result<(), Error> {
        let gather = |rows: &mut Vec<T>| -> Result<(), Error> {
            let per_entry = rows.len() / batch.max(1);
            let mut chosen = with_room(size(&[per_entry, index.len()])?)?;
            index.iter().for_each(|i| chosen.extend_from_slice(&rows[i * per_entry..][..per_entry]));
            *rows = chosen;
            Ok(())
        };
        self.shape[0] = index.len();
        [&mut self.history, &mut self.pending, &mut self.seed].into_iter().chain(&mut self.spectra).try_for_each(gather)
    }
}

impl<T: Real> Cache<T> {
    /// A snapshot.
    pub fn state(&mut self) -> Result<State<T>, Error> {
        self.flush();
        let (layout, execution) = (&self.layout, &self.execution);
        let reach = self.tail.to;
        let rows = (layout.input_rows, layout.output_rows);
        let sizes = Sizes::of(execution, rows, |block| bins(layout.width, block))?;
        let mut state = State {
            shape: layout.input_shape.clone(),
            base: self.plan.schedule().base(),
            fans: self.plan.schedule().fans().to_vec(),
            latency: self.plan.latency(),
            capacity: self.capacity,
            clock: self.clock,
            position: self.position(),
            history: zeros(sizes.history, T::ZERO)?,
            pending: zeros(sizes.pending, T::ZERO)?,
            seed: zeros(size(&[layout.output_rows, reach])?, T::ZERO)?,
            spectra: sizes.spectra.iter().map(|len| zeros(*len, T::ZERO)).collect::<Result<_, _>>()?,
        };
        let (start, count) = self.open_inputs(self.clock);
        let ring = execution.ring;
        for (place, row) in self.places(Side::Input) {
            let history = &mut state.history[row * ring..][..ring];
            history.iter_mut().zip(self.history.row(place)).for_each(|(to, from)| *to = *from);
            let open = history[start..].iter_mut().zip(self.inputs.row(place)).take(count);
            open.for_each(|(to, from)| *to = *from);
            for (k, flat) in state.spectra.iter_mut().enumerate() {
                let len = flat.len() / layout.input_rows;
                let unit = self.spectra[k].unit(place.0);
                let flat = flat[row * len..][..len].chunks_exact_mut(2);
                flat.zip(self.bins(k, place.1)).for_each(|(z, at)| z.copy_from_slice(&[unit[at], unit[at + LANES]]));
            }
        }
        let (columns, width) = (execution.columns(), pending_columns(execution));
        for (place, row) in self.places(Side::Output) {
            let (ring, later) = state.pending[row * width..][..width].split_at_mut(columns);
            ring.iter_mut().zip(self.pending.row(place)).for_each(|(to, from)| *to = *from);
            let sliced = self.sliced.iter().flat_map(|level| level.out.row(place));
            later.iter_mut().zip(sliced).for_each(|(to, from)| *to = *from);
            let seed = &mut state.seed[row * reach..][..reach];
            seed[self.tail.from..].iter_mut().zip(self.tail.values.row(place)).for_each(|(to, from)| *to = *from);
        }
        Ok(state)
    }

    /// A cache that goes on where `state` was taken: with the same bits under the schedule, latency and filters it was
    /// taken under. Under others its past is taken as a prompt.
    pub(crate) fn from_state(plan: &Arc<Plan<T>>, state: &State<T>) -> Result<Self, Error> {
        let wrong = |what: &str| Error::State(format!("{what} does not fit this plan"));
        if state.capacity == Some(0) && state.clock > 0 || state.capacity.is_some_and(|c| state.clock > c) {
            return Err(wrong("its clock"));
        }
        // No cache comes so far; the positions to come are counted on from here.
        if state.position > usize::MAX / 2 {
            return Err(wrong("its position"));
        }
        let start = state.position.checked_sub(state.clock).ok_or_else(|| wrong("its position"))?;
        broadcast(&state.shape, plan.filter_shape()).map_err(|_| wrong("its shape"))?;
        let end = start.checked_add(state.capacity.unwrap_or(0)).ok_or_else(|| wrong("its position"))?;
        let own = (plan.schedule().base(), plan.schedule().fans(), plan.latency());
        let alike = (state.base, &state.fans[..], state.latency) == own;
        let within = plan.horizon().is_none_or(|horizon| state.capacity.is_some() && end <= horizon);
        if !alike || !within {
            return Self::from_other(plan, state);
        }
        Self::restore(plan, state)
    }

    /// Under another schedule, horizon or latency: what the past adds to the outputs that are left is computed by a
    /// cache of the state's own kind, and put in front of a new one.
    fn from_other(plan: &Arc<Plan<T>>, state: &State<T>) -> Result<Self, Error> {
        let known = state.capacity.map(|c| c - state.clock);
        let left = match plan.horizon() {
            None => known,
            Some(horizon) => {
                let left = horizon.checked_sub(state.position).ok_or_else(|| {
                    Error::State(format!("position {} is beyond this plan's horizon of {horizon}", state.position))
                })?;
                Some(known.map_or(left, |known| known.min(left)))
            }
        };
        let schedule = Schedule::new(state.base, state.fans.clone()).map_err(|e| Error::State(e.to_string()))?;
        let execution = Execution::new(&schedule, state.capacity, plan.filter_length(), state.latency);
        check_sizes(plan, state, &execution)?;
        let options = PlanOptions {
            horizon: state.capacity.map(|c| c.max(1)),
            method: Method::Schedule(schedule),
            latency: state.latency,
            ..plan.options().clone()
        };
        let theirs = Plan::new(plan.filters(), plan.filter_shape(), plan.filter_length(), options)?;
        let relative = State { position: state.clock, ..state.clone() };
        let mut before = Self::restore(&theirs, &relative)?;
        let reach = left.unwrap_or(usize::MAX).min(plan.filter_length() - 1);
        let mut tail = Buffer::new(size(&[before.layout.output_rows, reach])?, T::ZERO)?;
        before.pending(reach, &mut tail)?;
        let mut cache = Self::new(plan, &state.shape, left)?;
        cache.start_after(state.position, &tail, reach)?;
        Ok(cache)
    }

    fn restore(plan: &Arc<Plan<T>>, state: &State<T>) -> Result<Self, Error> {
        check_sizes(plan, state, &plan.execution_for(state.capacity))?;
        let mut cache = Self::new(plan, &state.shape, state.capacity)?;
        let layout = cache.layout.clone();
        cache.origin = state.position - state.clock;
        cache.clock = state.clock;
        let (columns, width) = (cache.execution.columns(), pending_columns(&cache.execution));
        for (place, row) in cache.places(Side::Output) {
            let (ring, later) = state.pending[row * width..][..width].split_at(columns);
            cache.pending.row_mut(place).zip(ring).for_each(|(to, from)| *to = *from);
            let sliced = cache.sliced.iter_mut().flat_map(|level| level.out.row_mut(place));
            sliced.zip(later).for_each(|(to, from)| *to = *from);
        }
        for (level, spec) in cache.sliced.iter_mut().zip(cache.execution.delayed_levels()) {
            level.flushed(spec, state.clock);
        }
        let reach = state.seed.len().checked_div(layout.output_rows).unwrap_or(0);
        cache.set_tail(&state.seed, reach)?;
        cache.restore_inputs(state)?;
        cache.load_block();
        // The direct tiles of the unfinished block run again, in the same order as before.
        if cache.execution.base > 0 && layout.output_rows > 0 {
            cache.advance(0, cache.open_inputs(state.clock).1);
        }
        Ok(cache)
    }

    fn restore_inputs(&mut self, state: &State<T>) -> Result<(), Error> {
        let (ring, width) = (self.execution.ring, self.layout.width);
        let (start, count) = self.open_inputs(state.clock);
        for (place, row) in self.places(Side::Input) {
            let history = &state.history[row * ring..][..ring];
            let lanes = if self.layout.replicated { 0..width } else { place.1..place.1 + 1 };
            for lane in lanes {
                let place = (place.0, lane);
                self.history.row_mut(place).zip(history).for_each(|(to, from)| *to = *from);
                let open = self.inputs.row_mut(place).zip(&history[start..]).take(count);
                open.for_each(|(to, from)| *to = *from);
                for (k, flat) in state.spectra.iter().enumerate() {
                    let len = flat.len() / self.layout.input_rows;
                    let flat = &flat[row * len..][..len];
                    let (bins, level) = (self.bank.levels[k].transform.bins(), self.execution.levels[k]);
                    let converted = rebinned(flat, level.kept(), level.block, bins)?;
                    let places: Vec<_> = self.bins(k, lane).collect();
                    let unit = self.spectra[k].unit_mut(place.0);
                    for (z, at) in converted.chunks_exact(2).zip(places) {
                        (unit[at], unit[at + LANES]) = (z[0], z[1]);
                    }
                }
            }
        }
        Ok(())
    }

    /// Where the inputs of the unfinished base block stand in a state's history, and how many there are.
    fn open_inputs(&self, clock: usize) -> (usize, usize) {
        let (block, ring) = (self.execution.block(), self.execution.ring);
        if self.execution.base == 0 {
            (0, ring)
        } else if self.execution.levels.is_empty() {
            (0, clock.min(block))
        } else {
            // No tile takes the last block of a capacity.
            let ended = self.capacity == Some(clock) && clock > 0;
            let count = if ended { (clock - 1) % block + 1 } else { clock % block };
            ((clock - count) % ring, count)
        }
    }

    /// Unit, lane and number of every row.
    fn places(&self, side: Side) -> Vec<((usize, usize), usize)> {
        let units = self.units(side).0.iter().enumerate();
        units.flat_map(|(g, unit)| (0..unit.rows).map(move |lane| ((g, lane), unit.row + lane))).collect()
    }

    /// Where the real part of every kept bin of a lane stands at level `k`: slot by slot, in the usual order of bins.
    fn bins(&self, k: usize, lane: usize) -> impl Iterator<Item = usize> + use<T> {
        let (transform, kept) = (self.bank.levels[k].transform.clone(), self.execution.levels[k].kept());
        let bins = transform.bins();
        (0..kept * bins).map(move |i| i / bins * transform.spectrum_len() + transform.place(i % bins) + lane)
    }
}

/// Kept spectra modulo `z^n - i` for another `n`: blocks of `block` reals, transformed back and forth.
fn rebinned<T: Real>(flat: &[T], kept: usize, block: usize, bins: usize) -> Result<Cow<'_, [T]>, Error> {
    let theirs = flat.len().checked_div(2 * kept).unwrap_or(bins);
    if theirs == bins {
        return Ok(flat.into());
    }
    Ok(rebin(flat, theirs, block, bins)?.into())
}

/// Refuses arrays of other lengths than this plan's caches would have, before anything is allocated.
fn check_sizes<T: Real>(plan: &Plan<T>, state: &State<T>, execution: &Execution) -> Result<(), Error> {
    let wrong = || Error::State("the size of its arrays does not fit this plan".into());
    let outputs = broadcast(&state.shape, plan.filter_shape()).map_err(|_| wrong())?;
    let rows = (rows(&state.shape)?, rows(&outputs)?);
    let usual = Sizes::of(execution, rows, |block| block)?;
    let reach = state.seed.len().checked_div(rows.1).unwrap_or(0);
    let seed_fits = reach < plan.filter_length() && state.seed.len() == rows.1 * reach;
    if state.history.len() != usual.history || state.pending.len() != usual.pending || !seed_fits {
        return Err(wrong());
    }
    // Spectra may come from units of either width.
    let wide = Sizes::of(execution, rows, |block| bins(LANES, block))?;
    let spectra_fit = state.spectra.len() == usual.spectra.len()
        && (state.spectra.iter().zip(usual.spectra.iter().zip(&wide.spectra)))
            .all(|(s, (usual, wide))| s.len() == *usual || s.len() == *wide);
    if !spectra_fit {
        return Err(wrong());
    }
    Ok(())
}

impl<T> State<T> {
    /// The schedule and latency it was taken under, as text for messages.
    pub fn schedule(&self) -> String {
        let base = self.base.map_or_else(|| "None".into(), |base| base.to_string());
        format!("Schedule(base={base}, fans={})", tuple(&self.fans))
    }
}
