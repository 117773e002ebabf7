"""What goes in is what comes out: dtypes, strides, byte order, `out=`, libraries and devices."""

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
import torch
from conftest import Library

ENGINES = [Library("torch-cpu", device="cpu"), Library("torch-engine", device="cpu", engine="torch")]
ENGINE = pytest.mark.parametrize("lib", ENGINES, ids=["rust", "torch"])
SCHEDULE = ff.Schedule(4, (2, 2))


def as_float64(array):
    return array.double().cpu().numpy() if isinstance(array, torch.Tensor) else array.astype(np.float64)


def test_dtype_matrix(lib, rng):
    u, h = rng.standard_normal((2, 60)), rng.standard_normal((2, 40))
    for filters in lib.dtypes:
        plan = lib.plan(h, None, SCHEDULE, dtype=filters)
        for inputs in lib.dtypes:
            x = lib.array(u, inputs)
            if inputs == "float64" and filters != "float64":
                continue
            reference = oracle.conv(as_float64(x), as_float64(lib.array(h, filters)))
            # Filters are kept in float32 at least; the output is rounded to the input's dtype.
            kept = "float64" if filters == "float64" else "float32"
            worst = max((kept, inputs), key=oracle.EPS.__getitem__)
            cache = plan.new_cache()
            steps = [cache.step(x[:, t]) for t in range(25)]
            block = cache.extend(x[:, 25:])
            prompt, _ = plan.prefill(x, 3)
            for y in (*steps, block, prompt):
                assert y.dtype == lib.dtype(inputs)
            stepped = np.concatenate([np.stack([lib.numpy(y) for y in steps], -1), lib.numpy(block)], -1)
            oracle.assert_close(stepped, reference, worst)
            oracle.assert_close(lib.numpy(prompt), reference, worst)


def test_results_are_fresh_arrays(lib, rng):
    u = lib.array(rng.standard_normal((2, 3)))
    cache = lib.plan(np.ones((2, 4))).new_cache()
    first = cache.step(u[:, 0])
    kept = lib.numpy(first).copy()
    cache.step(u[:, 1])
    np.testing.assert_array_equal(lib.numpy(first), kept)


VIEWS = {
    "contiguous": lambda a: a.copy(),
    "fortran": np.asfortranarray,
    "sliced": lambda a: np.repeat(np.repeat(a, 2, axis=0), 3, axis=-1)[::2, ..., ::3],
    "reversed": lambda a: a[::-1, ..., ::-1].copy()[::-1, ..., ::-1],
    "swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "subclass": lambda a: a.view(np.recarray) if a.dtype.names else a.view(type("Sub", (np.ndarray,), {})),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kept", ["float32", "float64"])
def test_numpy_memory_layouts(view, dtype, kept, rng):
    if dtype > kept:
        return
    u, h = rng.standard_normal((3, 2, 30)).astype(dtype), rng.standard_normal((2, 20)).astype(kept)
    x, f = VIEWS[view](u), VIEWS[view](h)
    np.testing.assert_array_equal(x, u)
    plan = ff.plan(f, None, SCHEDULE)
    clean = ff.plan(h, None, SCHEDULE)
    cache, reference = plan.new_cache((3, 2)), clean.new_cache((3, 2))
    for t in range(10):
        y = cache.step(VIEWS[view](u[..., t]))
        oracle.assert_same_bits(y, reference.step(u[..., t].copy()))
        assert y.dtype.isnative
    oracle.assert_same_bits(cache.extend(x[..., 10:]), reference.extend(u[..., 10:]))
    oracle.assert_same_bits(plan.prefill(x, 3)[0], clean.prefill(u, 3)[0])
    oracle.assert_same_bits(ff.causal_conv(x, f), ff.causal_conv(u, h))


def test_read_only_input(rng):
    u = rng.standard_normal((2, 5))
    u.flags.writeable = False
    cache = ff.plan(u, 10).new_cache()
    cache.step(u[:, 0])
    cache.extend(u)


def test_torch_memory_layouts(lib, rng):
    if not lib.is_torch:
        return
    u, h = lib.array(rng.standard_normal((3, 2, 20))), lib.array(rng.standard_normal((2, 9)))
    cache, plain = (ff.plan(f, engine=lib.engine).new_cache((3, 2)) for f in (h.t().contiguous().t(), h))
    views = u.permute(2, 1, 0).contiguous().permute(2, 1, 0), u.flip(-1).flip(-1)
    assert not views[0].is_contiguous()
    for t in range(10):
        oracle.assert_same_bits(lib.numpy(cache.step(views[0][..., t])), lib.numpy(plain.step(u[..., t])))
    expanded = torch.ones(2, dtype=torch.float64, device=lib.device).expand(3, 2)
    oracle.assert_same_bits(lib.numpy(cache.step(expanded)), lib.numpy(plain.step(expanded.contiguous())))
    oracle.assert_same_bits(lib.numpy(cache.extend(views[0])), lib.numpy(plain.extend(u)))
    negative = torch.complex(u, -u).conj().imag
    assert negative.is_neg()
    oracle.assert_same_bits(lib.numpy(cache.extend(negative)), lib.numpy(plain.extend(u)))


def test_results_are_detached(lib, rng):
    if not lib.is_torch:
        return
    h = lib.array(rng.standard_normal((2, 9))).requires_grad_()
    u = lib.array(rng.standard_normal((2, 20))).requires_grad_()
    plan = ff.plan(h, engine=lib.engine)
    y, cache = plan.prefill(u, 30)
    out = torch.empty_like(u[:, 0])
    for result in (y, cache.step(u[:, 0]), cache.extend(u), cache.step(u[:, 1], out=out)):
        assert not result.requires_grad


def test_parameters_and_subclasses(lib, rng):
    if not lib.is_torch:
        return
    h, u = torch.nn.Parameter(lib.array(rng.standard_normal((2, 9)))), lib.array(rng.standard_normal((2, 20)))
    cache, plain = (
        ff.plan(h, engine=lib.engine).new_cache(),
        ff.plan(h.detach(), engine=lib.engine).new_cache(),
    )
    oracle.assert_same_bits(
        lib.numpy(cache.step(torch.nn.Parameter(u[:, 0]))), lib.numpy(plain.step(u[:, 0].clone()))
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("kept", ["float32", "float64"])
def test_out(lib, dtype, kept, rng):
    if dtype not in lib.dtypes or (dtype, kept) == ("float64", "float32"):
        return
    u, h = rng.standard_normal((3, 2, 30)), rng.standard_normal((2, 20)).astype(kept)
    plan = lib.plan(h, None, SCHEDULE)
    cache, reference = plan.new_cache((3, 2)), plan.new_cache((3, 2))
    out = lib.array(np.full((3, 2), np.nan), dtype)
    for t in range(30):
        x = lib.array(u[..., t], dtype)
        assert cache.step(x, out=out) is out
        oracle.assert_same_bits(lib.numpy(out), lib.numpy(reference.step(x)))


def test_out_in_another_layout(lib, rng):
    u, h = rng.standard_normal((3, 2, 12)).astype(np.float32), rng.standard_normal((2, 20)).astype(np.float32)
    plan = lib.plan(h, None, SCHEDULE)
    cache, reference = plan.new_cache((3, 2)), plan.new_cache((3, 2))
    wide = lib.array(np.full((2, 3, 2), np.nan), "float32")
    out = (wide.permute(1, 0, 2) if lib.is_torch else wide.transpose(1, 0, 2))[..., 1]
    for t in range(12):
        x = lib.array(u[..., t])
        assert cache.step(x, out=out) is out
        oracle.assert_same_bits(lib.numpy(out), lib.numpy(reference.step(x)))
    assert np.isnan(lib.numpy(wide)[..., 0]).all()


def test_out_may_be_the_input(lib, rng):
    h = rng.standard_normal((3, 20)).astype(np.float32)
    plan = lib.plan(h, None, SCHEDULE)
    cache, reference = plan.new_cache(), plan.new_cache()
    buffer = lib.array(rng.standard_normal(3).astype(np.float32))
    for _ in range(20):
        expected = lib.numpy(reference.step(lib.array(lib.numpy(buffer)))).copy()
        assert cache.step(buffer, out=buffer) is buffer
        oracle.assert_same_bits(lib.numpy(buffer), expected)


def test_out_may_overlap_the_input(lib, rng):
    h = rng.standard_normal((2, 3, 20)).astype(np.float32)
    plan = lib.plan(h, None, SCHEDULE)
    for c in [(3,), (1, 3), (2, 3)]:
        for shift in (0, 1, 2):
            cache, reference = plan.new_cache(c), plan.new_cache(c)
            memory = rng.standard_normal(20).astype(np.float32)
            shared = lib.array(memory)
            n = int(np.prod(c))
            for _ in range(6):
                u, out = shared[:n].reshape(c), shared[shift : shift + 6].reshape(2, 3)
                expected = lib.numpy(reference.step(lib.array(lib.numpy(u).copy()))).copy()
                cache.step(u, out=out)
                oracle.assert_same_bits(np.ascontiguousarray(lib.numpy(out)), expected)


def test_bad_out_changes_nothing(lib, rng):
    u, h = rng.standard_normal((2, 20)).astype(np.float32), rng.standard_normal((2, 9)).astype(np.float32)
    cache = lib.plan(h, 20, SCHEDULE).new_cache()
    first = lib.stream(cache, u[:, :7])
    x = lib.array(u[:, 7])
    for out, error in [
        (lib.array(np.zeros(3, np.float32)), ValueError),
        (lib.array(np.zeros((2, 1), np.float32)), ValueError),
        (lib.array(np.zeros(2)), TypeError),
        ([0.0, 0.0], TypeError),
        (np.zeros(2, np.float32) if lib.is_torch else torch.zeros(2), TypeError),
    ]:
        with pytest.raises(error, match="out: expected"):
            cache.step(x, out=out)
    assert cache.position == 7
    y = np.concatenate([first, lib.stream(cache, u[:, 7:])], axis=-1)
    oracle.assert_same_bits(y, lib.stream(cache.plan.new_cache(), u))


def test_out_must_be_writable():
    cache = ff.plan(np.ones((2, 3))).new_cache()
    out = np.zeros(2)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected a writable"):
        cache.step(np.ones(2), out=out)
    with pytest.raises(TypeError, match="out: expected"):
        cache.step(np.ones(2), out=np.zeros(2).astype(">f8"))
    assert cache.position == 0


def test_out_must_not_share_its_entries():
    cache = ff.plan(torch.ones(2, 3)).new_cache()
    with pytest.raises(ValueError, match="out: expected"):
        cache.step(torch.ones(2), out=torch.zeros(1).expand(2))
    assert cache.position == 0


WRONG = [
    ([1.0, 2.0], "list"),
    ((1.0, 2.0), "tuple"),
    (None, "NoneType"),
    (np.ones(2, np.int32), "int32"),
    (np.ones(2, bool), "bool"),
    (np.ones(2, np.float16), "float16"),
    (np.ones(2, np.complex64), "complex64"),
    (np.array([1.0, 2.0], object), "object"),
    (np.array(["a", "b"]), "U1"),
    (torch.ones(2), "Tensor"),
]


@pytest.mark.parametrize(("u", "name"), WRONG, ids=[name for _, name in WRONG])
def test_numpy_plans_take_floating_numpy_arrays_only(u, name):
    cache = ff.plan(np.ones((2, 5), np.float32), 10).new_cache()
    cache.step(np.ones(2, np.float32))
    for call in (cache.step, cache.extend, cache.plan.prefill):
        with pytest.raises(TypeError, match=f"expected .*float32 or float64, got .*{name}"):
            call(u)
    assert cache.position == 1


@ENGINE
@pytest.mark.parametrize(
    "u",
    [
        [1.0],
        None,
        np.ones(2, np.float32),
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2).to_sparse(),
    ],
    ids=["list", "None", "numpy", "int64", "bool", "complex", "sparse"],
)
def test_torch_plans_take_floating_tensors_only(lib, u):
    cache = lib.plan(np.ones((2, 5), np.float32), 10).new_cache()
    cache.step(torch.ones(2))
    for call in (cache.step, cache.extend, cache.plan.prefill):
        with pytest.raises(TypeError, match=r"(u|prompt): expected "):
            call(u)
    assert cache.position == 1


@ENGINE
def test_other_devices_are_named(lib):
    cache = lib.plan(np.ones((2, 5), np.float32), 10).new_cache()
    u = torch.ones(2, device="meta")
    with pytest.raises(ValueError, match=r"u: expected .*cpu.*got .*meta"):
        cache.step(u)
    with pytest.raises(ValueError, match=r"u: expected .*cpu.*got .*meta"):
        cache.extend(u[:, None])
    with pytest.raises(ValueError, match=r"prompt: expected .*cpu.*got .*meta"):
        cache.plan.prefill(u[:, None])
    with pytest.raises(ValueError, match=r"out: expected .*cpu.*got .*meta"):
        cache.step(torch.ones(2), out=u)
    assert cache.position == 0


def test_a_position_of_a_single_sequence_is_a_scalar(rng):
    u, h = rng.standard_normal(30).astype(np.float32), rng.standard_normal(9).astype(np.float32)
    cache = ff.plan(h).new_cache()
    y = [cache.step(x) for x in u]
    assert all(
        isinstance(value, np.ndarray) and value.shape == () and value.dtype == np.float32 for value in y
    )
    oracle.assert_close(np.array(y), oracle.conv(u, h), "float32")
    assert cache.fork().step(1.0).shape == ()
    for bad in (1, np.float16(1), np.int64(1), True):
        with pytest.raises(TypeError, match="u: expected"):
            cache.step(bad)


def test_no_warning_where_a_value_leaves_the_inputs_range():
    cache = ff.plan(np.full((1, 2), 1e300)).new_cache()
    assert np.isinf(cache.step(np.ones(1, np.float32))).all()


def test_nothing_is_computed_in_less_precision_than_it_came_in(lib, rng):
    h = rng.standard_normal((2, 200))
    u, h32 = rng.standard_normal((2, 150)), h.astype(np.float32)
    plan = lib.plan(h32, 300)
    cache, x = plan.new_cache(), lib.array(u)
    calls = [lambda: cache.step(x[:, 0]), lambda: cache.extend(x), lambda: plan.prefill(x)]
    calls.append(lambda: cache.step(x[:, 0], out=lib.array(u[:, 0])))
    for call in calls:
        with pytest.raises(TypeError, match=r"expected float32.*got .*float64.*dtype=float64"):
            call()
    assert cache.position == 0
    exact = ff.plan(lib.array(h32), 300, engine=lib.engine, dtype="float64")
    assert exact.dtype == lib.dtype("float64")
    reference = oracle.conv(u, h32)
    oracle.assert_close(lib.numpy(exact.new_cache().extend(x)), reference, "float64")
    oracle.assert_close(lib.numpy(exact.prefill(x)[0]), reference, "float64")
    oracle.assert_close(lib.stream(exact.new_cache(), u), reference, "float64")
    y = exact.new_cache().extend(lib.array(u, "float32"))
    assert y.dtype == lib.dtype("float32")
    less = ff.plan(lib.array(h), 300, engine=lib.engine, dtype="float32")
    assert less.dtype == lib.dtype("float32")
    for a, b in ((u, h32), (u.astype(np.float32), h)):
        y = ff.causal_conv(lib.array(a), lib.array(b))
        assert y.dtype == lib.dtype(a.dtype.name)
        oracle.assert_close(lib.numpy(y), oracle.conv(a, b), a.dtype.name)
        y = ff.futurefill(lib.array(a), lib.array(b))
        assert y.dtype == lib.dtype(a.dtype.name)
        oracle.assert_close(lib.numpy(y), oracle.futurefill(a, b), a.dtype.name)


def test_dtypes_of_plans(lib):
    h = lib.array(np.ones((2, 5), np.float32))
    for bad in ("float16", "complex32", "int32", 3, object()):
        with pytest.raises(TypeError, match="dtype: expected float32, float64, complex64 or complex128"):
            ff.plan(h, engine=lib.engine, dtype=bad)
    cache = ff.plan(h, engine=lib.engine).new_cache()
    u = lib.array(np.ones(2)) * 1j
    with pytest.raises(TypeError, match="a complex input needs a plan with dtype=complex128"):
        cache.step(u)


@ENGINE
def test_autograd_sees_what_out_is_written_to(lib):
    plan = lib.plan(np.ones((4, 64), np.float32))
    cache, u, out = plan.new_cache(), torch.ones(4), torch.zeros(4)
    weight = torch.ones(4, requires_grad=True)
    for write in (
        lambda: cache.step(u, out=out),
        lambda: cache.step(u[::1].clone(), out=out),
        lambda: cache.step(torch.ones(8)[::2], out=out),
        lambda: cache.extend(u[:, None], out=out[:, None]),
        lambda: ff.causal_conv(u[:, None], torch.ones(4, 2), out=out[:, None]),
    ):
        write()
        loss = (weight * out).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    leaf = torch.zeros(4, requires_grad=True)
    before = cache.position
    for bad in (leaf, leaf * 1):
        with pytest.raises(ValueError, match="out: expected a tensor that does not require grad"):
            cache.step(u, out=bad)
    assert cache.position == before


def test_a_float_is_one_position_of_a_single_sequence_only(lib):
    with pytest.raises((TypeError, ValueError), match=r"u: expected .*, got"):
        lib.plan(np.ones((2, 5), np.float32), 10).new_cache().step(1.0)


def test_masked_arrays_are_refused(rng):
    h, u = rng.standard_normal((2, 9)), rng.standard_normal((2, 5))
    masked = np.ma.MaskedArray(u, mask=u < 0)
    cache = ff.plan(h).new_cache()
    for call in (
        lambda: ff.plan(masked),
        lambda: ff.causal_conv(masked, h),
        lambda: ff.futurefill(u, masked),
        lambda: cache.extend(masked),
        lambda: cache.step(masked[:, 0]),
        lambda: cache.step(u[:, 0], out=masked[:, 0]),
    ):
        with pytest.raises(TypeError, match="got a masked array"):
            call()
    assert cache.position == 0


def test_results_of_blocks_go_where_out_says(rng):
    h, u = rng.standard_normal((3, 40)).astype(np.float32), rng.standard_normal((3, 70)).astype(np.float32)
    expected = ff.causal_conv(u, h)
    stepped = ff.plan(h).new_cache().extend(u)
    for out in (np.empty((3, 70), np.float32), np.empty((70, 3), np.float32).T, u.copy()):
        x = out if out.flags.c_contiguous and np.array_equal(out, u) else u
        kept = x.copy()
        assert ff.causal_conv(kept if x is not out else x, h, out=out) is out
        np.testing.assert_array_equal(out, expected)
        assert ff.plan(h).new_cache().extend(kept, out=out) is out
        np.testing.assert_array_equal(out, stepped)
    with pytest.raises(ValueError, match=r"out: expected shape \(3, 70\), got \(3, 69\)"):
        ff.causal_conv(u, h, out=np.empty((3, 69), np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_plan_of_one_filter_takes_python_floats(dtype):
    cache = ff.plan(np.array([1, 0.5, 0.25], dtype)).new_cache()
    outputs = [cache.step(u) for u in (1.0, 2.0, 0.0)]
    assert [y.dtype for y in outputs] == [dtype] * 3
    np.testing.assert_array_equal(outputs, [1, 2.5, 1.25])
    with pytest.raises(TypeError, match="u: expected a numpy array"):
        cache.step(1)


def test_nan_in_filters_is_named():
    h = np.ones((2, 3, 50), np.float32)
    h[1, 0, 7] = np.nan
    with pytest.raises(ValueError, match=r"filters: expected numbers, got NaN at index \(1, 0, 7\)"):
        ff.plan(h)


def test_a_batch_without_a_shape_says_how_to_make_one():
    cache = ff.plan(np.ones((4, 9))).new_cache()
    hint = r"u: expected shape \(4,\), got \(3, 4\): make the cache for a batch by new_cache\(\(3, 4\)\)"
    with pytest.raises(ValueError, match=hint):
        cache.step(np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"got \(3, 4, 8\): make .* new_cache\(\(3, 4\)\)"):
        cache.extend(np.ones((3, 4, 8)))
