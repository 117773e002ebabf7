//! What a schedule means for a cache: its levels, which tile runs when, and where in the rings it reads and writes.

use crate::schedule::{Latency, Schedule};
use crate::transform::bins;

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

/// A tile that is due: which blocks take part, and the columns of the rings that it reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileIndex {
    pub level: usize,
    /// Slot of the newest block, and how many kept blocks take part.
    pub newest: usize,
    pub count: usize,
    /// First column of the newest block of inputs, and of the outputs that follow it.
    pub from: usize,
    pub to: usize,
    /// Whether other tiles have added to these outputs already.
    pub add: bool,
}

impl Level {
    /// Blocks whose spectra are kept: none where each block takes part in one tile only.
    pub fn kept(&self) -> usize {
        if self.parts == 1 { 0 } else { self.parts }
    }

    /// The share of its blocks' ends at which this level fires, and how many kept blocks take part on average.
    pub(crate) fn load(&self, horizon: Option<usize>, filter_len: usize, latency: Latency) -> (f64, f64) {
        match (self.fan, latency) {
            // Every block's end fires, over two super-blocks.
            (Some(fan), Latency::Smooth) => (1.0, (1.5 * fan as f64 - 0.5).min(self.parts as f64)),
            (Some(fan), Latency::Throughput) => {
                let total: usize = (1..fan).map(|i| i.min(self.parts)).sum();
                ((fan - 1) as f64 / fan as f64, total as f64 / (fan - 1) as f64)
            }
            (None, _) => {
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

/// A schedule cut to a capacity and a filter length: what a cache executes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Execution {
    /// Base block length; 0 for the direct sum without tiles.
    pub base: usize,
    /// Positions of inputs and pending outputs that are kept: the top block.
    pub ring: usize,
    pub levels: Vec<Level>,
    /// Levels above the first run one block later than they could, in slices.
    pub latency: Latency,
}

impl Execution {
    /// The schedule cut to `capacity` positions and `filter_len` lags.
    ///
    /// [`Latency::Smooth`] delays every level above the first by one of its blocks, so that each tile has a whole
    /// block's time. A level then leaves the blocks next to the present one to the level below, which looks back over
    /// two super-blocks instead of one.
    pub fn new(schedule: &Schedule, capacity: Option<usize>, filter_len: usize, latency: Latency) -> Self {
        let capacity = capacity.unwrap_or(usize::MAX);
        let reach = capacity.min(filter_len).max(1);
        let without_tiles = |base, ring| Self { base, ring, levels: Vec::new(), latency: Latency::Throughput };
        let Some(base) = schedule.base() else {
            return without_tiles(0, reach);
        };
        let base = base.min(reach);
        if capacity <= base {
            return without_tiles(base, base);
        }
        let smooth = latency == Latency::Smooth;
        let mut blocks = vec![base];
        for fan in schedule.fans() {
            let last = blocks[blocks.len() - 1];
            match last.checked_mul(*fan) {
                Some(next) if next < reach && !(smooth && next >= capacity.div_ceil(2)) => blocks.push(next),
                _ => break,
            }
        }
        let top = blocks.len() - 1;
        let smooth = smooth && top > 0;
        let level = |(k, &block): (usize, &usize)| {
            let fan = (k < top).then(|| schedule.fans()[k]);
            let most = match fan {
                Some(fan) if smooth => fan.saturating_mul(2) - 1,
                Some(fan) => fan - 1,
                None => capacity.div_ceil(block) - 1,
            };
            Level { block, fan, parts: filter_len.div_ceil(block).min(most).max(1) }
        };
        Self {
            base,
            ring: if smooth { 2 * blocks[top] } else { blocks[top] },
            levels: blocks.iter().enumerate().map(level).collect(),
            latency: if smooth { Latency::Smooth } else { Latency::Throughput },
        }
    }

    pub fn smooth(&self) -> bool {
        self.latency == Latency::Smooth
    }

    /// Positions of inputs that wait for the next tile, or for the direct sum all that count.
    pub fn block(&self) -> usize {
        if self.base == 0 { self.ring } else { self.base }
    }

    /// Positions of outputs that are completed in place.
    pub fn open(&self) -> usize {
        self.base.max(1)
    }

    /// Columns of history and of pending outputs.
    pub fn columns(&self) -> usize {
        if self.levels.is_empty() { 0 } else { self.ring }
    }

    /// The tile that is due when a base block ends at `clock`; in smooth mode the lowest level's alone.
    pub fn due(&self, clock: usize) -> TileIndex {
        let fires = |level: &Level| clock.is_multiple_of(level.block);
        let highest = || self.levels.iter().rposition(fires).expect("the base block divides the clock");
        let level = if self.smooth() { 0 } else { highest() };
        let Level { block, fan, parts } = self.levels[level];
        let blocks = clock / block;
        let count = match fan {
            Some(fan) if self.smooth() => blocks - fan * (blocks / fan).saturating_sub(1),
            Some(fan) => blocks % fan,
            None => blocks,
        };
        // Slots of a super-block are filled from the first on.
        let newest = if self.smooth() { blocks } else { count } - 1;
        TileIndex {
            level,
            newest: newest % parts,
            count: count.min(parts),
            from: (clock - block) % self.ring,
            to: clock % self.ring,
            add: fan.is_some() && !self.smooth(),
        }
    }

    /// The tile of a delayed level that began at the end of block `tile` (at least 1). It adds to block `tile + 1`;
    /// the partition next to the present block is the lower level's, so its filters begin with the second.
    pub fn delayed(&self, level: usize, tile: usize) -> TileIndex {
        let Level { block, fan, parts } = self.levels[level];
        // The super-blocks before the last one belong to the level above.
        let above = fan.map_or(0, |fan| fan * ((tile + 1) / fan).saturating_sub(1));
        TileIndex {
            level,
            newest: (tile - 1) % parts,
            count: (tile - above).min(parts - 1),
            from: (tile - 1) * block % self.ring,
            to: (tile + 1) % 2 * block,
            add: false,
        }
    }

    /// Reals that a cache keeps for so many rows of inputs and of outputs, `width` side by side, but for padding and
    /// room to work in. The planner, the guard against absurd sizes and the checks of saved states all count here.
    pub fn reals(&self, input_rows: f64, output_rows: f64, width: usize) -> f64 {
        let spectra: f64 = self.levels.iter().map(|l| 2.0 * bins(width, l.block) as f64 * l.kept() as f64).sum();
        let delayed: f64 = self.delayed_levels().iter().map(|l| 2.0 * l.block as f64).sum();
        let columns = self.columns() as f64;
        input_rows * (spectra + columns + self.block() as f64) + output_rows * (columns + self.open() as f64 + delayed)
    }

    /// Levels whose tiles run in slices.
    pub fn delayed_levels(&self) -> &[Level] {
        if self.smooth() { &self.levels[1..] } else { &[] }
    }
}
