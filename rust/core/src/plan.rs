//! The immutable half: filters, schedule and what is precomputed from them, shared by any number of caches and threads.

use crate::bank::{Bank, Filters};
use crate::buffer::Buffer;
use crate::cache::{Cache, State};
use crate::error::Error;
use crate::execution::Execution;
use crate::isa::Isa;
use crate::kernels::LANES;
use crate::layout::Layout;
use crate::offline;
use crate::planner::{AutoOptions, Profile};
use crate::real::Real;
use crate::schedule::{Latency, Method, Schedule};
use crate::shape::{check_filters, check_len, rows, size};
use crate::watch;
use std::sync::{Arc, Mutex};

/// Everything about a plan but its filters.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// Positions that one cache will serve; `None` for no bound.
    pub horizon: Option<usize>,
    pub method: Method,
    /// Threads for tile work, at least 1.
    pub workers: usize,
    /// Bytes of cache per sequence that the planner may use.
    pub max_memory: Option<usize>,
    pub latency: Latency,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self { horizon: None, method: Method::Auto, workers: 1, max_memory: None, latency: Latency::Throughput }
    }
}

/// Filters prepared for online convolution under one schedule.
pub struct Plan<T: Real> {
    filters: Filters<Buffer<T>>,
    filter_shape: Vec<usize>,
    options: PlanOptions,
    schedule: Schedule,
    /// What a cache of the whole horizon executes.
    execution: Execution,
    /// Filter spectra, for every arrangement of the filter rows that a layout has asked for.
    banks: Mutex<Vec<Arc<Bank<T>>>>,
    /// The layout used last: caches of one model usually share their shape.
    recent: Mutex<Option<Arc<Layout>>>,
    pub(crate) isa: Isa,
}

impl<T: Real> Plan<T> {
    /// Prepares `filters`, rows of `filter_length` lags (lag 0 first) in C order of `shape`.
    pub fn new(filters: &[T], shape: &[usize], filter_length: usize, options: PlanOptions) -> Result<Arc<Self>, Error> {
        let rows = rows(shape)?;
        check_filters(filters, rows, shape, filter_length)?;
        if options.horizon == Some(0) {
            return Err(Error::value("horizon", "a positive integer or None", 0));
        }
        if options.workers == 0 {
            return Err(Error::value("workers", "a positive integer or -1", 0));
        }
        let schedule = choose(&options, rows, filter_length, T::BYTES)?;
        let execution = Execution::new(&schedule, options.horizon, filter_length, options.latency);
        let values = Buffer::of(filters)?;
        let plan = Self {
            filters: Filters { values, length: filter_length },
            filter_shape: shape.to_vec(),
            options,
            schedule,
            execution,
            banks: Mutex::new(Vec::new()),
            recent: Mutex::new(None),
            isa: Isa::get(),
        };
        plan.bank(&Layout::new(shape, shape)?)?;
        Ok(Arc::new(plan))
    }

    /// The filter spectra for a layout, made when the first layout of its kind comes.
    fn bank(&self, layout: &Layout) -> Result<Arc<Bank<T>>, Error> {
        let banks = || self.banks.try_lock().ok();
        let found = banks().and_then(|banks| banks.iter().find(|bank| bank.serves(layout)).cloned());
        if let Some(found) = found {
            return Ok(found);
        }
        let reach = self.options.horizon.map_or(self.filter_length(), |horizon| horizon.min(self.filter_length()));
        let filters = Filters { values: &self.filters.values[..], length: self.filters.length };
        let made = Arc::new(Bank::new(&filters, layout, &self.execution, reach, self.workers())?);
        if let Some(mut banks) = banks() {
            banks.push(made.clone());
        }
        Ok(made)
    }

    /// The layout of inputs of `shape`, and its filters.
    pub(crate) fn arrangement(&self, shape: &[usize]) -> Result<(Arc<Layout>, Arc<Bank<T>>), Error> {
        let recent = || self.recent.try_lock().ok();
        let found = recent().and_then(|recent| recent.clone()).filter(|layout| layout.input_shape == shape);
        let layout = match found {
            Some(found) => found,
            None => Arc::new(Layout::new(shape, &self.filter_shape)?),
        };
        let bank = self.bank(&layout)?;
        if let Some(mut recent) = recent() {
            *recent = Some(layout.clone());
        }
        Ok((layout, bank))
    }

    /// A cache for one input position of `shape`, at position 0.
    pub fn new_cache(self: &Arc<Self>, shape: &[usize]) -> Result<Cache<T>, Error> {
        Cache::new(self, shape, self.options.horizon)
    }

    /// Outputs at all positions of a prompt `(*shape, len)`, and a cache for `max_new` more.
    ///
    /// The size of the cache depends on `max_new`, not on the prompt (the paper's Corollary): one FutureFill puts
    /// the prompt's whole effect on the next `max_new` outputs aside, after which the prompt is forgotten.
    pub fn prefill(
        self: &Arc<Self>,
        prompt: &[T],
        shape: &[usize],
        len: usize,
        max_new: Option<usize>,
        out: &mut [T],
    ) -> Result<Cache<T>, Error> {
        let left = match self.options.horizon {
            Some(horizon) => Some(horizon.checked_sub(len).ok_or(Error::Capacity { needed: len, remaining: horizon })?),
            None => None,
        };
        if let (Some(new), Some(left)) = (max_new, left)
            && new > left
        {
            return Err(Error::Capacity { needed: len.saturating_add(new), remaining: len + left });
        }
        let capacity = max_new.or(left);
        let (layout, _) = self.arrangement(shape)?;
        check_len("prompt", prompt.len(), layout.input_rows, shape, len)?;
        check_len("out", out.len(), layout.output_rows, &layout.output_shape, len)?;
        let reach = if len == 0 { 0 } else { capacity.unwrap_or(usize::MAX).min(self.filter_length() - 1) };
        let mut tail = Buffer::new(size(&[layout.output_rows, reach])?, T::ZERO)?;
        let mut cache = Cache::new(self, shape, capacity)?;
        let filters = Filters { values: &self.filters.values[..], length: self.filters.length };
        let whole = || offline::convolve(&layout, prompt, len, &filters, self.workers(), out, &mut tail, reach);
        watch::part(0, 9, 10, whole)?;
        watch::part(9, 10, 10, || cache.start_after(len, &tail, reach))?;
        Ok(cache)
    }

    /// A cache that goes on where `state` was taken, also under another schedule, horizon or latency.
    pub fn load_cache(self: &Arc<Self>, state: &State<T>) -> Result<Cache<T>, Error> {
        Cache::from_state(self, state)
    }

    /// What a cache of this capacity executes.
    pub fn execution_for(&self, capacity: Option<usize>) -> Execution {
        Execution::new(&self.schedule, capacity, self.filter_length(), self.options.latency)
    }

    /// Bytes that a cache of this shape and capacity keeps, but for padding and room to work in.
    pub fn cache_bytes(&self, shape: &[usize], capacity: Option<usize>) -> Result<f64, Error> {
        let layout = Layout::new(shape, &self.filter_shape)?;
        Ok(self.room(&self.execution_for(capacity), &layout))
    }

    pub(crate) fn room(&self, execution: &Execution, layout: &Layout) -> f64 {
        let (inputs, outputs) = layout.lanes();
        execution.reals(inputs as f64, outputs as f64, layout.width) * T::BYTES as f64
    }

    /// The schedule in use.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Shape of the filters without their lag axis.
    pub fn filter_shape(&self) -> &[usize] {
        &self.filter_shape
    }

    /// Lags of every filter.
    pub fn filter_length(&self) -> usize {
        self.filters.length
    }

    /// The filters, rows in C order.
    pub fn filters(&self) -> &[T] {
        &self.filters.values
    }

    /// Positions that one cache serves; `None` for no bound.
    pub fn horizon(&self) -> Option<usize> {
        self.options.horizon
    }

    /// Threads for tile work.
    pub fn workers(&self) -> usize {
        self.options.workers
    }

    pub fn latency(&self) -> Latency {
        self.options.latency
    }

    pub fn options(&self) -> &PlanOptions {
        &self.options
    }

    /// Bytes held by filters and spectra.
    pub fn nbytes(&self) -> usize {
        let banks = self.banks.try_lock().map_or(0, |banks| banks.iter().map(|bank| bank.bytes()).sum());
        self.filters.values.bytes() + banks
    }
}

fn choose(options: &PlanOptions, rows: usize, filter_length: usize, elem_bytes: usize) -> Result<Schedule, Error> {
    let reach = options.horizon.unwrap_or(usize::MAX).min(filter_length);
    match &options.method {
        Method::Auto => {
            // One filter serves any number of channels, and is planned for a unit of them.
            let many = rows == 1 && options.max_memory.is_none();
            let auto = AutoOptions {
                rows: if many { LANES } else { rows },
                elem_bytes,
                max_memory: options.max_memory,
                profile: Profile::Cpu,
                latency: options.latency,
            };
            Schedule::auto(options.horizon, filter_length, &auto)
        }
        Method::Naive => Ok(Schedule::naive()),
        Method::Epoched => Schedule::epoched(reach, None),
        Method::Continuous => Ok(Schedule::continuous(reach)),
        Method::Schedule(schedule) => Ok(schedule.clone()),
    }
}
