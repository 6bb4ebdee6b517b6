"""Bases that torchao or bitsandbytes has quantised, in a whole model; and a stand-in that is always there."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mor import check, disabled, eject, inject, load, save, to_lora, trainable_parameters

timm = pytest.importorskip("timm")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Sealed(Tensor):
    """As torchao's weights: a linear layer can use it, and whatever else would look at its values fails."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (Tensor.any, Tensor.matmul, Tensor.__rmatmul__, torch.matmul, torch.cat):
            raise NotImplementedError(f"{cls.__name__} cannot do {func.__name__}")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        kept = (Tensor.detach, Tensor.requires_grad_, Tensor.__deepcopy__)
        return result.as_subclass(cls) if func in kept else result

    def new_empty(self, *args, **kwargs):
        return super().new_empty(*args, **kwargs).as_subclass(type(self))


def sealed(base: nn.Linear) -> nn.Linear:
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Sealed), requires_grad=False)
    return base


def of_torchao(config: str, base: nn.Linear) -> nn.Linear:
    quantisation = pytest.importorskip("torchao.quantization")
    quantisation.quantize_(base, getattr(quantisation, config)())
    return base


def of_bitsandbytes(kind: str, settings: dict[str, object], base: nn.Linear) -> nn.Linear:
    bitsandbytes = pytest.importorskip("bitsandbytes", minversion="0.50")
    layer = getattr(bitsandbytes.nn, kind)(base.in_features, base.out_features, **settings)
    layer.load_state_dict(base.state_dict())
    layer.to("cpu")  # it is this that quantises
    # Otherwise evaluation packs the weights anew where the processor can do so, and no gradient passes them again.
    layer.support_avx512bf16_for_cpu = False
    return layer


QUANTISED = {
    "stand-in": sealed,
    "torchao int8": partial(of_torchao, "Int8WeightOnlyConfig"),
    "torchao int8 dynamic": partial(of_torchao, "Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes int8": partial(of_bitsandbytes, "Linear8bitLt", {"has_fp16_weights": False}),
    "bitsandbytes nf4": partial(of_bitsandbytes, "LinearNF4", {}),
    "bitsandbytes fp4 in bf16": partial(of_bitsandbytes, "LinearFP4", {"compute_dtype": torch.bfloat16}),
}


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.vision_transformer.VisionTransformer(**sizes).eval()


@pytest.fixture(params=QUANTISED)
def quantise(request):
    return QUANTISED[request.param]


@pytest.fixture
def build(quantise):
    def model() -> nn.Module:
        model = vit()
        for block in model.blocks:
            block.attn.qkv, block.attn.proj = quantise(block.attn.qkv), quantise(block.attn.proj)
            block.mlp.fc1, block.mlp.fc2 = quantise(block.mlp.fc1), quantise(block.mlp.fc2)
        return model.eval()

    return model


@torch.no_grad()
def perturb(parameters) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.normal_(std=0.2, generator=generator)


def learns(model: nn.Module) -> bool:
    model.train()(X).square().sum().backward()
    model.eval()
    return all(parameter.grad.any() for parameter in trainable_parameters(model).values())


def test_an_injected_model(build, tmp_path):
    model = build()
    layer, output = model.blocks[0].mlp.fc1, model(X)
    inject(model, "all", example=X)
    assert torch.equal(model(X), output) and "base is called" in repr(model.blocks[0].mlp.fc1)
    perturb(trainable_parameters(model).values())
    assert not torch.equal(model(X), output) and learns(model)
    with disabled(model):
        assert torch.equal(model(X), output)
    save(model, tmp_path / "mor", extra="head.*")
    assert torch.equal(load(build(), tmp_path / "mor")(X), model(X))
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    report = to_lora(model, [X], tmp_path / "lora")
    assert len(report.layers) == 8 and report.outputs.overall > 0
    assert torch.equal(eject(model)(X), output) and model.blocks[0].mlp.fc1 is layer


def test_a_model_of_peft(build, tmp_path):
    peft = pytest.importorskip("peft")
    from mor.peft_format import from_peft
    from mor.peft_plugin import MorConfig
    from mor.peft_plugin import check as check_peft

    plain = build()
    output = plain(X)
    model = peft.get_peft_model(plain, MorConfig(target_modules=["qkv", "proj", "fc"])).eval()
    assert torch.equal(model(X), output)
    perturb(trainable_parameters(model).values())
    assert not torch.equal(model(X), output) and learns(model)
    check_peft(model, X)
    with model.disable_adapter():
        assert torch.equal(model(X), output)
    model.save_pretrained(tmp_path / "peft")
    assert torch.equal(peft.PeftModel.from_pretrained(build(), tmp_path / "peft").eval()(X), model(X))
    from_peft(tmp_path / "peft", tmp_path / "mor")
    torch.testing.assert_close(load(build(), tmp_path / "mor")(X), model(X))
    to_lora(model, [X], tmp_path / "lora")
    assert torch.equal(model.unload()(X), output)


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")  # so it cannot merge
def test_peft_loads_the_nearest_lora(build, tmp_path):
    """A single expert without bypass has no gates, and is a LoRA."""
    peft = pytest.importorskip("peft")
    model = inject(build(), "fc", ranks=(2,), bypass=False)
    perturb(trainable_parameters(model).values())
    assert to_lora(model, [X], tmp_path).outputs.overall < 0.01
    lora = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(lora(X), model(X), rtol=0.02, atol=0.02)


def test_quantised_after_injection(quantise):
    model = inject(vit(), "all")
    perturb(trainable_parameters(model).values())
    for module in list(model.modules()):
        if hasattr(module, "mor_A"):
            module.base = quantise(module.base)
    assert learns(model)
    check(model, X)
    assert "base is called" in repr(model.blocks[0].mlp.fc1)


def test_what_is_quantised_is_not_saved(tmp_path):
    build = partial(of_torchao, "Int8WeightOnlyConfig")
    model = inject(nn.Sequential(build(nn.Linear(64, 64))), "0")
    with pytest.raises(ValueError, match="extra must name plain tensors, but these are quantised: 0.base.weight"):
        save(model, tmp_path, extra="*.base.weight")
    assert not list(tmp_path.iterdir())
