//! A closed loop through the crate `fft-convolver`, one sample at a time: `rivals CHANNELS LENGTH RUNS`.
//!
//! Every head block size is tried, with the tail block the crate chooses; one line of JSON each.

use fft_convolver::TwoStageFFTConvolver;
use std::time::Instant;

/// Positive and summing to 1, so that the loop settles instead of reaching denormal numbers.
fn filter(length: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut values: Vec<f32> = (0..length)
        .map(|j| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 * (-8.0 * j as f32 / length as f32).exp()
        })
        .collect();
    let sum: f64 = values.iter().map(|&v| f64::from(v)).sum();
    values.iter_mut().for_each(|v| *v = (f64::from(*v) / sum) as f32);
    values
}

fn main() {
    let args: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().expect("CHANNELS LENGTH RUNS")).collect();
    let &[channels, length, runs] = args.as_slice() else { panic!("usage: rivals CHANNELS LENGTH RUNS") };
    let filters: Vec<Vec<f32>> = (0..channels).map(|c| filter(length, c as u64 + 1)).collect();
    for head in [8, 16, 32, 64, 128] {
        let mut convolvers: Vec<TwoStageFFTConvolver<f32>> = filters
            .iter()
            .map(|f| {
                let mut convolver = TwoStageFFTConvolver::default();
                convolver.init_default(head, f).expect("a convolver");
                convolver
            })
            .collect();
        let mut best = f64::INFINITY;
        let mut last = 0.0;
        for _ in 0..runs {
            convolvers.iter_mut().for_each(TwoStageFFTConvolver::reset);
            let mut values = vec![1f32; channels];
            let start = Instant::now();
            for _ in 0..length {
                for (convolver, value) in convolvers.iter_mut().zip(&mut values) {
                    let mut output = [0f32];
                    convolver.process(&[*value], &mut output).expect("a sample");
                    *value = output[0];
                }
            }
            best = best.min(start.elapsed().as_secs_f64());
            last = values[0];
        }
        let each = best * 1e9 / (channels * length) as f64;
        println!("{{\"head\": {head}, \"ns_per_position_channel\": {each:.3}, \"last\": {last:e}}}");
    }
}
