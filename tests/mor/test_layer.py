import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mor import MoRConfig, MoRLinear, mor_linear
from mor.functional import mor_branch


@pytest.fixture
def layer() -> MoRLinear:
    """7 -> 5 with every parameter random, so that the adapter shows."""
    layer = MoRLinear(nn.Linear(7, 5), MoRConfig(ranks=(1, 3)))
    nn.init.normal_(layer.mor_B)
    return layer


@pytest.mark.parametrize("shape", [(7,), (4, 7), (0, 7), (2, 3, 7), (2, 1, 3, 7)], ids=str)
def test_starts_as_its_base(shape):
    base = nn.Linear(7, 5)
    x = torch.randn(shape)
    assert torch.equal(MoRLinear(base)(x), base(x))


def test_computes_the_equation(layer):
    x = torch.randn(4, 7)
    router = layer.mor_router
    tensors = (layer.weight, layer.bias, layer.mor_A, layer.mor_B, router.weight, router.bias)
    y = mor_linear(x, *tensors, ranks=(1, 3), scaling=(2.0, 2.0), backend="eager")
    torch.testing.assert_close(layer(x), y)
    assert not torch.allclose(layer(x), layer.base(x), atol=1e-2)


def test_first_step_reaches_b_alone():
    layer = MoRLinear(nn.Linear(7, 5))
    layer(torch.randn(4, 7)).pow(2).sum().backward()
    assert layer.mor_B.grad.abs().sum() > 0
    for name in ("mor_A", "mor_router.weight", "mor_router.bias"):
        assert not layer.get_parameter(name).grad.any(), name


def test_freezes_its_base_and_nothing_else():
    base = nn.Linear(7, 5)
    layer = MoRLinear(base)
    assert layer.base is base
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == {"base.weight", "base.bias"}


def test_shapes_and_names():
    layer = MoRLinear(nn.Linear(7, 5))
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.adapter_parameters().items()}
    assert shapes == {"mor_A": (14, 7), "mor_B": (14, 5), "mor_router.weight": (4, 7), "mor_router.bias": (4,)}


def test_one_expert_without_bypass_has_no_router():
    layer = MoRLinear(nn.Linear(7, 5), MoRConfig(ranks=(4,), alphas=(2.0,), bypass=False))
    nn.init.normal_(layer.mor_B)
    assert layer.mor_router is None and layer.gates(torch.zeros(7)) is None
    x = torch.randn(3, 7)
    torch.testing.assert_close(layer(x), layer.base(x) + 0.5 * x @ layer.mor_A.T @ layer.mor_B)


def test_shows_what_hosts_read(layer):
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias
    assert (layer.in_features, layer.out_features) == (7, 5)
    assert MoRLinear(nn.Linear(7, 5, bias=False)).bias is None


def test_a_initialised_like_a_linear_layer():
    torch.manual_seed(0)
    layer = MoRLinear(nn.Linear(100, 5))
    bound = 100**-0.5
    assert 0.95 * bound < layer.mor_A.abs().max() <= bound
    assert not layer.mor_B.any()


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_adapters_are_at_least_fp32_and_the_output_is_the_bases(base, adapter):
    layer = MoRLinear(nn.Linear(7, 5, dtype=base))
    assert {parameter.dtype for parameter in layer.adapter_parameters().values()} == {adapter}
    assert layer(torch.randn(2, 7, dtype=base)).dtype == base


def test_follows_to_bfloat16(layer):
    layer = layer.to(torch.bfloat16)
    assert layer(torch.randn(2, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_gives_what_the_base_gives(layer):
    x = torch.randn(2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == layer.base(x).dtype == torch.bfloat16


def test_dropout_acts_on_the_experts_and_only_in_training():
    layer = MoRLinear(nn.Linear(64, 5), MoRConfig(dropout=0.5))
    nn.init.normal_(layer.mor_B)
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    kept = F.dropout(x, 0.5)
    router = layer.mor_router
    tensors = (layer.weight, layer.bias, layer.mor_A, layer.mor_B, router.weight, router.bias)
    expected = mor_linear(x, *tensors, ranks=(2, 4, 8), scaling=(2.0,) * 3, expert_input=kept)
    assert torch.equal(dropped, expected)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_disabled_is_its_base(layer):
    x = torch.randn(3, 7)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


def test_repr_shows_the_backend(layer):
    assert "backend=concat" in repr(layer)
    layer.backend = "eager"
    assert "backend=eager" in repr(layer)
    layer.backend = "triton"  # may be asked for before the layer moves to a card
    assert "backend=triton" in repr(layer)


def test_both_backends_agree(layer):
    x = torch.randn(3, 7)
    concat = layer(x)
    layer.backend = "eager"
    torch.testing.assert_close(layer(x), concat)


def test_unknown_backend_is_refused_at_once(layer):
    with pytest.raises(ValueError, match="backend must be one of"):
        layer.backend = "quick"
    assert layer.backend == "auto"


def test_copies_and_pickles(layer):
    x = torch.randn(3, 7)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), layer(x)) and twin.mor_A is not layer.mor_A


def test_checkpointing_gives_the_same_gradients(layer):
    x = torch.randn(3, 7)
    parameters = list(layer.adapter_parameters().values())
    plain = torch.autograd.grad(layer(x).pow(2).sum(), parameters)
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).pow(2).sum(), parameters
    )
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_is_called_as_a_linear_layer_is(layer):
    x = torch.randn(3, 7)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_a_base_with_hooks_is_refused(how):
    """MoRLinear computes with the weight, so they would be skipped in silence."""
    base = nn.Linear(2, 2)
    if how == "hook":
        base.register_forward_hook(lambda *_: None)
    elif how == "pre-hook":
        base.register_forward_pre_hook(lambda *_: None)
    else:
        base.forward = lambda x: x
    with pytest.raises(ValueError, match="no forward hooks"):
        MoRLinear(base)
    assert base.weight.requires_grad


def test_gates_sum_to_one_with_the_bypass(layer):
    gates = layer.gates(torch.randn(2, 3, 7))
    assert gates.shape == (2, 3, 3)
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 3))


class Negated(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


class Quantised(nn.Linear):
    """As bitsandbytes' layers: packed integers for a weight, and a forward that makes floats of them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((base.weight.detach() / scale).round().to(torch.int8).view(-1, 1), False)
        self.bias = base.bias
        self.register_buffer("scale", scale)

    def forward(self, x):
        weight = self.weight.view(self.out_features, self.in_features).to(x.dtype) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias.to(x.dtype))


@pytest.mark.parametrize("base", [Negated(7, 5), Quantised(nn.Linear(7, 5))], ids=lambda base: type(base).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_with_a_forward_of_its_own_is_called(base, dtype):
    layer, x = MoRLinear(copy.deepcopy(base)), torch.randn(3, 7, dtype=dtype)
    if dtype == torch.bfloat16 and isinstance(base, Negated):
        layer = layer.to(dtype)
    assert torch.equal(layer(x), layer.base(x))
    nn.init.normal_(layer.mor_B)
    router = layer.mor_router
    experts = (layer.mor_A, layer.mor_B, router.weight, router.bias)
    branch = mor_branch(x, *experts, ranks=(2, 4, 8), scaling=(2.0,) * 3)
    assert torch.equal(layer(x), layer.base(x) + branch)
    assert layer(x).dtype == dtype and "base is called" in repr(layer)
    layer(x).float().pow(2).sum().backward()
    assert all(parameter.grad.any() for parameter in layer.adapter_parameters().values())
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


class Sharded(torch.Tensor):
    """As FSDP2 keeps a parameter but for forward and backward, when it is whole."""


def test_repr_does_not_say_what_sharding_does_outside_of_forward():
    layer, seen = MoRLinear(nn.Linear(7, 5)), []
    layer.register_forward_hook(lambda *_: seen.append(repr(layer)))
    whole, layer.base.weight = layer.base.weight, nn.Parameter(layer.base.weight.as_subclass(Sharded), False)
    assert "base is called while its weight is a Sharded of torch.float32" in repr(layer)
    layer.base.weight = whole
    layer(torch.randn(3, 7))
    assert "base is called" not in seen[0]


def test_adapters_of_integers_are_fp32():
    layer = MoRLinear(Quantised(nn.Linear(7, 5)))
    assert layer.mor_A.dtype == torch.float32 and layer.weight.dtype == torch.int8


@pytest.mark.parametrize("base", [nn.Conv2d(1, 1, 1), MoRLinear(nn.Linear(2, 2))], ids=lambda b: type(b).__name__)
def test_refuses_what_is_not_a_linear_layer(base):
    with pytest.raises(TypeError, match="base must be an nn.Linear"):
        MoRLinear(base)
    assert any(parameter.requires_grad for parameter in base.parameters())


def test_torchao_weights():
    quantisation = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(64, 32))
    quantisation.quantize_(base, quantisation.Int8WeightOnlyConfig())
    layer, x = MoRLinear(base[0]), torch.randn(3, 64)
    assert torch.equal(layer(x), base[0](x))
    nn.init.normal_(layer.mor_B)
    layer(x).pow(2).sum().backward()
    assert all(parameter.grad.any() for parameter in layer.adapter_parameters().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_bitsandbytes_layers(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = getattr(bitsandbytes.nn, kind)(64, 32).cuda()
    layer, x = MoRLinear(base).cuda(), torch.randn(3, 64, device="cuda", dtype=torch.float16)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.mor_B)
    layer(x).float().pow(2).sum().backward()
    assert all(parameter.grad.any() for parameter in layer.adapter_parameters().values())


def test_a_parametrised_base_keeps_its_buffers_and_its_bits():
    """spectral_norm takes a step of its power iteration whenever the weight is read in training."""
    torch.manual_seed(0)
    base = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)).train()
    twin = copy.deepcopy(base)
    layer = MoRLinear(base)
    repr(layer)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), twin(x))
    for one, other in zip(base.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_base_would_no_longer_run(register):
    base = nn.Linear(4, 4)
    getattr(base, register)(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        MoRLinear(base)
