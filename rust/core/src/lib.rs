//! Exact online convolution in quasilinear time: the FutureFill engine (Agarwal et al., arXiv 2410.03766v3).
//!
//! Read in the order in which data flows: [`Schedule`] says which tiles there are, [`Plan`] holds what depends on the
//! filters alone, [`Cache`] what depends on the inputs, `transform` is one tile's mathematics, `kernels` its loops.

mod bank;
mod buffer;
mod cache;
mod cost;
mod error;
mod execution;
mod isa;
#[doc(hidden)]
pub mod kernels;
mod layout;
mod offline;
pub mod oracle;
mod plan;
mod planner;
mod pool;
mod real;
mod schedule;
mod shape;
mod simd;
#[doc(hidden)]
pub mod transform;
mod tune;
pub mod watch;

pub use buffer::zeros;
pub use cache::{Cache, State};
pub use cost::Cost;
pub use error::Error;
pub use execution::{Execution, Level, TileIndex};
pub use isa::Isa;
pub use offline::{causal_conv, futurefill};
pub use plan::{Plan, PlanOptions};
pub use planner::{AutoOptions, CostModel, Profile, cost_model, set_cost_model};
pub use pool::{available_workers, process};
pub use real::Real;
pub use schedule::{Latency, Method, Schedule};
pub use shape::broadcast;
pub use tune::measure;

/// The instruction set in use: `avx512`, `avx2`, `neon` or `baseline`.
pub fn instruction_set() -> &'static str {
    Isa::get().name()
}
