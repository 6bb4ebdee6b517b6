"""mor_kernels.mor_linear against a loop in float64: outputs and every gradient, on awkward shapes."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mor_problem import FORMS, NAMES, RANK_SETS, TOLERANCE, Problem, check, error, leaves, loop, run
from torch import Tensor, library

import mor_kernels
from mor_kernels import blocks, matmul_tail, tables
from mor_kernels.linear import linear_backward, linear_forward


def surround_all(problem: Problem, surrounded) -> dict[str, Tensor | None]:
    tensors = leaves(problem)
    for name, t in tensors.items():
        if t is None:
            continue
        # A, B and the router are taken as they lie when contiguous, x and dy with any row stride.
        flat = surrounded(t.detach().flatten()).view(t.shape)
        tensors[name] = (surrounded(t.detach()) if name in ("x", "dy") else flat).requires_grad_(name in NAMES)
    return tensors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("ranks", "bypass"), RANK_SETS)
@pytest.mark.parametrize("shape", [(17, 24, 40), (63, 49, 33)])
def test_float32(form, ranks, bypass, shape, tiles, device, surrounded):
    problem = Problem(*shape, ranks, bypass, device=device)
    got = run(mor_kernels.mor_linear, problem, surround_all(problem, surrounded), form=form)
    check(got, run(loop, problem, leaves(problem, torch.float64)), TOLERANCE[torch.float32])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "bypass"), RANK_SETS[::2])
def test_half_precision(form, dtype, ranks, bypass, tiles, device, surrounded):
    problem = Problem(63, 49, 33, ranks, bypass, dtype=dtype, device=device)
    got = run(mor_kernels.mor_linear, problem, surround_all(problem, surrounded), form=form)
    check(got, run(loop, problem, leaves(problem, torch.float64)), TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_no_less_accurate_than_eager(form, dtype, device):
    """The rule for 16 bits: at most 1.25 times the error of the same loop in the same dtype, tensor by tensor."""
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter does not round to bf16")
    problem = Problem(320, 96, 80, dtype=dtype, device=device)
    expected = run(loop, problem, leaves(problem, torch.float64))
    eager = run(loop, problem, leaves(problem))
    got = run(mor_kernels.mor_linear, problem, leaves(problem), form=form)
    for name in expected:
        assert error(got[name], expected[name]) <= 1.25 * error(eager[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(17, 24, 136), (63, 48, 40)])
def test_persistent_matmul(shape, dtype, device, monkeypatch):
    """matmul_tail_tma, forward and for dx, with more tiles than programs; an odd width takes the other kernel."""
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a tensor memory accelerator")
    tile = blocks.Blocks(rows=64, inner=16, columns=32, persistent=True)
    old = tables.table_of(torch.device(device))
    every = {key: tile for key in old.tiles if key[0] == "matmul_tail"}
    monkeypatch.setattr(tables, "table_of", lambda device: old.with_entries_of(tables.Table(every, {})))
    launches = []
    launch = matmul_tail.matmul_tail_tma
    monkeypatch.setattr(matmul_tail, "matmul_tail_tma", lambda *a: launches.append(launch(*a)))
    problem = Problem(*shape, dtype=dtype, device=device)
    got = run(mor_kernels.mor_linear, problem, leaves(problem), form="tail")
    check(got, run(loop, problem, leaves(problem, torch.float64)), TOLERANCE[dtype])
    assert len(launches) == 2
    odd = Problem(17, 23, 41, dtype=dtype, device=device)
    got = run(mor_kernels.mor_linear, odd, leaves(odd), form="tail")
    check(got, run(loop, odd, leaves(odd, torch.float64)), TOLERANCE[dtype])
    assert len(launches) == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("router_bias", [False, True])
def test_without_biases(form, bias, router_bias, device):
    problem = Problem(17, 24, 40, bias=bias, router_bias=router_bias, device=device)
    got = run(mor_kernels.mor_linear, problem, leaves(problem), form=form)
    check(got, run(loop, problem, leaves(problem, torch.float64)), TOLERANCE[torch.float32])


@pytest.mark.parametrize("form", FORMS)
def test_many_slices_of_rows(form, device):
    """At 700 rows the sums over rows are split in five, the last one ragged."""
    problem = Problem(700, 40, 24, device=device)
    assert 1 < blocks.slice_rows(700, 1, 64) < 350
    got = run(mor_kernels.mor_linear, problem, leaves(problem), form=form)
    check(got, run(loop, problem, leaves(problem, torch.float64)), TOLERANCE[torch.float32])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [(4,), (2, 4, 8)])
def test_no_rows_and_one_row(form, ranks, device):
    for rows in (0, 1):
        problem = Problem(rows, 24, 40, ranks, len(ranks) > 1, device=device)
        got = run(mor_kernels.mor_linear, problem, leaves(problem), form=form)
        check(got, run(loop, problem, leaves(problem, torch.float64)), TOLERANCE[torch.float32])


@pytest.mark.parametrize("form", FORMS)
def test_full_precision_parameters_with_half_precision_activations(form, device):
    problem = Problem(33, 48, 40, dtype=torch.float16, device=device)
    tensors = leaves(problem)
    for name in NAMES[1:]:
        tensors[name] = tensors[name].detach().float().requires_grad_()
    got = run(mor_kernels.mor_linear, problem, tensors, form=form)
    assert got["y"].dtype == got["dx"].dtype == torch.float16
    assert all(got[f"d{name}"].dtype == torch.float32 for name in NAMES[1:])
    check(got, run(loop, problem, leaves(problem, torch.float64)), TOLERANCE[torch.float16])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", [0, 2, 3])
def test_gates_at_their_ends(form, gate, device):
    """A router that has made up its mind: one expert alone, or (3) the bypass alone."""
    problem = Problem(17, 24, 40, device=device)
    problem.tensors["router_bias"][:] = -80.0
    problem.tensors["router_bias"][gate] = 80.0
    got = run(mor_kernels.mor_linear, problem, leaves(problem), form=form)
    expected = run(loop, problem, leaves(problem, torch.float64))
    for name in ("y", "dx") if gate == 3 else ("y", "dx", "dA", "dB"):
        assert error(got[name], expected[name]) < TOLERANCE[torch.float32], name
    assert got["drouter_weight"].abs().max() < 1e-20
    if gate == 3:
        assert got["dA"].abs().max() < 1e-20


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_row(form, device):
    problem = Problem(20, 24, 40, device=device)
    problem.tensors["x"][3, 5] = float("nan")
    problem.tensors["x"][11, 0] = float("inf")
    tensors = leaves(problem)
    y = run(mor_kernels.mor_linear, problem, tensors, form=form)["y"]
    sick = torch.zeros(20, dtype=torch.bool, device=device)
    sick[[3, 11]] = True
    assert y[~sick].isfinite().all()
    assert not y[sick].isfinite().all(dim=1).any()


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([1, 2, 15, 16, 31, 63, 65]),
    width=st.sampled_from([1, 8, 17, 64, 130]),
    out=st.sampled_from([1, 8, 23, 72]),
    ranks=st.lists(st.sampled_from([1, 2, 3, 8, 16]), min_size=1, max_size=3).map(tuple),
    bypass=st.booleans(),
    form=st.sampled_from(FORMS),
)
def test_any_size_and_rank_set(rows, width, out, ranks, bypass, form, device):
    problem = Problem(rows, width, out, ranks, bypass, device=device)
    got = run(mor_kernels.mor_linear, problem, leaves(problem), form=form)
    expected = run(loop, problem, leaves(problem, torch.float64))
    # A sum over one row or one column can cancel to almost nothing, so errors are held against the largest entry too.
    for name, value in expected.items():
        size = value.abs().max().clamp_min(1.0) if value.numel() else 1.0
        assert (got[name].double() - value).abs().max().nan_to_num(nan=torch.inf) < 2e-5 * size, name


@pytest.mark.parametrize("form", FORMS)
def test_strides(form, device):
    """x and dy may be transposed, sliced, expanded, and have two to four dimensions."""
    problem = Problem(24, 16, 40, device=device)
    reference = run(loop, problem, leaves(problem, torch.float64))
    keywords = {"ranks": problem.ranks, "scaling": problem.scaling, "bypass": problem.bypass, "form": form}
    tensors = leaves(problem)
    rest = [tensors[name] for name in ("weight", "bias", *NAMES[1:])]
    x, dy = tensors["x"].detach(), tensors["dy"]
    wide_x, wide_dy = torch.cat([x, x], 1), torch.cat([dy, dy, dy], 1)
    views = {
        "as it is": (x, dy),
        "transposed": (x.t().contiguous().t(), dy.t().contiguous().t()),
        "every other column": (x.repeat_interleave(2, 1)[:, ::2], dy.repeat_interleave(2, 1)[:, ::2]),
        "columns of a wider matrix": (wide_x[:, 16:], wide_dy[:, 40:80]),
        "three dimensions": (x.view(2, 12, 16), dy.view(2, 12, 40)),
        "four dimensions": (x.view(2, 3, 4, 16), dy.view(2, 3, 4, 40)),
    }
    for name, (x_view, dy_view) in views.items():
        leaf = x_view.detach().requires_grad_()
        y = mor_kernels.mor_linear(leaf, *rest, **keywords)
        assert y.shape == dy_view.shape and y.is_contiguous(), name
        (dx,) = torch.autograd.grad(y, leaf, dy_view)
        assert error(y.detach().reshape(24, 40), reference["y"]) < 2e-6, name
        assert error(dx.reshape(24, 16), reference["dx"]) < 2e-6, name

    strided = [t.detach().repeat_interleave(2, -1)[..., ::2] for t in rest]
    y = mor_kernels.mor_linear(x, *strided, **keywords)
    assert error(y, reference["y"]) < 2e-6, "parameters with strides"

    problem.tensors["dy"] = torch.ones_like(dy)
    expected = run(loop, problem, leaves(problem, torch.float64))
    leaf = x.clone().requires_grad_()
    y = mor_kernels.mor_linear(leaf, *rest, **keywords)
    y.sum().backward()
    assert error(leaf.grad, expected["dx"]) < 2e-6
    assert error(tensors["B"].grad, expected["dB"]) < 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_gradients_only_for_those_who_ask(form, device):
    problem = Problem(17, 24, 40, device=device)
    expected = run(loop, problem, leaves(problem, torch.float64))
    for wanted in (("x",), ("A",), ("B", "router_bias"), NAMES):
        tensors = leaves(problem)
        for name in NAMES:
            tensors[name].requires_grad_(name in wanted)
        got = run(mor_kernels.mor_linear, problem, tensors, form=form)
        for name in NAMES:
            if name in wanted:
                assert error(got[f"d{name}"], expected[f"d{name}"]) < 2e-6
            else:
                assert got[f"d{name}"] is None


@pytest.mark.parametrize("form", FORMS)
def test_leaves_x_alone_and_returns_no_view(form, device):
    problem = Problem(17, 24, 40, device=device)
    tensors = leaves(problem)
    before = tensors["x"].detach().clone()
    arguments = [tensors[name] for name in ("x", "weight", "bias", *NAMES[1:])]
    y = mor_kernels.mor_linear(
        *arguments, ranks=problem.ranks, scaling=problem.scaling, bypass=problem.bypass, form=form
    )
    assert y._base is None
    y.mul_(2).sum().backward()
    assert torch.equal(tensors["x"].detach(), before)


def test_same_bits_every_time(device):
    problem = Problem(300, 24, 24, dtype=torch.float16, device=device)
    for form in FORMS:
        first = run(mor_kernels.mor_linear, problem, leaves(problem), form=form)
        for _ in range(9 if device == "cuda" else 1):
            again = run(mor_kernels.mor_linear, problem, leaves(problem), form=form)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("form", "ranks", "bypass"), [("branch", (2, 4), True), ("tail", (2, 4), True), ("tail", (4,), False)]
)
def test_opcheck(form, ranks, bypass, device):
    problem = Problem(17, 24, 40, ranks, bypass, device=device)
    tensors = leaves(problem)
    arguments = [tensors[name] for name in ("x", "weight", "bias", *NAMES[1:])]
    settings_ = (list(problem.ranks), list(problem.scaling), problem.bypass, form)
    library.opcheck(linear_forward, (*arguments, *settings_))
    with torch.no_grad():
        _, h, gates = linear_forward(*arguments, *settings_)
    x, weight, _, *parameters = (None if t is None else t.detach() for t in arguments)
    library.opcheck(
        linear_backward,
        (tensors["dy"], x, weight, *parameters, h, gates, *settings_, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_autocast(device):
    problem = Problem(33, 48, 40, device=device)
    with torch.autocast(device, torch.bfloat16):
        tensors = leaves(problem)
        arguments = [tensors[name] for name in ("x", "weight", "bias", *NAMES[1:])]
        y = mor_kernels.mor_linear(
            *arguments, ranks=problem.ranks, scaling=problem.scaling, bypass=problem.bypass, form="tail"
        )
    assert y.dtype == torch.bfloat16
    y.backward(tensors["dy"].bfloat16())
    expected = run(loop, problem, leaves(problem, torch.float64))
    assert error(y.detach(), expected["y"]) < TOLERANCE[torch.bfloat16]
    for name in NAMES:
        assert tensors[name].grad.dtype == torch.float32
        assert error(tensors[name].grad, expected[f"d{name}"]) < 2 * TOLERANCE[torch.bfloat16]


def test_offsets_beyond_two_to_the_31(device):
    """Rows 2^30 elements apart. Only the touched pages of the storage become real memory on the CPU."""
    problem = Problem(3, 24, 40, dtype=torch.float16, device=device)
    tensors = leaves(problem)
    storage = torch.empty(2 * 2**30 + 64, dtype=torch.float16, device=device)
    for name, width in (("x", 24), ("dy", 40)):
        far = storage.as_strided((3, width), (2**30, 1))
        far.copy_(tensors[name].detach())
        if name == "x":
            y = mor_kernels.mor_linear(
                far.requires_grad_(),
                *(tensors[key] for key in ("weight", "bias", *NAMES[1:])),
                ranks=problem.ranks, scaling=problem.scaling, bypass=problem.bypass, form="tail",
            )  # fmt: skip
            expected = run(loop, problem, leaves(problem, torch.float64))
            assert error(y.detach(), expected["y"]) < TOLERANCE[torch.float16]
            (dx,) = torch.autograd.grad(y, far, tensors["dy"], retain_graph=True)
            assert error(dx, expected["dx"]) < TOLERANCE[torch.float16]
            da, _ = torch.autograd.grad(y, (tensors["A"], far), tensors["dy"])
            assert error(da, expected["dA"]) < TOLERANCE[torch.float16]
            storage = torch.empty_like(storage)
        else:
            y = mor_kernels.mor_linear(
                *(tensors[key] for key in ("x", "weight", "bias", *NAMES[1:])),
                ranks=problem.ranks, scaling=problem.scaling, bypass=problem.bypass, form="tail",
            )  # fmt: skip
            y.backward(far)
            for key in NAMES:
                assert error(tensors[key].grad, expected[f"d{key}"]) < TOLERANCE[torch.float16], key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "fused"}, "form must be one of"),
        ({"ranks": (2, 4)}, "one scaling each"),
        ({"ranks": (20, 20, 24)}, "must be <= 64"),
        ({"A": torch.zeros(13, 24)}, r"A must have shape \(14, 24\), got \(13, 24\)"),
        ({"B": torch.zeros(40, 14)}, "B must have shape"),
        ({"x": torch.zeros(5, 23)}, r"got \(5, 23\); weight is \(40, 24\), ranks are \(2, 4, 8\)"),
        ({"x": torch.tensor(1.0)}, r"x must have shape \(24,\), got \(\)"),
        ({"bias": torch.zeros(40, dtype=torch.float16)}, "must share one dtype"),
        ({"router_weight": None}, "router_weight must be of shape"),
        ({"ranks": (14,), "scaling": (1.0,), "bypass": False}, "router_weight must be None: one expert"),
        ({"router_bias": torch.zeros(4, dtype=torch.float64)}, "router_bias must be fp32, fp16 or bf16"),
        ({"weight": torch.zeros(40, 24, requires_grad=True)}, "freeze them"),
    ],
)
def test_says_what_is_wrong(change, message, device):
    problem = Problem(5, 24, 40)
    arguments = {name: problem.tensors[name] for name in ("x", "weight", "bias", *NAMES[1:])}
    arguments |= {"ranks": problem.ranks, "scaling": problem.scaling, "bypass": problem.bypass} | change
    with pytest.raises(ValueError, match=message):
        mor_kernels.mor_linear(**arguments)


def test_imports_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import mor_kernels; assert not mor_kernels.is_available()\n"
        "try: mor_kernels.mor_linear()\n"
        "except RuntimeError as error: assert 'needs triton' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    path = [p for p in sys.path if p.endswith("kernels")]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {program}"], check=True)


def test_exported_names():
    assert set(mor_kernels.__all__) == {"MAX_COLUMNS", "is_available", "mor_linear", "prefers_library"}
