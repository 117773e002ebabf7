//! Ground truth: the direct sum in float64, as slow and as plain as possible.

use crate::real::Real;
use crate::shape::broadcast;

/// Causal convolution of `(*u_shape, t)` with `(*filter_shape, lags)`, computed and returned in float64.
pub fn causal_conv<T: Real>(
    u: &[T],
    u_shape: &[usize],
    t: usize,
    filters: &[T],
    filter_shape: &[usize],
    lags: usize,
) -> Vec<f64> {
    let shape = broadcast(u_shape, filter_shape).expect("the shapes broadcast");
    let rows: usize = shape.iter().product();
    let mut y = Vec::with_capacity(rows * t);
    for row in 0..rows {
        let (i, f) = (source(row, &shape, u_shape) * t, source(row, &shape, filter_shape) * lags);
        for s in 0..t {
            y.push((0..=s.min(lags - 1)).map(|j| filters[f + j].as_f64() * u[i + s - j].as_f64()).sum());
        }
    }
    y
}

/// Row of an array of `from` that broadcasts to row `row` of `shape`.
fn source(row: usize, shape: &[usize], from: &[usize]) -> usize {
    let (mut rest, mut index, mut stride) = (row, 0, 1);
    for axis in (0..shape.len()).rev() {
        let k = rest % shape[axis];
        rest /= shape[axis];
        if let Some(d) = (axis + from.len()).checked_sub(shape.len()).map(|a| from[a]) {
            index += if d == 1 { 0 } else { k * stride };
            stride *= d;
        }
    }
    index
}

/// Relative L2 error of `y` against the oracle's `truth`.
pub fn relative_error<T: Real>(y: &[T], truth: &[f64]) -> f64 {
    assert_eq!(y.len(), truth.len());
    let error: f64 = y.iter().zip(truth).map(|(y, t)| (y.as_f64() - t).powi(2)).sum();
    let norm: f64 = truth.iter().map(|t| t * t).sum();
    if norm == 0.0 { error.sqrt() } else { (error / norm).sqrt() }
}

/// The bound that every method keeps: `eps * log2(2 T)`.
pub fn bound<T: Real>(t: usize) -> f64 {
    let eps = if T::BYTES == 4 { f64::from(f32::EPSILON) } else { f64::EPSILON };
    eps * (2.0 * t.max(1) as f64).log2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hand_made() {
        let y = causal_conv(&[1.0f32, 2.0, 3.0, 4.0], &[], 4, &[1.0, 10.0], &[], 2);
        assert_eq!(y, [1.0, 12.0, 23.0, 34.0]);
        let y = causal_conv(&[1.0f64, 2.0], &[1], 2, &[1.0, 0.0, 5.0, 2.0, 1.0, 1.0], &[2], 3);
        assert_eq!(y, [1.0, 2.0, 2.0, 5.0]);
    }
}
