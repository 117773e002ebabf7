//! What a schedule costs, counted without running it.

use crate::execution::Execution;
use crate::schedule::{Latency, Schedule};

/// What a schedule costs per position and channel, and the state it keeps per channel, in float32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    pub flops: f64,
    pub bytes_moved: f64,
    pub state_bytes: f64,
}

impl Schedule {
    /// What a cache of `capacity` positions executes under filters of `filter_len` lags.
    pub fn execution(&self, capacity: Option<usize>, filter_len: usize) -> Execution {
        Execution::new(self, capacity, filter_len, Latency::Throughput)
    }

    /// Operations, memory traffic and state of this schedule over `horizon` positions.
    ///
    /// `horizon` `None` means an endless stream in its steady state.
    pub fn cost(&self, horizon: Option<usize>, filter_len: usize) -> Cost {
        let run = self.execution(horizon, filter_len);
        let steady = horizon.is_none_or(|t| t / 2 > filter_len);
        if run.base == 0 {
            let lags = if steady { run.ring as f64 } else { run.ring as f64 / 2.0 };
            return Cost { flops: 2.0 * lags, bytes_moved: 8.0 * lags, state_bytes: 4.0 * run.reals(1.0, 1.0, 1) };
        }
        // Direct part: on average half the block's lags, read in tiles of four outputs.
        let mut flops = run.base as f64;
        let mut bytes = 4.0 * run.base as f64 / 2.0;
        for level in &run.levels {
            let n = level.block as f64;
            let (often, parts) = level.load(horizon, filter_len, Latency::Throughput);
            flops += often * (2.0 * 5.0 * n.log2().max(1.0) + 8.0 * parts + 6.0);
            bytes += often * (2.0 * 16.0 + 16.0 * parts + 12.0);
        }
        Cost { flops, bytes_moved: bytes, state_bytes: 4.0 * run.reals(1.0, 1.0, 1) }
    }
}
