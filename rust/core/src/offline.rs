//! Whole sequences at once: causal convolution, and the FutureFill operator itself.
//!
//! Both are one right-angle product per row: its real part is the causal output of a block, its imaginary part what
//! the block contributes to the outputs after it.

use crate::buffer::{Buffer, with_room, zeros};
use crate::error::Error;
use crate::kernels::{Isa, LANES};
use crate::lanes::{BIN, LaneTransform, Products, fold};
use crate::layout::{self, Layout};
use crate::plan::{check_filters, check_len, size};
use crate::pool;
use crate::real::Real;
use crate::transform::{Transform, Workspace};
use crate::transpose;
use crate::watch;
use rustfft::num_complex::Complex;
use std::ops::Range;
use std::sync::Arc;

/// Filter rows `[row][filter_length]`, and how many threads may work.
pub(crate) struct Job<'a, T> {
    pub(crate) filters: &'a [T],
    pub(crate) filter_length: usize,
    pub(crate) workers: usize,
    /// 16 rows at a time: a matter of the filters alone, so that a row's bits do not depend on the batch it is in.
    pub(crate) side_by_side: bool,
}

impl<'a, T> Job<'a, T> {
    pub(crate) fn new(filters: &'a [T], rows: usize, filter_length: usize, workers: usize) -> Self {
        Self { filters, filter_length, workers, side_by_side: layout::well_filled(rows) }
    }
}

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
    let filter_rows = layout::rows(filter_shape)?;
    check_filters(filters, filter_rows, filter_shape, lags)?;
    check_len("u", u.len(), layout.input_rows, u_shape, t)?;
    check_len("out", out.len(), layout.output_rows, &layout.output_shape, t)?;
    let job = Job::new(filters, filter_rows, lags, workers.max(1));
    convolve(&layout, u, t, &job, Some(out), &mut [], 0)
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
    let rows = layout::rows(w_shape)?;
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
    let job = Job::new(w, rows, t2, 1);
    convolve(&layout, v, t1, &job, None, out, t2 - 1)
}

/// The smallest length of at least `n` that has fast transforms.
fn fast_len(n: usize) -> usize {
    let power = n.next_power_of_two();
    let three = power / 4 * 3;
    if three >= n && power >= 16 { three } else { power }
}

/// Below this a block costs more in calls than in arithmetic.
const SHORTEST_BLOCK: usize = 256;

/// How a sequence of `t` inputs and `extra` outputs after it is cut into blocks.
struct Cut {
    block: usize,
    blocks: usize,
    /// Lags that can matter.
    lags: usize,
}

impl Cut {
    fn new(t: usize, extra: usize, lags: usize) -> Self {
        let lags = lags.min(t + extra);
        let whole = fast_len(t.max((t + lags).div_ceil(2)).max(2));
        let block = fast_len(lags.max(SHORTEST_BLOCK));
        if block < whole && block < t {
            Self { block, blocks: t.div_ceil(block), lags }
        } else {
            Self { block: whole, blocks: 1, lags }
        }
    }
}

/// Outputs `[output row][t]` into `out`, and the `extra` outputs after them into `tail` `[output row][extra]`.
pub(crate) fn convolve<T: Real>(
    layout: &Layout,
    u: &[T],
    t: usize,
    job: &Job<T>,
    out: Option<&mut [T]>,
    tail: &mut [T],
    extra: usize,
) -> Result<(), Error> {
    if layout.output_rows == 0 || t == 0 {
        tail.fill(T::ZERO);
        return Ok(());
    }
    if job.side_by_side {
        return side_by_side(layout, u, t, job, out.unwrap_or_default(), tail, extra);
    }
    by_rows(layout, u, t, job, out.unwrap_or_default(), tail, extra)
}

/// Row by row.
fn by_rows<T: Real>(
    layout: &Layout,
    u: &[T],
    t: usize,
    job: &Job<T>,
    out: &mut [T],
    tail: &mut [T],
    extra: usize,
) -> Result<(), Error> {
    let cut = Cut::new(t, extra, job.filter_length);
    let transform = Transform::<T>::get(cut.block)?;
    let bins = transform.len();
    let zero = Complex::new(T::ZERO, T::ZERO);
    let new_worker = || -> Result<_, Error> {
        Ok(Worker { work: Workspace::for_transforms([&*transform], 0)?, filter: zeros(bins, zero)? })
    };
    let mut workers = (0..job.workers).map(|_| new_worker()).collect::<Result<Vec<_>, _>>()?;
    // Inputs that several filters share are transformed once, before the rows that need them.
    let shared = if layout.one_to_one {
        Vec::new()
    } else {
        let mut spectra = zeros(size(&[layout.input_rows, cut.blocks, bins])?, zero)?;
        let rows = u.chunks_exact(t).zip(spectra.chunks_exact_mut(cut.blocks * bins));
        let run = |(row, spectra): (&[T], &mut [Complex<T>]), worker: &mut Worker<T>| {
            for (b, (block, spectrum)) in row.chunks(cut.block).zip(spectra.chunks_exact_mut(bins)).enumerate() {
                transform.input_bins(block, spectrum, &mut worker.work);
                watch::poll(b + 1, cut.blocks);
            }
        };
        watch::part(0, 1, 3, || pool::for_each(rows, &mut workers, run));
        spectra
    };
    let mut outs = split(out, t);
    let mut tails = split(tail, extra);
    let mut tasks = Vec::new();
    for (bundle, (groups, outputs)) in
        layout.groups.chunks(layout.bundle).zip(layout.outputs.chunks(layout.bundle)).enumerate()
    {
        let mut row = |member: usize, lane: usize| Row {
            input: layout.inputs[groups[member].input].row + layout.input_row(groups[member].input, lane),
            out: outs.get_mut(outputs[member].row + lane).and_then(Option::take),
            tail: tails.get_mut(outputs[member].row + lane).and_then(Option::take).unwrap_or_default(),
        };
        // One filter transform serves the whole batch, or all lanes that share the filter.
        if layout.filters[bundle].rows == 1 {
            for (member, lanes) in outputs.iter().enumerate() {
                let rows: Vec<_> = (0..lanes.rows).map(|lane| row(member, lane)).collect();
                tasks.push((layout.filter_row(bundle, 0), rows));
            }
        } else {
            for lane in 0..outputs[0].rows {
                let rows: Vec<_> = (0..outputs.len()).map(|member| row(member, lane)).collect();
                tasks.push((layout.filter_row(bundle, lane), rows));
            }
        }
    }
    let run = |(filter, rows): (usize, Vec<Row<T>>), worker: &mut Worker<T>| {
        let filter = &job.filters[filter * job.filter_length..][..cut.lags];
        transform.filter_bins(filter, &mut worker.filter, &mut worker.work);
        let count = rows.len();
        for (k, row) in rows.into_iter().enumerate() {
            let input = &u[row.input * t..][..t];
            let spectra = shared.get(row.input * cut.blocks * bins..).unwrap_or_default();
            watch::part(k, k + 1, count, || worker.convolve(&transform, &cut, input, spectra, row));
        }
    };
    watch::part(1, 3, 3, || pool::for_each(tasks.into_iter(), &mut workers, run));
    Ok(())
}

/// The longest block that is transformed 16 rows at a time: longer ones leave the caches.
const LONGEST_BLOCK: usize = 1 << 14;

/// How a sequence is cut into blocks, and the filters into as long partitions, where rows go side by side.
///
/// Block `b` and partition `p` meet in output blocks `b + p` (the real part of their product) and `b + p + 1` (the
/// imaginary part).
struct Partition {
    block: usize,
    blocks: usize,
    parts: usize,
    /// Output blocks that are transformed back.
    outputs: usize,
    lags: usize,
}

impl Partition {
    fn new(t: usize, extra: usize, lags: usize) -> Self {
        let cut = Cut::new(t, extra, lags);
        if cut.blocks == 1 && cut.block <= LONGEST_BLOCK {
            // The only partition may be up to two blocks long, as long as the product is no longer.
            return Self { block: cut.block, blocks: 1, parts: 1, outputs: 1, lags: cut.lags };
        }
        let block = cut.block.min(LONGEST_BLOCK);
        let outputs = (t + extra).div_ceil(block);
        Self { block, blocks: t.div_ceil(block), parts: cut.lags.div_ceil(block), outputs, lags: cut.lags }
    }
}

/// 16 rows at a time.
fn side_by_side<T: Real>(
    layout: &Layout,
    u: &[T],
    t: usize,
    job: &Job<T>,
    out: &mut [T],
    tail: &mut [T],
    extra: usize,
) -> Result<(), Error> {
    let cut = Partition::new(t, extra, job.filter_length);
    let transform = LaneTransform::<T>::get(cut.block)?;
    let len = transform.spectrum_len();
    let lanes = Lanes { layout, transform: &transform, isa: Isa::get(), cut: &cut, u, t, extra };
    // Inputs that several groups share are transformed once, before the groups that need them.
    let apart = layout.packed || !layout.one_to_one;
    let room = || -> Result<Room<T>, Error> {
        Ok(Room {
            x: Buffer::new(cut.block * LANES, T::ZERO)?,
            inputs: Buffer::new(if apart { 0 } else { size(&[cut.parts.min(cut.blocks), len])? }, T::ZERO)?,
            filter: Buffer::new(size(&[cut.parts, len])?, T::ZERO)?,
            z: Buffer::new(len, T::ZERO)?,
        })
    };
    let mut rooms = (0..job.workers).map(|_| room()).collect::<Result<Vec<_>, _>>()?;
    let mut shared = Buffer::new(if apart { size(&[layout.sources(), cut.blocks, len])? } else { 0 }, T::ZERO)?;
    let sources = shared.chunks_exact_mut(cut.blocks * len).enumerate();
    let run = |(source, spectra): (usize, &mut [T]), room: &mut Room<T>| {
        for (b, spectrum) in spectra.chunks_exact_mut(len).enumerate() {
            lanes.gather(source, b, &mut room.x);
            transform.input(&room.x, spectrum);
            watch::poll(b + 1, cut.blocks);
        }
    };
    watch::part(0, 1, 3, || pool::for_each(sources, &mut rooms, run));
    let mut outs = lanes.by_group(out, t);
    let mut tails = lanes.by_group(tail, extra);
    // One filter transform serves a whole batch, or as much of it as leaves no thread without work.
    let share = layout.bundle.div_ceil(job.workers.div_ceil(layout.filters.len()));
    let mut tasks = Vec::new();
    for first in (0..layout.groups.len()).step_by(layout.bundle) {
        for from in (first..first + layout.bundle).step_by(share) {
            let members = from..(from + share).min(first + layout.bundle);
            tasks.push(members.map(|g| (g, std::mem::take(&mut outs[g]), std::mem::take(&mut tails[g]))).collect());
        }
    }
    let run = |members: Vec<(usize, &mut [T], &mut [T])>, room: &mut Room<T>| {
        lanes.filter(layout.groups[members[0].0].filter, job, &mut room.filter);
        let count = members.len();
        for (k, (g, out, tail)) in members.into_iter().enumerate() {
            let (source, lane) = layout.source(layout.groups[g].input, 0);
            let spectra = shared.get(source * cut.blocks * len..).unwrap_or_default();
            let lane = layout.packed.then_some(lane);
            watch::part(k, k + 1, count, || lanes.convolve(g, spectra, lane, out, tail, room));
        }
    };
    watch::part(1, 3, 3, || pool::for_each(tasks.into_iter(), &mut rooms, run));
    Ok(())
}

/// What one worker needs to convolve 16 rows.
struct Room<T> {
    x: Buffer<T>,
    /// A ring of as many input blocks as there are filter partitions.
    inputs: Buffer<T>,
    filter: Buffer<T>,
    z: Buffer<T>,
}

/// A sequence that is convolved 16 rows at a time.
struct Lanes<'a, T: Real> {
    layout: &'a Layout,
    transform: &'a LaneTransform<T>,
    isa: Isa,
    cut: &'a Partition,
    u: &'a [T],
    t: usize,
    extra: usize,
}

impl<T: Real> Lanes<'_, T> {
    /// A buffer `[output row][len]` by output groups.
    fn by_group<'b>(&self, buffer: &'b mut [T], len: usize) -> Vec<&'b mut [T]> {
        let outputs = &self.layout.outputs;
        let mut order: Vec<_> = (0..outputs.len()).collect();
        order.sort_by_key(|g| outputs[*g].row);
        let mut parts: Vec<&mut [T]> = outputs.iter().map(|_| Default::default()).collect();
        let mut rest = buffer;
        for g in order {
            parts[g] = rest.split_off_mut(..outputs[g].rows * len).unwrap_or_default();
        }
        parts
    }

    /// Block `b` of the rows of a source as `[time][16]`, zero-padded.
    fn gather(&self, source: usize, b: usize, x: &mut [T]) {
        let (n, t) = (self.cut.block, self.t);
        let count = n.min(t - b * n);
        let (block, rest) = x[..n * LANES].split_at_mut(count * LANES);
        rest.fill(T::ZERO);
        // Sixteen groups of one row each, or one group.
        let (first, most) = if self.layout.packed { (source * LANES, LANES) } else { (source, 1) };
        for (lane, group) in self.layout.inputs[first..].iter().take(most).enumerate() {
            transpose::from_rows(self.isa, &self.u[group.row * t..], t, b * n, group.rows, &mut block[lane..]);
        }
    }

    /// Spectra of all partitions of a filter group, scaled so that products need no scaling.
    fn filter(&self, group: usize, job: &Job<T>, spectra: &mut [T]) {
        let n = self.cut.block;
        let scale = T::of_f64(1.0 / n as f64);
        let (stride, layout::Lanes { row, rows, .. }) = (job.filter_length, self.layout.filters[group]);
        for (p, z) in spectra.chunks_exact_mut(self.transform.spectrum_len()).enumerate() {
            z.fill(T::ZERO);
            let longest = if self.cut.parts == 1 { 2 * n } else { n };
            let range = p * n..self.cut.lags.min(p * n + longest);
            fold(self.isa, &job.filters[row * stride..], stride, range, rows, scale, &mut z[..n * BIN]);
            self.transform.filter(z);
            watch::check();
        }
    }

    /// One output group, block by block.
    fn convolve(&self, g: usize, shared: &[T], lane: Option<usize>, out: &mut [T], tail: &mut [T], room: &mut Room<T>) {
        let Room { x, inputs, filter, z } = room;
        let (n, len, end) = (self.cut.block, self.transform.spectrum_len(), self.t + self.extra);
        for block in 0..self.cut.outputs {
            watch::poll(block, self.cut.outputs);
            let newest = block.min(self.cut.blocks - 1);
            let first = block - newest;
            let (slots, slot) = if shared.is_empty() {
                let slot = newest % self.cut.parts;
                if first == 0 {
                    self.gather(g, block, x);
                    self.transform.input(x, &mut inputs[slot * len..][..len]);
                }
                (&inputs[..], slot)
            } else {
                (&shared[..self.cut.blocks * len], newest)
            };
            let (at, next) = (block * n, ((block + 1) * n).min(end));
            let after = (next + n).min(end);
            if first >= self.cut.parts {
                self.zero(next..after, out, tail);
                continue;
            }
            let count = (newest + 1).min(self.cut.parts - first);
            let filters = &filter[first * len..];
            self.transform.both(&Products { slots, newest: slot, filters, count, len, lane }, z);
            self.emit(g, z, at..next, out, tail, block > 0);
            self.emit(g, z.get(LANES..).unwrap_or_default(), next..after, out, tail, false);
        }
        self.zero(((self.cut.outputs + 1) * n).min(end)..end, out, tail);
    }

    /// Real parts of bins to these positions of the outputs: `out` up to the sequence's end, `tail` behind it.
    fn emit(&self, g: usize, z: &[T], range: Range<usize>, out: &mut [T], tail: &mut [T], add: bool) {
        let (t, rows) = (self.t, self.layout.outputs[g].rows);
        let within = range.end.min(t).saturating_sub(range.start);
        let to_rows = if add { transpose::add_bins_to_rows } else { transpose::bins_to_rows };
        if within > 0 && !out.is_empty() {
            to_rows(self.isa, &z[..(within - 1) * BIN + LANES], out, t, range.start, rows);
        }
        if range.len() > within {
            let z = &z[within * BIN..(range.len() - 1) * BIN + LANES];
            to_rows(self.isa, z, tail, self.extra, range.start + within - t, rows);
        }
    }

    fn zero(&self, range: Range<usize>, out: &mut [T], tail: &mut [T]) {
        let t = self.t;
        out.chunks_exact_mut(t).for_each(|row| row[range.start.min(t)..range.end.min(t)].fill(T::ZERO));
        let (from, to) = (range.start.max(t) - t, range.end.max(t) - t);
        tail.chunks_exact_mut(self.extra.max(1)).for_each(|row| row[from..to].fill(T::ZERO));
    }
}

/// The rows of a buffer, to be taken in any order.
fn split<T>(mut buffer: &mut [T], len: usize) -> Vec<Option<&mut [T]>> {
    let count = buffer.len().checked_div(len).unwrap_or(0);
    let mut rows = Vec::with_capacity(count);
    for _ in 0..count {
        let (row, rest) = buffer.split_at_mut(len);
        rows.push(Some(row));
        buffer = rest;
    }
    rows
}

struct Row<'a, T> {
    input: usize,
    out: Option<&'a mut [T]>,
    tail: &'a mut [T],
}

struct Worker<T> {
    work: Workspace<T>,
    filter: Vec<Complex<T>>,
}

impl<T: Real> Worker<T> {
    /// One row, block by block: each block's own outputs, and its effect on the block after it.
    fn convolve(&mut self, transform: &Arc<Transform<T>>, cut: &Cut, u: &[T], spectra: &[Complex<T>], row: Row<T>) {
        let (n, t) = (cut.block, u.len());
        let Row { mut out, tail, .. } = row;
        for (b, block) in u.chunks(n).enumerate() {
            watch::poll(b, cut.blocks);
            match spectra.get(b * n..(b + 1) * n) {
                Some(bins) => transform.product_of_bins(bins, &self.filter, &mut self.work),
                None => transform.product(block, &self.filter, &mut self.work),
            }
            let last = b + 1 == cut.blocks;
            if let Some(out) = out.as_deref_mut() {
                let (own, next) = out[b * n..].split_at_mut(block.len());
                transform.present(0, own, b > 0, &self.work);
                let reach = next.len().min(n);
                transform.future(0, &mut next[..reach], false, &self.work);
            }
            // What lies behind the sequence's end: the rest of the last block, then its future.
            if last && !tail.is_empty() {
                let rest = (n - block.len()).min(tail.len());
                let (within, beyond) = tail.split_at_mut(rest);
                self.finish_tail(transform, b > 0, block.len(), within, beyond);
            } else if b + 2 == cut.blocks && !tail.is_empty() {
                // The last block is shorter than the future of the one before it.
                let short = t - (b + 1) * n;
                let reach = (n - short).min(tail.len());
                transform.future(short, &mut tail[..reach], false, &self.work);
            }
        }
    }

    fn finish_tail(&self, transform: &Transform<T>, add: bool, at: usize, within: &mut [T], beyond: &mut [T]) {
        transform.present(at, within, add, &self.work);
        let reach = beyond.len().min(transform.len());
        let (near, far) = beyond.split_at_mut(reach);
        transform.future(0, near, false, &self.work);
        far.fill(T::ZERO);
    }
}
