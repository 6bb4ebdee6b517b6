"""What torch does with an operator: compiles it, exports it, copies its module, spreads it over processes."""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.distributed.nn  # before there is a group, which it would keep; threads of it may abort a process that ends
import torch.multiprocessing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mor_problem import FORMS, NAMES, TOLERANCE, Problem, check, error, leaves, loop, run
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mor_kernels
from mor_kernels import linear


class Layer(nn.Module):
    """The smallest module around the operator."""

    def __init__(self, problem: Problem, form: str = "branch") -> None:
        super().__init__()
        self.settings = {"ranks": problem.ranks, "scaling": problem.scaling, "bypass": problem.bypass, "form": form}
        for name in ("weight", "bias", *NAMES[1:]):
            tensor = problem.tensors[name].clone()
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=name in NAMES))

    def forward(self, x: Tensor) -> Tensor:
        parameters = (self.weight, self.bias, self.A, self.B, self.router_weight, self.router_bias)
        return mor_kernels.mor_linear(x, *parameters, **self.settings)


def gradients(layer: Layer, x: Tensor, dy: Tensor) -> list[Tensor]:
    layer.zero_grad()
    layer(x).backward(dy)
    return [parameter.grad.clone() for parameter in layer.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, device):
    """By finite differences, in fp32: the kernels have no fp64. The step is wide and the function nearly linear, so
    what is left is small; test_mor_linear.py holds every gradient against float64 to 2e-6. Also shows that two
    backwards give the same bits (nondet_tol)."""
    problem = Problem(5, 8, 6, ranks=(1, 2), device=device)
    tensors = leaves(problem)
    arguments = [tensors[name] for name in ("x", "A", "B", "router_weight", "router_bias")]

    def function(x, *parameters):
        options = {"ranks": problem.ranks, "scaling": problem.scaling, "bypass": problem.bypass, "form": form}
        return mor_kernels.mor_linear(x, tensors["weight"], tensors["bias"], *parameters, **options)

    with pytest.warns(UserWarning, match="not a double precision"):
        torch.autograd.gradcheck(function, arguments, eps=1e-2, atol=1e-4, rtol=1e-3, nondet_tol=0.0)


def test_the_definition_that_all_is_held_against_passes_gradcheck():
    problem = Problem(3, 4, 3, ranks=(1, 2), dtype=torch.float64)
    tensors = leaves(problem)
    arguments = [tensors[name] for name in ("x", "A", "B", "router_weight", "router_bias")]

    def function(x, *parameters):
        options = {"ranks": problem.ranks, "scaling": problem.scaling, "bypass": problem.bypass}
        return loop(x, tensors["weight"], tensors["bias"], *parameters, **options)

    assert torch.autograd.gradcheck(function, arguments)


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    step=st.sampled_from([1, 2]),
    offset=st.integers(0, 3),
    padding=st.integers(0, 5),
    transposed=st.booleans(),
    expanded=st.booleans(),
    form=st.sampled_from(FORMS),
)
def test_any_strides(rows, step, offset, padding, transposed, expanded, form, device):
    """x and dy at any offset, row stride and column stride, and dy expanded from one row."""

    def placed(t: Tensor) -> Tensor:
        if transposed:
            return t.t().contiguous().t()
        big = t.new_full((t.shape[0] + 1, t.shape[1] * step + offset + padding), float("nan"))
        return big[1:, offset : offset + t.shape[1] * step : step].copy_(t)

    problem = Problem(rows, 24, 17, device=device)
    if expanded:
        problem.tensors["dy"] = problem.tensors["dy"][:1].expand(rows, -1)
    tensors = leaves(problem)
    tensors["x"] = placed(tensors["x"].detach()).requires_grad_()
    tensors["dy"] = problem.tensors["dy"] if expanded else placed(tensors["dy"])
    got = run(mor_kernels.mor_linear, problem, tensors, form=form)
    expected = run(loop, problem, leaves(problem, torch.float64))
    for name, value in expected.items():
        size = value.abs().max().clamp_min(1.0)
        assert (got[name].double() - value).abs().max().nan_to_num(nan=torch.inf) < 2e-5 * size, name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph_for_any_number_of_rows(backend, device):
    problem = Problem(17, 24, 40, device=device)
    layer = Layer(problem)
    compiled = torch.compile(
        lambda x: torch.nn.functional.gelu(layer(x)), fullgraph=True, backend=backend, dynamic=True
    )
    for rows in (17, 23):
        problem = Problem(rows, 24, 40, device=device)
        x, dy = problem.tensors["x"], problem.tensors["dy"]
        layer.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=rows != 17):
            y = compiled(x)
        y.backward(dy)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        got = [parameter.grad.clone() for parameter in trained]
        layer.zero_grad()
        expected = torch.nn.functional.gelu(layer(x))
        expected.backward(dy)
        assert torch.allclose(y, expected, atol=1e-5)
        for gradient, parameter in zip(got, trained, strict=True):
            assert error(gradient, parameter.grad.double()) < 1e-5


def test_exports(device):
    """With a free number of rows; the program holds one operator and no Python of ours."""
    problem = Problem(17, 24, 40, device=device)
    layer = Layer(problem)
    rows = torch.export.Dim("rows", min=2, max=4000)
    program = torch.export.export(layer, (problem.tensors["x"],), dynamic_shapes=({0: rows},))
    called = [node.target for node in program.graph.nodes if "mor_kernels" in str(node.target)]
    assert called == [torch.ops.mor_kernels.linear_forward.default]
    x = Problem(30, 24, 40, device=device).tensors["x"]
    assert torch.equal(program.module()(x), layer(x))


def test_a_copy_is_independent(device):
    problem = Problem(17, 24, 40, device=device)
    layer = Layer(problem)
    x, dy = problem.tensors["x"], problem.tensors["dy"]
    before = gradients(layer, x, dy)
    twin = copy.deepcopy(layer)
    assert all(torch.equal(a, b) for a, b in zip(gradients(twin, x, dy), before, strict=True))
    with torch.no_grad():
        twin.A.zero_()
    assert all(torch.equal(a, b) for a, b in zip(gradients(layer, x, dy), before, strict=True))


def test_two_backwards_through_one_forward(device):
    problem = Problem(17, 24, 40, device=device)
    tensors = leaves(problem)
    arguments = [tensors[name] for name in ("x", "weight", "bias", *NAMES[1:])]
    options = {"ranks": problem.ranks, "scaling": problem.scaling, "bypass": problem.bypass}
    y = mor_kernels.mor_linear(*arguments, **options)
    wanted = [tensors[name] for name in NAMES]
    first = torch.autograd.grad(y, wanted, tensors["dy"], retain_graph=True)
    second = torch.autograd.grad(y, wanted, tensors["dy"])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="does not require grad|second time"):
        first[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "bypass"), [((2, 4, 8), True), ((3, 5), False), ((4,), False)])
def test_keeps_ranks_and_gates_beside_x(dtype, ranks, bypass, device):
    """Per row the sum of ranks in x's dtype and 4 B for each gate: 44 B for ranks 2, 4, 8 in 16 bits."""
    problem = Problem(64, 24, 40, ranks, bypass, dtype=dtype, device=device)
    tensors = leaves(problem)
    known = {t.data_ptr() for t in tensors.values() if t is not None}
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        arguments = [tensors[name] for name in ("x", "weight", "bias", *NAMES[1:])]
        mor_kernels.mor_linear(*arguments, ranks=ranks, scaling=problem.scaling, bypass=bypass)
    extra = sum(t.untyped_storage().nbytes() for t in kept.values() if t.numel() and t.data_ptr() not in known)
    gates = 0 if tensors["router_weight"] is None else len(tensors["router_weight"])
    assert extra == 64 * (sum(ranks) * dtype.itemsize + 4 * gates)


def in_one_process(process: int, folder: str) -> None:
    """Half of the rows, averaged with the other half by DistributedDataParallel."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process, world_size=2)
    try:
        torch.save(gradients_of_half(process), f"{folder}/{process}.pt")
    finally:
        torch.distributed.destroy_process_group()


def gradients_of_half(process: int) -> dict[str, Tensor]:
    problem = Problem(18, 24, 40)
    model = nn.parallel.DistributedDataParallel(Layer(problem))
    half = slice(9 * process, 9 * process + 9)
    model(problem.tensors["x"][half]).backward(problem.tensors["dy"][half])
    return {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_distributed_data_parallel(device, tmp_path: Path):
    if device == "cuda":
        pytest.skip("tries two processes on the CPU")
    torch.multiprocessing.spawn(in_one_process, (str(tmp_path),), nprocs=2)
    problem = Problem(18, 24, 40)
    expected = run(loop, problem, leaves(problem, torch.float64))
    for process in range(2):
        got = torch.load(tmp_path / f"{process}.pt")
        assert got.keys() == set(NAMES[1:])
        for name, gradient in got.items():
            assert error(2 * gradient, expected[f"d{name}"]) < TOLERANCE[torch.float32], name


class Seen(TorchDispatchMode):
    """The names of the operators that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class Own(Tensor):
    """A kind of tensor of its own."""


def outputs_and_gradients(problem: Problem, form: str, look=nullcontext, kind=lambda x: x) -> list[Tensor]:
    tensors = leaves(problem)
    wanted = [tensors[name] for name in NAMES if tensors[name] is not None]
    names = ("weight", "bias", "A", "B", "router_weight", "router_bias")
    with look():
        y = mor_kernels.mor_linear(
            kind(tensors["x"]), *(tensors[name] for name in names),
            ranks=problem.ranks, scaling=problem.scaling, bypass=problem.bypass, form=form,
        )  # fmt: skip
        return [y, *torch.autograd.grad(y, wanted, tensors["dy"])]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("ranks", "bypass"), [((2, 4, 8), True), ((4,), False)])
def test_who_looks_on_sees_the_operators_and_the_same_bits(ranks, bypass, form, device):
    problem = Problem(21, 24, 40, ranks=ranks, bypass=bypass, device=device)
    plain = outputs_and_gradients(problem, form)
    seen = Seen()
    watched = outputs_and_gradients(problem, form, look=lambda: seen)
    assert [name for name in seen.names if name.startswith("mor_kernels")] == [
        "mor_kernels::linear_forward",
        "mor_kernels::linear_backward",
    ]
    assert not any("addmm" in name for name in seen.names)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_plain_eager_mode_does_without_the_operators(device, monkeypatch):
    """Their registered autograd takes the host longer than several launches."""

    def refuse(*args):
        raise AssertionError("called")

    monkeypatch.setattr(linear, "linear_forward", refuse)
    monkeypatch.setattr(linear, "linear_backward", refuse)
    problem = Problem(5, 8, 6, device=device)
    outputs_and_gradients(problem, "branch")
    gradients(Layer(problem), problem.tensors["x"], problem.tensors["dy"])
    with pytest.raises(AssertionError, match="called"):
        outputs_and_gradients(problem, "branch", kind=lambda x: x.as_subclass(Own))


@pytest.mark.filterwarnings("ignore:.*batching rule")
def test_a_function_transform_sees_the_operators(device):
    problem = Problem(4, 8, 6, device=device)
    tensors = problem.tensors
    names = ("weight", "bias", "A", "B", "router_weight", "router_bias")
    options = {"ranks": problem.ranks, "scaling": problem.scaling, "bypass": problem.bypass}

    def function(x: Tensor) -> Tensor:
        return mor_kernels.mor_linear(x, *(tensors[name] for name in names), **options)

    both = torch.stack([tensors["x"], -tensors["x"]])
    mapped = torch.func.vmap(function)(both)
    assert torch.equal(mapped, torch.stack([function(x) for x in both]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # with which torch itself loads its rules
@pytest.mark.parametrize("transform", ["jvp", "dual numbers", "jacfwd"])
def test_forward_mode_is_refused(transform, device):
    """An operator's tangent would be zero, without a word."""
    layer, x = Layer(Problem(4, 8, 6, device=device)), torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match="forward-mode derivatives .* do not exist here"):
        if transform == "jvp":
            torch.func.jvp(layer, (x,), (x,))
        elif transform == "jacfwd":
            torch.func.jacfwd(layer)(x)
        else:
            with forward_ad.dual_level():
                layer(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("transform", ["jvp", "dual numbers"])
def test_forward_mode_of_backward_alone_is_refused(transform, device):
    problem = Problem(4, 8, 6, device=device)
    x, dy = leaves(problem)["x"], problem.tensors["dy"]
    y = Layer(problem)(x)

    def backward(dy):
        return torch.autograd.grad(y, x, dy)[0]

    with pytest.raises(ValueError, match="forward-mode derivatives .* do not exist here"):
        if transform == "jvp":
            torch.func.jvp(backward, (dy,), (dy,))
        else:
            with forward_ad.dual_level():
                backward(forward_ad.make_dual(dy, dy))


@pytest.mark.parametrize("look", [nullcontext, Seen], ids=["nobody", "a mode in forward"])
def test_second_derivatives_are_refused(look, device):
    """Whoever looked on in forward may not do so in backward, and a part of a second derivative would be wrong."""
    problem = Problem(5, 8, 6, device=device)
    tensors = leaves(problem)
    arguments = [tensors[name] for name in ("x", "weight", "bias", *NAMES[1:])]
    options = {"ranks": problem.ranks, "scaling": problem.scaling, "bypass": problem.bypass}
    with look():
        y = mor_kernels.mor_linear(*arguments, **options)
    dy = tensors["dy"].requires_grad_()
    (dx,) = torch.autograd.grad(y, tensors["x"], dy, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(dx.square().sum(), dy, allow_unused=True)


def test_a_batch_of_gradients(device):
    problem = Problem(5, 8, 6, device=device)
    tensors, layer = leaves(problem), Layer(problem)
    y, wanted = layer(tensors["x"]), [tensors["x"], layer.A, layer.router_weight]
    dys = torch.stack([tensors["dy"], -2 * tensors["dy"]])
    together = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        alone = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        assert all(torch.equal(batch[i], gradient) for batch, gradient in zip(together, alone, strict=True))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def test_no_gradient_stays_none(device):
    """Zeros in its place would let an optimizer with weight decay or momentum take a step."""
    problem = Problem(5, 8, 6, device=device)
    layer, x = Layer(problem), problem.tensors["x"].requires_grad_()
    NoGradient.apply(layer(x)).sum().backward()
    assert x.grad is None and all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:Warning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_operator(device):
    problem = Problem(5, 8, 6, device=device)
    layer, x = Layer(problem).requires_grad_(False), problem.tensors["x"]
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert "mor_kernels::linear_forward" in [node.kind() for node in traced.graph.nodes()]
    assert torch.equal(traced(2 * x), layer(2 * x))


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_graph_of_fx_holds_the_operator(pre_dispatch, device):
    """Its kernels are no operators: without it they would be missing in the graph."""
    problem = Problem(5, 8, 6, device=device)
    layer, x = Layer(problem), problem.tensors["x"]
    graph = make_fx(layer, tracing_mode="real", pre_dispatch=pre_dispatch)(x)
    assert torch.ops.mor_kernels.linear_forward.default in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(2 * x), layer(2 * x))


def counted(function, problem: Problem, wanted: tuple[str, ...], **form: str) -> tuple[int, int]:
    """Floating-point operations of a forward and of its backward."""
    tensors = {name: None if t is None else t.requires_grad_(name in wanted) for name, t in leaves(problem).items()}
    dy = tensors.pop("dy")
    with FlopCounterMode(display=False) as forward:
        y = function(**tensors, ranks=problem.ranks, scaling=problem.scaling, bypass=problem.bypass, **form)
    with FlopCounterMode(display=False) as backward:
        y.backward(dy)
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", [NAMES, NAMES[1:], NAMES[:1]], ids=["all", "parameters", "x"])
@pytest.mark.parametrize(("ranks", "bypass"), [((2, 4, 8), True), ((4,), False)])
def test_operations_are_counted_as_those_of_the_loop(ranks, bypass, wanted, form, device):
    problem = Problem(15, 24, 40, ranks=ranks, bypass=bypass, device=device)
    assert counted(mor_kernels.mor_linear, problem, wanted, form=form) == counted(loop, problem, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_module(reentrant, device):
    from torch.utils.checkpoint import checkpoint

    problem = Problem(17, 24, 40, device=device)
    layer, x, dy = Layer(problem), problem.tensors["x"].requires_grad_(), problem.tensors["dy"]
    expected = gradients(layer, x, dy)
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).backward(dy)
    got = [parameter.grad for parameter in layer.parameters() if parameter.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_check_itself_is_not_fooled_by_nan():
    with pytest.raises(AssertionError):
        check({"y": torch.tensor([float("nan")])}, {"y": torch.ones(1).double()}, 1.0)
