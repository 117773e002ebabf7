//! Shapes of arrays: broadcasting, sizes, and the checks of what a caller hands over.

use crate::error::{Error, tuple};

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
pub(crate) fn dim(shape: &[usize], n: usize, axis: usize) -> usize {
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

/// The product of the parts, where it can be counted.
pub(crate) fn size(parts: &[usize]) -> Result<usize, Error> {
    parts.iter().try_fold(1usize, |n, &p| n.checked_mul(p)).ok_or(Error::Memory { bytes: usize::MAX })
}

/// Refuses filters without a lag, or of another number of values.
pub(crate) fn check_filters<T>(filters: &[T], rows: usize, shape: &[usize], length: usize) -> Result<(), Error> {
    if length == 0 {
        return Err(Error::value("filters", "at least one lag", 0));
    }
    check_len("filters", filters.len(), rows, shape, length)
}

/// Refuses what is no array of `rows` rows of `len` positions.
pub(crate) fn check_len(arg: &'static str, got: usize, rows: usize, shape: &[usize], len: usize) -> Result<(), Error> {
    if rows.checked_mul(len) == Some(got) {
        return Ok(());
    }
    let mut expected = shape.to_vec();
    expected.push(len);
    Err(Error::shape(arg, tuple(&expected), format_args!("{got} values")))
}
