"""The streaming passes: dtypes, strides, chunk edges, memory, threads."""

from __future__ import annotations

import multiprocessing
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from wide import WIDE, norm

from mergekit_karcher import fisher_mean, karcher_mean
from mergekit_karcher.kernels.chords import squared_chord
from mergekit_karcher.kernels.chunks import walk, working_device
from mergekit_karcher.kernels.combine import combine
from mergekit_karcher.kernels.gram import Precision, grams

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layouts():
    """The same kind of tensor in every layout, by name."""
    yield "contiguous", draw(12, 10)
    yield "transposed", draw(10, 12).T
    yield "column slice", draw(12, 30)[:, ::3]
    yield "row slice", draw(36, 10)[5:17]
    yield "expanded", draw(12, 1).expand(12, 10)
    yield "channels last", draw(2, 10, 3, 4).to(memory_format=torch.channels_last)
    yield "one element", draw(1)
    yield "scalar", draw()[()]
    yield "long rows", draw(2, 500)[:, 1:]
    yield "permuted", draw(3, 4, 5, 6).permute(3, 1, 0, 2)


LAYOUTS = dict(layouts())


@pytest.fixture(params=[None, 16], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr("mergekit_karcher.kernels.gram.CHUNK_ELEMENTS", request.param * 3)
        monkeypatch.setattr("mergekit_karcher.kernels.gram._SUM_ELEMENTS", 5)
        monkeypatch.setattr("mergekit_karcher.kernels.combine.CHUNK_ELEMENTS", request.param)


def expected_gram(tensors):
    rows = np.array([tensor.double().numpy().ravel() for tensor in tensors], dtype=np.longdouble)
    return rows @ rows.T


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_and_combine_equal_the_plain_formulas(layout, dtype):
    tensors = [(LAYOUTS[layout] + shift).to(dtype) for shift in (0, 0.25, -1.5)]
    tensors[0] = LAYOUTS[layout].to(dtype)  # the layout itself; sums above are contiguous
    before = [tensor.clone() for tensor in tensors]
    for precision in (Precision.DOUBLE, Precision.EXACT):
        (matrix,), (exponents,) = grams(tensors, precision=precision)
        matrix = np.ldexp(matrix, exponents[:, None] + exponents)
        np.testing.assert_allclose(matrix, expected_gram(tensors), rtol=1e-14, atol=1e-14)

    factors = np.array([0.7, -1.3, 0.0])
    combined = combine(tensors, factors, dtype)
    exact = 0.7 * tensors[0].double() - 1.3 * tensors[1].double()
    size = 0.7 * tensors[0].double().abs() + 1.3 * tensors[1].double().abs()
    assert combined.dtype == dtype
    assert combined.shape == tensors[0].shape
    assert combined.is_contiguous()
    assert ((combined.double() - exact).abs() <= torch.finfo(dtype).eps * size).all()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [name for name, tensor in LAYOUTS.items() if tensor.ndim > 1])
@pytest.mark.parametrize("based", [False, True])
def test_rows_and_differences_equal_the_plain_formulas(layout, dtype, based):
    tensors = [(LAYOUTS[layout] + shift).to(dtype) for shift in (0, 0.25, -1.5)]
    tensors[0] = LAYOUTS[layout].to(dtype)
    base = (LAYOUTS[layout] * 0.5 + 1).to(dtype) if based else None
    origin = base.double() if based else torch.zeros(tensors[0].shape, dtype=torch.float64)
    wide = [tensor.double() - origin for tensor in tensors]
    rows = len(origin)
    for precision in (Precision.DOUBLE, Precision.EXACT):
        matrices, exponents = grams(tensors, base=base, by_row=True, precision=precision)
        assert matrices.shape == (rows, 3, 3)
        matrices = np.ldexp(matrices, exponents[:, :, None] + exponents[:, None, :])
        for row in range(rows):
            expected = expected_gram([tensor[row] for tensor in wide])
            np.testing.assert_allclose(matrices[row], expected, rtol=1e-13, atol=1e-13)
        (whole,), (powers,) = grams(tensors, base=base, precision=precision)
        whole = np.ldexp(whole, powers[:, None] + powers)
        np.testing.assert_allclose(whole, expected_gram(wide), rtol=1e-13, atol=1e-13)

    factors = np.random.default_rng(0).standard_normal((rows, 3))
    factors[:, 2] = 0
    for coefficients in (factors, factors[0]):
        combined = combine(tensors, coefficients, dtype, base=base)
        column = torch.as_tensor(np.broadcast_to(coefficients, factors.shape).copy())
        column = column.view(rows, 3, *[1] * (origin.ndim - 1))
        terms = [column[:, index] * tensor for index, tensor in enumerate(wide)]
        exact_sum = origin + sum(terms)
        size = origin.abs() + sum(term.abs() for term in terms)
        error = (combined.double() - exact_sum).abs()
        assert combined.is_contiguous()
        assert (error <= torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gram_is_better_than_float64(dtype, monkeypatch):
    """Against exact rational sums, over thousands of chunks."""
    monkeypatch.setattr("mergekit_karcher.kernels.gram.CHUNK_ELEMENTS", 8)
    monkeypatch.setattr("mergekit_karcher.kernels.gram._SUM_ELEMENTS", 4)
    generator = torch.Generator().manual_seed(0)
    tensors = list(torch.randn(2, 9001, generator=generator, dtype=torch.float64).to(dtype))
    (matrix,), (exponents,) = grams(tensors, precision=Precision.EXACT)
    rows = [[Fraction(v) for v in tensor.tolist()] for tensor in tensors]
    for i, j in ((0, 0), (0, 1), (1, 1)):
        exact = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        size = sum(abs(a * b) for a, b in zip(rows[i], rows[j], strict=True))
        value = Fraction(*np.ldexp(matrix, exponents[:, None] + exponents)[i, j].as_integer_ratio())
        bound = 2.0**-60 if np.finfo(np.longdouble).nmant > 52 else 2.0**-52
        assert abs(value - exact) <= bound * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chords_of_narrow_dtypes_and_strided_tensors(dtype):
    generator = torch.Generator().manual_seed(4)
    first = torch.randn(60, 50, generator=generator).to(dtype)
    second = first.clone()
    second[7, 3] *= 1.25
    pair = (first.double().ravel().numpy(), second.double().ravel().numpy())
    norms = tuple(float(norm(v)) for v in pair)
    unit = [np.asarray(v, WIDE) / norm(v) for v in pair]
    expected = float(norm(unit[0] - unit[1]) ** 2)
    assert squared_chord(first, second, norms) == pytest.approx(expected, rel=1e-9)
    assert squared_chord(first.mT, second.mT, norms) == pytest.approx(expected, rel=1e-9)


@pytest.mark.usefixtures("chunks")
def test_mixed_dtypes_and_strides_in_one_group():
    tensors = [
        draw(9, 14, seed=1).half(),
        draw(14, 9, seed=2).bfloat16().T,
        draw(9, 28, seed=3).float()[:, ::2],
        draw(9, 14, seed=4),
    ]
    mean, result = karcher_mean(tensors)
    same, expected = karcher_mean([tensor.double().contiguous() for tensor in tensors])
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean, same, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(result.coefficients, expected.coefficients, rtol=1e-14)


@pytest.mark.parametrize(
    ("dtypes", "promoted"),
    [
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_the_result_has_the_promoted_dtype(dtypes, promoted):
    mean, _ = karcher_mean([draw(5, seed=i).to(dtype) for i, dtype in enumerate(dtypes)])
    assert mean.dtype == promoted


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 5)])
def test_empty_tensors(shape):
    mean, result = karcher_mean([torch.empty(shape)] * 3)
    assert mean.shape == shape
    assert result.converged


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 50), (1000, 2), (4, 1, 1, 6)])
@pytest.mark.parametrize("limit", [1, 4, 64, 10_000])
@pytest.mark.parametrize("strided", [False, True])
def test_pieces_cover_every_element_once_and_keep_the_limit(shape, limit, strided):
    tensor = torch.zeros(shape)
    if strided and len(shape) > 0:
        tensor = torch.zeros((*shape, 2))[..., 0]
    (view,), pieces = walk([tensor], limit)
    for piece in pieces:
        assert 0 < piece.of(view).numel() <= limit
        piece.of(view).add_(1)
    assert torch.equal(tensor, torch.ones(shape))


def test_float64_sums_leave_devices_that_have_none():
    assert working_device(torch.device("mps")) == torch.device("cpu")
    assert working_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def peak_scratch(tensors, threads, mean_of=karcher_mean, **options):
    """The most bytes that a mean held at once beside its result, by the profiler.

    It sees the calling thread: with one thread everything, with more their buffers.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        mean_of(tensors, **options)  # the threads start
        with torch.profiler.profile(profile_memory=True) as profile:
            result = mean_of(tensors, **options)
    finally:
        torch.set_num_threads(before)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    mean = result if isinstance(result, torch.Tensor) else result[0]
    assert peak >= mean.nbytes
    return peak - mean.nbytes


KINDS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "mixed", "strided"])
def test_scratch_does_not_grow_with_the_number_or_size_of_inputs(kind, threads):
    """One output and at most 64 MB beside the inputs, for 2 and 17 of them; here much less."""

    def inputs(count, rows):
        for index in range(count):
            dtype = torch.bfloat16 if kind == "mixed" and index % 2 else torch.float32
            tensor = draw(rows, 1024, dtype=KINDS.get(kind, dtype), seed=index)
            yield tensor.T if kind == "strided" and index == 0 else tensor

    shape = 1024 if kind == "strided" else 2048
    few, many = (peak_scratch(list(inputs(count, shape)), threads) for count in (2, 17))
    assert max(few, many) < 24 * 2**20
    assert abs(few - many) < 2**22


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scratch_around_a_base_and_by_rows(granularity, based, measured, dtype):
    """One output and at most 64 MB beside the inputs: no difference or root is held whole."""
    peaks = []
    for count in (2, 17):
        inputs = [draw(2048, 1024, dtype=dtype, seed=seed) for seed in range(count)]
        base = draw(2048, 1024, dtype=dtype, seed=99) if based else None
        options = {"metrics": [tensor.abs() for tensor in inputs]} if measured else {}
        peaks.append(peak_scratch(inputs, 1, base=base, granularity=granularity, **options))
    assert max(peaks) < 24 * 2**20
    assert abs(peaks[0] - peaks[1]) < 2**22


def test_scratch_of_a_precision_weighted_mean():
    """Chunks, whatever the number of models and metrics is."""
    peaks = []
    for count in (2, 9):
        inputs = [draw(2048, 1024, dtype=torch.bfloat16, seed=seed) for seed in range(count)]
        metrics = [tensor.float().abs() for tensor in inputs]
        peaks.append(peak_scratch(inputs, 1, fisher_mean, metrics=metrics))
    assert max(peaks) < 2**22
    assert abs(peaks[0] - peaks[1]) < 2**16


def test_scratch_of_many_rows():
    """64 MB for 128k rows of 17 models: torch's part by its profiler, numpy's by tracemalloc.

    From two smaller numbers of rows: all that grows with them does so in proportion.
    """
    peaks = []
    for rows in (4096, 12288):
        inputs = [draw(rows, 20, dtype=torch.bfloat16, seed=seed) for seed in range(17)]
        scratch = peak_scratch(inputs, 1, granularity="row")
        tracemalloc.start()
        try:
            karcher_mean(inputs, granularity="row")
            peaks.append(scratch + tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    a_row = (peaks[1] - peaks[0]) / 8192
    assert peaks[1] + a_row * (131072 - 12288) < 64 * 2**20


class Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_nothing_but_the_gram_matrix_is_read_back_from_the_device():
    """`item`, `nonzero` and the like would each wait for an accelerator."""
    with Calls() as calls:
        karcher_mean([draw(40, 40, seed=seed) for seed in range(3)])
    assert "aten.stack.default" in calls.names or "aten.cat.default" in calls.names
    waiting = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
    assert not [name for name in calls.names if any(word in name for word in waiting)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_change_the_answer(threads, monkeypatch):
    monkeypatch.setattr("mergekit_karcher.kernels.gram.CHUNK_ELEMENTS", 1 << 12)
    tensors = [draw(200, 100, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        mean, _ = karcher_mean(tensors)
        assert torch.get_num_threads() == threads
        # Threads of the program that start later look at what was set last.
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(mean, karcher_mean(tensors)[0])


def test_inference_mode_and_a_default_device_do_not_matter():
    tensors = [draw(30, 30, seed=seed) for seed in range(3)]
    expected, _ = karcher_mean(tensors)
    with torch.inference_mode():
        assert torch.equal(karcher_mean([tensor.clone() for tensor in tensors])[0], expected)
    with torch.device("meta"):
        assert torch.equal(karcher_mean(tensors)[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(karcher_mean(tensors)[0], expected)


def _mean_in_child(tensors, queue):
    queue.put(karcher_mean(tensors)[0].tolist())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("side", [64, 512])
def test_a_child_process_merges_too(method, side):
    """A fork copies the pool of threads without its threads, and OpenMP's likewise."""
    tensors = [draw(side, side, seed=seed) for seed in range(2)]
    expected = karcher_mean(tensors)[0].tolist()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_mean_in_child, args=(tensors, queue))
    child.start()
    try:
        assert queue.get(timeout=120) == expected
    finally:
        child.terminate()
        child.join()


def test_inputs_are_shared_between_threads_without_harm():
    """The executor of --multi-gpu calls from several threads at once."""
    tensors = [draw(300, 300, seed=seed) for seed in range(4)]
    expected, _ = karcher_mean(tensors)
    with ThreadPoolExecutor(4) as pool:
        for mean, _ in pool.map(lambda _: karcher_mean(tensors), range(12)):
            assert torch.equal(mean, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_do_not_depend_on_the_number_of_threads(dtype):
    """Bit for bit: or else the same merge would give other bytes on another machine."""
    tensors = [draw(700, 900, dtype=dtype, seed=seed) for seed in range(3)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(grams(tensors)[0])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert np.array_equal(result, results[0])
