//! What bytes can do to a saved state: the body of a fuzz target.
//!
//! For cargo-fuzz a target is `fuzz_target!(|bytes: &[u8]| { hostile::load(bytes); });` with this file as a module.

use futurefill::{Latency, Method, Plan, PlanOptions, Schedule, State};

/// Reads numbers from bytes; zeros behind their end.
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    pub fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn below(&mut self, n: usize) -> usize {
        usize::from(self.byte()) % n
    }

    /// A size that an attacker might write: small, near a power of two, or beyond all memory.
    fn size(&mut self) -> usize {
        let (kind, value) = (self.byte(), usize::from(self.byte()));
        match kind % 8 {
            0..=3 => value % 40,
            4 => value * 257,
            5 => (1usize << (value % 64)).wrapping_add(self.below(3)).wrapping_sub(1),
            6 => usize::MAX - value,
            _ => isize::MAX as usize - 100 + value,
        }
    }

    fn sizes(&mut self) -> Vec<usize> {
        (0..self.below(5)).map(|_| self.size()).collect()
    }

    fn flag(&mut self) -> bool {
        self.byte() % 2 == 1
    }

    fn optional(&mut self) -> Option<usize> {
        self.flag().then(|| self.size())
    }

    fn schedule(&mut self) -> (Option<usize>, Vec<usize>) {
        let base = (self.below(5) > 0).then(|| 1 + self.below(20));
        let fans = (0..self.below(4)).map(|_| 2 + self.below(4)).collect();
        (base, base.map_or(vec![], |_| fans))
    }

    fn latency(&mut self) -> Latency {
        if self.flag() { Latency::Smooth } else { Latency::Throughput }
    }
}

/// Loads a state that the bytes make or spoil, and uses the cache if there is one. Returns the bytes that an honest
/// cache of the plan and batch would take; nothing may panic.
pub fn load(bytes: &[u8]) -> usize {
    let mut bytes = Bytes(bytes);
    let lags = 1 + bytes.below(60);
    let filter_shape = [vec![], vec![3], vec![2, 1], vec![16]][bytes.below(4)].clone();
    let rows: usize = filter_shape.iter().product();
    let filters: Vec<f32> = (0..rows * lags).map(|i| (i % 7) as f32 - 3.0).collect();
    let make = |bytes: &mut Bytes| {
        let (base, fans) = bytes.schedule();
        let horizon = bytes.flag().then(|| 1 + bytes.below(200));
        let method = Method::Schedule(Schedule::new(base, fans).unwrap());
        let options = PlanOptions { horizon, method, latency: bytes.latency(), ..Default::default() };
        Plan::new(&filters, &filter_shape, lags, options).unwrap()
    };
    let (plan, saver) = (make(&mut bytes), make(&mut bytes));
    // An honest state, of this plan or of another one.
    let shape: Vec<usize> = [&[1 + bytes.below(3)][..], &filter_shape].concat();
    let source = if bytes.flag() { &plan } else { &saver };
    let mut cache = source.new_cache(&shape).unwrap();
    let honest = cache.nbytes();
    let outs: usize = cache.output_shape().iter().product();
    let m = cache.remaining().map_or(100, |left| left.min(100)).min(bytes.below(101));
    cache.extend(&vec![1.0; m * shape.iter().product::<usize>()], m, &mut vec![0.0; m * outs]).unwrap();
    let mut state = cache.state().unwrap();
    for _ in 0..bytes.below(4) {
        spoil(&mut state, &mut bytes);
    }
    if let Ok(mut cache) = plan.load_cache(&state) {
        let (ins, outs): (usize, usize) = (cache.input_shape().iter().product(), cache.output_shape().iter().product());
        let m = cache.remaining().map_or(40, |left| left.min(40));
        // A state that was accepted is small, or none of its arrays would fit.
        if ins * m < 1 << 20 && outs * m < 1 << 20 {
            cache.extend(&vec![1.0; ins * m], m, &mut vec![0.0; outs * m]).unwrap();
            cache.pending(0, &mut []).unwrap();
            let again = cache.state().unwrap();
            // An honest cache never comes so far; its state would be refused.
            if again.position <= usize::MAX / 2 {
                plan.load_cache(&again).unwrap();
                if cache.input_shape().len() > filter_shape.len() {
                    cache.reorder(&vec![0; cache.input_shape()[0].min(2)]).unwrap();
                }
            }
            cache.reset();
        }
    }
    honest
}

fn spoil(state: &mut State<f32>, bytes: &mut Bytes) {
    match bytes.below(14) {
        0 => state.shape = bytes.sizes(),
        1 => (state.base, state.fans) = (bytes.optional(), bytes.sizes()),
        2 => state.fans = bytes.sizes(),
        3 => state.base = bytes.optional(),
        4 => state.latency = bytes.latency(),
        5 => state.capacity = bytes.optional(),
        6 => state.clock = bytes.size(),
        7 => state.position = bytes.size(),
        8 => (state.clock, state.position) = (bytes.size(), bytes.size()),
        9 => {
            let size = bytes.size();
            (state.clock, state.position, state.capacity) = (size, size, bytes.optional());
        }
        10 => state.seed.resize(bytes.size() % 5000, 1.0),
        11 => {
            let n = bytes.size() % 5000;
            let array = if bytes.flag() { &mut state.history } else { &mut state.pending };
            array.resize(n, f32::NAN);
        }
        12 => {
            let n = bytes.size() % 5000;
            match state.spectra.last_mut() {
                Some(spectra) if bytes.flag() => spectra.resize(n, f32::INFINITY),
                _ => drop(state.spectra.pop()),
            }
        }
        _ => state.spectra.push(vec![0.0; bytes.size() % 5000]),
    }
}
