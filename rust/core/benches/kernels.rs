//! Each kernel on each instruction set of this machine: `cargo bench -p futurefill --bench kernels`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use futurefill::Isa;
use futurefill::kernels::{self, DirectPart, Group, LANES, transpose};
use futurefill::transform::{BlockTransform, Prefetch, Products, Tile, WideTransform, Write};
use rustfft::num_complex::Complex32;
use std::hint::black_box;

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 17) as f32 * 0.1 - 0.8).collect()
}

fn complex(n: usize) -> Vec<Complex32> {
    (0..n).map(|i| Complex32::new((i % 17) as f32 * 0.1 - 0.8, (i % 13) as f32 * 0.1 - 0.6)).collect()
}

fn each_isa(c: &mut Criterion, name: &str, elements: usize, mut run: impl FnMut(Isa)) {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(elements as u64));
    for isa in Isa::available() {
        group.bench_function(BenchmarkId::new(isa.name(), elements), |b| b.iter(|| run(black_box(isa))));
    }
    group.finish();
}

fn all(c: &mut Criterion) {
    let block = 128;
    let (taps, inputs) = (values(block * LANES), values(block * LANES));
    let mut outputs = values(block * LANES);
    let groups = [Group { input: 0, filter: 0 }];
    let part = DirectPart { groups: &groups, taps: &taps, lags: block, inputs: &inputs, block, width: LANES };
    each_isa(c, "complete", block * LANES, |isa| {
        part.complete(isa, &mut outputs, 0..block);
        outputs.fill(0.5);
    });
    let part = DirectPart { width: 1, ..part };
    each_isa(c, "complete_row", block, |isa| {
        part.complete(isa, &mut outputs[..block], 0..block);
        outputs.fill(0.5);
    });
    let lags = 4096;
    let (taps, inputs) = (values(lags * LANES), values(lags * LANES));
    let mut sum = [0f32; LANES];
    each_isa(c, "direct_sum", lags * LANES, |isa| kernels::direct_sum(isa, &taps, &inputs, &[], &mut sum));

    let n = 1024;
    let (x, w, z) = (values(n), complex(n), complex(n));
    let (mut bins, mut spectrum, mut row) = (complex(n), values(2 * n), values(n));
    each_isa(c, "twist", n, |isa| kernels::twist(isa, &x, &w, &mut bins));
    each_isa(c, "store_spectrum", n, |isa| kernels::store_spectrum(isa, &z, &mut spectrum));
    each_isa(c, "load_spectrum", n, |isa| kernels::load_spectrum(isa, &spectrum, &mut bins));
    each_isa(c, "untwist_imaginary", n, |isa| kernels::untwist_imaginary(isa, &z, &w, 0.5, &mut row, Write::Set));
    let parts = 7;
    // The engine keeps slots a cache line's pair apart from a multiple of a page.
    let bins = 2 * n + 2 * LANES;
    let (slots, filters, mut spectrum) = (values(parts * bins), values(parts * bins), values(bins));
    let (x, mut out) = (values(n * LANES), values(n * LANES));
    let transforms: Vec<_> = Isa::available().into_iter().map(|isa| (isa, WideTransform::<f32>::new(isa, n))).collect();
    let on = |isa| &transforms.iter().find(|(own, _)| *own == isa).expect("one for each").1;
    let (len, mut work) = (on(Isa::get()).spectrum_len(), on(Isa::get()).work().expect("a little room"));
    let (mut kept, lags) = (values(parts * len), values(parts * len));
    each_isa(c, "wide_input", n * LANES, |isa| on(isa).input(&x, &mut kept, &mut work));
    for (name, count) in [("wide_future_of_1", 1), ("wide_future_of_7", parts)] {
        let products = Products { slots: &kept, newest: 3, filters: &lags, count, shared: false };
        each_isa(c, name, n * LANES, |isa| on(isa).future(&products, &mut out, Write::Add, &mut work));
    }
    for (name, count, slots) in [("wide_tile_alone", 1, &mut [][..]), ("wide_tile_of_7", parts, &mut kept[..])] {
        each_isa(c, name, n * LANES, |isa| {
            let (input, filters, newest, shared, write) = (&x[..], &lags[..], 3, false, Write::Add);
            let tile = Tile { input, slots: &mut *slots, newest, filters, count, shared, out: &mut out, write };
            on(isa).tile(tile, &mut work, &mut Prefetch::nothing());
        });
    }
    each_isa(c, "multiply_accumulate", parts * n, |isa| {
        kernels::multiply_accumulate(isa, &mut spectrum, &slots, 3, &filters, parts);
    });

    let (stride, mut rows) = (block + LANES, values((block + LANES) * LANES));
    each_isa(c, "to_rows", block * LANES, |isa| {
        transpose::to_rows(isa, &inputs[..block * LANES], &mut rows, stride, 0, LANES)
    });
    each_isa(c, "from_rows", block * LANES, |isa| transpose::from_rows(isa, &rows, stride, 0, LANES, &mut outputs));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_millis(300))
        .warm_up_time(std::time::Duration::from_millis(100));
    targets = all
}
criterion_main!(benches);
