//! Exact online convolution in quasilinear time: the FutureFill engine (Agarwal et al., arXiv 2410.03766v3).
//!
//! Read in the order in which data flows: [`Schedule`] says which tiles there are, [`Plan`] holds what depends on the
//! filters alone, [`Cache`] what depends on the inputs, `transform` is one tile's
//! mathematics (`lanes` the same for 16 rows at once), `kernels` its loops.

#[doc(hidden)]
pub mod ahead;
mod buffer;
mod cache;
mod error;
#[doc(hidden)]
pub mod kernels;
#[doc(hidden)]
pub mod lanes;
mod layout;
mod offline;
pub mod oracle;
mod plan;
mod planner;
mod pool;
mod real;
mod schedule;
mod simd;
mod transform;
#[doc(hidden)]
pub mod transpose;
mod tune;
pub mod watch;

pub use buffer::zeros;
pub use cache::{Cache, State};
pub use error::Error;
pub use kernels::Isa;
pub use layout::broadcast;
pub use offline::{causal_conv, futurefill};
pub use plan::{Latency, Method, Plan, PlanOptions};
pub use planner::{AutoOptions, CostModel, Profile, cost_model, set_cost_model};
pub use pool::{available_workers, process};
pub use real::Real;
pub use schedule::{Cost, Execution, Level, Schedule};
pub use tune::measure;

/// The instruction set in use: `avx512`, `avx2`, `neon` or `baseline`.
pub fn instruction_set() -> &'static str {
    Isa::get().name()
}
