//! Schedules as data: which algorithm runs is a value that can be printed, compared and tested without running it.

use crate::error::Error;
use std::fmt;

/// A tiling of the triangle (input time, output time).
///
/// Inputs wait in a base block of `base` positions, inside which outputs are summed directly; `fans` multiply it up
/// to the top block. `base` `None` means no tiles at all: the direct sum over all lags. Any base of at least 1 and
/// any fans of at least 2 are exact, for every filter length and horizon.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Schedule {
    base: Option<usize>,
    fans: Vec<usize>,
}

/// What a schedule costs per position and channel, and the state it keeps per channel, in float32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    pub flops: f64,
    pub bytes_moved: f64,
    pub state_bytes: f64,
}

/// One level of tiles as it will run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Block length: inputs and outputs of one tile.
    pub block: usize,
    /// Blocks in one super-block of this level; `None` at the top, which is an endless ring.
    pub fan: Option<usize>,
    /// Blocks that take part in one tile at most, and filter partitions.
    pub parts: usize,
}

impl Level {
    /// Blocks whose spectra are kept: none where each block takes part in one tile only.
    pub fn kept(&self) -> usize {
        if self.parts == 1 { 0 } else { self.parts }
    }
}

/// A schedule cut to a capacity and a filter length: what a cache executes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Execution {
    /// Base block length; 0 for the direct sum without tiles.
    pub base: usize,
    /// Positions of inputs and pending outputs that are kept: the top block.
    pub ring: usize,
    pub levels: Vec<Level>,
    /// Levels above the first run one block later than they could, in slices.
    pub smooth: bool,
}

impl Execution {
    /// Reals of state, but for padding and book-keeping, of a cache with so many rows of inputs and of outputs.
    pub fn reals(&self, input_rows: f64, output_rows: f64) -> f64 {
        let spectra: f64 = self.levels.iter().map(|l| 2.0 * l.block as f64 * l.kept() as f64).sum();
        let ring = if self.levels.is_empty() { 0.0 } else { self.ring as f64 };
        let inputs = if self.base == 0 { self.ring } else { self.base } as f64;
        let early: f64 = if self.smooth { self.levels.iter().skip(1).map(|l| 2.0 * l.block as f64).sum() } else { 0.0 };
        input_rows * (spectra + ring + inputs) + output_rows * (ring + self.base as f64 + early)
    }
}

impl Schedule {
    /// A schedule from its parts; `base` at least 1, `fans` at least 2 each.
    pub fn new(base: Option<usize>, fans: Vec<usize>) -> Result<Self, Error> {
        match base {
            Some(0) => return Err(Error::value("base", "a positive integer or None", 0)),
            None if !fans.is_empty() => {
                return Err(Error::value("fans", "no fans where base is None", format!("{fans:?}")));
            }
            _ => {}
        }
        if let Some(fan) = fans.iter().find(|fan| **fan < 2) {
            return Err(Error::value("fans", "integers of at least 2", fan));
        }
        Ok(Self { base, fans })
    }

    pub fn base(&self) -> Option<usize> {
        self.base
    }

    pub fn fans(&self) -> &[usize] {
        &self.fans
    }

    /// The direct sum.
    pub fn naive() -> Self {
        Self { base: None, fans: Vec::new() }
    }

    /// The paper's Algorithm 1; the epoch defaults to `sqrt(T log2 T)`.
    pub fn epoched(horizon: usize, epoch: Option<usize>) -> Result<Self, Error> {
        if epoch == Some(0) {
            return Err(Error::value("epoch", "a positive integer or None", 0));
        }
        let t = horizon.max(2) as f64;
        let epoch = epoch.unwrap_or_else(|| ((t * t.log2()).sqrt().round() as usize).clamp(1, horizon.max(1)));
        Ok(Self { base: Some(epoch), fans: Vec::new() })
    }

    /// The paper's Algorithm 2: every level twice the one below, on a direct base block.
    pub fn continuous(horizon: usize) -> Self {
        let base = CONTINUOUS_BASE.min(horizon.max(1));
        let levels = horizon.div_ceil(base).next_power_of_two().trailing_zeros().saturating_sub(1);
        Self { base: Some(base), fans: vec![2; levels as usize] }
    }

    /// The schedule cut to `capacity` positions and `filter_len` lags.
    pub fn execution(&self, capacity: Option<usize>, filter_len: usize) -> Execution {
        self.cut(capacity, filter_len, false)
    }

    /// The same with every level above the first delayed by one of its blocks, so that each tile has a whole block's
    /// time. A level then leaves the blocks next to the present one to the level below, which looks back over two
    /// super-blocks instead of one.
    pub fn smooth_execution(&self, capacity: Option<usize>, filter_len: usize) -> Execution {
        self.cut(capacity, filter_len, true)
    }

    fn cut(&self, capacity: Option<usize>, filter_len: usize, smooth: bool) -> Execution {
        let capacity = capacity.unwrap_or(usize::MAX);
        let reach = capacity.min(filter_len).max(1);
        let Some(base) = self.base else {
            return Execution { base: 0, ring: reach, levels: Vec::new(), smooth: false };
        };
        let base = base.min(reach);
        if capacity <= base {
            return Execution { base, ring: base, levels: Vec::new(), smooth: false };
        }
        let mut blocks = vec![base];
        for fan in &self.fans {
            let last = blocks[blocks.len() - 1];
            match last.checked_mul(*fan) {
                Some(next) if next < reach && !(smooth && next >= capacity.div_ceil(2)) => blocks.push(next),
                _ => break,
            }
        }
        let top = blocks.len() - 1;
        let smooth = smooth && top > 0;
        let levels = blocks
            .iter()
            .enumerate()
            .map(|(k, &block)| {
                let fan = (k < top).then(|| self.fans[k]);
                let most = match fan {
                    Some(fan) if smooth => fan.saturating_mul(2) - 1,
                    Some(fan) => fan - 1,
                    None => capacity.div_ceil(block) - 1,
                };
                Level { block, fan, parts: filter_len.div_ceil(block).min(most).max(1) }
            })
            .collect();
        let ring = if smooth { 2 * blocks[top] } else { blocks[top] };
        Execution { base, ring, levels, smooth }
    }

    /// Operations, memory traffic and state of this schedule over `horizon` positions.
    ///
    /// `horizon` `None` means an endless stream in its steady state.
    pub fn cost(&self, horizon: Option<usize>, filter_len: usize) -> Cost {
        let run = self.execution(horizon, filter_len);
        let steady = horizon.is_none_or(|t| t / 2 > filter_len);
        if run.base == 0 {
            let lags = if steady { run.ring as f64 } else { run.ring as f64 / 2.0 };
            return Cost { flops: 2.0 * lags, bytes_moved: 8.0 * lags, state_bytes: 4.0 * run.reals(1.0, 1.0) };
        }
        // Direct part: on average half the block's lags, read in tiles of four outputs.
        let mut flops = run.base as f64;
        let mut bytes = 4.0 * run.base as f64 / 2.0;
        for level in &run.levels {
            let n = level.block as f64;
            let (often, parts) = level.load(horizon, filter_len);
            flops += often * (2.0 * 5.0 * n.log2().max(1.0) + 8.0 * parts + 6.0);
            bytes += often * (2.0 * 16.0 + 16.0 * parts + 12.0);
        }
        Cost { flops, bytes_moved: bytes, state_bytes: 4.0 * run.reals(1.0, 1.0) }
    }
}

impl Level {
    /// The share of base blocks' ends at which this level fires, and how many kept blocks take part on average.
    pub(crate) fn load(&self, horizon: Option<usize>, filter_len: usize) -> (f64, f64) {
        match self.fan {
            Some(fan) => {
                let total: usize = (1..fan).map(|i| i.min(self.parts)).sum();
                ((fan - 1) as f64 / fan as f64, total as f64 / (fan - 1) as f64)
            }
            None => {
                let reach = filter_len.div_ceil(self.block) as f64;
                match horizon {
                    None => (1.0, reach.min(self.parts as f64)),
                    Some(t) => {
                        let fires = ((t.div_ceil(self.block)) - 1).max(1) as f64;
                        let ramp = fires.min(self.parts as f64);
                        let total = ramp * (ramp + 1.0) / 2.0 + (fires - ramp) * self.parts as f64;
                        (fires / (fires + 1.0), total / fires)
                    }
                }
            }
        }
    }
}

impl Level {
    /// As [`load`](Self::load) for a delayed schedule: every block's end fires, over two super-blocks.
    pub(crate) fn smooth_load(&self, horizon: Option<usize>, filter_len: usize) -> (f64, f64) {
        match self.fan {
            Some(fan) => (1.0, (1.5 * fan as f64 - 0.5).min(self.parts as f64)),
            None => self.load(horizon, filter_len),
        }
    }
}

const CONTINUOUS_BASE: usize = 64;

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.base {
            None => write!(f, "Schedule(base=None, fans=())"),
            Some(base) => write!(f, "Schedule(base={base}, fans={})", crate::error::tuple(&self.fans)),
        }
    }
}
