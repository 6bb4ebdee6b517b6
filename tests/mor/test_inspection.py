import random

import numpy as np
import pytest
import torch
from torch import nn

from mor import MoRConfig, check, disabled, inject, preview, trainable_parameters
from mor.injection import mor_layers


def state_of(model: nn.Module) -> dict:
    """Everything that a check could leave behind."""
    return {
        "modules": {name: (id(m), m.training, sorted(vars(m))) for name, m in model.named_modules()},
        "parameters": {n: (id(p), p.requires_grad, id(p.grad), p.clone()) for n, p in model.named_parameters()},
        "grads": {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        "buffers": {n: (id(b), b.clone()) for n, b in model.named_buffers()},
        "random": (torch.get_rng_state(), random.getstate()),
    }


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


class Block(nn.Module):
    """An attention and an MLP, whose layers are used or not as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.skipped = how, 0
        self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 8)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        qkv, fc1, fc2 = self.attn["qkv"], self.mlp["fc1"], self.mlp["fc2"]
        fast = not self.training and not (torch.is_grad_enabled() and x.requires_grad)
        if self.how == "weight" or (self.how == "weight in evaluation" and fast):
            x = x + torch.nn.functional.linear(x, qkv.weight, qkv.bias)
        else:
            x = x + qkv(x)
        if self.how == "skipped at times" and self.training and random.random() < 2:
            self.skipped += 1
            if self.skipped % 3:
                return x
        y = fc1(self.drop(self.norm(x)))
        if self.how == "unused":
            y = fc2(x) + 0 * y
        elif self.how == "detached":
            y = fc2(torch.tanh(y.detach()))
        elif self.how == "no grad":
            with torch.no_grad():
                y = fc1(x)
            y = fc2(torch.tanh(y))
        else:
            y = fc2(torch.tanh(y))
        return x + y


class Net(nn.Module):
    def __init__(self, how: str = "", output=lambda x: x) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(""), Block(how)])
        self.head = nn.Linear(8, 3)
        self.output = output

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.output(self.head(x))


def test_a_living_model_passes_and_is_left_as_it_was(vit, images):
    inject(vit, "all")
    vit.train()
    vit.blocks[1].eval()
    vit(images).pow(2).sum().backward()
    before = state_of(vit)
    check(vit, images)
    assert_same(state_of(vit), before)


def test_buffers_and_trained_adapters_are_left_as_they_were():
    model, x = inject(Net(), "all"), torch.randn(4, 8)
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter)
    mor_layers(model)["blocks.0.mlp.fc1"].mor_A.requires_grad_(False)
    nn.init.zeros_(model.head.weight)
    before = state_of(model)
    check(model, x)
    assert_same(state_of(model), before)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weight", "not called in training: blocks.1.attn.qkv; not called in evaluation: blocks.1.attn.qkv;"),
        ("unused", "without effect on the output in training: blocks.1.mlp.fc1; without effect .* in evaluation"),
        ("detached", "without a gradient in training: blocks.1.mlp.fc1; without a gradient in evaluation"),
        ("no grad", "without a gradient in training: blocks.1.mlp.fc1; without a gradient in evaluation"),
    ],
)
def test_dead_adapters_are_named(how, message):
    model, x = inject(Net(how), "all"), torch.randn(4, 8)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"some adapters are dead; {message}") as error:
        check(model, x)
    assert "blocks.0" not in str(error.value)
    assert_same(state_of(model), before)


def test_a_host_that_reads_weights_only_without_gradients():
    """As nn.TransformerEncoderLayer does: alive in training, and dead when it counts."""
    model = inject(Net("weight in evaluation"), "qkv")
    with pytest.raises(ValueError, match="some adapters are dead; not called in evaluation: blocks.1.attn.qkv"):
        check(model, torch.randn(4, 8))


def test_layers_that_are_skipped_at_times_are_alive():
    model, x = inject(Net("skipped at times"), "all"), torch.randn(4, 8)
    before = state_of(model)
    check(model, x)
    assert_same(state_of(model), before)


def test_the_fast_path_of_torch_is_seen():
    """Were the flag not set, the check would see it, though hooks would hide it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = inject(nn.TransformerEncoder(layer, 2), "fc", layers=0)
    check(model, torch.randn(2, 3, 8))
    model.layers[0].activation_relu_or_gelu = 1
    with pytest.raises(ValueError, match="not called in evaluation: layers.0.linear1, layers.0.linear2"):
        check(model, torch.randn(2, 3, 8))


def test_a_head_of_zeros_hides_nothing(vit, images):
    nn.init.zeros_(vit.head.weight)
    check(inject(vit, "fc"), images)


def test_a_frozen_scale_of_zeros_is_named(vit, images):
    nn.init.zeros_(vit.blocks[1].norm2.weight)
    nn.init.zeros_(vit.blocks[1].norm2.bias)
    message = r"blocks.1.mlp.fc1.* \(frozen parameters that are all zero: blocks.1.norm2.*train or set them first"
    with pytest.raises(ValueError, match=message):
        check(inject(vit, "fc"), images)


@pytest.mark.parametrize(
    "output",
    [lambda x: (x, None), lambda x: {"logits": x, "n": 3}, lambda x: [{"a": (x, x.argmax())}]],
)
def test_outputs_of_many_kinds(output):
    check(inject(Net(output=output), "all"), torch.randn(4, 8))


def test_inputs_of_many_kinds():
    model, x = inject(Net(), "all"), torch.randn(4, 8)
    check(model, (x,))
    check(model, {"x": x})


def test_what_cannot_be_checked(vit, images):
    with pytest.raises(ValueError, match="no Mixture-of-Ranks layers to check"):
        check(vit, images)
    inject(vit, "fc")
    with pytest.raises(ValueError, match="values that are not finite"):
        check(vit, images * float("inf"))
    with disabled(vit), pytest.raises(ValueError, match="leave mor.disabled first"):
        check(vit, images)
    with pytest.raises(ValueError, match="on the meta device"):
        check(vit.to("meta"), images)
    with pytest.raises(ValueError, match="must hold floating-point tensors to be checked, got int"):
        check(inject(Net(output=lambda _: 3), "fc"), torch.randn(4, 8))


def test_inject_with_an_example(vit, images):
    inject(vit, "all", example=images)
    assert len(mor_layers(vit)) == 12
    model = Net("weight")
    before = state_of(model)
    with pytest.raises(ValueError, match="not called in training: blocks.1.attn.qkv"):
        inject(model, "all", example=torch.randn(4, 8))
    # The adapters were drawn at random.
    assert_same({**state_of(model), "random": ()}, {**before, "random": ()})
    inject(model, "all", exclude="blocks.1.attn.qkv", example=torch.randn(4, 8))


def test_compiled_models_are_checked_as_written(vit, images):
    inject(vit, "fc")
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    check(compiled, images)
    assert not any("forward" in vars(layer) for layer in mor_layers(vit).values())


def test_preview_is_what_inject_does(vit):
    config = MoRConfig(ranks=(1, 3), bypass=False)
    before = state_of(vit)
    shown = preview(vit, ["qkv", "fc"], config, layers=[0, 1])
    assert_same(state_of(vit), before)
    inject(vit, ["qkv", "fc"], config, layers=[0, 1])
    assert shown.layers == len(mor_layers(vit)) == 6
    assert shown.parameters == sum(p.numel() for p in trainable_parameters(vit).values())
    row = shown.rows[0]
    assert (row.name, row.role, row.layers, row.in_features, row.out_features, row.host) == (
        "blocks.*.attn.qkv",
        "qkv",
        2,
        32,
        96,
        "plain",
    )


def test_preview_of_hosts_is_a_table():
    class Subclass(nn.MultiheadAttention):
        pass

    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model.layers[1].self_attn = Subclass(8, 2, batch_first=True)
    model.layers[1].linear1.register_forward_hook(lambda *_: None)
    assert str(preview(model, ["qkv", "fc1"], ranks=(4,), bypass=False)).splitlines() == [
        "layers  name                        role  in x out  parameters  host",
        "     1  layers.*.self_attn.in_proj  qkv   8 x 24           128  attention replaced",
        "     1  layers.*.linear1            fc1   8 x 16            96  host flag activation_relu_or_gelu,"
        " use_nested_tensor",
        "     1  layers.*.self_attn.in_proj  qkv   8 x 24           128  refused: Subclass is a MultiheadAttention,"
        " which only reads their weights",
        "     1  layers.*.linear1            fc1   8 x 16            96  refused: forward hooks",
        "     2  in all                                             224",
    ]


def test_preview_counts_a_shared_layer_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared})
    shown = preview(model, "*")
    inject(model, "*")
    assert shown.layers == 1
    assert shown.parameters == sum(p.numel() for p in trainable_parameters(model).values())


def test_preview_needs_a_plain_model_and_matching_targets(vit):
    with pytest.raises(ValueError, match="target 'fc3' matches no"):
        preview(vit, "fc3")
    with pytest.raises(TypeError, match="mor.preview has no example, because it runs nothing"):
        preview(vit, "fc", example=torch.zeros(1))
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        preview("vit", "fc")
    inject(vit, "fc")
    with pytest.raises(ValueError, match="already"):
        preview(vit, "fc")


def test_preview_shows_layers_without_a_role(vit):
    vit.blocks[0].mixer = nn.Linear(32, 32)
    shown = preview(vit, "all")
    row = shown.rows[-1]
    assert (row.name, row.role, row.layers, row.host) == ("blocks.*.mixer", "", 1, "without a role")
    assert shown.layers == 12 and shown.parameters == preview(vit, "all", exclude="*.mixer").parameters
    assert all(row.is_adapted for row in preview(vit, "fc").rows)


def test_an_example_that_is_at_fault_is_named(vit, images):
    with pytest.raises(ValueError, match=r"example must hold at least one image, got a tensor of shape \(0, 3"):
        inject(vit, "fc", example=images[:0])
    model = Net()
    with pytest.raises(ValueError, match="example must hold two or more images, because the model normalises over"):
        inject(model, "all", example=torch.randn(1, 8))
    assert not mor_layers(vit) and not mor_layers(model)
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        check("vit", images)


def test_effects_below_the_precision_are_no_fault_of_the_adapter():
    model = inject(Net("unused").half(), "fc")
    with pytest.raises(ValueError, match=r"without effect on the output \(perhaps only in float16: try .* float32\)"):
        check(model, torch.randn(4, 8).half())


class Strange(nn.Module):
    """Draws from numpy, does more than note its mode, and switches gradients off in evaluation by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Identity()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(4, 4)})
        self.merged = False

    def train(self, mode: bool = True):
        self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        np.random.rand(3)
        with torch.set_grad_enabled(self.training):
            return self.mlp["fc1"](x)


def test_a_model_that_switches_gradients_off_in_evaluation_is_alive_and_left_as_it_was():
    model = inject(nn.Sequential(Strange()), "fc")
    layer = model[0].mlp["fc1"]
    vars(layer)["forward"] = forward = lambda *args: type(layer).forward(layer, *args)
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    check(model, torch.randn(2, 4))
    assert np.random.rand() == expected
    assert not model[0].merged and model.training
    assert vars(layer)["forward"] is forward


def test_adapters_are_enabled_again_when_the_model_raises():
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = nn.Identity(), nn.ModuleDict({"fc1": nn.Linear(4, 4)})

        def forward(self, x):
            y = self.mlp["fc1"](x)
            if not self.mlp["fc1"].enabled:
                raise RuntimeError("it cannot do without")
            return y.detach()

    model = inject(nn.Sequential(Raises()), "fc")
    with pytest.raises(RuntimeError, match="cannot do without"):
        check(model, torch.randn(2, 4))
    assert model[0].mlp["fc1"].enabled
