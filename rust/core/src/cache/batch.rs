//! Operations on entries of the batch axis: copies, gathers, fresh starts.

use super::{Cache, Side};
use crate::error::{Error, tuple};
use crate::layout::Unit;
use crate::real::Real;
use crate::watch;

impl<T: Real> Cache<T> {
    /// An independent copy.
    pub fn fork(&mut self) -> Result<Self, Error> {
        // This cache stays whole where the copying is ended early.
        watch::unwatched(|| self.flush());
        let mut copy = self.fresh()?;
        copy.tail = self.tail.copy()?;
        for side in [Side::Input, Side::Output] {
            for (copy, own) in copy.row_buffers(side).zip(self.row_buffers(side)) {
                copy.copy_from(own);
            }
        }
        for (copy, own) in copy.sliced.iter_mut().zip(&self.sliced) {
            (copy.tile, copy.done) = (own.tile, own.done);
        }
        (copy.origin, copy.clock) = (self.origin, self.clock);
        Ok(copy)
    }

    /// Gathers entries of axis 0: entry `i` becomes a copy of the present entry `index[i]`.
    pub fn reorder(&mut self, index: &[usize]) -> Result<(), Error> {
        let batch = self.batch()?;
        if let Some(bad) = index.iter().find(|i| **i >= batch) {
            return Err(Error::value("index", format!("entries below {batch}"), bad));
        }
        if index.len() != batch {
            // Units of another batch may be of another width: a state is not.
            let mut state = self.state()?;
            state.select(batch, index)?;
            *self = Self::from_state(&self.plan, &state)?;
            return Ok(());
        }
        let moves = moves(index);
        if moves.is_empty() {
            return Ok(());
        }
        self.flush();
        for side in [Side::Input, Side::Output] {
            let pieces = self.pieces(side, &moves, batch);
            for buffer in self.row_buffers(side) {
                for piece in &pieces {
                    match *piece {
                        Piece::Unit { to, from, exchange } => buffer.move_unit(to, from, exchange),
                        Piece::Row { to, from, exchange } => buffer.move_row(to, from, exchange),
                    }
                }
            }
        }
        Ok(())
    }

    /// Moves of entries as moves of rows, and of whole units where these move together.
    fn pieces(&self, side: Side, moves: &[Move], batch: usize) -> Vec<Piece> {
        let (units, rows, replicated) = self.units(side);
        let (places, per_entry) = (places(units, rows), rows / batch);
        let mut pieces = Vec::new();
        for &Move { to, from, exchange } in moves {
            let mut row = 0;
            while row < per_entry {
                let (at, origin) = (places[to * per_entry + row], places[from * per_entry + row]);
                let rows = units[at.0].rows;
                let aligned = (at.1, origin.1) == (0, 0) && units[origin.0].rows == rows && row + rows <= per_entry;
                if replicated || aligned {
                    pieces.push(Piece::Unit { to: at.0, from: origin.0, exchange });
                    row += rows;
                } else {
                    pieces.push(Piece::Row { to: at, from: origin, exchange });
                    row += 1;
                }
            }
        }
        pieces
    }

    /// Starts the given entries of axis 0 again; the others, the clock and the capacity go on.
    pub fn reset_rows(&mut self, rows: &[usize]) -> Result<(), Error> {
        let batch = self.batch()?;
        if let Some(bad) = rows.iter().find(|r| **r >= batch) {
            return Err(Error::value("rows", format!("entries below {batch}"), bad));
        }
        self.flush();
        let mut chosen = vec![false; batch];
        rows.iter().for_each(|r| chosen[*r] = true);
        for side in [Side::Input, Side::Output] {
            let (units, all, replicated) = self.units(side);
            let mut gone = Vec::new();
            for (g, unit) in units.iter().enumerate() {
                let lanes = (0..unit.rows).filter(|lane| chosen[(unit.row + lane) / (all / batch)]);
                gone.extend(lanes.map(|lane| (g, lane)));
            }
            for buffer in self.row_buffers(side) {
                for place in &gone {
                    if replicated {
                        buffer.unit_mut(place.0).fill(T::ZERO);
                    } else {
                        buffer.row_mut(*place).for_each(|v| *v = T::ZERO);
                    }
                }
            }
        }
        Ok(())
    }

    /// Units and number of rows of a side, and whether every unit is one row in all lanes.
    pub(super) fn units(&self, side: Side) -> (&[Unit], usize, bool) {
        let layout = &self.layout;
        match side {
            Side::Input => (&layout.inputs, layout.input_rows, layout.replicated),
            Side::Output => (&layout.outputs, layout.output_rows, false),
        }
    }

    /// Entries of the batch axis, where there is one.
    fn batch(&self) -> Result<usize, Error> {
        if self.layout.batch_axes == 0 {
            let expected = "a batch axis in front of the filters' axes";
            return Err(Error::value("cache", expected, tuple(self.input_shape())));
        }
        Ok(self.input_shape()[0])
    }
}

/// Unit and lane of every row.
fn places(units: &[Unit], rows: usize) -> Vec<(usize, usize)> {
    let mut places = vec![(0, 0); rows];
    for (g, unit) in units.iter().enumerate() {
        for lane in 0..unit.rows {
            places[unit.row + lane] = (g, lane);
        }
    }
    places
}

/// What moves in every buffer of a side.
enum Piece {
    Unit { to: usize, from: usize, exchange: bool },
    Row { to: (usize, usize), from: (usize, usize), exchange: bool },
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
