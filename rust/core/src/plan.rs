//! The immutable half: schedule, filter spectra and transforms, shared by any number of caches and threads.

use crate::buffer::Buffer;
use crate::cache::{Cache, State};
use crate::error::{Error, tuple};
use crate::kernels::{Isa, LANES};
use crate::lanes::{self, BIN, LaneTransform, fold};
use crate::layout::{self, Layout};
use crate::offline;
use crate::planner::{AutoOptions, Profile};
use crate::pool;
use crate::real::Real;
use crate::schedule::{Execution, Level, Schedule};
use crate::transform::{Transform, Workspace};
use crate::watch;
use std::ops::Range;
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
    pub(crate) transforms: Transforms<T>,
    /// Filter spectra, for every grouping of the filter rows that a layout has asked for.
    banks: Mutex<Vec<Arc<Bank<T>>>>,
    /// The layout used last: caches of one model usually share their shape.
    recent: Mutex<Option<Arc<Lanes<T>>>>,
    pub(crate) isa: Isa,
}

/// The transforms of all levels: row by row for blocks of any length, or 16 rows side by side.
pub(crate) enum Transforms<T: Real> {
    Rows(Vec<Arc<Transform<T>>>),
    Lanes(Vec<Arc<LaneTransform<T>>>),
}

impl<T: Real> Transforms<T> {
    fn new(execution: &Execution, filter_rows: usize) -> Result<Self, Error> {
        let blocks = || execution.levels.iter().map(|level| level.block);
        Ok(match side_by_side(execution, filter_rows) {
            true => Self::Lanes(blocks().map(LaneTransform::get).collect::<Result<_, _>>()?),
            false => Self::Rows(blocks().map(Transform::get).collect::<Result<_, _>>()?),
        })
    }

    /// Reals of one spectrum of a level: of one row, or of 16.
    pub(crate) fn spectrum_len(&self, level: usize) -> usize {
        match self {
            Self::Rows(transforms) => transforms[level].spectrum_len(),
            Self::Lanes(transforms) => transforms[level].spectrum_len(),
        }
    }

    /// Buffers of one worker for these levels, the first of all.
    pub(crate) fn workspace(&self, levels: &[Level]) -> Result<Workspace<T>, Error> {
        match self {
            Self::Rows(transforms) => {
                let single = levels.iter().rev().find(|level| level.kept() == 0).map_or(0, |level| level.block);
                Workspace::for_transforms(transforms[..levels.len()].iter().map(|t| &**t), single)
            }
            Self::Lanes(_) => Workspace::for_lanes(levels.last().map_or(0, |level| level.block)),
        }
    }
}

/// Whether 16 rows at a time are faster. The filters alone decide, so that a row's bits do not depend on the batch it is
/// in.
pub(crate) fn side_by_side(execution: &Execution, filter_rows: usize) -> bool {
    let supported = execution.levels.iter().all(|level| lanes::supports(level.block));
    supported && layout::well_filled(filter_rows)
}

/// Filter spectra of all levels: `[filter row][partition][bins]`, or by groups of 16 rows.
pub(crate) struct Bank<T> {
    groups: Vec<layout::Lanes>,
    levels: Vec<Buffer<T>>,
}

/// A layout with the filter lags that its base block needs, `[filter group][lag][16]`, and its filter spectra.
pub(crate) struct Lanes<T> {
    pub(crate) layout: Layout,
    pub(crate) taps: Buffer<T>,
    bank: Arc<Bank<T>>,
}

impl<T: Real> Lanes<T> {
    /// Spectra of all partitions of a filter row at a level, or of a filter group where rows go side by side.
    pub(crate) fn filter_spectra(&self, plan: &Plan<T>, level: usize, index: usize) -> &[T] {
        let len = plan.execution.levels[level].parts * plan.transforms.spectrum_len(level);
        &self.bank.levels[level][index * len..][..len]
    }
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
        let transforms = Transforms::new(&execution, rows)?;
        let plan = Self {
            filters: Buffer::of(filters)?,
            filter_shape: shape.to_vec(),
            filter_rows: rows,
            filter_length,
            options,
            schedule,
            execution,
            transforms,
            banks: Mutex::new(Vec::new()),
            recent: Mutex::new(None),
            isa: Isa::get(),
        };
        plan.bank(&Layout::new(shape, shape)?)?;
        Ok(Arc::new(plan))
    }

    /// The filter spectra for a layout, made when the first layout of its kind comes.
    fn bank(&self, layout: &Layout) -> Result<Arc<Bank<T>>, Error> {
        let groups = match &self.transforms {
            Transforms::Rows(_) => &[][..],
            Transforms::Lanes(_) => &layout.filters,
        };
        let banks = || self.banks.try_lock().ok();
        let found = banks().and_then(|banks| banks.iter().find(|bank| bank.groups == groups).cloned());
        if let Some(found) = found {
            return Ok(found);
        }
        let levels = match &self.transforms {
            Transforms::Rows(transforms) => self.transform_rows(transforms)?,
            Transforms::Lanes(transforms) => self.transform_groups(transforms, groups)?,
        };
        let made = Arc::new(Bank { groups: groups.to_vec(), levels });
        if let Some(mut banks) = banks() {
            banks.push(made.clone());
        }
        Ok(made)
    }

    /// The lags of one partition of a level: two blocks, from the partition's first lag on.
    fn partition(&self, level: &Level, part: usize) -> Range<usize> {
        // Lags that no output of the horizon reaches would only add rounding.
        let reach = self.options.horizon.map_or(self.filter_length, |horizon| horizon.min(self.filter_length));
        let from = (part * level.block).min(reach);
        from..from.saturating_add(2 * level.block).min(reach)
    }

    fn transform_rows(&self, transforms: &[Arc<Transform<T>>]) -> Result<Vec<Buffer<T>>, Error> {
        let level = |(k, (level, transform)): (usize, (&Level, &Arc<Transform<T>>))| {
            let bins = transform.spectrum_len();
            let mut spectra = Buffer::new(size(&[self.filter_rows, level.parts, bins])?, T::ZERO)?;
            let mut work = (0..self.options.workers)
                .map(|_| Workspace::for_transforms([&**transform], 0))
                .collect::<Result<Vec<_>, _>>()?;
            let rows = spectra.chunks_exact_mut(level.parts * bins).enumerate();
            let run = |(row, spectra): (usize, &mut [T]), work: &mut Workspace<T>| {
                for (p, spectrum) in spectra.chunks_exact_mut(bins).enumerate() {
                    let filter = &self.filters[row * self.filter_length..][self.partition(level, p)];
                    transform.filter(filter, spectrum, work);
                    watch::poll(p + 1, level.parts);
                }
            };
            watch::part(k, k + 1, transforms.len(), || pool::for_each(rows, &mut work, run));
            Ok(spectra)
        };
        self.execution.levels.iter().zip(transforms).enumerate().map(level).collect()
    }

    fn transform_groups(
        &self,
        transforms: &[Arc<LaneTransform<T>>],
        groups: &[layout::Lanes],
    ) -> Result<Vec<Buffer<T>>, Error> {
        let level = |(k, (level, transform)): (usize, (&Level, &Arc<LaneTransform<T>>))| {
            let bins = transform.spectrum_len();
            let mut spectra = Buffer::new(size(&[groups.len(), level.parts, bins])?, T::ZERO)?;
            let jobs = spectra.chunks_exact_mut(level.parts * bins).zip(groups);
            let run = |(spectra, group): (&mut [T], &layout::Lanes), (): &mut ()| {
                for (p, spectrum) in spectra.chunks_exact_mut(bins).enumerate() {
                    let (range, one) = (self.partition(level, p), T::of_f64(1.0));
                    let rows = &self.filters[group.row * self.filter_length..];
                    let z = &mut spectrum[..level.block * BIN];
                    fold(self.isa, rows, self.filter_length, range, group.rows, one, z);
                    transform.filter(spectrum);
                    watch::poll(p + 1, level.parts);
                }
            };
            let mut work = vec![(); self.options.workers];
            watch::part(k, k + 1, transforms.len(), || pool::for_each(jobs, &mut work, run));
            Ok(spectra)
        };
        self.execution.levels.iter().zip(transforms).enumerate().map(level).collect()
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
        let mut seed = Buffer::new(size(&[lanes.layout.output_rows, reach])?, T::ZERO)?;
        let job = offline::Job::new(&self.filters, self.filter_rows, self.filter_length, self.workers());
        let mut cache = Cache::new(self, shape, capacity)?;
        watch::part(0, 9, 10, || offline::convolve(&lanes.layout, prompt, len, &job, Some(out), &mut seed, reach))?;
        watch::part(9, 10, 10, || cache.start_after(len, &seed, reach))?;
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
        let mut taps = Buffer::new(size(&[stride, LANES, groups])?, T::ZERO)?;
        let keep = stride.min(self.filter_length);
        for (group, taps) in taps.chunks_exact_mut(stride * LANES).enumerate() {
            let rows = layout.filters[group].rows;
            for lane in 0..if rows == 1 { LANES } else { rows } {
                let row = layout.filter_row(group, lane);
                let filter = &self.filters[row * self.filter_length..][..keep];
                watch::check();
                for (tap, f) in taps.chunks_exact_mut(LANES).zip(filter) {
                    tap[lane] = *f;
                }
            }
        }
        let bank = self.bank(&layout)?;
        let lanes = Arc::new(Lanes { layout, taps, bank });
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
        let spectra = |bank: &Arc<Bank<T>>| bank.levels.iter().map(Buffer::bytes).sum::<usize>();
        let banks = self.banks.try_lock().map_or(0, |banks| banks.iter().map(spectra).sum());
        self.filters.bytes() + taps + banks
    }
}

/// The product of the parts, where it can be counted.
pub(crate) fn size(parts: &[usize]) -> Result<usize, Error> {
    parts.iter().try_fold(1usize, |n, &p| n.checked_mul(p)).ok_or(Error::Memory { bytes: usize::MAX })
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
