//! Measures the planner's cost model on this machine.

use crate::plan::{Plan, PlanOptions};
use crate::planner::CostModel;
use crate::schedule::{Method, Schedule};
use std::time::Instant;

/// Nanoseconds per position of `rows` channels under `base` and `fans` over `t` positions: the least of three runs.
fn position(rows: usize, t: usize, base: Option<usize>, fans: &[usize]) -> f64 {
    let schedule = Schedule::new(base, fans.to_vec()).expect("the measured schedules are valid");
    let filters: Vec<f32> = (0..rows * t).map(|i| (i % 7) as f32 * 1e-3 - 3e-3).collect();
    let options = PlanOptions { horizon: Some(t), method: Method::Schedule(schedule), ..Default::default() };
    let plan = Plan::new(&filters, &[rows], t, options).expect("the measured plans are valid");
    let mut cache = plan.new_cache(&[rows]).expect("the measured caches are small");
    let (u, mut y) = (vec![0.5f32; rows], vec![0f32; rows]);
    let mut least = f64::INFINITY;
    for _ in 0..3 {
        cache.reset();
        let start = Instant::now();
        for _ in 0..t {
            cache.step(&u, &mut y).expect("within the horizon");
            cache.finish();
        }
        least = least.min(start.elapsed().as_secs_f64());
    }
    least * 1e9 / t as f64
}

/// Fits a cost model to this machine: about a second of one core, best on an idle machine.
///
/// Each constant comes from the difference of two runs that differ in little else.
pub fn measure() -> CostModel {
    let shipped = CostModel::SHIPPED;
    let positive = |value: f64, default: f64| if value > default / 10.0 { value } else { default / 10.0 };
    // Direct part: base blocks of two sizes, no tiles.
    let (small, large) = (position(64, 64, Some(64), &[]) / 64.0, position(64, 512, Some(512), &[]) / 64.0);
    let direct = positive((large - small) / 448.0, shipped.direct);
    // One level that fires at every other block with one kept block, with few channels and with many.
    let one = |rows: usize| position(rows, 512, Some(256), &[]) / rows as f64;
    let few = one(16) * 16.0;
    let many = one(64);
    let step = positive((few / 16.0 - many) / (1.0 / 16.0 - 1.0 / 64.0), shipped.step);
    let fixed = positive(small - 64.0 * direct - step / 64.0, shipped.fixed);
    let level = positive((many - step / 64.0 - fixed - 256.0 * direct) * 2.0, shipped.level);
    // Kept blocks: the top level of a plan against the same plan with half the positions.
    let kept = |rows: usize, base: usize, parts: usize| {
        let (short, long) = (parts / 2 * base, parts * base);
        let each = |t: usize| position(rows, t, Some(base), &[]) / rows as f64;
        (each(long) - each(short)) / (parts as f64 / 4.0)
    };
    let near = positive(kept(16, 64, 32), shipped.accumulate[0]);
    let far = positive(kept(64, 256, 32), shipped.accumulate[1]).max(near);
    let beyond = positive(kept(512, 256, 32), shipped.accumulate[2]).max(far);
    let sum = |rows: usize, t: usize| position(rows, t, None, &[]) / rows as f64 / (t as f64 / 2.0);
    let sums = [positive(sum(16, 1024), shipped.sum[0]), positive(sum(256, 1024), shipped.sum[1])];
    CostModel {
        step,
        fixed,
        direct,
        sum: sums,
        level,
        level_growth: shipped.level_growth * level / shipped.level,
        level_beyond: shipped.level_beyond * level / shipped.level,
        row_by_row: shipped.row_by_row,
        accumulate: [near, far, beyond],
        cache: shipped.cache,
    }
}
