//! Operations on entries of the batch axis: copies, gathers, fresh starts.

use super::seed::Seed;
use super::{Cache, Strip};
use crate::error::{Error, tuple};
use crate::kernels::LANES;
use crate::layout;
use crate::plan::Transforms;
use crate::real::Real;

impl<T: Real> Cache<T> {
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
        copy.seed = Seed::new(new.output_rows, self.seed.from, self.seed.to)?;
        let block = self.block() * LANES;
        let places = places(&old.inputs, old.input_rows);
        for (g, group) in new.inputs.iter().enumerate() {
            let place = |lane| places[origin_row(group.row + lane, new.input_rows / entries, index)];
            let whole = !old.packed && !new.packed && self.moves_whole(group.rows, place);
            for lane in 0..group.rows {
                let (from_group, from_lane) = place(lane);
                if !whole || lane == 0 {
                    let (from, to) = (self.history_strip(from_group, from_lane), copy.history_strip(g, lane));
                    copy_strip(&self.history, from, &mut copy.history, to, whole);
                    for level in 0..self.spectra.len() {
                        let from = self.spectra_strip(level, from_group, from_lane);
                        let to = copy.spectra_strip(level, g, lane);
                        copy_strip(&self.spectra[level], from, &mut copy.spectra[level], to, whole);
                    }
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
            let place = |lane| places[origin_row(group.row + lane, new.output_rows / entries, index)];
            let whole = self.moves_whole(group.rows, place);
            for lane in 0..group.rows {
                let (from_group, from_lane) = place(lane);
                let (from, to) = (old.outputs[from_group].start + from_lane, group.start + lane);
                copy.seed.row_mut(to).copy_from_slice(self.seed.row(from));
                if !whole || lane == 0 {
                    let (from, to) = (self.pending_strip(from_group, from_lane), copy.pending_strip(g, lane));
                    copy_strip(&self.pending, from, &mut copy.pending, to, whole);
                    for k in 0..self.delayed.len() {
                        let from = self.delayed_strip(k, from_group, from_lane);
                        let to = copy.delayed_strip(k, g, lane);
                        copy_strip(&self.delayed[k].out, from, &mut copy.delayed[k].out, to, whole);
                    }
                }
                let from = &self.outputs[from_group * block..][..block];
                for (from, to) in from.chunks_exact(LANES).zip(copy.outputs[g * block..].chunks_exact_mut(LANES)) {
                    to[lane] = from[from_lane];
                }
            }
        }
        for (level, copy) in self.delayed.iter().zip(&mut copy.delayed) {
            // All its units are done, of which another batch has another number.
            (copy.tile, copy.done) = (level.tile, usize::MAX);
        }
        Ok(copy)
    }

    /// Whether the lanes of a group that stands side by side are those of one old group, in the same order.
    fn moves_whole(&self, rows: usize, place: impl Fn(usize) -> (usize, usize)) -> bool {
        let side_by_side = matches!(self.plan.transforms, Transforms::Lanes(_));
        side_by_side && (0..rows).all(|lane| place(lane) == (place(0).0, lane))
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
                self.history_strip(g, lane).of_mut(&mut self.history).for_each(|v| *v = T::ZERO);
                for level in 0..self.spectra.len() {
                    let strip = self.spectra_strip(level, g, lane);
                    strip.of_mut(&mut self.spectra[level]).for_each(|v| *v = T::ZERO);
                }
                for lanes in self.inputs[g * block..][..block].chunks_exact_mut(LANES) {
                    if group.rows == 1 { lanes.fill(T::ZERO) } else { lanes[lane] = T::ZERO }
                }
            }
        }
        let block = self.outputs.len().checked_div(layout.groups.len()).unwrap_or(0);
        for (g, group) in layout.outputs.iter().enumerate() {
            for lane in (0..group.rows).filter(|l| chosen[(group.row + l) / (layout.output_rows / batch)]) {
                self.pending_strip(g, lane).of_mut(&mut self.pending).for_each(|v| *v = T::ZERO);
                self.seed.row_mut(group.start + lane).fill(T::ZERO);
                for k in 0..self.delayed.len() {
                    let strip = self.delayed_strip(k, g, lane);
                    strip.of_mut(&mut self.delayed[k].out).for_each(|v| *v = T::ZERO);
                }
                for lanes in self.outputs[g * block..][..block].chunks_exact_mut(LANES) {
                    lanes[lane] = T::ZERO;
                }
            }
        }
        Ok(())
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

/// One row of a buffer becomes a row of another, or the `whole` group that begins with it a group.
fn copy_strip<T: Copy>(rows: &[T], from: Strip, copy: &mut [T], to: Strip, whole: bool) {
    if whole || from.step == 1 {
        let (from, to) = (from.whole_group(), to.whole_group());
        copy[to.first..to.first + to.count].copy_from_slice(&rows[from.first..from.first + from.count]);
    } else {
        to.of_mut(copy).zip(from.of(rows)).for_each(|(to, from)| *to = *from);
    }
}
