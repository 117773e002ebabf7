//! The direct part: sums over lags inside the base block, and the direct sum of all lags.

use super::{LANES, add_all, dispatch, fma, fma_all, load};
use crate::isa::Isa;
use crate::real::Real;
use std::ops::Range;

/// Inputs that one direct tile pushes at the lowest level; larger direct tiles are powers of it.
pub(crate) const PUSH: usize = 8;

/// Inputs summed in registers before they are added to memory: keeps long direct sums accurate.
const CHAIN: usize = 64;

/// Where the lanes of one output unit come from: its base-block inputs and its first filter lags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    pub input: usize,
    pub filter: usize,
}

/// The direct part of the base blocks of some output units.
pub struct DirectPart<'a, T> {
    pub groups: &'a [Group],
    /// `[filter][lags][width]`, `lags` at least `block`; for single rows `[filter][lead + lags]`, which begin with zeros.
    pub taps: &'a [T],
    pub lags: usize,
    /// `[input][block][width]`.
    pub inputs: &'a [T],
    pub block: usize,
    pub width: usize,
}

impl<T: Real> DirectPart<'_, T> {
    /// Completes positions `range` of the base blocks, in place in `pending [group][block][width]`.
    pub fn complete(&self, isa: Isa, pending: &mut [T], range: Range<usize>) {
        match self.width {
            1 => complete_rows(isa, self, pending, range),
            _ => complete_wide(isa, self, pending, range),
        }
    }

    /// Lags and inputs of one group, for single rows with [`PUSH`] zeros in front of the lags.
    #[inline(always)]
    fn operands(&self, group: &Group) -> (&[T], &[T]) {
        let (len, lead) = (self.block * self.width, lead(self.width));
        let taps = &self.taps[group.filter * (lead + self.lags) * self.width..][..lead + len];
        (taps, &self.inputs[group.input * len..][..len])
    }
}

/// Zeros in front of the lags of a unit.
pub(crate) fn lead(width: usize) -> usize {
    if width == 1 { PUSH } else { 0 }
}

dispatch! {
    /// Completes positions `from..to` of the base block for each group, in place in `pending`, and pushes finished
    /// sub-blocks to the rest of the block. `pending [group][block][16]`.
    fn complete_wide(part: &DirectPart<T>, pending: &mut [T], range: Range<usize>) = complete_wide_body;

    /// The same for single rows.
    fn complete_rows(part: &DirectPart<T>, pending: &mut [T], range: Range<usize>) = complete_rows_body;

    /// Direct sum of all lags for one output position of one group, newest input first, in partial sums.
    /// `newer` and `older` are the two runs of a ring of inputs `[time][16]`, both in order of time.
    pub fn direct_sum(taps: &[T], newer: &[T], older: &[T], out: &mut [T]) = direct_sum_body;

    /// The same for a single row, whose `taps` have the last lag first.
    pub fn direct_sum_row(taps: &[T], newer: &[T], older: &[T], out: &mut T) = direct_sum_row_body;
}

/// The direct tile that is due after `done` positions: how many inputs it takes, and where its outputs end.
#[inline(always)]
fn due(done: usize, block: usize) -> Option<(usize, usize)> {
    if !done.is_multiple_of(PUSH) || done >= block {
        return None;
    }
    let mut size = PUSH;
    while done.is_multiple_of(size * PUSH) {
        size *= PUSH;
    }
    Some((size, done.next_multiple_of(size * PUSH).min(block)))
}

#[inline(always)]
fn complete_wide_body<T: Real, const FMA: bool, const W: usize>(
    part: &DirectPart<T>,
    pending: &mut [T],
    range: Range<usize>,
) {
    let block = part.block;
    for (group, c) in part.groups.iter().zip(pending.chunks_exact_mut(block * LANES)) {
        let (h, u) = part.operands(group);
        for s in range.clone() {
            pull::<T, FMA, W>(h, u, c, s);
            if let Some((size, end)) = due(s + 1, block) {
                push::<T, FMA, W>(h, u, c, s + 1 - size, s + 1, end);
            }
        }
    }
}

/// `c[s] += sum of the lags inside the sub-block of s`.
#[inline(always)]
fn pull<T: Real, const FMA: bool, const W: usize>(h: &[T], u: &[T], c: &mut [T], s: usize) {
    let first = s / PUSH * PUSH;
    let h = &h[..(s - first + 1) * LANES];
    let u = &u[first * LANES..(s + 1) * LANES];
    for lane in (0..LANES).step_by(W) {
        let mut acc: [T; W] = load(c, s * LANES + lane);
        for (h, u) in h.chunks_exact(LANES).zip(u.chunks_exact(LANES).rev()) {
            fma_all::<T, FMA, W>(&mut acc, &load(h, lane), &load(u, lane));
        }
        c[s * LANES + lane..][..W].copy_from_slice(&acc);
    }
}

/// A direct tile: inputs `lo..hi` to outputs `hi..end` of the block, four outputs at a time.
#[inline(always)]
fn push<T: Real, const FMA: bool, const W: usize>(h: &[T], u: &[T], c: &mut [T], lo: usize, hi: usize, end: usize) {
    for lane in (0..LANES).step_by(W) {
        let mut o = hi;
        while o < end {
            let count = (end - o).min(4);
            let mut total = [[T::ZERO; W]; 4];
            for from in (lo..hi).step_by(CHAIN) {
                let to = hi.min(from + CHAIN);
                let x = &u[from * LANES..to * LANES];
                // Outputs o..o + 4 use the lags from o + 1 - to on, for the newest input first.
                let first = (o + 1 - to) * LANES;
                if count == 4 {
                    let taps = &h[first..(o + 4 - from) * LANES];
                    let sums = correlate4::<T, FMA, W>(x, taps, lane);
                    for (total, sum) in total.iter_mut().zip(&sums) {
                        add_all(total, sum);
                    }
                } else {
                    for (q, total) in total.iter_mut().enumerate().take(count) {
                        let taps = &h[first + q * LANES..(o + q + 1 - from) * LANES];
                        let mut sum = [T::ZERO; W];
                        for (x, taps) in x.chunks_exact(LANES).rev().zip(taps.chunks_exact(LANES)) {
                            fma_all::<T, FMA, W>(&mut sum, &load(x, lane), &load(taps, lane));
                        }
                        add_all(total, &sum);
                    }
                }
            }
            for (q, total) in total.iter_mut().enumerate().take(count) {
                let at = (o + q) * LANES + lane;
                add_all(total, &load(c, at));
                c[at..at + W].copy_from_slice(total);
            }
            o += count;
        }
    }
}

/// Four neighbouring outputs of a direct tile, whose inputs are a multiple of four: the window of taps rotates
/// through registers, so that each is read once.
#[inline(always)]
fn correlate4<T: Real, const FMA: bool, const W: usize>(x: &[T], taps: &[T], lane: usize) -> [[T; W]; 4] {
    let mut acc = [[T::ZERO; W]; 4];
    let mut window: [[T; W]; 4] =
        [load(taps, lane), load(taps, LANES + lane), load(taps, 2 * LANES + lane), [T::ZERO; W]];
    for (x, ahead) in x.rchunks_exact(4 * LANES).zip(taps[3 * LANES..].chunks_exact(4 * LANES)) {
        for turn in 0..4 {
            window[(turn + 3) % 4] = load(ahead, turn * LANES + lane);
            let v: [T; W] = load(x, (3 - turn) * LANES + lane);
            for q in 0..4 {
                fma_all::<T, FMA, W>(&mut acc[q], &v, &window[(turn + q) % 4]);
            }
        }
    }
    acc
}

#[inline(always)]
fn direct_sum_body<T: Real, const FMA: bool, const W: usize>(taps: &[T], newer: &[T], older: &[T], out: &mut [T]) {
    let (recent, rest) = taps.split_at(newer.len().min(taps.len()));
    let mut total = [[T::ZERO; 2]; LANES];
    for (taps, inputs) in [(recent, newer), (rest, older)] {
        let n = taps.len();
        let inputs = &inputs[inputs.len() - n..];
        for (h, u) in taps.chunks(2 * CHAIN * LANES).zip(inputs.rchunks(2 * CHAIN * LANES)) {
            let mut even = [T::ZERO; LANES];
            let mut odd = [T::ZERO; LANES];
            let mut hs = h.chunks_exact(2 * LANES);
            let mut us = u.rchunks_exact(2 * LANES);
            for (h, u) in hs.by_ref().zip(us.by_ref()) {
                fma_all::<T, FMA, LANES>(&mut even, &load(h, 0), &load(u, LANES));
                fma_all::<T, FMA, LANES>(&mut odd, &load(h, LANES), &load(u, 0));
            }
            if let (h, u) = (hs.remainder(), us.remainder())
                && h.len() == LANES
            {
                fma_all::<T, FMA, LANES>(&mut even, &load(h, 0), &load(u, 0));
            }
            for q in 0..LANES {
                compensated_add(&mut total[q], even[q] + odd[q]);
            }
        }
    }
    for q in 0..LANES {
        out[q] = total[q][0];
    }
}

#[inline(always)]
fn complete_rows_body<T: Real, const FMA: bool, const W: usize>(
    part: &DirectPart<T>,
    pending: &mut [T],
    range: Range<usize>,
) {
    let block = part.block;
    for s in range {
        let (first, tile) = (s / PUSH * PUSH, due(s + 1, block));
        for (group, c) in part.groups.iter().zip(pending.chunks_exact_mut(block)) {
            let (h, u) = part.operands(group);
            let lags = &h[PUSH + first - s..];
            // The newest input goes to the rest of its sub-block at once: one vector, with zeros before lag 0.
            match (c[first..].first_chunk_mut::<PUSH>(), lags.first_chunk::<PUSH>()) {
                (Some(c), Some(h)) => fma_all::<T, FMA, PUSH>(c, h, &[u[s]; PUSH]),
                _ => {
                    for (c, h) in c[first..].iter_mut().zip(lags) {
                        *c = fma::<T, FMA>(*h, u[s], *c);
                    }
                }
            }
            if let Some((size, end)) = tile {
                push_row::<T, FMA, W>(&h[PUSH..], &u[s + 1 - size..s + 1], &mut c[s + 1..end]);
            }
        }
    }
}

/// A direct tile of one row: the inputs `u` to the outputs `c` that follow them.
#[inline(always)]
fn push_row<T: Real, const FMA: bool, const W: usize>(h: &[T], u: &[T], c: &mut [T]) {
    let wide = push_vectors::<T, FMA, W>(h, u, c, 0);
    let narrow = push_vectors::<T, FMA, PUSH>(h, u, c, wide);
    push_vectors::<T, FMA, 1>(h, u, c, narrow);
}

/// The same for as many outputs from `at` on as fill vectors of `N`; where these end.
#[inline(always)]
fn push_vectors<T: Real, const FMA: bool, const N: usize>(h: &[T], u: &[T], c: &mut [T], mut at: usize) -> usize {
    while let Some(out) = c[at..].first_chunk_mut::<N>() {
        let mut total = [T::ZERO; N];
        for (part, inputs) in u.chunks(CHAIN).enumerate() {
            // Output `o` takes input `i` by lag `n + o - i`. Even and odd inputs make a chain each.
            let lag = u.len() + at - part * CHAIN;
            let mut sums = [[T::ZERO; N]; 2];
            for (i, pair) in inputs.as_chunks::<2>().0.iter().enumerate() {
                for odd in 0..2 {
                    fma_all::<T, FMA, N>(&mut sums[odd], &load(h, lag - 2 * i - odd), &[pair[odd]; N]);
                }
            }
            for sum in &sums {
                add_all(&mut total, sum);
            }
        }
        add_all(out, &total);
        at += N;
    }
    at
}

#[inline(always)]
fn direct_sum_row_body<T: Real, const FMA: bool, const W: usize>(taps: &[T], newer: &[T], older: &[T], out: &mut T) {
    // The newest inputs meet the end of the taps.
    let (rest, recent) = taps.split_at(taps.len() - newer.len().min(taps.len()));
    let mut total = [[T::ZERO; 2]; W];
    for (taps, inputs) in [(recent, newer), (rest, older)] {
        let inputs = &inputs[inputs.len() - taps.len()..];
        for (h, u) in taps.rchunks(CHAIN * W).zip(inputs.rchunks(CHAIN * W)) {
            let mut sum = [T::ZERO; W];
            for (h, u) in h.chunks_exact(W).zip(u.chunks_exact(W)) {
                fma_all::<T, FMA, W>(&mut sum, &load(h, 0), &load(u, 0));
            }
            let tail = h.len() / W * W;
            for (q, (h, u)) in h[tail..].iter().zip(&u[tail..]).enumerate() {
                sum[q] = fma::<T, FMA>(*h, *u, sum[q]);
            }
            for (total, sum) in total.iter_mut().zip(sum) {
                compensated_add(total, sum);
            }
        }
    }
    // Halves side by side: one after another, the lanes would take longer than a short filter.
    let mut lanes = W;
    while lanes > 1 {
        lanes /= 2;
        let (low, high) = total.split_at_mut(lanes);
        for (low, high) in low.iter_mut().zip(high) {
            compensated_add(low, high[0]);
        }
    }
    *out = total[0][0];
}

/// Kahan's addition to a sum and its compensation.
#[inline(always)]
fn compensated_add<T: Real>(total: &mut [T; 2], term: T) {
    let term = term - total[1];
    let sum = total[0] + term;
    total[1] = (sum - total[0]) - term;
    total[0] = sum;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::kernels::tests::{all_agree, values};

    fn every_block<T: Real>() {
        for block in [1, 3, 8, 20, 64, 65, 130, 600] {
            let (taps, inputs) = (values::<T>(2 * block * LANES, 1), values::<T>(3 * block * LANES, 2));
            let groups = [Group { input: 2, filter: 1 }, Group { input: 0, filter: 0 }];
            let run = |isa| {
                let mut c = values::<T>(2 * block * LANES, 3);
                let part =
                    DirectPart { groups: &groups, taps: &taps, lags: block, inputs: &inputs, block, width: LANES };
                part.complete(isa, &mut c, 0..block);
                c
            };
            all_agree("complete", run);
            // The direct part is the causal convolution of the block.
            let (start, done) = (values::<T>(2 * block * LANES, 3), run(Isa::get()));
            for s in [0, block / 2, block - 1] {
                let lane = 5;
                let sum: f64 = (0..=s)
                    .map(|j| {
                        let h = taps[(block + j) * LANES + lane].as_f64();
                        h * inputs[(2 * block + s - j) * LANES + lane].as_f64()
                    })
                    .sum();
                let got = done[s * LANES + lane].as_f64() - start[s * LANES + lane].as_f64();
                assert!((got - sum).abs() < 1e-4, "position {s} of {block}: {got} for {sum}");
            }
            all_agree("direct_sum", |isa| {
                let mut out = vec![T::ZERO; LANES];
                let (newer, older) = inputs.split_at((block / 3 + 1) * LANES);
                direct_sum(isa, &taps[..block * LANES], newer, older, &mut out);
                out
            });
        }
    }

    fn every_row<T: Real>() {
        for block in [1, 3, 8, 9, 20, 64, 65, 130, 600] {
            let inputs = values::<T>(3 * block, 2);
            let mut taps = values::<T>(2 * (PUSH + block), 1);
            taps.chunks_exact_mut(PUSH + block).for_each(|row| row[..PUSH].fill(T::ZERO));
            let groups = [Group { input: 2, filter: 1 }, Group { input: 0, filter: 0 }];
            let run = |isa| {
                let mut c = values::<T>(2 * block, 3);
                let part = DirectPart { groups: &groups, taps: &taps, lags: block, inputs: &inputs, block, width: 1 };
                part.complete(isa, &mut c, 0..block);
                c
            };
            all_agree("complete, rows", run);
            let (start, done) = (values::<T>(2 * block, 3), run(Isa::get()));
            for s in 0..block {
                let sum: f64 =
                    (0..=s).map(|j| taps[2 * PUSH + block + j].as_f64() * inputs[2 * block + s - j].as_f64()).sum();
                let got = done[s].as_f64() - start[s].as_f64();
                assert!((got - sum).abs() < 1e-4, "position {s} of {block}: {got} for {sum}");
            }
            for lags in [1, block / 2 + 1, block] {
                let at = block / 3 + 1;
                let (newer, older) = inputs[..block].split_at(at);
                let mut out = T::ZERO;
                direct_sum_row(Isa::get(), &taps[..lags], newer, older, &mut out);
                let sum: f64 = (0..lags)
                    .map(|j| {
                        let input = if j < at { newer[at - 1 - j] } else { inputs[block - 1 - (j - at)] };
                        taps[lags - 1 - j].as_f64() * input.as_f64()
                    })
                    .sum();
                assert!((out.as_f64() - sum).abs() < 1e-4, "{lags} of {block}");
            }
        }
    }

    #[test]
    fn every_block_on_every_instruction_set() {
        every_block::<f32>();
        every_block::<f64>();
        every_row::<f32>();
        every_row::<f64>();
    }
}
