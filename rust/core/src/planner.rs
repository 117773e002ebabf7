//! Which schedule is fastest: a small measured cost model, searched over plain candidates in microseconds.

use crate::error::Error;
use crate::execution::Execution;
use crate::kernels::LANES;
use crate::layout::Layout;
use crate::schedule::{Latency, Schedule};
use std::sync::RwLock;

/// The machine that a schedule is planned for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    #[default]
    Cpu,
    /// Every tile is a few kernel launches: larger bases, fewer levels.
    Gpu,
}

/// What the planner may use besides horizon and filter length.
#[derive(Clone, Copy, Debug)]
pub struct AutoOptions {
    /// Channels of one sequence.
    pub rows: usize,
    /// Bytes of one real.
    pub elem_bytes: usize,
    /// Bytes of cache per sequence.
    pub max_memory: Option<usize>,
    pub profile: Profile,
    pub latency: Latency,
}

impl Default for AutoOptions {
    fn default() -> Self {
        Self { rows: 64, elem_bytes: 4, max_memory: None, profile: Profile::Cpu, latency: Latency::Throughput }
    }
}

/// Nanoseconds per position and channel in float32, by what they are spent on.
///
/// The shipped values were fitted to `benches/online.rs` on one AVX-512 machine; [`measure`](crate::measure) fits
/// them to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CostModel {
    /// Once per step and cache, whatever the channels.
    pub step: f64,
    /// Per position and channel: gathering, scattering, transposing.
    pub fixed: f64,
    /// Per position of the base block.
    pub direct: f64,
    /// Per lag of the direct sum, with the state in cache and beyond it.
    pub sum: [f64; 2],
    /// Per tile level: two transforms, 16 rows at a time.
    pub level: f64,
    /// More of the same for each doubling of the block beyond 1024.
    pub level_growth: f64,
    /// More of the same for a level whose spectra do not fit the caches.
    pub level_beyond: f64,
    /// How many times as much a level costs row by row.
    pub row_by_row: f64,
    /// Per kept block that takes part where blocks are kept, with the level's spectra in the near cache, in the far cache and beyond.
    pub accumulate: [f64; 3],
    /// Bytes up to which all is in the near cache, and from which on all is beyond the far one.
    pub cache: [f64; 2],
}

impl CostModel {
    /// The values this crate was built with.
    pub const SHIPPED: Self = Self {
        step: 30.0,
        fixed: 1.35,
        direct: 0.0095,
        sum: [0.025, 0.08],
        level: 0.75,
        level_growth: 0.24,
        level_beyond: 1.2,
        row_by_row: 3.5,
        accumulate: [0.08, 0.1, 0.6],
        cache: [2e5, 1.28e8],
    };

    /// By a large card's bandwidth and launches; not measured.
    const GPU: Self = Self {
        step: 4e4,
        fixed: 0.004,
        direct: 1e-3,
        sum: [1e-3, 3e-3],
        level: 0.02,
        level_growth: 0.002,
        level_beyond: 0.01,
        row_by_row: 1.0,
        accumulate: [0.004, 0.006, 0.01],
        cache: [4e6, 4e7],
    };

    /// Names of the constants, in the order of [`values`](Self::values).
    pub const NAMES: [&str; 14] = [
        "step",
        "fixed",
        "direct",
        "sum_in_cache",
        "sum_beyond",
        "level",
        "level_growth",
        "level_beyond",
        "row_by_row",
        "accumulate_near",
        "accumulate_far",
        "accumulate_beyond",
        "near_cache_bytes",
        "far_cache_bytes",
    ];

    /// The constants as plain numbers, to be stored.
    pub fn values(&self) -> [f64; 14] {
        let Self {
            step,
            fixed,
            direct,
            sum: s,
            level,
            level_growth: g,
            level_beyond: b,
            row_by_row: r,
            accumulate: a,
            cache: c,
        } = *self;
        [step, fixed, direct, s[0], s[1], level, g, b, r, a[0], a[1], a[2], c[0], c[1]]
    }

    /// The model with these constants, which must be positive and finite.
    pub fn from_values(v: [f64; 14]) -> Result<Self, Error> {
        if let Some(bad) = v.iter().find(|v| !(v.is_finite() && **v > 0.0)) {
            return Err(Error::value("costs", "positive numbers", bad));
        }
        Ok(Self {
            step: v[0],
            fixed: v[1],
            direct: v[2],
            sum: [v[3], v[4]],
            level: v[5],
            level_growth: v[6],
            level_beyond: v[7],
            row_by_row: v[8],
            accumulate: [v[9], v[10], v[11]],
            cache: [v[12], v[13]],
        })
    }

    /// How far spectra of so many bytes lie in the near cache, in the far cache and beyond: shares that sum to 1, since
    /// the levels crowd each other out of the caches gradually.
    fn residence(&self, bytes: f64) -> [f64; 3] {
        let [near, far] = self.cache.map(f64::ln);
        let place = (2.0 * (bytes.max(1.0).ln() - near) / (far - near).max(1e-9)).clamp(0.0, 2.0);
        if place < 1.0 { [1.0 - place, place, 0.0] } else { [0.0, 2.0 - place, place - 1.0] }
    }

    /// Nanoseconds per position and channel of `rows` channels.
    fn time(&self, run: &Execution, horizon: Option<usize>, filter_len: usize, options: &AutoOptions) -> f64 {
        let rows = options.rows.max(1) as f64;
        let precision = options.elem_bytes as f64 / 4.0;
        // With few channels most of the sixteen lanes of the direct part are padding.
        let padding = options.rows.max(1).next_multiple_of(LANES) as f64 / rows;
        if run.base == 0 {
            let bounded = horizon.is_some_and(|t| t / 2 <= filter_len);
            let lags = run.ring as f64 * if bounded { 0.5 } else { 1.0 };
            let beyond = usize::from(rows * run.ring as f64 * 8.0 * precision > self.cache[0]);
            return self.step / rows + padding * precision * (self.fixed + self.sum[beyond] * lags);
        }
        let mut time = self.step / rows + padding * precision * (self.fixed + self.direct * run.base as f64);
        let slower = if wide(options.rows) { padding } else { self.row_by_row };
        for level in &run.levels {
            let bytes = rows * (level.block * level.parts) as f64 * 16.0 * precision;
            let share = self.residence(bytes);
            let (often, parts) = level.load(horizon, filter_len, run.latency);
            let beyond = self.level_beyond * share[2];
            let accumulate: f64 = self.accumulate.iter().zip(share).map(|(cost, share)| cost * share).sum();
            let launches = if options.profile == Profile::Gpu { self.step / rows / level.block as f64 } else { 0.0 };
            let growth = self.level_growth * (level.block as f64 / 1024.0).log2().max(0.0);
            let transforms = slower * (self.level + growth + beyond);
            let sums = if level.kept() == 0 { 0.0 } else { accumulate * parts };
            time += often * (precision * (transforms + sums) + launches);
        }
        time
    }
}

static MODEL: RwLock<CostModel> = RwLock::new(CostModel::SHIPPED);

/// The cost model in use for CPUs.
pub fn cost_model() -> CostModel {
    MODEL.try_read().map_or(CostModel::SHIPPED, |model| *model)
}

/// Plans from now on with another cost model, such as one measured on this machine.
pub fn set_cost_model(model: CostModel) {
    if let Ok(mut current) = MODEL.write() {
        *current = model;
    }
}

impl Schedule {
    /// The fastest schedule by the cost model within the memory allowed.
    ///
    /// `horizon` `None` plans an endless stream, whose tiles reach as far as the filters do.
    pub fn auto(horizon: Option<usize>, filter_len: usize, options: &AutoOptions) -> Result<Self, Error> {
        let reach = horizon.unwrap_or(usize::MAX).min(filter_len).max(1);
        let model = match options.profile {
            Profile::Cpu => cost_model(),
            Profile::Gpu => CostModel::GPU,
        };
        let mut best: Option<(f64, Self)> = None;
        let mut least = usize::MAX;
        // A tile in one pass keeps nothing where every level doubles: 16 rows at a time nothing is faster.
        let doubling = wide(options.rows)
            && options.profile == Profile::Cpu
            && options.latency == Latency::Throughput
            && options.max_memory.is_none();
        let (all, usual) = match doubling {
            true => (doublings(reach), None),
            false => (candidates(reach, options.profile), usual_memory(reach, options)),
        };
        let allowed = options.max_memory.or(usual);
        for schedule in all {
            if options.latency == Latency::Smooth && !stays_smooth(&schedule, options.profile) {
                continue;
            }
            let run = Execution::new(&schedule, horizon, filter_len, options.latency);
            if let Some(allowed) = allowed {
                let bytes = cache_bytes(&run, options.rows, options.elem_bytes);
                least = least.min(bytes);
                if bytes > allowed {
                    continue;
                }
            }
            let time = model.time(&run, horizon, filter_len, options);
            if best.as_ref().is_none_or(|(t, _)| time < *t) {
                best = Some((time, schedule));
            }
        }
        best.map(|(_, schedule)| schedule).ok_or_else(|| {
            let expected = format!("at least {least} bytes per sequence");
            Error::value("max_memory", expected, options.max_memory.unwrap_or(0))
        })
    }
}

/// Whether no step has too much to do: the first level's tile is one step's work, and where the others run in slices,
/// small fans keep these short.
fn stays_smooth(schedule: &Schedule, profile: Profile) -> bool {
    match profile {
        Profile::Cpu => schedule.base() <= Some(128) && schedule.fans().iter().all(|fan| *fan <= 4),
        Profile::Gpu => schedule.base() <= Some(256),
    }
}

/// What the fastest schedules may take where nothing else is asked for: two and a half values per position. Some
/// schedules with large top blocks take more and gain next to nothing; short streams are small in any case.
fn usual_memory(reach: usize, options: &AutoOptions) -> Option<usize> {
    let long = reach >= 1 << 13 && options.profile == Profile::Cpu && options.latency == Latency::Throughput;
    let lanes = options.rows.max(1).next_multiple_of(Layout::width_of(options.rows));
    let values = reach.saturating_mul(lanes).saturating_mul(5) / 2;
    long.then(|| values.saturating_mul(options.elem_bytes))
}

/// Whether a sequence of so many channels runs 16 at a time.
fn wide(rows: usize) -> bool {
    Layout::width_of(rows) > 1
}

/// Bytes of a cache of `rows` channels with one worker.
fn cache_bytes(run: &Execution, rows: usize, elem_bytes: usize) -> usize {
    let width = Layout::width_of(rows);
    let lanes = rows.next_multiple_of(width) as f64;
    // Room to work in: a block's bins, in a unit's lanes.
    let work = run.levels.last().map_or(0.0, |level| 2.0 * (level.block * (width + 2)) as f64);
    ((run.reals(lanes, lanes, width) + work) * elem_bytes as f64) as usize
}

/// The direct sum, and schedules whose levels all double, from some bases.
fn doublings(reach: usize) -> Vec<Schedule> {
    let from = |base: usize| {
        let levels = reach.div_ceil(base).max(1).next_power_of_two().trailing_zeros().saturating_sub(1);
        Schedule::new(Some(base), vec![2; levels as usize]).expect("candidates are valid")
    };
    std::iter::once(Schedule::naive()).chain([32, 64, 128, 256].map(from)).collect()
}

fn candidates(reach: usize, profile: Profile) -> Vec<Schedule> {
    let bases: &[usize] = match profile {
        Profile::Cpu => &[32, 64, 128, 256],
        Profile::Gpu => &[128, 256, 512, 1024],
    };
    let mut all = vec![Schedule::naive()];
    for &base in bases {
        let mut stack = vec![Vec::new()];
        while let Some(fans) = stack.pop() {
            let top = fans.iter().fold(base, |n: usize, fan| n.saturating_mul(*fan));
            for fan in [2, 4, 8, 16] {
                // Larger fans upwards, as transforms grow dearer; or, as kept spectra do, twos that need none.
                let fits = fan == 2 || fans.is_sorted() && fans.last().is_none_or(|last| fan >= *last);
                if fits && top.saturating_mul(fan) < reach && fans.len() < 8 {
                    let mut next = fans.clone();
                    next.push(fan);
                    stack.push(next);
                }
            }
            all.push(Schedule::new(Some(base), fans).expect("candidates are valid"));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auto(horizon: Option<usize>, filter_len: usize, rows: usize) -> Schedule {
        Schedule::auto(horizon, filter_len, &AutoOptions { rows, ..Default::default() }).unwrap()
    }

    #[test]
    fn chosen_schedules_are_values() {
        assert_eq!(auto(None, 3, 64), Schedule::naive());
        assert_eq!(auto(Some(1000), 16, 1024), Schedule::naive());
        assert_eq!(auto(Some(1024), 1024, 64).to_string(), "Schedule(base=64, fans=(2, 2, 2))");
        for (horizon, len, rows) in [(Some(1 << 14), 1 << 14, 256), (None, 1 << 17, 64), (Some(1 << 20), 1 << 20, 64)] {
            let schedule = auto(horizon, len, rows);
            assert!(schedule.base().is_some_and(|b| (64..=256).contains(&b)), "{schedule}");
            assert!(schedule.fans().iter().all(|f| (2..=16).contains(f)), "{schedule}");
            let bytes = cache_bytes(&schedule.execution(horizon, len), rows, 4);
            // An endless stream keeps the spectra of two top blocks besides.
            let values = if horizon.is_some() { 5 * len * rows / 2 } else { 7 * len * rows / 2 };
            assert!(bytes <= 4 * values, "{schedule}: {bytes} bytes");
        }
    }

    #[test]
    fn on_a_gpu_tiles_are_few_and_long_filters_are_not_summed() {
        for latency in [Latency::Throughput, Latency::Smooth] {
            let options = |rows| AutoOptions { rows, profile: Profile::Gpu, latency, ..Default::default() };
            assert_eq!(Schedule::auto(None, 64, &options(896)).unwrap(), Schedule::naive());
            for rows in [64, 896, 8192] {
                let schedule = Schedule::auto(Some(1 << 17), 1 << 17, &options(rows)).unwrap();
                let base = schedule.base().unwrap();
                assert!((128..=1024).contains(&base) && !schedule.fans().is_empty(), "{schedule}");
                assert!(latency == Latency::Throughput || base <= 256, "{schedule}");
                let more = Schedule::auto(Some(1 << 17), 1 << 17, &options(16 * rows)).unwrap();
                assert!(more.base().unwrap() <= base, "launches weigh less with more rows: {schedule}, {more}");
            }
        }
    }

    #[test]
    fn memory_is_respected_or_the_least_is_named() {
        let options = |max_memory| AutoOptions { rows: 64, max_memory: Some(max_memory), ..Default::default() };
        let free = auto(Some(1 << 14), 1 << 14, 64).execution(Some(1 << 14), 1 << 14);
        let bytes = cache_bytes(&free, 64, 4);
        let tight = Schedule::auto(Some(1 << 14), 1 << 14, &options(bytes)).unwrap();
        assert!(cache_bytes(&tight.execution(Some(1 << 14), 1 << 14), 64, 4) <= bytes);
        let error = Schedule::auto(Some(1 << 14), 1 << 14, &options(1000)).unwrap_err().to_string();
        assert!(error.starts_with("max_memory: expected at least "), "{error}");
        let least: usize = error.split(' ').nth(4).unwrap().parse().unwrap();
        assert!(Schedule::auto(Some(1 << 14), 1 << 14, &options(least)).is_ok());
        assert!(Schedule::auto(Some(1 << 14), 1 << 14, &options(least - 1)).is_err());
    }

    #[test]
    fn a_model_can_be_stored() {
        assert_eq!(CostModel::from_values(CostModel::SHIPPED.values()), Ok(CostModel::SHIPPED));
        let mut bad = CostModel::SHIPPED.values();
        bad[3] = f64::NAN;
        assert!(CostModel::from_values(bad).is_err());
    }

    #[test]
    fn planning_takes_microseconds() {
        assert!(candidates(usize::MAX, Profile::Cpu).len() < 6000);
    }
}
