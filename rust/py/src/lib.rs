//! Python bindings of the FutureFill engine: arrays in, plan, cache, arrays out.
//!
//! Everything mathematical lives in the `futurefill` crate. Here arguments are checked and converted, the interpreter
//! lock is released around long work, and errors become Python exceptions.

mod args;
mod arrays;
mod bulk;
mod cache;
mod engine;
mod errors;
mod execution;
mod plan;
mod reserve;
mod schedule;
mod tensors;
mod turn;
mod watch;

use futurefill::{CostModel, Isa};
use pyo3::prelude::*;
use std::collections::BTreeMap;

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
    use super::execution::{Execution, Level, TileIndex};
    #[pymodule_export]
    use super::plan::{Plan, plan};
    #[pymodule_export]
    use super::schedule::{Cost, Schedule};
    #[pymodule_export]
    use super::tensors::read_tensors;

    /// Version of the package.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// Names of the vector instruction sets this machine has, weakest first.
    #[pyfunction]
    fn instruction_sets() -> Vec<&'static str> {
        Isa::available().into_iter().map(Isa::name).collect()
    }

    /// Name of the vector instruction set the kernels use on this machine.
    #[pyfunction]
    fn instruction_set() -> &'static str {
        futurefill::instruction_set()
    }

    /// Measures the planner's cost model on this machine: about a second of one core.
    #[pyfunction]
    fn measure_costs(py: Python<'_>) -> PyResult<BTreeMap<&'static str, f64>> {
        errors::shielded(|| py.detach(|| Ok(futurefill::measure())))
            .map(|model| CostModel::NAMES.into_iter().zip(model.values()).collect())
    }

    /// Plans from now on with these costs, or with the shipped ones where `costs` is None.
    ///
    /// Raises ValueError for missing, unknown or non-positive costs.
    #[pyfunction]
    #[pyo3(signature = (costs))]
    fn set_costs(costs: Option<BTreeMap<String, f64>>) -> PyResult<()> {
        let model = match costs {
            None => CostModel::SHIPPED,
            Some(costs) => {
                let known = costs.len() == CostModel::NAMES.len();
                let values = CostModel::NAMES.map(|name| costs.get(name).copied().unwrap_or(f64::NAN));
                CostModel::from_values(if known { values } else { [f64::NAN; CostModel::NAMES.len()] })
                    .map_err(errors::engine)?
            }
        };
        futurefill::set_cost_model(model);
        Ok(())
    }

    /// Number of processor cores a plan may use (`workers=-1`).
    #[pyfunction]
    fn available_workers() -> usize {
        futurefill::available_workers()
    }
}
