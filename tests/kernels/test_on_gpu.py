"""What only a card can show: bf16 and tf32, sizes that matter, CUDA graphs, memory, compilations. Skipped elsewhere.

    pytest -m gpu tests/kernels/test_on_gpu.py          on a card, a few minutes
    MOR_KERNELS_REHEARSAL=1 pytest -m gpu tests/kernels/test_on_gpu.py

The second runs the same code at toy sizes in the interpreter, so that a slip in it is not found on a borrowed card;
what is CUDA's own (graphs, peak memory) is played by stand-ins there, and the counts say nothing.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from mor_problem import FORMS, loop
from torch import Tensor

import mor_kernels
from mor_kernels import tables
from mor_kernels.blocks import ROW_LIMITS, Blocks

REHEARSAL = os.environ.get("MOR_KERNELS_REHEARSAL") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSAL), reason="needs a CUDA device"),
]

OPTIONS = {"ranks": (2, 4, 8), "scaling": (2.0, 2.0, 2.0), "bypass": True}
NAMES = ("y", "dx", "dA", "dB", "drouter_weight", "drouter_bias")
VIT_B = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}
VIT_L = {"L qkv": (1024, 3072), "L proj": (1024, 1024), "L fc1": (1024, 4096), "L fc2": (4096, 1024)}
SHAPES = VIT_B | VIT_L
DRAWS = 4 if REHEARSAL else 16


def rows_of(rows: int) -> int:
    return min(rows, 40) if REHEARSAL else rows


def shape_of(name: str) -> tuple[int, int]:
    K, O = SHAPES[name]
    return (24, 40 if O > K else 24) if REHEARSAL else (K, O)


def dtype_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if REHEARSAL and dtype == torch.bfloat16 else dtype  # the interpreter is wrong on bf16


def leaves(rows: int, K: int, O: int, dtype: torch.dtype, seed: int = 0, parameters: torch.dtype | None = None):
    """x, weight, bias, A, B, router_weight, router_bias; x and the adapter require grad."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape: int, scale: float, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, device=DEVICE, generator=generator) * scale).to(dtype)

    own = parameters or dtype
    trained = [
        draw(14, K, scale=K**-0.5, dtype=own),
        draw(14, O, scale=0.1, dtype=own),
        draw(4, K, scale=K**-0.5, dtype=own),
        draw(4, scale=0.5, dtype=own),
    ]
    frozen = [draw(O, K, scale=K**-0.5), draw(O, scale=0.1)]
    return [draw(rows, K, scale=1.0).requires_grad_(), *frozen, *(t.requires_grad_() for t in trained)]


def gradient_of_y(rows: int, O: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, O, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed + 1)).to(dtype)


def eager(x: Tensor, *rest: Tensor, **options) -> Tensor:
    """The loop in x's dtype, whatever the parameters are in."""
    return loop(x, *(t.to(x.dtype) for t in rest), **options)


def everything(function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor, **options) -> dict[str, Tensor]:
    y = function(*tensors, **OPTIONS, **options)
    wanted = [t for t in tensors if t.requires_grad]
    return dict(zip(NAMES, [y.detach(), *torch.autograd.grad(y, wanted, dy)], strict=True))


def exactly(tensors: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
    return everything(loop, [t.detach().double().requires_grad_(t.requires_grad) for t in tensors], dy.double())


def graphed(function: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The function's results as a CUDA graph writes them, and its replay."""
    if REHEARSAL:
        results = function()
        return results, lambda: [results[name].copy_(value) for name, value in function().items()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, which a capture could not
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return results, graph.replay


def check_rule(
    shape: str, rows: int, dtype: torch.dtype, parameters: torch.dtype | None = None, floor: float = 0.0
) -> None:
    """Frobenius error at most 1.25 times eager's, largest error at most twice eager's, tensor by tensor.

    As a root mean square over draws: the gradient of the router's bias is four numbers, and one draw mostly luck.
    Errors are relative, the largest to the largest number; below `floor` they may be what they like.
    """
    rows, (K, O), dtype = rows_of(rows), shape_of(shape), dtype_of(dtype)
    runs = {"eager": (eager, {}), **{form: (mor_kernels.mor_linear, {"form": form}) for form in FORMS}}
    square = {run: dict.fromkeys(NAMES, 0.0) for run in runs}
    largest = {run: dict.fromkeys(NAMES, 0.0) for run in runs}
    for seed in range(DRAWS):
        tensors, dy = leaves(rows, K, O, dtype, seed, parameters), gradient_of_y(rows, O, dtype, seed)
        expected = exactly(tensors, dy)
        for run, (function, options) in runs.items():
            for name, got in everything(function, tensors, dy, **options).items():
                off = got.double() - expected[name]
                square[run][name] += float(off.square().sum() / expected[name].square().sum()) / DRAWS
                # NaN is greater than nothing, so it would be lost in a maximum.
                worst = (off.abs().max() / expected[name].abs().max()).nan_to_num(nan=torch.inf)
                largest[run][name] = max(largest[run][name], float(worst))
    for form in FORMS:
        for name in NAMES:
            ours, theirs = square[form][name] ** 0.5, square["eager"][name] ** 0.5
            assert ours <= max(1.25 * theirs, floor), (form, name, ours, theirs)  # so that NaN fails, too
            ours, theirs = largest[form][name], largest["eager"][name]
            assert ours <= max(2.0 * theirs, floor), (form, name, ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [197, 1370, 1576, 12608])
def test_error_in_bf16(shape, rows):
    check_rule(shape, rows, torch.bfloat16)


@pytest.mark.parametrize("shape", VIT_B)
def test_error_in_bf16_at_many_rows(shape):
    check_rule(shape, 65536, torch.bfloat16)


@pytest.mark.parametrize("shape", ["fc1", "fc2"])
@pytest.mark.parametrize("rows", [1576, 6288])
def test_error_with_fp32_parameters(shape, rows):
    """As MoRLinear keeps them."""
    check_rule(shape, rows, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("shape", ["fc1", "fc2", "L proj"])
def test_error_in_fp16(shape):
    check_rule(shape, 1576, torch.float16)


@pytest.fixture
def tf32() -> Iterator[None]:
    known = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = known


@pytest.mark.parametrize("shape", ["fc1", "proj"])
def test_error_in_tf32(shape, tf32):
    if REHEARSAL:
        pytest.skip("the interpreter computes tf32 as plain fp32, and so does the CPU")
    # Triton cuts operands to tf32's ten bits, up to 1e-3 each; the library may round them, or not use tf32 where ranks
    # are narrow.
    check_rule(shape, 1576, torch.float32, floor=2e-3)


@pytest.mark.parametrize("shape", ["fc1", "proj"])
def test_fp32_without_tf32_is_exact_to_rounding(shape):
    rows, (K, O) = rows_of(1576), shape_of(shape)
    tensors, dy = leaves(rows, K, O, torch.float32), gradient_of_y(rows, O, torch.float32)
    expected = exactly(tensors, dy)
    for form in FORMS:
        for name, got in everything(mor_kernels.mor_linear, tensors, dy, form=form).items():
            assert (got.double() - expected[name]).norm() <= 1e-5 * expected[name].norm(), (form, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", [0, 2, 3])
def test_gates_at_their_ends(form, gate):
    """A router that has made up its mind: one expert alone, or (3) the bypass alone."""
    dtype, rows, (K, O) = dtype_of(torch.bfloat16), rows_of(1576), shape_of("fc1")
    tensors, dy = leaves(rows, K, O, dtype), gradient_of_y(rows, O, dtype)
    with torch.no_grad():
        tensors[6].fill_(-60.0)
        tensors[6][gate] = 60.0
    got, expected = everything(mor_kernels.mor_linear, tensors, dy, form=form), exactly(tensors, dy)
    plain = everything(eager, tensors, dy)
    for name in ("y", "dx", "dB") if gate != 3 else ("y", "dx"):
        ours, theirs = ((r[name].double() - expected[name]).norm() for r in (got, plain))
        assert ours <= 1.25 * theirs, name
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert float(got["drouter_weight"].abs().max()) < 1e-20
    if gate == 3:
        assert max(float(got[name].abs().max()) for name in ("dA", "dB")) < 1e-20


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1576, 65536])
def test_same_bits_ten_times(form, rows):
    dtype, rows, (K, O) = dtype_of(torch.bfloat16), rows_of(rows), shape_of("fc1")
    tensors, dy = leaves(rows, K, O, dtype), gradient_of_y(rows, O, dtype)
    first = everything(mor_kernels.mor_linear, tensors, dy, form=form)
    for _ in range(9):
        again = everything(mor_kernels.mor_linear, tensors, dy, form=form)
        assert all(torch.equal(first[name], again[name]) for name in NAMES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1576, 12608])
def test_cuda_graph_follows_its_inputs(form, rows):
    dtype, rows, (K, O) = dtype_of(torch.bfloat16), rows_of(rows), shape_of("fc1")
    tensors, dy = leaves(rows, K, O, dtype), gradient_of_y(rows, O, dtype)
    captured, replay = graphed(lambda: everything(mor_kernels.mor_linear, tensors, dy, form=form))
    with torch.no_grad():
        for t in (tensors[0], tensors[3], tensors[5], dy):
            t.copy_(torch.randn_like(t) * t.std())
    replay()
    expected = everything(mor_kernels.mor_linear, tensors, dy, form=form)
    assert all(torch.equal(captured[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("form", FORMS)
def test_more_than_two_to_the_31_elements(form):
    """Outputs and every gradient, in rows that 32-bit offsets would not reach."""
    dtype, rows, K, O, chunk = dtype_of(torch.bfloat16), 700_000, 64, 3072, 50_000
    if REHEARSAL:
        rows, O, chunk = 70, 40, 30
    else:
        assert rows * O > 2**31
    tensors, dy = leaves(rows, K, O, dtype), gradient_of_y(rows, O, dtype)
    got = everything(mor_kernels.mor_linear, tensors, dy, form=form)
    sums: dict[str, Tensor] = {}
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        expected = exactly([tensors[0].detach()[part].requires_grad_(), *tensors[1:]], dy[part])
        for name in ("y", "dx"):
            value = expected.pop(name)
            assert (got[name][part].double() - value).norm() < 1e-2 * value.norm(), (name, start)
        sums = {name: value + sums.get(name, 0) for name, value in expected.items()}
    for name, value in sums.items():
        assert (got[name].double() - value).norm() < 1e-2 * value.norm(), name


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode):
    """One graph, the operator inside; "reduce-overhead" replays it as a CUDA graph."""
    dtype, rows, (K, O) = dtype_of(torch.bfloat16), rows_of(1576), shape_of("fc1")
    tensors, dy = leaves(rows, K, O, dtype), gradient_of_y(rows, O, dtype)

    def function(*arguments, **options):
        return torch.nn.functional.gelu(mor_kernels.mor_linear(*arguments, **options))

    compiled = torch.compile(function, fullgraph=True, mode=mode)
    expected = everything(function, tensors, dy)
    for _ in range(3):  # warms up, records, replays
        got = {name: value.clone() for name, value in everything(compiled, tensors, dy).items()}
        for name in NAMES:
            assert (got[name].double() - expected[name].double()).norm() <= 1e-2 * expected[name].double().norm(), name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter's numpy
def test_autocast_with_gradient_scaler_sees_an_overflow():
    tensors = leaves(64, 64, 64, torch.float32)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40)
    with torch.autocast(DEVICE, torch.float16):
        y = mor_kernels.mor_linear(*tensors, **OPTIONS)
    assert y.dtype == torch.float16
    optimizer = torch.optim.SGD([tensors[3]], lr=1.0)
    before = tensors[3].detach().clone()
    scaler.scale(y.float().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(tensors[3].detach(), before) and scaler.get_scale() < 2.0**40


def test_autocast_trains_with_a_sensible_scale():
    """The same without an overflow: fp32 masters get fp32 gradients and move."""
    tensors, dtype = leaves(64, 64, 64, torch.float32), dtype_of(torch.bfloat16)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0, enabled=dtype == torch.float16)
    with torch.autocast(DEVICE, dtype):
        y = mor_kernels.mor_linear(*tensors, **OPTIONS)
    optimizer = torch.optim.SGD(tensors[3:], lr=1.0)
    before = tensors[3].detach().clone()
    scaler.scale(y.float().mean()).backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in tensors[3:])
    scaler.step(optimizer)
    assert not torch.equal(tensors[3].detach(), before)


@pytest.mark.parametrize("form", FORMS)
def test_peak_memory_is_the_frozen_layers_and_a_little(form):
    """Forward and backward at 12,608 rows of fc1: beside y and dx only what is narrow, at most 8 MB."""
    dtype, rows, (K, O) = dtype_of(torch.bfloat16), rows_of(12608), shape_of("fc1")
    tensors, dy = leaves(rows, K, O, dtype), gradient_of_y(rows, O, dtype)

    def peak(function: Callable[[], object]) -> int:
        function()  # compiles, and lets the library take its workspace
        if REHEARSAL:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def frozen() -> None:
        y = torch.nn.functional.linear(*tensors[:3])
        torch.autograd.grad(y, tensors[0], dy)

    fused = peak(lambda: everything(mor_kernels.mor_linear, tensors, dy, form=form))
    assert fused <= peak(frozen) + 8 * 2**20
    if not REHEARSAL:
        assert 2 * fused < peak(lambda: everything(eager, tensors, dy))


def test_no_kernel_is_compiled_anew_when_the_rows_vary():
    """After one call in each bucket of rows; a few numbers of rows for each of the ways Triton could specialise."""
    import triton

    K, O = shape_of("proj")
    compiled: list[str] = []

    def run(rows: int) -> None:
        tensors = leaves(rows_of(rows), K, O, dtype_of(torch.bfloat16))
        for form in FORMS:
            everything(mor_kernels.mor_linear, tensors, torch.ones_like(tensors[0][:, :1]).expand(-1, O), form=form)

    for rows in (512, *ROW_LIMITS):
        run(rows)
    triton.knobs.runtime.jit_post_compile_hook = lambda *args, **known: compiled.append(str(known.get("repr")))
    try:
        for rows in (1, 2, 16, 17, 197, 1000, 1576, *(limit + d for limit in ROW_LIMITS for d in (-1, 1)), 65536):
            run(rows)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled


def test_a_captured_call_with_rows_never_seen_before():
    """Nothing is compiled, timed or waited for inside a capture, as long as the bucket is warm."""
    dtype, (K, O) = dtype_of(torch.bfloat16), shape_of("fc1")
    everything(mor_kernels.mor_linear, leaves(rows_of(512), K, O, dtype), gradient_of_y(rows_of(512), O, dtype))
    tensors, dy = leaves(rows_of(1111), K, O, dtype), gradient_of_y(rows_of(1111), O, dtype)
    expected = everything(mor_kernels.mor_linear, tensors, dy)
    if REHEARSAL:
        return
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        y = mor_kernels.mor_linear(*tensors, **OPTIONS)
    graph.replay()
    assert torch.equal(y, expected["y"])


@pytest.mark.parametrize(
    "tile", [(128, 64, 256, 8, 3), (128, 64, 128, 8, 4), (128, 64, 128, 4, 4), (256, 64, 128, 8, 3)]
)
@pytest.mark.parametrize("rows", [197, 6288])
def test_persistent_matmul(tile, rows, monkeypatch):
    """The candidates of `mor_kernels.tune` with the copy engine, forward and for dx, also with weights as rows of W."""
    if not REHEARSAL and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a tensor memory accelerator")
    table = tables.table_of(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE))
    blocks = Blocks(*tile, persistent=True)
    every = {key: blocks for key in table.tiles if key[0] == "matmul_tail"}
    monkeypatch.setattr(tables, "table_of", lambda device: table.with_entries_of(tables.Table(every, {})))
    for shape in ("fc1", "fc2"):
        dtype, T, (K, O) = dtype_of(torch.bfloat16), rows_of(rows), shape_of(shape)
        tensors, dy = leaves(T, K, O, dtype), gradient_of_y(T, O, dtype)
        expected, plain = exactly(tensors, dy), everything(eager, tensors, dy)
        got = everything(mor_kernels.mor_linear, tensors, dy, form="tail")
        for name in ("y", "dx"):
            ours, theirs = ((r[name].double() - expected[name]).norm() for r in (got, plain))
            assert ours <= 1.25 * theirs, (name, shape)


def test_on_a_stream_of_its_own():
    dtype, rows, (K, O) = dtype_of(torch.bfloat16), rows_of(1576), shape_of("fc1")
    tensors, dy = leaves(rows, K, O, dtype), gradient_of_y(rows, O, dtype)
    expected = everything(mor_kernels.mor_linear, tensors, dy)
    if REHEARSAL:
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = everything(mor_kernels.mor_linear, tensors, dy)
    stream.synchronize()
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)
