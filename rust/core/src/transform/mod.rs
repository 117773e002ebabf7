//! The mathematics of one tile, behind one trait: real blocks convolved by their products modulo `z^N - i`.
//!
//! The product of a real block `x` (length `n`) and `2n` real lags `f` has three parts of length `n`,
//! `P0 + P1 z^n + P2 z^2n`; `P1` is the FutureFill of the block, and `P0` its own causal convolution. Modulo `z^N - i`,
//! for any `N` from `n` to `2n`, the coefficient `j` is `P_j - P_{j+2N} + i (P_{j+N} - ..)`: the real part holds `P_j`
//! for `n <= j < N`, the imaginary part `P_{N+j}` for `j < 2n - N`. So `N = n` needs imaginary parts alone, and a block of
//! any length can use the transform of the next length that has a fast one. Where `f` has only `n` lags, `P2` is zero
//! and all of the product can be read off.
//!
//! [`WideTransform`] runs 16 rows side by side, [`RowTransform`] one row with rustfft.

mod prefetch;
mod rows;
mod wide;

pub use prefetch::Prefetch;
pub use rows::RowTransform;
pub(crate) use rows::rebin;
pub use wide::WideTransform;

use crate::buffer::Buffer;
use crate::error::Error;
use crate::kernels::LANES;
use crate::real::Real;
use rustfft::num_complex::Complex;
use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex};

/// Reals in one bin of 16 rows: real parts, then imaginary parts.
pub const BIN: usize = 2 * LANES;

/// Whether outputs are written, or added to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Set,
    Add,
}

/// Kept blocks and filter partitions whose products are summed: block `newest - p` with partition `p`, for `p` below
/// `count`, around the ring of `slots`.
#[derive(Clone, Copy)]
pub struct Products<'a, T> {
    /// Spectra of [`BlockTransform::spectrum_len`] reals.
    pub slots: &'a [T],
    pub newest: usize,
    /// Spectra of [`BlockTransform::filter_len`] reals.
    pub filters: &'a [T],
    pub count: usize,
    /// One filter row serves all lanes.
    pub shared: bool,
}

/// A block whose spectrum is made, kept and multiplied in one go.
pub struct Tile<'a, T> {
    /// `[time][width]`.
    pub input: &'a [T],
    /// The ring of kept spectra, empty where the block takes part in this tile only.
    pub slots: &'a mut [T],
    pub newest: usize,
    pub filters: &'a [T],
    pub count: usize,
    pub shared: bool,
    /// `[time][width]`: the block of outputs that follows.
    pub out: &'a mut [T],
    pub write: Write,
}

/// Lags `range` of the filter rows of one unit. Lane `l` takes row `l % rows`.
pub struct Lags<'a, T> {
    pub filters: &'a [T],
    /// From one row to the next.
    pub stride: usize,
    pub rows: usize,
    pub range: Range<usize>,
    pub scale: T,
}

impl<'a, T: Copy> Lags<'a, T> {
    /// The lags of lane `lane`.
    fn row(&self, lane: usize) -> &'a [T] {
        &self.filters[lane % self.rows * self.stride..][self.range.clone()]
    }
}

/// One block length for a unit of `width` rows side by side; immutable tables.
pub trait BlockTransform<T: Real>: Send + Sync {
    /// Reals of the stored spectrum of one unit of inputs, and of one unit of filters.
    fn spectrum_len(&self) -> usize;
    fn filter_len(&self, shared: bool) -> usize;
    /// The modulus' degree `N`: bins of one row.
    fn bins(&self) -> usize;
    /// Where the real part of the usual bin `k` of lane 0 stands in a spectrum of inputs; the imaginary part follows
    /// [`LANES`] reals later.
    fn place(&self, k: usize) -> usize;
    /// Room for one worker.
    fn work(&self) -> Result<Work<T>, Error>;

    /// Spectra of a block `x [time][width]`.
    fn input(&self, x: &[T], spectrum: &mut [T], work: &mut Work<T>) {
        self.input_parts(x, spectrum, 0..self.input_units(), work);
    }
    /// Spectra of up to `2n` lags of the filters of one unit; `shared` where they are one row.
    fn filter(&self, lags: &Lags<T>, shared: bool, spectrum: &mut [T], work: &mut Work<T>);
    /// What the blocks contribute to the `n` outputs `[time][width]` that follow the newest.
    fn future(&self, products: &Products<T>, out: &mut [T], write: Write, work: &mut Work<T>) {
        self.future_parts(products, out, write, 0..self.future_units(), work);
    }
    /// All `N` coefficients of the sum of products, times `N`, as `[j][2][width]` in `z`.
    fn both(&self, products: &Products<T>, z: &mut [T], work: &mut Work<T>);
    /// [`input`](Self::input) and [`future`](Self::future) in one pass over the data.
    fn tile(&self, tile: Tile<T>, work: &mut Work<T>, ahead: &mut Prefetch);

    /// Units of nearly equal work that `input` consists of, and some of them; they follow each other.
    fn input_units(&self) -> usize;
    fn input_parts(&self, x: &[T], spectrum: &mut [T], parts: Range<usize>, work: &mut Work<T>);
    /// The same for `future`; between its parts `work` stays as it is.
    fn future_units(&self) -> usize;
    fn future_parts(
        &self,
        products: &Products<T>,
        out: &mut [T],
        write: Write,
        parts: Range<usize>,
        work: &mut Work<T>,
    );
}

/// The transform of blocks of `n` positions for units of `width` rows, made once per process.
pub(crate) fn block_transform<T: Real>(width: usize, n: usize) -> Result<Arc<dyn BlockTransform<T>>, Error> {
    Ok(match width {
        1 => RowTransform::<T>::get(n)?,
        _ => WideTransform::<T>::get(n)?,
    })
}

/// Bins of a block of `n` positions in units of `width` rows.
pub(crate) fn bins(width: usize, n: usize) -> usize {
    if width == 1 { n } else { fast_len(n) }
}

/// The shortest length of at least `n` that has fast transforms: a power of two, or three times one.
pub(crate) fn fast_len(n: usize) -> usize {
    let power = n.max(2).next_power_of_two();
    let three = power / 4 * 3;
    if three >= n && three >= 3 { three } else { power }
}

/// Room of one worker.
pub struct Work<T> {
    pub(crate) reals: Buffer<T>,
    pub(crate) block: Buffer<T>,
    pub(crate) complex: Buffer<Complex<T>>,
}

impl<T: Real> Work<T> {
    pub(crate) fn new(reals: usize, block: usize, complex: usize) -> Result<Self, Error> {
        Ok(Self {
            reals: Buffer::new(reals, poison())?,
            block: Buffer::new(block, poison())?,
            complex: Buffer::new(complex, Complex::new(poison(), poison()))?,
        })
    }

    /// Room for whatever needs no more than one of these.
    pub(crate) fn for_all(rooms: impl IntoIterator<Item = Work<T>>) -> Result<Self, Error> {
        let (mut reals, mut block, mut complex) = (0, 0, 0);
        for room in rooms {
            reals = reals.max(room.reals.len());
            block = block.max(room.block.len());
            complex = complex.max(room.complex.len());
        }
        Self::new(reals, block, complex)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.reals.bytes() + self.block.bytes() + self.complex.bytes()
    }
}

/// What fresh buffers hold: in tests not a number, so that a kernel that reads what it has not written is found out.
fn poison<T: Real>() -> T {
    if cfg!(debug_assertions) { T::of_f64(f64::NAN) } else { T::ZERO }
}

/// The transform of blocks of `n` positions, made by the first who asks for it in this process: planning one costs
/// more than running it. Very long ones are not kept.
fn once<V: Any + Send + Sync>(n: usize, make: impl FnOnce() -> Result<V, Error>) -> Result<Arc<V>, Error> {
    type Known = Mutex<HashMap<(TypeId, usize), Arc<dyn Any + Send + Sync>>>;
    static KNOWN: LazyLock<Known> = LazyLock::new(Default::default);
    let key = (TypeId::of::<V>(), n);
    // A fork can leave the lock taken for ever in the child: never wait for it.
    let known = KNOWN.try_lock().ok();
    if let Some(found) = known.as_ref().and_then(|map| map.get(&key)) {
        return Ok(found.clone().downcast().expect("the key names the type"));
    }
    let made = Arc::new(make()?);
    if let Some(mut map) = known
        && n <= 1 << 18
    {
        map.insert(key, made.clone());
    }
    Ok(made)
}

/// Rows a multiple of a page apart fall into the same few cache sets and evict each other: move them apart.
pub(crate) fn pad_pitch(len: usize) -> usize {
    if len >= 1024 && len.is_multiple_of(512) { len.saturating_add(2 * LANES) } else { len }
}
