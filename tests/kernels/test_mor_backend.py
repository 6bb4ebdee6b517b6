"""The fused kernels as the backend "triton" of mor: the same numbers as the other backends, in a model too."""

import copy

import pytest
import torch
from torch import nn

import mor
from mor.functional import mor_linear

NAMES = ("x", "A", "B", "router_weight", "router_bias")
SPEC = {"ranks": (2, 4, 8), "scaling": (2.0, 1.0, 0.5), "bypass": True}


@pytest.fixture
def operands(device):
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device) / shape[-1] ** 0.5

    return {
        "x": draw(2, 9, 40),
        "weight": draw(24, 40),
        "bias": draw(24),
        "A": draw(14, 40),
        "B": draw(14, 24),
        "router_weight": draw(4, 40),
        "router_bias": draw(4),
    }


def results(operands, backend, function=mor_linear, **options):
    tensors = {name: t.detach().clone().requires_grad_(name in NAMES) for name, t in operands.items()}
    y = function(**tensors, **{**SPEC, **options}, backend=backend)
    y.float().square().sum().backward()
    return {"y": y.detach(), **{name: tensors[name].grad for name in NAMES}}


def assert_close(got, expected, tolerance):
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert (got[name] - value).norm() < tolerance * value.norm(), name


def test_triton_equals_concat(operands):
    assert_close(results(operands, "triton"), results(operands, "concat"), 1e-5)


@pytest.mark.parametrize("rank", [4, 64])
def test_a_single_expert_without_router(rank, operands, device):
    """It may take all the columns that the kernels have, for it needs none for gates."""
    A, B = (torch.randn(rank, size, device=device) / size**0.5 for size in (40, 24))
    operands = {name: operands[name] for name in ("x", "weight", "bias")} | {"A": A, "B": B}
    options = {"ranks": (rank,), "scaling": (0.5,), "bypass": False, "router_weight": None, "router_bias": None}
    tensors = {name: t.clone().requires_grad_(name in NAMES) for name, t in operands.items()}
    y = [mor_linear(**tensors, **options, backend=backend) for backend in ("triton", "concat")]
    torch.testing.assert_close(*y, rtol=1e-5, atol=1e-5)


def test_under_autocast_the_result_is_narrow_and_the_gradients_are_wide(operands, device):
    # fp16, because the interpreter cuts bf16's low bits off.
    with torch.autocast(device, torch.float16):
        fused, concatenated = (results(operands, backend) for backend in ("triton", "concat"))
    assert fused["y"].dtype == torch.float16
    assert fused["A"].dtype == torch.float32
    assert_close(fused, concatenated, 3e-3)


def test_parameters_may_be_wider_than_x(operands):
    narrow = {name: t.half() if name in ("x", "weight", "bias") else t for name, t in operands.items()}
    assert_close(results(narrow, "triton"), results(narrow, "concat"), 3e-3)


def test_compiles_without_a_break(operands):
    torch._dynamo.reset()
    compiled = torch.compile(mor_linear, fullgraph=True, backend="aot_eager")
    assert_close(results(operands, "triton", compiled), results(operands, "triton"), 1e-6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Identity()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(24, 48), "fc2": nn.Linear(48, 24)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp["fc2"](torch.nn.functional.gelu(self.mlp["fc1"](x)))


@pytest.fixture
def model(device):
    model = mor.inject(nn.Sequential(Block(), Block()), targets="fc").to(device)
    for name, parameter in mor.trainable_parameters(model).items():
        if name.endswith("mor_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def choose(model, backend):
    for module in model.modules():
        if isinstance(module, mor.MoRLinear):
            module.backend = backend


def model_gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return {"y": y.detach(), **{name: p.grad.clone() for name, p in mor.trainable_parameters(model).items()}}


def test_a_whole_model(model, device):
    x = torch.randn(3, 7, 24, device=device)
    choose(model, "concat")
    expected = model_gradients(model, x)
    choose(model, "triton")
    assert_close(model_gradients(model, x), expected, 1e-5)
    assert_close(model_gradients(copy.deepcopy(model), x), expected, 1e-5)


def test_dropout_takes_another_backend_in_training_only(operands, device):
    layer = mor.MoRLinear(nn.Linear(40, 24), mor.MoRConfig(dropout=0.5)).to(device)
    layer.backend = "triton"
    with pytest.raises(ValueError, match=r"experts that read x itself, got expert_input \(dropout\)"):
        layer(operands["x"])
    assert layer.eval()(operands["x"]).shape == (2, 9, 24)


def test_an_unfrozen_base_is_refused_by_name(operands, device):
    layer = mor.MoRLinear(nn.Linear(40, 24)).to(device)
    layer.backend = "triton"
    layer.base.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="backend 'triton' needs a frozen weight and bias"):
        layer(operands["x"])


def test_there_is_no_second_derivative_and_it_says_so(operands):
    tensors = {name: t.requires_grad_(name in NAMES) for name, t in operands.items()}
    y = mor_linear(**tensors, **SPEC, backend="triton")
    (dA,) = torch.autograd.grad(y.square().sum(), tensors["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dA.sum().backward()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_holds_the_operator(strict, device):
    """Exporters put tensors of their own in the place of the weight, which is none the less plain."""
    layer = mor.MoRLinear(nn.Linear(40, 24, device=device), backend="triton")
    nn.init.normal_(layer.mor_B)
    x = torch.randn(5, 40, device=device)
    program = torch.export.export(layer, (x,), strict=strict)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.mor_kernels.linear_forward.default in called
    assert torch.equal(program.module()(x), layer(x))
