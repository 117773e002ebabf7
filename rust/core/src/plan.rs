//! The immutable half: schedule, filter spectra and transforms, shared by any number of caches and threads.

use crate::buffer::Buffer;
use crate::cache::{Cache, State};
use crate::error::{Error, tuple};
use crate::kernels::{Isa, LANES};
use crate::layout::{self, Layout};
use crate::offline;
use crate::planner::{AutoOptions, Profile};
use crate::pool;
use crate::real::Real;
use crate::schedule::{Execution, Schedule};
use crate::transform::{Transform, Workspace};
use std::sync::{Arc, Mutex};

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
    filters: Buffer<T>,
    filter_shape: Vec<usize>,
    filter_rows: usize,
    filter_length: usize,
    options: PlanOptions,
    schedule: Schedule,
    pub(crate) execution: Execution,
    pub(crate) transforms: Vec<Arc<Transform<T>>>,
    /// Per level, spectra `[filter row][partition][bins]`.
    spectra: Vec<Buffer<T>>,
    /// The layout used last: caches of one model usually share their shape.
    recent: Mutex<Option<Arc<Lanes<T>>>>,
    pub(crate) isa: Isa,
}

/// A layout with the filter lags that its base block needs, `[filter group][lag][16]`.
pub(crate) struct Lanes<T> {
    pub(crate) layout: Layout,
    pub(crate) taps: Buffer<T>,
}

impl<T: Real> Plan<T> {
    /// Prepares `filters`, rows of `filter_length` lags (lag 0 first) in C order of `shape`.
    pub fn new(filters: &[T], shape: &[usize], filter_length: usize, options: PlanOptions) -> Result<Arc<Self>, Error> {
        let rows = layout::rows(shape)?;
        check_filters(filters, rows, shape, filter_length)?;
        if options.horizon == Some(0) {
            return Err(Error::value("horizon", "a positive integer or None", 0));
        }
        if options.workers == 0 {
            return Err(Error::value("workers", "a positive integer or -1", 0));
        }
        let schedule = choose(&options, rows, filter_length, T::BYTES)?;
        let execution = cut(&schedule, &options, options.horizon, filter_length);
        let transforms: Vec<_> = execution.levels.iter().map(|l| Transform::get(l.block)).collect();
        let mut own = Buffer::new(filters.len(), T::ZERO)?;
        own.copy_from_slice(filters);
        let mut plan = Self {
            filters: own,
            filter_shape: shape.to_vec(),
            filter_rows: rows,
            filter_length,
            options,
            schedule,
            execution,
            transforms,
            spectra: Vec::new(),
            recent: Mutex::new(None),
            isa: Isa::get(),
        };
        plan.transform_filters()?;
        Ok(Arc::new(plan))
    }

    fn transform_filters(&mut self) -> Result<(), Error> {
        for (level, transform) in self.execution.levels.iter().zip(&self.transforms) {
            let (n, bins, length) = (level.block, transform.spectrum_len(), self.filter_length);
            let total = [level.parts, bins].iter().try_fold(self.filter_rows, |a, &b| a.checked_mul(b));
            let mut spectra = Buffer::new(total.ok_or(Error::Memory { bytes: usize::MAX })?, T::ZERO)?;
            let mut work: Vec<_> =
                (0..self.options.workers).map(|_| Workspace::for_transforms([&**transform])).collect();
            // Lags that no output of the horizon reaches would only add rounding.
            let reach = self.options.horizon.map_or(length, |horizon| horizon.min(length));
            let rows = spectra.chunks_exact_mut(level.parts * bins).zip(self.filters.chunks_exact(length));
            pool::for_each(rows, &mut work, |(spectra, filter), work| {
                for (p, spectrum) in spectra.chunks_exact_mut(bins).enumerate() {
                    let from = (p * n).min(reach);
                    transform.filter(&filter[from..from.saturating_add(2 * n).min(reach)], spectrum, work);
                }
            });
            self.spectra.push(spectra);
        }
        Ok(())
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
        let lanes = self.lanes(shape)?;
        check_len("prompt", prompt.len(), lanes.layout.input_rows, shape, len)?;
        check_len("out", out.len(), lanes.layout.output_rows, &lanes.layout.output_shape, len)?;
        let reach = if len == 0 { 0 } else { capacity.unwrap_or(usize::MAX).min(self.filter_length - 1) };
        let mut seed = Buffer::new(
            lanes.layout.output_rows.checked_mul(reach).ok_or(Error::Memory { bytes: usize::MAX })?,
            T::ZERO,
        )?;
        let job = offline::Job { filters: &self.filters, filter_length: self.filter_length, workers: self.workers() };
        let mut cache = Cache::new(self, shape, capacity)?;
        offline::convolve(&lanes.layout, prompt, len, &job, Some(out), &mut seed, reach)?;
        cache.start_after(len, &seed, reach)?;
        Ok(cache)
    }

    /// A cache that goes on where `state` was taken.
    pub fn load_cache(self: &Arc<Self>, state: &State<T>) -> Result<Cache<T>, Error> {
        Cache::from_state(self, state)
    }

    /// The layout of `shape` and its base-block taps.
    pub(crate) fn lanes(&self, shape: &[usize]) -> Result<Arc<Lanes<T>>, Error> {
        let recent = || self.recent.try_lock().ok();
        if let Some(found) = recent().and_then(|r| r.clone())
            && found.layout.input_shape == shape
        {
            return Ok(found);
        }
        let layout = Layout::new(shape, &self.filter_shape)?;
        let stride = self.taps_stride();
        let groups = layout.filters.len();
        let total = stride.checked_mul(LANES).and_then(|n| n.checked_mul(groups));
        let mut taps = Buffer::new(total.ok_or(Error::Memory { bytes: usize::MAX })?, T::ZERO)?;
        let keep = stride.min(self.filter_length);
        for (group, taps) in taps.chunks_exact_mut(stride * LANES).enumerate() {
            let rows = layout.filters[group].rows;
            for lane in 0..if rows == 1 { LANES } else { rows } {
                let row = layout.filter_row(group, lane);
                let filter = &self.filters[row * self.filter_length..][..keep];
                for (tap, f) in taps.chunks_exact_mut(LANES).zip(filter) {
                    tap[lane] = *f;
                }
            }
        }
        let lanes = Arc::new(Lanes { layout, taps });
        if let Some(mut recent) = recent() {
            *recent = Some(lanes.clone());
        }
        Ok(lanes)
    }

    /// What a cache of this capacity executes.
    pub fn execution_for(&self, capacity: Option<usize>) -> Execution {
        cut(&self.schedule, &self.options, capacity, self.filter_length)
    }

    /// Lags that the base block keeps per filter group.
    pub(crate) fn taps_stride(&self) -> usize {
        if self.execution.base == 0 { self.execution.ring } else { self.execution.base }
    }

    /// Spectra of all partitions of a filter row at a level.
    pub(crate) fn filter_spectra(&self, level: usize, row: usize) -> &[T] {
        let len = self.execution.levels[level].parts * self.transforms[level].spectrum_len();
        &self.spectra[level][row * len..][..len]
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
        self.filter_length
    }

    /// The filters, rows in C order.
    pub fn filters(&self) -> &[T] {
        &self.filters
    }

    /// Positions that one cache serves; `None` for no bound.
    pub fn horizon(&self) -> Option<usize> {
        self.options.horizon
    }

    /// Threads for tile work.
    pub fn workers(&self) -> usize {
        self.options.workers
    }

    /// Bytes held by filters and spectra.
    pub fn nbytes(&self) -> usize {
        let taps = self.recent.try_lock().ok().and_then(|r| r.as_ref().map(|l| l.taps.bytes())).unwrap_or(0);
        self.filters.bytes() + taps + self.spectra.iter().map(Buffer::bytes).sum::<usize>()
    }
}

fn cut(schedule: &Schedule, options: &PlanOptions, capacity: Option<usize>, filter_length: usize) -> Execution {
    match options.latency {
        Latency::Throughput => schedule.execution(capacity, filter_length),
        Latency::Smooth => schedule.smooth_execution(capacity, filter_length),
    }
}

fn choose(options: &PlanOptions, rows: usize, filter_length: usize, elem_bytes: usize) -> Result<Schedule, Error> {
    let reach = options.horizon.unwrap_or(usize::MAX).min(filter_length);
    match &options.method {
        Method::Auto => {
            let auto = AutoOptions {
                rows,
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

pub(crate) fn check_filters<T>(filters: &[T], rows: usize, shape: &[usize], length: usize) -> Result<(), Error> {
    if length == 0 {
        return Err(Error::value("filters", "at least one lag", 0));
    }
    check_len("filters", filters.len(), rows, shape, length)
}

/// An array of `rows` rows of `len` positions.
pub(crate) fn check_len(arg: &'static str, got: usize, rows: usize, shape: &[usize], len: usize) -> Result<(), Error> {
    if rows.checked_mul(len) == Some(got) {
        return Ok(());
    }
    let mut expected = shape.to_vec();
    expected.push(len);
    Err(Error::shape(arg, tuple(&expected), format_args!("{got} values")))
}
