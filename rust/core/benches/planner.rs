//! The planner's choice against every schedule it could have chosen, all measured in one run:
//! `cargo bench -p futurefill --bench planner -- [CHANNELS LOG2_T ..]`.

use futurefill::{AutoOptions, Method, Plan, PlanOptions, Schedule};
use std::time::Instant;

/// Nanoseconds per position and channel: the least of `rounds` runs.
fn measure(channels: usize, t: usize, filters: &[f32], schedule: &Schedule, rounds: usize) -> f64 {
    let method = Method::Schedule(schedule.clone());
    let options = PlanOptions { horizon: Some(t), method, ..Default::default() };
    let plan = Plan::new(filters, &[channels], t, options).expect("a plan");
    let mut cache = plan.new_cache(&[channels]).expect("a cache");
    let (u, mut y) = (vec![0.5f32; channels], vec![0f32; channels]);
    let mut least = f64::INFINITY;
    for _ in 0..rounds {
        cache.reset();
        let start = Instant::now();
        for _ in 0..t {
            cache.step(&u, &mut y).expect("a step");
            cache.finish();
        }
        least = least.min(start.elapsed().as_secs_f64());
    }
    least * 1e9 / (t * channels) as f64
}

fn schedules(t: usize) -> Vec<Schedule> {
    let mut all = Vec::new();
    for base in [32, 64, 128, 256, 512] {
        let mut stack = vec![vec![]];
        while let Some(fans) = stack.pop() {
            let top: usize = fans.iter().fold(base, |n, fan| n * fan);
            for fan in [2, 4, 8, 16] {
                let any = fans.len() < 4 && fans.iter().all(|fan| *fan > 2);
                if top * fan < t && (any || fan == 2) {
                    let mut next = fans.clone();
                    next.push(fan);
                    stack.push(next);
                }
            }
            // A top ring of many blocks is the direct sum of large tiles: never the best, and slow to measure.
            if t / top <= 64 {
                all.push(Schedule::new(Some(base), fans).expect("valid"));
            }
        }
    }
    all
}

fn main() {
    let args: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let cells: Vec<(usize, usize)> = match args.len() {
        0 => vec![(16, 12), (64, 12), (256, 12), (16, 14), (64, 14), (256, 13)],
        _ => args.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect(),
    };
    for (channels, log) in cells {
        let t = 1 << log;
        let filters: Vec<f32> = (0..channels * t).map(|i| (i % 17) as f32 * 1e-3 - 8e-3).collect();
        let options = AutoOptions { rows: channels, ..Default::default() };
        let chosen = Schedule::auto(Some(t), t, &options).expect("a schedule");
        let mut all: Vec<_> = schedules(t).into_iter().map(|s| (measure(channels, t, &filters, &s, 2), s)).collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        // The best few again, beside the chosen one: the least of many measurements flatters the winner.
        let mut finals: Vec<_> = all.iter().take(5).map(|(_, s)| s.clone()).collect();
        finals.push(chosen.clone());
        let mut least = vec![f64::INFINITY; finals.len()];
        for _ in 0..5 {
            for (least, schedule) in least.iter_mut().zip(&finals) {
                *least = least.min(measure(channels, t, &filters, schedule, 1));
            }
        }
        let own = least[finals.len() - 1];
        let (best, schedule) =
            least.iter().zip(&finals).min_by(|a, b| a.0.total_cmp(b.0)).expect("there are finalists");
        println!(
            "D={channels} T={t}: chosen {chosen} {own:.2} ns, best of {} {schedule} {best:.2} ns, ratio {:.3}",
            all.len(),
            own / best
        );
    }
}
