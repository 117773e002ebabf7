//! Python bindings of the FutureFill engine: arrays in, plan, cache, arrays out.
//!
//! Everything mathematical lives in the `futurefill` crate. Here arguments are checked and converted, the interpreter
//! lock is released around long work, and errors become Python exceptions.

mod args;
mod arrays;
mod bulk;
mod cache;
mod errors;
mod plan;
mod schedule;

use pyo3::prelude::*;

/// Compiled engine of futurefill_rs.
#[pymodule]
mod _core {
    use super::*;

    #[pymodule_export]
    use super::bulk::{causal_conv, future_fill};
    #[pymodule_export]
    use super::cache::Cache;
    #[pymodule_export]
    use super::errors::CapacityError;
    #[pymodule_export]
    use super::plan::{Plan, plan};
    #[pymodule_export]
    use super::schedule::{Cost, Schedule};

    /// Version of the package.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// Name of the vector instruction set the kernels use on this machine.
    #[pyfunction]
    fn instruction_set() -> &'static str {
        futurefill::instruction_set()
    }

    /// Number of processor cores a plan may use (`workers=-1`).
    #[pyfunction]
    fn available_workers() -> usize {
        futurefill::available_workers()
    }
}
