//! Whole sequences at once: causal convolution, and the FutureFill operator itself.
//!
//! A sequence is one block of inputs, or blocks of equal length, and the filters are partitions of lags: each pair is one
//! product, and all of its coefficients count. No product has lags that none of its outputs reaches: they would only add
//! rounding, however large they are.

use crate::bank::Filters;
use crate::buffer::{Buffer, with_room};
use crate::error::Error;
use crate::isa::Isa;
use crate::kernels::{LANES, transpose};
use crate::layout::Layout;
use crate::pool;
use crate::real::Real;
use crate::shape::{check_filters, check_len, rows, size};
use crate::transform::{BIN, BlockTransform, Products, Work, block_transform, fast_len};
use crate::watch;
use std::ops::Range;

/// `y[..., t] = sum_j filters[..., j] u[..., t - j]` for inputs `(*u_shape, t)` and filters `(*filter_shape, lags)`.
#[allow(clippy::too_many_arguments)]
pub fn causal_conv<T: Real>(
    u: &[T],
    u_shape: &[usize],
    t: usize,
    filters: &[T],
    filter_shape: &[usize],
    lags: usize,
    out: &mut [T],
    workers: usize,
) -> Result<(), Error> {
    let layout = Layout::new(u_shape, filter_shape)?;
    check_filters(filters, rows(filter_shape)?, filter_shape, lags)?;
    check_len("u", u.len(), layout.input_rows, u_shape, t)?;
    check_len("out", out.len(), layout.output_rows, &layout.output_shape, t)?;
    convolve(&layout, u, t, &Filters { values: filters, length: lags }, workers.max(1), out, &mut [], 0)
}

/// The paper's operator: `out[s - 1] = sum_{i=1}^{t2-s} v_{t1-i+1} w_{s+i}` for `s = 1..t2 - 1`, row by row.
pub fn futurefill<T: Real>(
    v: &[T],
    v_shape: &[usize],
    t1: usize,
    w: &[T],
    w_shape: &[usize],
    t2: usize,
    out: &mut [T],
) -> Result<(), Error> {
    let layout = Layout::new(v_shape, w_shape)?;
    if t2 == 0 {
        return Err(Error::value("w", "at least one value on its last axis", 0));
    }
    let rows = rows(w_shape)?;
    check_filters(w, rows, w_shape, t2)?;
    check_len("v", v.len(), layout.input_rows, v_shape, t1)?;
    check_len("out", out.len(), layout.output_rows, &layout.output_shape, t2 - 1)?;
    // Only the last t2 - 1 inputs reach the future.
    let recent = t1.min(t2 - 1);
    let tails: Vec<T>;
    let (v, t1) = if recent < t1 {
        let mut recents = with_room(size(&[layout.input_rows, recent])?)?;
        v.chunks_exact(t1).for_each(|row| recents.extend_from_slice(&row[t1 - recent..]));
        tails = recents;
        (&tails[..], recent)
    } else {
        (v, t1)
    };
    convolve(&layout, v, t1, &Filters { values: w, length: t2 }, 1, &mut [], out, t2 - 1)
}

/// Below this a block costs more in calls than in arithmetic.
const SHORTEST_BLOCK: usize = 256;

/// Longer blocks leave the caches.
const LONGEST_BLOCK: usize = 1 << 14;

/// How a sequence is cut into blocks of inputs, and the filters into partitions of lags.
struct Cut {
    /// Inputs of one block, and how many blocks there are.
    block: usize,
    blocks: usize,
    /// Degree of the transforms' modulus.
    bins: usize,
    /// The lags of each partition. Where there are several blocks, all but the last are as long as a block.
    partitions: Vec<Range<usize>>,
}

impl Cut {
    fn new(t: usize, extra: usize, lags: usize) -> Self {
        let lags = lags.min(t + extra);
        if lags <= t {
            // Every lag reaches some output of the sequence.
            let block = fast_len(lags.max(SHORTEST_BLOCK)).min(LONGEST_BLOCK);
            if t <= LONGEST_BLOCK && (block >= fast_len(t) || block >= t) {
                return Self { block: t, blocks: 1, bins: fast_len(t), partitions: std::iter::once(0..lags).collect() };
            }
            return Self::grid(t, block, lags);
        }
        if t > LONGEST_BLOCK {
            return Self::grid(t, t.div_ceil(t.div_ceil(LONGEST_BLOCK)), lags);
        }
        // The first partition is all that the sequence's own outputs reach; the others reach those after it alone.
        let bins = fast_len(t.max(SHORTEST_BLOCK));
        let longest = 2 * bins + 1 - t;
        let rest = (t..lags).step_by(longest).map(|from| from..lags.min(from + longest));
        Self { block: t, blocks: 1, bins, partitions: std::iter::once(0..t).chain(rest).collect() }
    }

    fn grid(t: usize, block: usize, lags: usize) -> Self {
        let partitions = (0..lags).step_by(block).map(|from| from..lags.min(from + block)).collect();
        Self { block, blocks: t.div_ceil(block), bins: fast_len(block), partitions }
    }
}

/// Outputs `[output row][t]` into `out`, unless it is empty, and the `extra` outputs after them into `tail`
/// `[output row][extra]`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn convolve<T: Real>(
    layout: &Layout,
    u: &[T],
    t: usize,
    filters: &Filters<&[T]>,
    workers: usize,
    out: &mut [T],
    tail: &mut [T],
    extra: usize,
) -> Result<(), Error> {
    tail.fill(T::ZERO);
    if layout.output_rows == 0 || t == 0 {
        return Ok(());
    }
    let cut = Cut::new(t, extra, filters.length);
    let transform = block_transform::<T>(layout.width, cut.bins)?;
    let sequence = Sequence { layout, transform: &*transform, isa: Isa::get(), cut: &cut, u, t, extra };
    let (len, width) = (transform.spectrum_len(), layout.width);
    // Inputs that several units of outputs share are transformed once, before these.
    let apart = !layout.one_to_one;
    let slots = cut.partitions.len().min(cut.blocks);
    let filter_len = transform.filter_len(layout.shared_filters);
    let room = || -> Result<Room<T>, Error> {
        Ok(Room {
            x: Buffer::new(size(&[cut.bins, width])?, T::ZERO)?,
            inputs: Buffer::new(if apart { 0 } else { size(&[slots, len])? }, T::ZERO)?,
            filter: Buffer::new(size(&[cut.partitions.len(), filter_len])?, T::ZERO)?,
            z: Buffer::new(size(&[2, cut.bins, width])?, T::ZERO)?,
            work: transform.work()?,
        })
    };
    let mut rooms = (0..workers).map(|_| room()).collect::<Result<Vec<_>, _>>()?;
    let mut shared = Buffer::new(if apart { size(&[layout.inputs.len(), cut.blocks, len])? } else { 0 }, T::ZERO)?;
    let run = |(i, spectrum): (usize, &mut [T]), room: &mut Room<T>| {
        sequence.gather(i / cut.blocks, i % cut.blocks, &mut room.x);
        transform.input(&room.x, spectrum, &mut room.work);
    };
    watch::part(0, 1, 3, || pool::for_each(shared.chunks_exact_mut(len).enumerate(), &mut rooms, run));
    let mut outs = sequence.by_unit(out, t);
    let mut tails = sequence.by_unit(tail, extra);
    // One filter transform serves a whole batch, or as much of it as leaves no thread without work.
    let share = layout.bundle.div_ceil(workers.div_ceil(layout.filters.len()));
    let mut tasks = Vec::new();
    for first in (0..layout.groups.len()).step_by(layout.bundle) {
        for from in (first..first + layout.bundle).step_by(share) {
            let members = from..(from + share).min(first + layout.bundle);
            tasks.push(members.map(|g| (g, std::mem::take(&mut outs[g]), std::mem::take(&mut tails[g]))).collect());
        }
    }
    let run = |members: Vec<(usize, &mut [T], &mut [T])>, room: &mut Room<T>| {
        let unit = layout.filters[layout.groups[members[0].0].filter];
        let scale = T::of_f64(1.0 / cut.bins as f64);
        for (lags, spectrum) in cut.partitions.iter().zip(room.filter.chunks_exact_mut(filter_len)) {
            watch::check();
            let lags = filters.lags(unit, lags.clone(), scale);
            transform.filter(&lags, layout.shared_filters, spectrum, &mut room.work);
        }
        let count = members.len();
        for (k, (g, out, tail)) in members.into_iter().enumerate() {
            let first = layout.groups[g].input * cut.blocks * len;
            let shared = shared.get(first..first + cut.blocks * len);
            watch::part(k, k + 1, count, || sequence.convolve(g, shared, out, tail, room));
        }
    };
    watch::part(1, 3, 3, || pool::for_each(tasks.into_iter(), &mut rooms, run));
    Ok(())
}

/// What one worker needs.
struct Room<T> {
    x: Buffer<T>,
    /// A ring of as many input blocks as there are filter partitions.
    inputs: Buffer<T>,
    filter: Buffer<T>,
    /// `[2 bins][width]`: all coefficients of a product.
    z: Buffer<T>,
    work: Work<T>,
}

/// A sequence that is convolved unit by unit.
struct Sequence<'a, T: Real> {
    layout: &'a Layout,
    transform: &'a dyn BlockTransform<T>,
    isa: Isa,
    cut: &'a Cut,
    u: &'a [T],
    t: usize,
    extra: usize,
}

impl<T: Real> Sequence<'_, T> {
    /// A buffer `[output row][len]` by output units.
    fn by_unit<'b>(&self, buffer: &'b mut [T], len: usize) -> Vec<&'b mut [T]> {
        let outputs = &self.layout.outputs;
        let mut order: Vec<_> = (0..outputs.len()).collect();
        order.sort_by_key(|g| outputs[*g].row);
        let mut parts: Vec<&mut [T]> = outputs.iter().map(|_| Default::default()).collect();
        let mut rest = buffer;
        for g in order {
            // An empty buffer has no part for anybody.
            parts[g] = rest.split_off_mut(..outputs[g].rows * len).unwrap_or_default();
        }
        parts
    }

    /// Block `b` of the rows of a unit as `[time][width]`, zero-padded.
    fn gather(&self, unit: usize, b: usize, x: &mut [T]) {
        let (n, width, unit) = (self.cut.block, self.layout.width, self.layout.inputs[unit]);
        let count = n.min(self.t - b * n);
        let (block, rest) = x.split_at_mut(count * width);
        rest.fill(T::ZERO);
        let rows = &self.u[unit.row * self.t..];
        if width == 1 {
            block.copy_from_slice(&rows[b * n..][..count]);
            return;
        }
        transpose::from_rows(self.isa, rows, self.t, b * n, unit.rows, block);
        if unit.rows == 1 {
            block.chunks_exact_mut(width).for_each(|lanes| lanes.fill(lanes[0]));
        }
    }

    /// One unit of outputs, block by block.
    fn convolve(&self, g: usize, shared: Option<&[T]>, out: &mut [T], tail: &mut [T], room: &mut Room<T>) {
        let Room { x, inputs, filter, z, work } = room;
        let (cut, len) = (self.cut, self.transform.spectrum_len());
        let (parts, n) = (cut.partitions.len(), cut.block);
        let filter_len = self.transform.filter_len(self.layout.shared_filters);
        let ends = if cut.blocks == 1 { parts } else { (self.t + self.extra).div_ceil(n) };
        for block in 0..ends {
            watch::poll(block, ends);
            // Inputs of block `newest` meet partition `first`, older ones the partitions after it.
            let newest = block.min(cut.blocks - 1);
            let first = block - newest;
            if first >= parts {
                break;
            }
            let (slots, slot) = match shared {
                Some(slots) => (slots, newest),
                None => {
                    let slot = newest % parts;
                    if first == 0 {
                        self.gather(self.layout.groups[g].input, block, x);
                        self.transform.input(x, &mut inputs[slot * len..][..len], work);
                    }
                    (&inputs[..], slot)
                }
            };
            let count = (newest + 1).min(parts - first);
            let filters = &filter[first * filter_len..];
            let products = Products { slots, newest: slot, filters, count, shared: self.layout.shared_filters };
            self.transform.both(&products, z, work);
            let (at, longest) = match cut.blocks {
                1 => (cut.partitions[block].start, cut.partitions[block].len()),
                _ => (block * n, n),
            };
            self.emit(g, z, at..at + (n + longest).min(2 * cut.bins), out, tail, block);
        }
    }

    /// The coefficients of a product to these positions: `out` up to the sequence's end, `tail` behind it. The first
    /// half of what block `block` has may meet what the one before it left.
    fn emit(&self, g: usize, z: &[T], range: Range<usize>, out: &mut [T], tail: &mut [T], block: usize) {
        let (t, n, bins) = (self.t, self.cut.block, self.cut.bins);
        let range = range.start..range.end.min(t + self.extra);
        // Where the output's buffer, the part of the coefficients, or what stands there already changes.
        let own = if block == 0 { range.start } else { range.start + n };
        let mut cuts = [range.start, own, t, range.start + bins, range.end].map(|at| at.clamp(range.start, range.end));
        cuts.sort_unstable();
        for pair in cuts.windows(2).filter(|pair| pair[0] < pair[1]) {
            let (from, to) = (pair[0], pair[1]);
            let coefficient = from - range.start;
            let (part, coefficient) = (coefficient / bins, coefficient % bins);
            let rows = if from < t { &mut *out } else { &mut *tail };
            if rows.is_empty() {
                continue;
            }
            let (pitch, at) = if from < t { (t, from) } else { (self.extra, from - t) };
            // The tail begins with zeros.
            let add = from < own || from >= t;
            self.write(g, &z[self.layout.width * (2 * coefficient + part)..], rows, pitch, at, to - from, add);
        }
    }

    /// `count` coefficients, real or imaginary parts, to columns `at..` of the rows of a unit.
    #[allow(clippy::too_many_arguments)]
    fn write(&self, g: usize, z: &[T], rows: &mut [T], pitch: usize, at: usize, count: usize, add: bool) {
        if self.layout.width == 1 {
            for (to, v) in rows[at..at + count].iter_mut().zip(z.iter().step_by(2)) {
                *to = if add { *to + *v } else { *v };
            }
            return;
        }
        let to_rows = if add { transpose::add_bins_to_rows } else { transpose::bins_to_rows };
        to_rows(self.isa, &z[..(count - 1) * BIN + LANES], rows, pitch, at, self.layout.outputs[g].rows);
    }
}
