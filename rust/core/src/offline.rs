//! Whole sequences at once: causal convolution, and the FutureFill operator itself.
//!
//! Both are one right-angle product per row: its real part is the causal output of a block, its imaginary part what
//! the block contributes to the outputs after it.

use crate::error::Error;
use crate::layout::{self, Layout};
use crate::plan::{check_filters, check_len};
use crate::pool;
use crate::real::Real;
use crate::transform::{Transform, Workspace};
use rustfft::num_complex::Complex;
use std::sync::Arc;

/// Filter rows `[row][filter_length]`, and how many threads may work.
pub(crate) struct Job<'a, T> {
    pub(crate) filters: &'a [T],
    pub(crate) filter_length: usize,
    pub(crate) workers: usize,
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
    check_filters(filters, layout::rows(filter_shape)?, filter_shape, lags)?;
    check_len("u", u.len(), layout.input_rows, u_shape, t)?;
    check_len("out", out.len(), layout.output_rows, &layout.output_shape, t)?;
    let job = Job { filters, filter_length: lags, workers: workers.max(1) };
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
    check_filters(w, layout::rows(w_shape)?, w_shape, t2)?;
    check_len("v", v.len(), layout.input_rows, v_shape, t1)?;
    check_len("out", out.len(), layout.output_rows, &layout.output_shape, t2 - 1)?;
    // Only the last t2 - 1 inputs reach the future.
    let recent = t1.min(t2 - 1);
    let tails: Vec<T>;
    let (v, t1) = if recent < t1 {
        tails = v.chunks_exact(t1).flat_map(|row| &row[t1 - recent..]).copied().collect();
        (&tails[..], recent)
    } else {
        (v, t1)
    };
    let job = Job { filters: w, filter_length: t2, workers: 1 };
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
        let whole = fast_len(t.max((t + lags).div_ceil(2)));
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
    let cut = Cut::new(t, extra, job.filter_length);
    let transform = Transform::<T>::get(cut.block);
    let bins = transform.len();
    let zero = Complex::new(T::ZERO, T::ZERO);
    let new_worker = || Worker { work: Workspace::for_transforms([&*transform]), filter: vec![zero; bins] };
    // Inputs that several filters share are transformed once, before the rows that need them.
    let shared = if layout.one_to_one {
        Vec::new()
    } else {
        let mut spectra = vec![zero; layout.input_rows * cut.blocks * bins];
        let mut workers: Vec<_> = (0..job.workers).map(|_| new_worker()).collect();
        let rows = u.chunks_exact(t).zip(spectra.chunks_exact_mut(cut.blocks * bins));
        pool::for_each(rows, &mut workers, |(row, spectra), worker| {
            for (block, spectrum) in row.chunks(cut.block).zip(spectra.chunks_exact_mut(bins)) {
                transform.input_bins(block, spectrum, &mut worker.work);
            }
        });
        spectra
    };
    let mut outs = match out {
        Some(out) => split(out, t),
        None => Vec::new(),
    };
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
    let mut workers: Vec<_> = (0..job.workers).map(|_| new_worker()).collect();
    pool::for_each(tasks.into_iter(), &mut workers, |(filter, rows), worker| {
        let filter = &job.filters[filter * job.filter_length..][..cut.lags];
        transform.filter_bins(filter, &mut worker.filter, &mut worker.work);
        for row in rows {
            let input = &u[row.input * t..][..t];
            let spectra = shared.get(row.input * cut.blocks * bins..).unwrap_or_default();
            worker.convolve(&transform, &cut, input, spectra, row);
        }
    });
    Ok(())
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
