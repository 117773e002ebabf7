//! How user rows map to units of rows side by side: broadcasting of input rows and filter rows.
//!
//! Every buffer of a cache is `[unit][time][width]`. Units are 16 rows wide where rows fill them well enough, else single
//! rows: `[unit][time]`.

use crate::error::Error;
use crate::kernels::{Group, LANES};
use crate::shape::{broadcast, dim, rows};
use std::collections::HashMap;

/// Up to `width` rows side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    /// First row in the user's order; the others follow it.
    pub(crate) row: usize,
    /// Distinct rows: lane `l` holds row `row + l % rows`.
    pub(crate) rows: usize,
}

impl Unit {
    pub(crate) fn row(&self, lane: usize) -> usize {
        self.row + lane % self.rows
    }
}

/// The units of one input shape under one filter shape.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) input_shape: Vec<usize>,
    pub(crate) output_shape: Vec<usize>,
    pub(crate) input_rows: usize,
    pub(crate) output_rows: usize,
    /// Rows in a unit at most.
    pub(crate) width: usize,
    /// Where each output unit's inputs and filters are; those that share a filter unit stand next to each other.
    pub(crate) groups: Vec<Group>,
    pub(crate) inputs: Vec<Unit>,
    pub(crate) outputs: Vec<Unit>,
    pub(crate) filters: Vec<Unit>,
    /// Consecutive output units that share one filter unit.
    pub(crate) bundle: usize,
    /// Output unit `i` reads input unit `i` alone, and nobody else does.
    pub(crate) one_to_one: bool,
    /// One input row feeds all lanes of its unit, and stands in all of them.
    pub(crate) replicated: bool,
    /// One filter row serves all lanes of its unit.
    pub(crate) shared_filters: bool,
    /// Axes of the input in front of the filters' axes.
    pub(crate) batch_axes: usize,
}

/// Lanes of a unit that need to be filled on average for 16 rows at a time to be faster than one by one.
const FILLED: usize = 7;

impl Layout {
    pub(crate) fn new(input: &[usize], filter: &[usize]) -> Result<Self, Error> {
        let wide = Self::of_width(input, filter, LANES)?;
        if wide.output_rows >= wide.outputs.len() * FILLED { Ok(wide) } else { Self::of_width(input, filter, 1) }
    }

    /// The same with units of so many rows.
    pub(crate) fn of_width(input: &[usize], filter: &[usize], width: usize) -> Result<Self, Error> {
        let output = broadcast(input, filter)?;
        let (input_rows, output_rows) = (rows(input)?, rows(&output)?);
        rows(filter)?;
        let mut layout = Self {
            input_shape: input.to_vec(),
            output_shape: output.clone(),
            input_rows,
            output_rows,
            width,
            groups: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            filters: Vec::new(),
            bundle: 1,
            one_to_one: true,
            replicated: false,
            shared_filters: false,
            batch_axes: input.len().saturating_sub(filter.len()),
        };
        if output_rows > 0 {
            layout.place(merge(input, filter, &output))?;
        }
        Ok(layout)
    }

    /// How many of `rows` equal rows run side by side.
    pub(crate) fn width_of(rows: usize) -> usize {
        if rows >= rows.div_ceil(LANES) * FILLED { LANES } else { 1 }
    }

    /// Lanes of all units of inputs and of outputs, filled or not.
    pub(crate) fn lanes(&self) -> (usize, usize) {
        (self.inputs.len().saturating_mul(self.width), self.outputs.len().saturating_mul(self.width))
    }

    fn place(&mut self, mut axes: Vec<Axis>) -> Result<(), Error> {
        let last = axes.pop().expect("merge returns at least one axis");
        self.replicated = self.width > 1 && last.len > 1 && last.input_stride == 0;
        self.shared_filters = self.width > 1 && last.filter_stride == 0;
        // Rows along the last axis, how many of them go into a unit, and after how many the filters repeat.
        let (mut span, mut step, mut period) = (last.len, self.width, usize::MAX);
        if let Some(batch) = axes.last()
            && 2 * last.len <= self.width
            && (last.input_stride, last.filter_stride) == (1, 1)
            && (batch.input_stride, batch.filter_stride) == (last.len, 0)
        {
            // Several entries of the batch share a unit, and each repeats the filters.
            (span, step, period) = (batch.len * last.len, self.width / last.len * last.len, last.len);
            axes.pop();
        }
        let outer: usize = axes.iter().map(|axis| axis.len).product();
        let count = outer.saturating_mul(span.div_ceil(step));
        let mut units = Vec::new();
        units.try_reserve_exact(count).map_err(|_| Error::Memory { bytes: count.saturating_mul(64) })?;
        let (mut input_ids, mut filter_ids) = (HashMap::new(), HashMap::new());
        for block in 0..outer {
            let (mut rest, mut i, mut f) = (block, 0, 0);
            for axis in axes.iter().rev() {
                let k = rest % axis.len;
                rest /= axis.len;
                i += k * axis.input_stride;
                f += k * axis.filter_stride;
            }
            for at in (0..span).step_by(step) {
                let rows = step.min(span - at);
                let unit = |base: usize, stride: usize| match stride {
                    0 => Unit { row: base, rows: 1 },
                    _ => Unit { row: base + at, rows },
                };
                let filter = match period {
                    usize::MAX => unit(f, last.filter_stride),
                    period => Unit { row: f, rows: period },
                };
                let next = filter_ids.len();
                let filter_id = *filter_ids.entry(filter.row).or_insert(next);
                if filter_id == self.filters.len() {
                    self.filters.push(filter);
                }
                units.push((filter_id, unit(i, last.input_stride), Unit { row: block * span + at, rows }));
            }
        }
        units.sort_by_key(|(filter_id, _, _)| *filter_id);
        self.bundle = units.len() / self.filters.len();
        for (filter, source, out) in units {
            let next = input_ids.len();
            let input = *input_ids.entry(source.row).or_insert(next);
            if input == self.inputs.len() {
                self.inputs.push(source);
            }
            self.one_to_one &= input == self.groups.len();
            self.groups.push(Group { input, filter });
            self.outputs.push(out);
        }
        self.one_to_one &= self.inputs.len() == self.groups.len();
        Ok(())
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

    fn wide(input: &[usize], filter: &[usize]) -> Layout {
        Layout::of_width(input, filter, LANES).unwrap()
    }

    #[test]
    fn depthwise_batch_shares_filters() {
        let l = wide(&[3, 40], &[40]);
        assert_eq!((l.groups.len(), l.filters.len(), l.bundle, l.one_to_one), (9, 3, 3, true));
        assert_eq!(l.outputs[1], Unit { row: 40, rows: 16 });
        assert_eq!((l.filters[2].row, l.filters[2].rows), (32, 8));
    }

    #[test]
    fn a_batch_of_few_channels_shares_units() {
        let l = wide(&[7, 5], &[5]);
        assert_eq!((l.filters.len(), l.bundle, l.one_to_one), (1, 3, true));
        assert_eq!(l.outputs, [0, 15, 30].map(|row| Unit { row, rows: 15.min(35 - row) }));
        assert_eq!((l.filters[0], l.filters[0].row(7)), (Unit { row: 0, rows: 5 }, 2));
    }

    #[test]
    fn one_filter_for_all_is_shared() {
        let l = wide(&[3, 40], &[]);
        assert_eq!((l.groups.len(), l.filters.len(), l.bundle), (8, 1, 8));
        assert!(l.shared_filters && l.one_to_one && !l.replicated);
    }

    #[test]
    fn shared_bank_stores_each_row_once() {
        let l = wide(&[2, 1, 20], &[5, 1]);
        assert_eq!(l.output_shape, [2, 5, 20]);
        assert_eq!((l.inputs.len(), l.filters.len(), l.groups.len(), l.one_to_one), (4, 5, 20, false));
    }

    #[test]
    fn one_input_for_many_filters_is_replicated() {
        let l = wide(&[2, 1], &[20]);
        assert_eq!(l.inputs, [Unit { row: 0, rows: 1 }, Unit { row: 1, rows: 1 }]);
        assert_eq!((l.output_shape, l.replicated), (vec![2, 20], true));
    }

    #[test]
    fn few_rows_go_one_by_one() {
        for (input, filter, width) in [(1, 1, 1), (6, 6, 1), (7, 7, 16), (17, 17, 16), (64, 64, 16)] {
            assert_eq!(Layout::new(&[input], &[filter]).unwrap().width, width, "{input}");
        }
        assert_eq!(Layout::new(&[8, 2], &[2]).unwrap().width, 16);
        let l = Layout::new(&[3], &[3]).unwrap();
        assert_eq!((l.outputs[2], l.groups[2]), (Unit { row: 2, rows: 1 }, Group { input: 2, filter: 2 }));
    }

    #[test]
    fn scalars_and_empty_shapes() {
        assert_eq!(Layout::new(&[], &[]).unwrap().groups.len(), 1);
        assert!(Layout::new(&[0, 3], &[3]).unwrap().groups.is_empty());
        assert!(broadcast(&[2, 3], &[4]).is_err());
        assert!(rows(&[usize::MAX, 2]).is_err());
    }
}
