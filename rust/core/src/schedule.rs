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

/// Which algorithm a plan uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// The planner's choice.
    #[default]
    Auto,
    /// The direct sum.
    Naive,
    /// The paper's Algorithm 1.
    Epoched,
    /// The paper's Algorithm 2.
    Continuous,
    Schedule(Schedule),
}

/// How the work of large tiles is spread over the steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Latency {
    /// The least total time: a tile runs when it is due.
    #[default]
    Throughput,
    /// No step much longer than another: tiles run in slices before they are due.
    Smooth,
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
