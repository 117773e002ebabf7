//! What a plan keeps of its filters for one arrangement of their rows: the first lags, and spectra of all levels.

use crate::buffer::Buffer;
use crate::error::Error;
use crate::execution::{Execution, Level};
use crate::kernels::direct::lead;
use crate::layout::{Layout, Unit};
use crate::pool;
use crate::real::Real;
use crate::shape::size;
use crate::transform::{BlockTransform, Lags, Work, block_transform};
use crate::watch;
use std::ops::Range;
use std::sync::Arc;

/// Rows of `length` lags, lag 0 first.
pub(crate) struct Filters<V> {
    pub(crate) values: V,
    pub(crate) length: usize,
}

/// Filters for units of one width.
pub(crate) struct Bank<T: Real> {
    width: usize,
    units: Vec<Unit>,
    pub(crate) levels: Vec<BankLevel<T>>,
    /// `[filter unit][lag][width]`: the lags of the base block, or for the direct sum all that count. Single rows of a
    /// base block begin with zeros; those of the direct sum have the last lag first, so that inputs and lags run the
    /// same way.
    pub(crate) taps: Buffer<T>,
    /// Lags per unit in `taps`.
    pub(crate) lags: usize,
}

/// Filter spectra of one level, `[filter unit][partition][bins]`.
pub(crate) struct BankLevel<T: Real> {
    pub(crate) transform: Arc<dyn BlockTransform<T>>,
    pub(crate) shared: bool,
    spectra: Buffer<T>,
    /// Reals of one partition.
    pub(crate) len: usize,
    parts: usize,
}

impl<T: Real> BankLevel<T> {
    /// Spectra of the partitions of a filter unit, from partition `first` on.
    pub(crate) fn partitions(&self, unit: usize, first: usize) -> &[T] {
        let unit = &self.spectra[unit * self.parts * self.len..][..self.parts * self.len];
        &unit[first.min(self.parts) * self.len..]
    }
}

impl<T: Real> Bank<T> {
    pub(crate) fn new(
        filters: &Filters<&[T]>,
        layout: &Layout,
        execution: &Execution,
        reach: usize,
        workers: usize,
    ) -> Result<Self, Error> {
        let count = execution.levels.len();
        let level = |(k, level): (usize, &Level)| {
            watch::part(k, k + 1, count, || BankLevel::new(filters, layout, level, reach, workers))
        };
        Ok(Self {
            width: layout.width,
            units: layout.filters.clone(),
            levels: execution.levels.iter().enumerate().map(level).collect::<Result<_, _>>()?,
            taps: taps(filters, layout, execution)?,
            lags: execution.block(),
        })
    }

    pub(crate) fn serves(&self, layout: &Layout) -> bool {
        self.width == layout.width && self.units == layout.filters
    }

    pub(crate) fn bytes(&self) -> usize {
        self.taps.bytes() + self.levels.iter().map(|level| level.spectra.bytes()).sum::<usize>()
    }
}

impl<T: Real> BankLevel<T> {
    fn new(
        filters: &Filters<&[T]>,
        layout: &Layout,
        level: &Level,
        reach: usize,
        workers: usize,
    ) -> Result<Self, Error> {
        let transform = block_transform::<T>(layout.width, level.block)?;
        let shared = layout.shared_filters;
        let (len, parts) = (transform.filter_len(shared), level.parts);
        let mut spectra = Buffer::new(size(&[layout.filters.len(), parts, len])?, T::ZERO)?;
        let mut rooms = (0..workers).map(|_| transform.work()).collect::<Result<Vec<_>, _>>()?;
        let jobs = spectra.chunks_exact_mut(len).enumerate();
        let run = |(i, spectrum): (usize, &mut [T]), room: &mut Work<T>| {
            let (unit, part) = (layout.filters[i / parts], i % parts);
            let lags = filters.lags(unit, partition(level, part, reach), T::of_f64(1.0));
            transform.filter(&lags, shared, spectrum, room);
        };
        pool::for_each(jobs, &mut rooms, run);
        Ok(Self { transform, shared, spectra, len, parts })
    }
}

/// The lags of one partition of a level: two blocks, from the partition's first lag on.
fn partition(level: &Level, part: usize, reach: usize) -> Range<usize> {
    // Lags that no output of the horizon reaches would only add rounding.
    let from = part.saturating_mul(level.block).min(reach);
    from..from.saturating_add(2 * level.block).min(reach)
}

fn taps<T: Real>(filters: &Filters<&[T]>, layout: &Layout, execution: &Execution) -> Result<Buffer<T>, Error> {
    let (lags, width) = (execution.block(), layout.width);
    let lead = if execution.base == 0 { 0 } else { lead(width) };
    let mut taps = Buffer::new(size(&[layout.filters.len(), lead + lags, width])?, T::ZERO)?;
    for (unit, taps) in layout.filters.iter().zip(taps.chunks_exact_mut((lead + lags) * width)) {
        let taps = &mut taps[lead * width..];
        for lane in 0..width {
            let row = &filters.row(unit.row(lane))[..lags.min(filters.length)];
            for (j, f) in row.iter().enumerate() {
                let j = if execution.base == 0 && width == 1 { lags - 1 - j } else { j };
                taps[j * width + lane] = *f;
            }
        }
    }
    Ok(taps)
}

impl<T: Real> Filters<&[T]> {
    pub(crate) fn row(&self, row: usize) -> &[T] {
        &self.values[row * self.length..][..self.length]
    }

    /// Some lags of the filters of a unit.
    pub(crate) fn lags(&self, unit: Unit, range: Range<usize>, scale: T) -> Lags<'_, T> {
        let filters = &self.values[unit.row * self.length..];
        Lags { filters, stride: self.length, rows: unit.rows, range, scale }
    }
}
