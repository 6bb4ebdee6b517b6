"""mor_linear against a loop in float64, written here from the equation alone."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from mor import functional, mor_linear
from mor.functional import choose_backend, mor_branch

BACKENDS = ["eager", "concat"]


def expected(x, weight, bias, A, B, router_weight, router_bias, ranks, scaling, bypass) -> Tensor:
    """Row by row, expert by expert, float64."""
    operands = [t for t in (x, weight, bias, A, B, router_weight, router_bias) if t is not None]
    x, weight, A, B = x.double(), weight.double(), A.double(), B.double()
    if x.numel() == 0:  # still depends on everything, with gradients of zero
        return sum(0.0 * t.double().sum() for t in operands) + x.new_zeros(*x.shape[:-1], len(weight))
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        gates = torch.ones(1, dtype=torch.float64)
        if router_weight is not None:
            logits = router_weight.double() @ row + (0 if router_bias is None else router_bias.double())
            gates = torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum()
        y = weight @ row + (0 if bias is None else bias.double())
        start = 0
        for i, rank in enumerate(ranks):
            h = A[start : start + rank] @ row
            y = y + gates[i] * scaling[i] * (B[start : start + rank].T @ h)
            start += rank
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], len(weight))


def operands(shape=(7,), K=13, O=11, ranks=(2, 4, 8), bypass=True, bias=True, router_bias=True, dtype=torch.float64):
    R, outputs = sum(ranks), len(ranks) + bypass
    router = outputs > 1

    def random(*size):
        return torch.randn(*size, dtype=torch.float64).to(dtype)

    tensors = {
        "x": random(*shape, K),
        "weight": random(O, K),
        "bias": random(O) if bias else None,
        "A": random(R, K),
        "B": random(R, O),
        "router_weight": random(outputs, K) if router else None,
        "router_bias": random(outputs) if router and router_bias else None,
    }
    return tensors, {"ranks": ranks, "scaling": tuple(0.5 + i for i in range(len(ranks))), "bypass": bypass}


def gradients(function, tensors, names, dy):
    leaves = {name: tensors[name].clone().requires_grad_() for name in names if tensors[name] is not None}
    y = function(**{**tensors, **leaves})
    return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)), strict=True))


ADAPTED = ["x", "A", "B", "router_weight", "router_bias"]
CASES = [
    {},
    {"bias": False},
    {"router_bias": False},
    {"bypass": False},
    {"ranks": (3,), "bypass": False},
    {"ranks": (3,), "bypass": True},
    {"ranks": (1, 5, 2, 7)},
    {"ranks": (4, 4, 4), "bypass": False, "bias": False},
    {"shape": ()},
    {"shape": (0,)},
    {"shape": (2, 0, 3)},
    {"shape": (2, 3, 5)},
    {"shape": (1,), "K": 1, "O": 1},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_float64_loop(backend, case):
    tensors, spec = operands(**case)
    dy = torch.randn(*tensors["x"].shape[:-1], len(tensors["weight"]), dtype=torch.float64)
    names = [*ADAPTED, "weight", "bias"]
    y, grads = gradients(lambda **t: mor_linear(**t, **spec, backend=backend), tensors, names, dy)
    y_expected, grads_expected = gradients(lambda **t: expected(**t, **spec), tensors, names, dy)
    torch.testing.assert_close(y, y_expected, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, grads_expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_order_of_gates_matters():
    """If a permutation of the gates went unnoticed above, this would fail too."""
    tensors, spec = operands()
    turned = {**tensors, "router_weight": tensors["router_weight"].roll(1, 0)}
    for backend in BACKENDS:
        assert not torch.allclose(mor_linear(**tensors, **spec, backend=backend), expected(**turned, **spec), rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_router_output_is_the_bypass(backend):
    tensors, spec = operands()
    tensors["router_bias"] = torch.tensor([-1e3, -1e3, -1e3, 1e3], dtype=torch.float64)
    y = mor_linear(**tensors, **spec, backend=backend)
    assert torch.equal(y, F.linear(tensors["x"], tensors["weight"], tensors["bias"]))


@settings(max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    rows=st.integers(0, 9),
    K=st.integers(1, 17),
    O=st.integers(1, 17),
    bypass=st.booleans(),
    bias=st.booleans(),
)
def test_concat_equals_eager(ranks, rows, K, O, bypass, bias):
    tensors, spec = operands(shape=(rows,), K=K, O=O, ranks=ranks, bypass=bypass, bias=bias)
    dy = torch.randn(rows, O, dtype=torch.float64)
    results = [
        gradients(lambda backend=backend, **t: mor_linear(**t, **spec, backend=backend), tensors, ADAPTED, dy)
        for backend in BACKENDS
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_branch_is_the_layer_without_its_base(case):
    tensors, spec = operands(**case, **({} if "bias" in case else {"bias": False}))
    tensors["weight"] = torch.zeros_like(tensors["weight"])
    dy = torch.randn(*tensors["x"].shape[:-1], len(tensors["weight"]), dtype=torch.float64)

    def branch(weight, bias, **t):
        return mor_branch(**t, **spec)

    y, grads = gradients(branch, tensors, ADAPTED, dy)
    y_expected, grads_expected = gradients(lambda **t: expected(**t, **spec), tensors, ADAPTED, dy)
    torch.testing.assert_close(y, y_expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, grads_expected, rtol=1e-12, atol=1e-12)


def test_the_branch_takes_autocasts_dtype_and_wider_parameters():
    tensors, spec = operands(shape=(5,), dtype=torch.float32, bias=False)
    arguments = {name: t for name, t in tensors.items() if name not in ("weight", "bias")}
    assert mor_branch(**{**arguments, "x": tensors["x"].bfloat16()}, **spec).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert mor_branch(**arguments, **spec).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    tensors, spec = operands(shape=(3,), K=4, O=5, ranks=(1, 2))
    names = [*ADAPTED, "weight", "bias"]
    leaves = [tensors[name].requires_grad_() for name in names]

    def function(*values):
        return mor_linear(**dict(zip(names, values, strict=True)), **spec, backend=backend)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("wanted", ADAPTED)
def test_gradient_of_one_operand_alone(wanted):
    tensors, spec = operands()
    dy = torch.randn(7, 11, dtype=torch.float64)
    _, alone = gradients(lambda **t: mor_linear(**t, **spec), tensors, [wanted], dy)
    _, together = gradients(lambda **t: mor_linear(**t, **spec), tensors, ADAPTED, dy)
    torch.testing.assert_close(alone[wanted], together[wanted])


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_may_read_another_input_than_the_router(backend):
    """Dropout acts on the experts' input alone."""
    tensors, spec = operands(bias=False)
    other = torch.randn_like(tensors["x"]).requires_grad_()
    tensors["x"].requires_grad_()
    y = mor_linear(**tensors, **spec, expert_input=other, backend=backend)
    gates = torch.softmax(tensors["x"] @ tensors["router_weight"].T + tensors["router_bias"], -1)
    y_expected = tensors["x"] @ tensors["weight"].T
    parts = zip(tensors["A"].split(spec["ranks"]), tensors["B"].split(spec["ranks"]), spec["scaling"], strict=True)
    for i, (A_i, B_i, scale) in enumerate(parts):
        y_expected = y_expected + gates[:, i, None] * scale * (other @ A_i.T @ B_i)
    torch.testing.assert_close(y, y_expected)
    dy = torch.randn_like(y)
    inputs = [tensors["x"], other]
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(y_expected, inputs, dy))


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strides_of_x(layout):
    tensors, spec = operands(shape=(4, 6))
    x = {
        "sliced": torch.randn(4, 12, 26, dtype=torch.float64)[:, ::2, ::2],
        "transposed": torch.randn(6, 4, 13, dtype=torch.float64).transpose(0, 1),
        "expanded": torch.randn(1, 6, 13, dtype=torch.float64).expand(4, 6, 13),
    }[layout]
    before = x.clone()
    torch.testing.assert_close(mor_linear(**{**tensors, "x": x}, **spec), expected(**{**tensors, "x": x}, **spec))
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", ["summed", "sliced", "transposed"])
def test_strides_of_the_incoming_gradient(layout):
    tensors, spec = operands()

    def reduced(y):
        return {"summed": y.sum(), "sliced": torch.cat([y, y])[3:9, ::2].sum(), "transposed": (y.T @ y).sum()}[layout]

    def grads(function):
        leaves = {name: tensors[name].clone().requires_grad_() for name in ADAPTED}
        return torch.autograd.grad(reduced(function(**{**tensors, **leaves})), list(leaves.values()))

    torch.testing.assert_close(grads(lambda **t: mor_linear(**t, **spec)), grads(lambda **t: expected(**t, **spec)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_narrow_types(backend, dtype, bound):
    tensors, spec = operands(shape=(64,), K=48, O=40, dtype=dtype)
    dy = torch.randn(64, 40, dtype=torch.float64)
    y, grads = gradients(lambda **t: mor_linear(**t, **spec, backend=backend), tensors, ADAPTED, dy)
    y_expected, grads_expected = gradients(lambda **t: expected(**t, **spec), tensors, ADAPTED, dy.to(dtype).double())
    assert y.dtype == dtype
    assert relative(y, y_expected) < bound
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert relative(grad, grads_expected[name]) < bound, name


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def test_concat_is_no_less_exact_than_eager_in_bf16():
    tensors, spec = operands(shape=(256,), K=96, O=80, dtype=torch.bfloat16)
    dy = torch.randn(256, 80, dtype=torch.float64).bfloat16()
    truth = gradients(lambda **t: expected(**t, **spec), tensors, ADAPTED, dy.double())
    errors = {}
    for backend in BACKENDS:
        y, grads = gradients(
            lambda backend=backend, **t: mor_linear(**t, **spec, backend=backend), tensors, ADAPTED, dy
        )
        errors[backend] = [relative(y, truth[0])] + [relative(grads[name], truth[1][name]) for name in grads]
    for eager, concat in zip(errors["eager"], errors["concat"], strict=True):
        assert concat <= 1.25 * eager


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_are_not_rounded_before_the_softmax(backend):
    """Logits beyond fp16's range of exp, and a router bias that bf16 would round away."""
    tensors, spec = operands(K=4, O=4, ranks=(1, 1), bypass=False, dtype=torch.bfloat16)
    tensors["router_weight"] = torch.zeros(2, 4)
    tensors["router_bias"] = torch.tensor([256.0, 256.5])  # bf16 has no 256.5
    y = mor_linear(**tensors, **spec, backend=backend)
    assert relative(y, expected(**tensors, **spec)) < 1e-2
    tensors["router_bias"] = torch.tensor([256.0, 256.0])
    assert relative(y, expected(**tensors, **spec)) > 2e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_adapter_may_be_wider_than_x(backend):
    tensors, spec = operands(dtype=torch.bfloat16)
    for name in ("A", "B", "router_weight", "router_bias"):
        tensors[name] = tensors[name].float().requires_grad_()
    y = mor_linear(**tensors, **spec, backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert tensors["A"].grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_type_of_the_base(backend, x_dtype):
    tensors, spec = operands(dtype=torch.float32)
    tensors["A"].requires_grad_()
    x = tensors.pop("x").to(x_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mor_linear(x, **tensors, **spec, backend=backend)
        assert y.dtype == F.linear(x, tensors["weight"], tensors["bias"]).dtype == torch.bfloat16
    y.float().pow(2).sum().backward()
    assert tensors["A"].grad.dtype == torch.float32 and tensors["A"].grad.isfinite().all()


def test_concat_keeps_little_for_backward():
    tensors, spec = operands(shape=(100,), K=64, O=256, dtype=torch.float32)
    for name in ADAPTED:
        tensors[name].requires_grad_()
    saved = {}
    parameters = {tensor.data_ptr() for tensor in tensors.values()}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mor_linear(**tensors, **spec)
    assert sum(saved.values()) == 100 * (14 * 4 + 4 * 4)  # h and the gates


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_may_be_changed_in_place(backend):
    tensors, spec = operands()
    tensors["A"].requires_grad_()
    y = mor_linear(**tensors, **spec, backend=backend)
    y += 1.0
    y.sum().backward()
    assert tensors["A"].grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    tensors, spec = operands(shape=(2, 5), dtype=torch.float32)
    dy = torch.randn(2, 5, 11, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(lambda **t: mor_linear(**t, **spec, backend=backend), fullgraph=True, backend="aot_eager")
    plain = gradients(lambda **t: mor_linear(**t, **spec, backend=backend), tensors, ADAPTED, dy)
    torch.testing.assert_close(gradients(compiled, tensors, ADAPTED, dy), plain, rtol=1e-5, atol=1e-5)


def second_derivative(backend):
    tensors, spec = operands(shape=(3,), K=4, O=5, ranks=(1, 2))
    x, A = tensors["x"].requires_grad_(), tensors["A"].requires_grad_()
    y = mor_linear(**tensors, **spec, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), A)[0]


def test_second_derivatives_are_right_or_refused():
    assert second_derivative("eager").abs().sum() > 0
    with pytest.raises(RuntimeError, match="no second derivatives .* set backend='eager'"):
        second_derivative("concat")


@pytest.mark.parametrize("bypass", [True, False])
def test_a_batch_of_gradients(bypass):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for."""
    tensors, spec = operands(bypass=bypass)
    wanted = [tensors[name].requires_grad_() for name in ("x", "A", "B", "router_weight", "router_bias")]
    y = mor_linear(**tensors, **spec, backend="concat")
    dys = torch.stack([y.detach().cos(), y.detach().sin()])
    together = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        alone = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        torch.testing.assert_close([batch[i] for batch in together], list(alone))


def along(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


TRANSFORMS = {
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x.cos(),))[1],
    "dual numbers": lambda function, x: along(function, x, x.cos()),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "hessian": lambda function, x: torch.func.hessian(lambda x: function(x).square().sum())(x),
    "gradients of each row": lambda function, x: torch.func.vmap(torch.func.grad(lambda x: function(x).sum()))(x),
    "compiled": lambda function, x: torch.compile(
        lambda x: torch.func.jvp(function, (x,), (x.cos(),))[1], backend="aot_eager"
    )(x),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # with which torch itself loads its rules
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms_are_right_or_refused(transform):
    """A tangent that is dropped would be a zero without a word."""
    tensors, spec = operands(shape=(3,), K=4, O=5, ranks=(1, 2))
    x = tensors.pop("x")

    def transformed(function, **options):
        return transform(lambda x: function(x=x, **tensors, **spec, **options), x)

    right = transformed(expected)
    for backend in ("eager", "auto"):
        torch.testing.assert_close(transformed(mor_linear, backend=backend), right)
    with pytest.raises(ValueError, match="backend 'concat' cannot serve torch.func or forward-mode AD; 'auto' takes"):
        transformed(mor_linear, backend="concat")


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_may_run_inside_autocast(backend):
    tensors, spec = operands(dtype=torch.float32)
    dy = torch.randn(7, 11, dtype=torch.float64)
    _, outside = gradients(lambda **t: mor_linear(**t, **spec, backend=backend), tensors, ADAPTED, dy)
    leaves = {name: tensors[name].clone().requires_grad_() for name in ADAPTED}
    y = mor_linear(**{**tensors, **leaves}, **spec, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y, list(leaves.values()), dy.float())
    for grad, expected_grad in zip(inside, outside.values(), strict=True):
        assert relative(grad, expected_grad) < (1e-6 if backend == "concat" else 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_on_the_meta_device(backend):
    tensors, spec = operands(shape=(2, 3), dtype=torch.float32)
    tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert mor_linear(**tensors, **spec, backend=backend).shape == (2, 3, 11)


def chosen(backend="auto", device="cuda", dtype=torch.bfloat16, columns=18, **call):
    return choose_backend(backend, torch.device(device), dtype, columns=columns, **call)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_is_concat_without_cuda(device):
    assert chosen(device=device) == "concat"


LACKS = [
    ({"dtype": torch.float64}, "fp32, fp16 or bf16, got torch.float64"),
    ({"columns": 65}, "at most 64, got 65"),
    ({"trains_base": True}, "a frozen weight and bias"),
    ({"has_expert_input": True}, "experts that read x itself"),
]


@pytest.fixture(params=["sm_80"])
def cuda_with_kernels(request, monkeypatch):
    """As if a CUDA device were there; the kernels run on it unless it is too old."""
    kernels = SimpleNamespace(
        MAX_COLUMNS=64,
        is_available=lambda device: request.param == "sm_80",
        prefers_library=lambda device, dtype, K, O, rows: (K, O) == (768, 3072) and rows < 4096,
    )
    monkeypatch.setattr(functional, "_kernels", lambda: kernels)
    functional._cached_availability.cache_clear()
    yield
    functional._cached_availability.cache_clear()


@pytest.mark.usefixtures("cuda_with_kernels")
@pytest.mark.parametrize("cuda_with_kernels", ["sm_70"], indirect=True)
def test_auto_is_concat_on_an_old_card_and_triton_is_refused():
    assert chosen() == "concat"
    with pytest.raises(ValueError, match="'triton' needs triton and a CUDA device .* got cuda; 'auto' takes 'concat'"):
        chosen("triton")


@pytest.mark.usefixtures("cuda_with_kernels")
def test_auto_is_triton_on_cuda():
    assert chosen() == "triton"
    assert chosen("concat") == "concat"
    assert chosen("eager") == "eager"


@pytest.mark.usefixtures("cuda_with_kernels")
def test_auto_heeds_what_was_measured():
    assert chosen(shape=(1576, 3072, 768)) == "concat"
    assert chosen(shape=(6288, 3072, 768)) == "triton"
    assert chosen(shape=(1576, 768, 3072)) == "triton"
    assert chosen("triton", shape=(1576, 3072, 768)) == "triton"


@pytest.mark.usefixtures("cuda_with_kernels")
@pytest.mark.parametrize(("call", "reason"), LACKS)
def test_auto_takes_concat_where_triton_cannot_serve(call, reason):
    assert chosen(**call) == "concat"
    with pytest.raises(ValueError, match=f"backend 'triton' needs .*{reason}"):
        chosen("triton", **call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x must end in 13 features to fit weight, got shape \(3, 5\)"),
        ({"x": torch.tensor(1.0)}, "x must end in 13 features"),
        ({"A": torch.zeros(13, 13)}, r"A must be \(14, 13\) for ranks \(2, 4, 8\), got \(13, 13\)"),
        ({"B": torch.zeros(11, 14)}, r"B must be \(14, 11\)"),
        ({"router_weight": None}, "router_weight is needed for 3 experts with bypass=True"),
        ({"router_weight": torch.zeros(3, 13)}, r"router_weight must be \(4, 13\)"),
        ({"ranks": (14,), "scaling": (1.0,), "bypass": False}, "router_weight must be None for a single expert"),
        ({"scaling": (1.0,)}, "scaling must have one factor per rank, got 1 for 3"),
        ({"backend": "fast"}, "backend must be one of auto, eager, concat, triton, got 'fast'"),
        ({"expert_input": torch.zeros(7, 12)}, r"expert_input must have x's shape \(7, 13\)"),
    ],
)
def test_misfits_are_named(change, message):
    tensors, spec = operands(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        mor_linear(**{**tensors, **spec, **change})
