//! How user rows map to lanes: broadcasting of input rows and filter rows, in groups of 16 output rows.

use crate::error::{Error, tuple};
use crate::kernels::{Group, LANES};
use crate::schedule::Level;
use std::collections::HashMap;

/// numpy's broadcasting of two shapes.
pub fn broadcast(a: &[usize], b: &[usize]) -> Result<Vec<usize>, Error> {
    let n = a.len().max(b.len());
    (0..n)
        .map(|axis| match (dim(a, n, axis), dim(b, n, axis)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (1, y) => Ok(y),
            _ => Err(Error::shape("u", format!("broadcastable to {}", tuple(b)), tuple(a))),
        })
        .collect()
}

/// Axis `axis` of `shape` seen as a shape of `n` axes.
fn dim(shape: &[usize], n: usize, axis: usize) -> usize {
    (axis + shape.len()).checked_sub(n).map_or(1, |i| shape[i])
}

/// Number of rows of a shape.
pub(crate) fn rows(shape: &[usize]) -> Result<usize, Error> {
    if shape.contains(&0) {
        return Ok(0);
    }
    let product = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    product.filter(|n| *n <= isize::MAX as usize).ok_or(Error::Memory { bytes: usize::MAX })
}

/// Up to 16 rows side by side. One row that feeds every lane of its group is replicated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lanes {
    /// First row in the user's order; the others follow it.
    pub(crate) row: usize,
    /// Distinct rows, 1 to 16.
    pub(crate) rows: usize,
    /// First row in the engine's own order, in which the rows of a group stand together.
    pub(crate) start: usize,
}

/// Whether `rows` rows fill groups of 16 nearly to the full, so that computing with 16 at a time wastes little.
pub(crate) fn well_filled(rows: usize) -> bool {
    rows > 0 && rows.saturating_mul(8) >= rows.next_multiple_of(LANES).saturating_mul(7)
}

/// Numbers the rows of groups that follow each other.
fn number(groups: &mut [Lanes]) {
    let mut start = 0;
    for group in groups {
        group.start = start;
        start += group.rows;
    }
}

/// The groups of one input shape under one filter shape.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) input_shape: Vec<usize>,
    pub(crate) output_shape: Vec<usize>,
    pub(crate) input_rows: usize,
    pub(crate) output_rows: usize,
    /// Output groups; those that share a filter group stand next to each other.
    pub(crate) groups: Vec<Group>,
    pub(crate) inputs: Vec<Lanes>,
    pub(crate) outputs: Vec<Lanes>,
    pub(crate) filters: Vec<Lanes>,
    /// Consecutive output groups that share one filter group.
    pub(crate) bundle: usize,
    /// Output group `i` reads input group `i` alone, and nobody else does.
    pub(crate) one_to_one: bool,
    /// Every input group is one row: 16 of them are transformed side by side.
    pub(crate) packed: bool,
    /// Axes of the input in front of the filters' axes.
    pub(crate) batch_axes: usize,
}

impl Layout {
    pub(crate) fn new(input: &[usize], filter: &[usize]) -> Result<Self, Error> {
        let output = broadcast(input, filter)?;
        let (input_rows, output_rows) = (rows(input)?, rows(&output)?);
        rows(filter)?;
        let mut layout = Self {
            input_shape: input.to_vec(),
            output_shape: output.clone(),
            input_rows,
            output_rows,
            groups: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            filters: Vec::new(),
            bundle: 1,
            one_to_one: true,
            packed: false,
            batch_axes: input.len().saturating_sub(filter.len()),
        };
        if output_rows > 0 {
            layout.place(input, filter, &output)?;
        }
        Ok(layout)
    }

    fn place(&mut self, input: &[usize], filter: &[usize], output: &[usize]) -> Result<(), Error> {
        let axes = merge(input, filter, output);
        let (last, outer) = axes.split_last().expect("merge returns at least one axis");
        let width = last.len;
        let mut groups = Vec::new();
        let mut input_ids = HashMap::new();
        let mut filter_ids = HashMap::new();
        let blocks: usize = outer.iter().map(|a| a.len).product();
        let count = blocks * width.div_ceil(LANES);
        groups.try_reserve_exact(count).map_err(|_| Error::Memory { bytes: count.saturating_mul(LANES * 64) })?;
        for block in 0..blocks {
            let (mut i, mut f, mut rest) = (0, 0, block);
            for axis in outer.iter().rev() {
                let k = rest % axis.len;
                rest /= axis.len;
                i += k * axis.input_stride;
                f += k * axis.filter_stride;
            }
            for lane in (0..width).step_by(LANES) {
                let n = LANES.min(width - lane);
                let lanes = |base: usize, stride: usize| match stride {
                    0 => Lanes { row: base, rows: 1, start: 0 },
                    _ => Lanes { row: base + lane, rows: n, start: 0 },
                };
                let source = lanes(i, last.input_stride);
                let filter = lanes(f, last.filter_stride);
                let next = filter_ids.len();
                let filter_id = *filter_ids.entry(filter.row).or_insert(next);
                if filter_id == self.filters.len() {
                    self.filters.push(filter);
                }
                groups.push((filter_id, source, Lanes { row: block * width + lane, rows: n, start: 0 }));
            }
        }
        groups.sort_by_key(|(filter_id, _, _)| *filter_id);
        self.bundle = groups.len() / self.filters.len();
        for (filter, source, out) in groups {
            let next = input_ids.len();
            let input = *input_ids.entry(source.row).or_insert(next);
            if input == self.inputs.len() {
                self.inputs.push(source);
            }
            self.one_to_one &= input == self.groups.len() && source.rows == out.rows;
            self.groups.push(Group { input, filter });
            self.outputs.push(out);
        }
        self.one_to_one &= self.inputs.len() == self.groups.len();
        self.packed = self.inputs.iter().all(|group| group.rows == 1);
        number(&mut self.inputs);
        number(&mut self.outputs);
        Ok(())
    }

    /// Room for kept spectra per input row: where several outputs share an input, all read what it was transformed to.
    pub(crate) fn slots(&self, level: &Level) -> usize {
        if self.one_to_one && !self.packed { level.kept() } else { level.parts }
    }

    /// Blocks of 16 input rows that are transformed together.
    pub(crate) fn sources(&self) -> usize {
        if self.packed { self.inputs.len().div_ceil(LANES) } else { self.inputs.len() }
    }

    /// The source of an input group, and where in it the group's lane `lane` stands.
    pub(crate) fn source(&self, group: usize, lane: usize) -> (usize, usize) {
        if self.packed { (group / LANES, group % LANES) } else { (group, lane) }
    }

    /// Filter row of lane `lane` in filter group `group`.
    pub(crate) fn filter_row(&self, group: usize, lane: usize) -> usize {
        let f = self.filters[group];
        if f.rows == 1 { f.row } else { f.row + lane }
    }

    /// Which row of input group `group` feeds lane `lane`.
    pub(crate) fn input_row(&self, group: usize, lane: usize) -> usize {
        if self.inputs[group].rows == 1 { 0 } else { lane }
    }
}

#[derive(Clone, Copy)]
struct Axis {
    len: usize,
    /// Rows from one entry to the next; 0 where broadcast.
    input_stride: usize,
    filter_stride: usize,
}

/// Neighbouring axes that broadcast alike become one.
fn merge(input: &[usize], filter: &[usize], output: &[usize]) -> Vec<Axis> {
    let mut axes: Vec<Axis> = Vec::new();
    let (mut i, mut f) = (1, 1);
    for (axis, &len) in output.iter().enumerate().rev() {
        if len == 1 {
            continue;
        }
        let (di, df) = (dim(input, output.len(), axis), dim(filter, output.len(), axis));
        let this =
            Axis { len, input_stride: if di == len { i } else { 0 }, filter_stride: if df == len { f } else { 0 } };
        i *= di;
        f *= df;
        match axes.last_mut() {
            Some(inner)
                if (inner.input_stride == 0) == (this.input_stride == 0)
                    && (inner.filter_stride == 0) == (this.filter_stride == 0) =>
            {
                inner.len *= len;
            }
            _ => axes.push(this),
        }
    }
    if axes.is_empty() {
        axes.push(Axis { len: 1, input_stride: 1, filter_stride: 1 });
    }
    axes.reverse();
    axes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depthwise_batch_shares_filters() {
        let l = Layout::new(&[3, 40], &[40]).unwrap();
        assert_eq!((l.groups.len(), l.filters.len(), l.bundle, l.one_to_one), (9, 3, 3, true));
        assert_eq!(l.outputs[1], Lanes { row: 40, rows: 16, start: 16 });
        assert_eq!((l.filters[2].row, l.filters[2].rows), (32, 8));
    }

    #[test]
    fn shared_bank_stores_each_row_once() {
        let l = Layout::new(&[2, 1, 20], &[5, 1]).unwrap();
        assert_eq!(l.output_shape, [2, 5, 20]);
        assert_eq!((l.inputs.len(), l.filters.len(), l.groups.len(), l.one_to_one), (4, 5, 20, false));
    }

    #[test]
    fn one_input_for_many_filters_is_replicated() {
        let l = Layout::new(&[2, 1], &[20]).unwrap();
        assert_eq!(l.inputs, [Lanes { row: 0, rows: 1, start: 0 }, Lanes { row: 1, rows: 1, start: 1 }]);
        assert_eq!(l.output_shape, [2, 20]);
    }

    #[test]
    fn scalars_and_empty_shapes() {
        assert_eq!(Layout::new(&[], &[]).unwrap().groups.len(), 1);
        assert!(Layout::new(&[0, 3], &[3]).unwrap().groups.is_empty());
        assert!(broadcast(&[2, 3], &[4]).is_err());
        assert!(rows(&[usize::MAX, 2]).is_err());
    }
}
