//! Between rows, as users have them, and 16 rows side by side.

use crate::kernels::LANES;
use crate::real::Real;
use crate::simd::{Vector, vectors};
use crate::transform::BIN;

/// The widest square tile that fits the registers.
const WIDEST: usize = 8;

vectors! {
    /// Rows to `block [time][16]`: `rows[lane * stride + at + time]`. Lanes from `lanes` on are left alone.
    pub fn from_rows(
        rows: &[T], stride: usize, at: usize, lanes: usize, block: &mut [T],
    ) = from_rows_body on Avx2;

    /// Rows times `scale` to one part of `bins [time][2][16]`, the first or, sliced from [`LANES`] on, the second.
    pub fn bins_from_rows(
        rows: &[T], stride: usize, at: usize, lanes: usize, scale: T, bins: &mut [T],
    ) = bins_from_rows_body on Avx2;

    /// `[time][16]` to rows.
    pub fn to_rows(block: &[T], rows: &mut [T], stride: usize, at: usize, lanes: usize) = to_rows_body on Avx2;

    /// One part of `bins [time][2][16]` to rows.
    pub fn bins_to_rows(
        bins: &[T], rows: &mut [T], stride: usize, at: usize, lanes: usize,
    ) = bins_to_rows_body on Avx2;

    /// The same, added to what is there.
    pub fn add_bins_to_rows(
        bins: &[T], rows: &mut [T], stride: usize, at: usize, lanes: usize,
    ) = add_bins_to_rows_body on Avx2;
}

#[inline(always)]
fn from_rows_body<T: Real, V: Vector<T>>(rows: &[T], stride: usize, at: usize, lanes: usize, block: &mut [T]) {
    gather::<T, V, LANES, false>(rows, stride, at, lanes, T::ZERO, block);
}

#[inline(always)]
fn bins_from_rows_body<T: Real, V: Vector<T>>(
    rows: &[T],
    stride: usize,
    at: usize,
    lanes: usize,
    scale: T,
    bins: &mut [T],
) {
    gather::<T, V, BIN, true>(rows, stride, at, lanes, scale, bins);
}

#[inline(always)]
fn to_rows_body<T: Real, V: Vector<T>>(block: &[T], rows: &mut [T], stride: usize, at: usize, lanes: usize) {
    scatter::<T, V, LANES, false>(block, rows, stride, at, lanes);
}

#[inline(always)]
fn bins_to_rows_body<T: Real, V: Vector<T>>(bins: &[T], rows: &mut [T], stride: usize, at: usize, lanes: usize) {
    scatter::<T, V, BIN, false>(bins, rows, stride, at, lanes);
}

#[inline(always)]
fn add_bins_to_rows_body<T: Real, V: Vector<T>>(bins: &[T], rows: &mut [T], stride: usize, at: usize, lanes: usize) {
    scatter::<T, V, BIN, true>(bins, rows, stride, at, lanes);
}

/// Rows to a block whose times are `PITCH` values apart: square tiles, then what is left one by one.
#[inline(always)]
fn gather<T: Real, V: Vector<T>, const PITCH: usize, const SCALE: bool>(
    rows: &[T],
    stride: usize,
    at: usize,
    lanes: usize,
    scale: T,
    block: &mut [T],
) {
    let count = block.len().div_ceil(PITCH);
    let (lanes_in_tiles, tiled) = (lanes / V::WIDTH * V::WIDTH, count / V::WIDTH * V::WIDTH);
    for time in (0..tiled).step_by(V::WIDTH) {
        for lane in (0..lanes_in_tiles).step_by(V::WIDTH) {
            let mut tile = [V::splat(T::ZERO); WIDEST];
            for i in 0..V::WIDTH {
                tile[i] = V::load(&rows[(lane + i) * stride + at + time..]);
            }
            V::transpose(&mut tile[..V::WIDTH]);
            for i in 0..V::WIDTH {
                let v = if SCALE { tile[i].mul(V::splat(scale)) } else { tile[i] };
                v.store(&mut block[(time + i) * PITCH + lane..]);
            }
        }
    }
    for lane in 0..lanes {
        let start = if lane < lanes_in_tiles { tiled } else { 0 };
        let row = &rows[lane * stride + at..][..count];
        for (time, v) in row.iter().enumerate().skip(start) {
            block[time * PITCH + lane] = if SCALE { *v * scale } else { *v };
        }
    }
}

/// The way back.
#[inline(always)]
fn scatter<T: Real, V: Vector<T>, const PITCH: usize, const ADD: bool>(
    block: &[T],
    rows: &mut [T],
    stride: usize,
    at: usize,
    lanes: usize,
) {
    let count = block.len().div_ceil(PITCH);
    let (lanes_in_tiles, tiled) = (lanes / V::WIDTH * V::WIDTH, count / V::WIDTH * V::WIDTH);
    for time in (0..tiled).step_by(V::WIDTH) {
        for lane in (0..lanes_in_tiles).step_by(V::WIDTH) {
            let mut tile = [V::splat(T::ZERO); WIDEST];
            for i in 0..V::WIDTH {
                tile[i] = V::load(&block[(time + i) * PITCH + lane..]);
            }
            V::transpose(&mut tile[..V::WIDTH]);
            for i in 0..V::WIDTH {
                let row = &mut rows[(lane + i) * stride + at + time..];
                let v = if ADD { tile[i].add(V::load(row)) } else { tile[i] };
                v.store(row);
            }
        }
    }
    for lane in 0..lanes {
        let start = if lane < lanes_in_tiles { tiled } else { 0 };
        let row = &mut rows[lane * stride + at..][..count];
        for (time, out) in row.iter_mut().enumerate().skip(start) {
            let v = block[time * PITCH + lane];
            *out = if ADD { *out + v } else { v };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    fn every_shape<T: Real>() {
        let number = |i: usize| T::of_f64(i as f64);
        for isa in Isa::available() {
            for count in [1, 3, 8, 16, 20, 64, 65] {
                for lanes in [1, 7, 8, 13, 16] {
                    let (stride, at) = (count + 5, 3);
                    let rows: Vec<T> = (0..lanes * stride).map(number).collect();
                    let row = |lane: usize, time: usize| rows[lane * stride + at + time];
                    let mut block = vec![number(7); count * LANES];
                    from_rows(isa, &rows, stride, at, lanes, &mut block);
                    let mut bins = vec![number(7); count * BIN];
                    bins_from_rows(isa, &rows, stride, at, lanes, number(2), &mut bins[LANES..]);
                    for time in 0..count {
                        for lane in 0..LANES {
                            let wanted = if lane < lanes { row(lane, time) } else { number(7) };
                            assert!(block[time * LANES + lane] == wanted, "{count} {lanes} {}", isa.name());
                            let wanted = if lane < lanes { row(lane, time) * number(2) } else { number(7) };
                            assert!(bins[time * BIN + LANES + lane] == wanted, "{count} {lanes} {}", isa.name());
                            assert!(bins[time * BIN + lane] == number(7));
                        }
                    }
                    let (mut back, mut other) = (rows.clone(), rows.clone());
                    back.iter_mut().for_each(|v| *v = number(1));
                    to_rows(isa, &block, &mut back, stride, at, lanes);
                    bins_to_rows(isa, &bins[LANES..], &mut other, stride, at, lanes);
                    add_bins_to_rows(isa, &bins[LANES..], &mut other, stride, at, lanes);
                    for (i, v) in rows.iter().enumerate() {
                        let inside = (at..at + count).contains(&(i % stride));
                        assert!(back[i] == if inside { *v } else { number(1) });
                        assert!(other[i] == if inside { *v * number(4) } else { *v });
                    }
                }
            }
        }
    }

    #[test]
    fn there_and_back_on_every_instruction_set() {
        every_shape::<f32>();
        every_shape::<f64>();
    }
}
