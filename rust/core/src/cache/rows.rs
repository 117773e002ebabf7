//! Operations on entries of the batch axis: copies, gathers, fresh starts.

use super::seed::Seed;
use super::{Cache, Strip};
use crate::error::{Error, tuple};
use crate::kernels::LANES;
use crate::layout;
use crate::plan::Transforms;
use crate::real::Real;
use crate::watch;

impl<T: Real> Cache<T> {
    /// An independent copy.
    pub fn fork(&mut self) -> Result<Self, Error> {
        // This cache stays whole where the copying is ended early.
        watch::unwatched(|| self.settle());
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
        if index.len() == batch {
            self.permute(&moves(index));
            return Ok(());
        }
        let mut shape = self.lanes.layout.input_shape.clone();
        shape[0] = index.len();
        self.settle();
        *self = self.select(&shape, index)?;
        Ok(())
    }

    /// Copies and exchanges entries of axis 0 where they stand; what does not move is not touched.
    fn permute(&mut self, moves: &[Move]) {
        if moves.is_empty() {
            return;
        }
        self.settle();
        let lanes = self.lanes.clone();
        let layout = &lanes.layout;
        let side_by_side = matches!(self.plan.transforms, Transforms::Lanes(_));
        let batch = layout.input_shape[0];
        let block = self.block() * LANES;
        for piece in pieces(moves, &layout.inputs, layout.input_rows / batch, side_by_side && !layout.packed) {
            let Piece { to, from, whole, .. } = piece;
            let strips = [to, from].map(|(group, lane)| self.history_strip(group, lane));
            piece.apply(&mut self.history, strips, whole);
            for level in 0..self.spectra.len() {
                let strips = [to, from].map(|(group, lane)| self.spectra_strip(level, group, lane));
                piece.apply(&mut self.spectra[level], strips, whole);
            }
            piece.apply(&mut self.inputs, [to, from].map(|(group, lane)| Strip::lane(group, lane, block)), whole);
            for (group, _) in [to, from].into_iter().filter(|(group, _)| layout.inputs[*group].rows == 1) {
                // A row that is alone in its group fills all lanes.
                self.inputs[group * block..][..block].chunks_exact_mut(LANES).for_each(|lanes| lanes.fill(lanes[0]));
            }
        }
        let block = self.outputs.len().checked_div(layout.groups.len()).unwrap_or(0);
        for piece in pieces(moves, &layout.outputs, layout.output_rows / batch, side_by_side) {
            let Piece { to, from, whole, .. } = piece;
            let strips = [to, from].map(|(group, lane)| self.pending_strip(group, lane));
            piece.apply(&mut self.pending, strips, whole);
            for k in 0..self.delayed.len() {
                let strips = [to, from].map(|(group, lane)| self.delayed_strip(k, group, lane));
                piece.apply(&mut self.delayed[k].out, strips, whole);
            }
            piece.apply(&mut self.outputs, [to, from].map(|(group, lane)| Strip::lane(group, lane, block)), whole);
            let width = self.seed.to - self.seed.from;
            let rows = if whole { layout.outputs[to.0].rows } else { 1 };
            let strips = [to, from].map(|(group, lane)| {
                let first = (layout.outputs[group].start + lane) * width;
                Strip { first, step: 1, count: rows * width }
            });
            piece.apply(&mut self.seed.values, strips, false);
        }
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
            watch::check();
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
            watch::check();
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

/// One entry becomes a copy of another, or they change places.
struct Move {
    to: usize,
    from: usize,
    exchange: bool,
}

/// What turns the entries into those of `index` in place: first copies to where nobody reads any more, then rings of
/// exchanges.
fn moves(index: &[usize]) -> Vec<Move> {
    let mut readers = vec![0; index.len()];
    index.iter().enumerate().filter(|(to, from)| to != *from).for_each(|(_, from)| readers[*from] += 1);
    let mut waiting: Vec<bool> = index.iter().enumerate().map(|(to, from)| to != *from).collect();
    let mut moves = Vec::new();
    let mut free: Vec<usize> = (0..index.len()).filter(|to| waiting[*to] && readers[*to] == 0).collect();
    while let Some(to) = free.pop() {
        let from = index[to];
        moves.push(Move { to, from, exchange: false });
        waiting[to] = false;
        readers[from] -= 1;
        if readers[from] == 0 && waiting[from] {
            free.push(from);
        }
    }
    for first in 0..index.len() {
        let mut to = first;
        while std::mem::take(&mut waiting[to]) && index[to] != first {
            moves.push(Move { to, from: index[to], exchange: true });
            to = index[to];
        }
    }
    moves
}

/// Rows that move together: one, or the `whole` of a group.
struct Piece {
    to: (usize, usize),
    from: (usize, usize),
    whole: bool,
    exchange: bool,
}

impl Piece {
    /// The move in one buffer, where the rows or, if `whole`, the groups that begin with them stand at these
    /// strips: where they go and where they are.
    fn apply<T: Copy>(&self, buffer: &mut [T], strips: [Strip; 2], whole: bool) {
        let [to, from] = if whole { strips.map(Strip::whole_group) } else { strips };
        if self.exchange {
            (0..to.count).for_each(|i| buffer.swap(to.first + i * to.step, from.first + i * from.step));
        } else if to.step == 1 && to.count > 0 {
            buffer.copy_within(from.first..from.first + from.count, to.first);
        } else {
            (0..to.count).for_each(|i| buffer[to.first + i * to.step] = buffer[from.first + i * from.step]);
        }
    }
}

/// Moves of entries of `per_entry` rows each as moves of rows, and of groups that may go as a `whole`.
fn pieces(moves: &[Move], groups: &[layout::Lanes], per_entry: usize, whole: bool) -> Vec<Piece> {
    let places = places(groups, groups.iter().map(|group| group.rows).sum());
    let mut pieces = Vec::new();
    for &Move { to, from, exchange } in moves {
        let mut row = 0;
        while row < per_entry {
            let (at, origin) = (places[to * per_entry + row], places[from * per_entry + row]);
            let rows = groups[at.0].rows;
            let whole = whole && (at.1, origin.1) == (0, 0) && groups[origin.0].rows == rows && row + rows <= per_entry;
            pieces.push(Piece { to: at, from: origin, whole, exchange });
            row += if whole { rows } else { 1 };
        }
    }
    pieces
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

#[cfg(test)]
mod tests {
    use super::moves;

    /// Every gather of up to five entries; no entry that stays is moved.
    #[test]
    fn moves_gather_in_place() {
        for n in 0..=5u32 {
            for code in 0..n.pow(n) {
                let index: Vec<usize> = (0..n).map(|i| (code / n.pow(i) % n.max(1)) as usize).collect();
                let mut entries: Vec<usize> = (0..n as usize).collect();
                let moves = moves(&index);
                for m in &moves {
                    if m.exchange { entries.swap(m.to, m.from) } else { entries[m.to] = entries[m.from] }
                }
                assert_eq!(entries, index);
                assert!(moves.len() <= index.iter().enumerate().filter(|(i, from)| i != *from).count());
            }
        }
    }
}
