import copy
import io
from itertools import product

import pytest
import torch
from torch import nn

from mor import MoRLinear, disabled, eject, inject, load, save, trainable_parameters
from mor.hosts import linear_names, note, prepare, restore
from mor.injection import mor_layers


def multihead(**options) -> nn.MultiheadAttention:
    """Width 8, 2 heads, with biases that are not zero."""
    attention = nn.MultiheadAttention(8, 2, **options).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.4)
    return attention


def inputs(attention: nn.MultiheadAttention, kind: str, batch: int = 3, queries: int = 5, keys: int = 7):
    """query, key, value; in self-attention the same tensor."""

    def tokens(length: int, width: int) -> torch.Tensor:
        x = torch.randn(batch, length, width)
        return x if attention.batch_first else x.transpose(0, 1)

    if kind == "self":
        return (tokens(queries, 8),) * 3
    if kind == "memory":
        memory = tokens(keys, attention.kdim)
        return tokens(queries, 8), memory, memory
    return tokens(queries, 8), tokens(keys, attention.kdim), tokens(keys, attention.vdim)


def called(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    twin = copy.deepcopy(attention)
    prepare(twin, ["out_proj"])
    return twin


def same(one, other):
    assert (one is None) == (other is None)
    if one is not None:
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 4},
    {"kdim": 6, "vdim": 4, "bias": False, "batch_first": True, "add_bias_kv": True},
]


@pytest.mark.parametrize("kind", ["self", "memory", "all different"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_multihead_attention_computes_the_same(options, kind):
    attention = multihead(**options)
    if kind == "self" and "kdim" in options:
        kind = "all different"
    if kind == "memory" and "kdim" in options:
        options = {**options, "vdim": 6}
        attention = multihead(**options)
    twin = called(attention)
    x = inputs(attention, kind)
    keys = 5 if kind == "self" else 7
    masks = [
        {},
        {"attn_mask": torch.rand(5, keys) > 0.6},
        {"attn_mask": torch.randn(5, keys)},
        {"attn_mask": torch.randn(3 * 2, 5, keys)},
        {"key_padding_mask": torch.arange(keys).expand(3, -1) >= torch.tensor([[keys], [2], [4]])},
        {"attn_mask": torch.randn(5, keys), "key_padding_mask": torch.randn(3, keys)},
    ]
    if "attn_mask" in masks[1]:
        masks[1]["attn_mask"][:, 0] = False
    for mask, need, average in product(masks, (True, False), (True, False)):
        settings = {**mask, "need_weights": need, "average_attn_weights": average}
        for one, other in zip(twin(*x, **settings), attention(*x, **settings), strict=True):
            same(one, other)


@pytest.mark.parametrize(("training", "gradients"), list(product([True, False], repeat=2)))
@pytest.mark.parametrize("kind", ["self", "memory", "all different"])
@pytest.mark.parametrize("options", [*OPTIONS[:6], {"batch_first": True, "bias": False}], ids=str)
def test_multihead_attention_lies_in_memory_as_before(options, kind, training, gradients):
    """What a model does to the output with view must work with an adapter, too."""
    attention = multihead(**options).train(training)
    twin = called(attention)
    x = inputs(attention, kind)
    keys = x[1].shape[int(attention.batch_first)]
    masks = [
        {},
        {"attn_mask": torch.zeros(5, keys)},
        {"attn_mask": torch.zeros(5, keys, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(3, keys, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(3, keys)},
    ]
    with torch.set_grad_enabled(gradients):
        for mask, need, average in product(masks, (True, False), (True, False)):
            settings = {**mask, "need_weights": need, "average_attn_weights": average}
            strides = [[y.stride() for y in module(*x, **settings) if y is not None] for module in (twin, attention)]
            assert strides[0] == strides[1], settings


def test_multihead_attention_of_frozen_weights_lies_in_memory_as_before():
    attention = multihead(batch_first=True).requires_grad_(False)
    x = torch.randn(2, 5, 8)
    for batch in (x, x.clone().requires_grad_()):
        assert called(attention)(batch, batch, batch)[0].stride() == attention(batch, batch, batch)[0].stride()
    one = x[0]
    assert called(attention)(one, one, one)[0].stride() == attention(one, one, one)[0].stride()


@pytest.mark.parametrize("need", [True, False])
def test_multihead_attention_without_a_batch(need):
    attention = multihead(batch_first=True)
    x = torch.randn(5, 8)
    padding = torch.tensor([False, False, True, False, True])
    for mask in (None, torch.randn(5, 5), torch.randn(2, 5, 5)):
        for one, other in zip(
            called(attention)(x, x, x, attn_mask=mask, need_weights=need),
            attention(x, x, x, attn_mask=mask, need_weights=need),
            strict=True,
        ):
            same(one, other)
    same(called(attention)(x, x, x, padding)[0], attention(x, x, x, padding)[0])


@pytest.mark.parametrize("need", [True, False])
def test_multihead_attention_with_a_causal_hint(need):
    attention = multihead(batch_first=True)
    x = torch.randn(2, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    settings = {"attn_mask": mask, "is_causal": True, "need_weights": need}
    same(called(attention)(x, x, x, **settings)[0], attention.train()(x, x, x, **settings)[0])
    with pytest.raises(ValueError, match="attn_mask is needed, got None"):
        called(attention)(x, x, x, is_causal=True)


@pytest.mark.parametrize("need", [True, False])
def test_multihead_attention_with_a_causal_hint_and_padding(need):
    attention = multihead(batch_first=True).train()
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5).expand(3, -1) >= torch.tensor([[5], [2], [4]])
    settings = {
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(5).isinf(),
        "is_causal": True,
        "need_weights": need,
    }
    output = called(attention)(x, x, x, padding, **settings)[0]
    same(output, attention(x, x, x, padding, **settings)[0])
    assert not torch.allclose(output, attention(x, x, x, **settings)[0], atol=1e-3)


def test_multihead_attention_refuses_what_it_does_not_understand():
    x = torch.randn(2, 5, 8)
    twin = called(multihead(batch_first=True))
    with pytest.raises(TypeError, match="attn_mask must be of bool or a floating-point type, got torch.int64"):
        twin(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.int64))
    nested = torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(3, 8)], layout=torch.jagged)
    with pytest.raises(ValueError, match="takes no nested tensors"):
        twin(nested, nested, nested)


@pytest.mark.parametrize("need", [True, False])
def test_multihead_attention_drops_out_only_in_training(need):
    attention = called(multihead(dropout=0.5, batch_first=True))
    x = torch.randn(2, 5, 8)
    one, other = attention(x, x, x, need_weights=need)[0], attention(x, x, x, need_weights=need)[0]
    assert torch.equal(one, other)
    attention.train()
    assert not torch.allclose(attention(x, x, x, need_weights=need)[0], one)


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_drops_out_what_it_did(need, batch_first):
    attention = multihead(dropout=0.3, batch_first=batch_first).train()
    x, outputs = torch.randn(2, 5, 8), []
    for module in (called(attention), attention):
        torch.manual_seed(4)
        outputs.append(module(x, x, x, need_weights=need))
    for one, other in zip(*outputs, strict=True):
        same(one, other)


def test_multihead_attention_has_the_same_gradients():
    attention = multihead(batch_first=True).double()
    twin = called(attention)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for module in (attention, twin):
        module(x, x, x)[0].pow(2).sum().backward()
    for (name, one), (other_name, other) in zip(attention.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other_name
        same(one.grad, other.grad)


def test_what_a_host_keeps_in_bare_parameters_has_a_name():
    model = nn.ModuleDict({"a": multihead(), "b": multihead(kdim=6, vdim=4)})
    assert linear_names(model) == {
        "a.in_proj": (8, 24),
        "a.out_proj": (8, 8),
        "b.q_proj": (8, 8),
        "b.k_proj": (6, 8),
        "b.v_proj": (4, 8),
        "b.out_proj": (8, 8),
    }


def test_names_of_the_base_stay_as_they_were():
    attention = multihead()
    before, parameters = list(attention.state_dict()), dict(attention.named_parameters())
    changes = prepare(attention, ["in_proj"])
    assert isinstance(attention, nn.MultiheadAttention) and type(attention) is not nn.MultiheadAttention
    assert list(attention.state_dict()) == before
    assert all(p is parameters[name] for name, p in attention.named_parameters())
    assert attention.in_proj.weight is attention.in_proj_weight
    attention.load_state_dict({name: torch.ones_like(p) for name, p in parameters.items()})
    assert attention.in_proj.weight.eq(1).all()
    restore(attention, changes)
    assert type(attention) is nn.MultiheadAttention and "in_proj" not in dict(attention.named_children())


def test_attentions_of_another_make_are_let_be():
    """A subclass without the usual parameters stands in the model, and nobody wants to adapt it."""

    class Without(nn.MultiheadAttention):
        def __init__(self):
            super().__init__(8, 2)
            del self.in_proj_weight, self.in_proj_bias

    model = nn.ModuleDict({"a": Without(), "b": nn.Linear(2, 2)})
    assert list(linear_names(model)) == ["a.out_proj", "b"]
    assert list(mor_layers(inject(model, "b"))) == ["b"]


def test_preparing_twice_changes_nothing_more():
    attention = multihead()
    first = prepare(attention, ["in_proj"])
    assert prepare(attention, ["in_proj", "out_proj"]) == ()
    restore(attention, first)
    assert type(attention) is nn.MultiheadAttention


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", ["__class__", "in_proj", "k_proj", "use_nested_tensor"])
def test_a_change_that_fails_undoes_those_before_it(monkeypatch, failing, kind):
    model = nn.Sequential(encoder(), multihead(kdim=6, vdim=4))
    last = {"use_nested_tensor": model[0], "k_proj": model[1]}.get(failing, model[0].layers[1].self_attn)
    before, set_attribute = snapshot(model), nn.Module.__setattr__

    def fail(module, name, value):
        if module is last and name == failing:
            raise kind
        set_attribute(module, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", fail)
    with pytest.raises(kind):
        prepare(model, linear_names(model))
    assert snapshot(model) == before


def encoder(**options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)


def timm_model(name: str, **options) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=3, **options)


def eva() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.eva.Eva(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)


def swin_v2() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.SwinTransformerV2(
        img_size=32,
        patch_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
        num_classes=3,
        drop_path_rate=0.0,
    )


def torchvision_swin(version: int) -> nn.Module:
    swin = pytest.importorskip("torchvision").models.swin_transformer
    more = {}
    if version == 2:
        more = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [3, 3], stochastic_depth_prob=0.0, num_classes=3, **more)


def torchvision_video_swin() -> nn.Module:
    swin = pytest.importorskip("torchvision").models.video.swin_transformer
    return swin.SwinTransformer3d(
        [2, 4, 4], 16, [2, 2], [2, 2], window_size=[2, 3, 3], stochastic_depth_prob=0.0, num_classes=3
    )


def open_clip_tower(**options) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    more = {"mlp_ratio": 2.0, "output_dim": 8, **options}
    return open_clip.transformer.VisionTransformer(16, 8, width=32, layers=2, heads=2, **more)


def torchvision_vit() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 32, 64, num_classes=3)


HOSTS = {
    "timm BEiT": (
        lambda: timm_model("beit_base_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2),
        16,
    ),
    "timm EVA": (eva, 16),
    "timm SwinV2": (swin_v2, 32),
    "torchvision ViT": (torchvision_vit, 16),
    # 28 / 4 = 7 tokens a side: not a multiple of the window of 3.
    "torchvision Swin": (lambda: torchvision_swin(1), 28),
    "torchvision SwinV2": (lambda: torchvision_swin(2), 28),
    "torchvision video Swin": (torchvision_video_swin, (6, 28, 28)),
    "open_clip": (open_clip_tower, 16),
    "open_clip custom": (lambda: open_clip_tower(block_type="custom"), 16),
    "open_clip custom, normalised": (
        lambda: open_clip_tower(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True),
        16,
    ),
    "nn.TransformerEncoder": (encoder, None),
    "nn.TransformerEncoder, norm first": (lambda: encoder(norm_first=True, activation="gelu"), None),
}


@pytest.fixture(params=HOSTS, ids=str)
def host(request) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    build, size = HOSTS[request.param]
    model = build().eval()
    for name, parameter in model.named_parameters():
        # Some are born as zeros, such as torchvision's head, and would hide what is in front of them.
        is_scale = parameter.dim() == 1 and "bias" not in name
        nn.init.normal_(parameter, mean=float(is_scale), std=0.2)
    if size is None:
        return model, torch.randn(3, 5, 8)
    return model, torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))


def snapshot(model: nn.Module) -> dict:
    """Every module and parameter by identity, and every plain attribute."""
    plain = (bool, int, float, str, type(None))
    modules = {
        name: (id(module), type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain)})
        for name, module in model.named_modules()
    }
    return modules | {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


def perturb(model: nn.Module, std: float = 0.1) -> None:
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, std=std)


def test_all_of_a_block_is_alive_in_both_modes(host):
    model, x = host
    inject(model, ["qkv", "proj", "fc"])
    perturb(model)
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            for name, layer in mor_layers(model).items():
                adapted = model(x)
                kept = layer.mor_B.clone()
                layer.mor_B.zero_()
                assert not torch.equal(model(x), adapted), (name, training)
                layer.mor_B.copy_(kept)
        model.zero_grad()
        model(x).pow(2).sum().backward()
        dead = [name for name, p in trainable_parameters(model).items() if p.grad is None or not p.grad.any()]
        assert not dead, training


def test_the_same_at_first_and_after_eject(host):
    model, x = host
    before, names = snapshot(model), list(model.state_dict())
    with torch.no_grad():
        output = model(x)
        inject(model, ["qkv", "proj", "fc"])
        torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-5)
        perturb(model)
        assert not torch.allclose(model(x), output, atol=1e-2)
        with disabled(model):
            torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-5)
        eject(model)
        assert snapshot(model) == before
        assert torch.equal(model(x), output)
    assert list(model.state_dict()) == names


def test_only_fc_leaves_the_attention_alone(host):
    model, x = host
    attentions = {name: type(module) for name, module in model.named_modules() if hasattr(module, "num_heads")}
    inject(model, "fc")
    perturb(model)
    assert {name: type(model.get_submodule(name)) for name in attentions} == attentions
    model(x).pow(2).sum().backward()
    assert all(p.grad.any() for p in trainable_parameters(model).values())


def test_saved_and_loaded(host, tmp_path):
    model, x = host
    plain = copy.deepcopy(model)
    inject(model, ["qkv", "proj"])
    perturb(model)
    save(model, tmp_path)
    assert torch.equal(load(plain, tmp_path)(x), model(x))
    load(plain, tmp_path)
    before = snapshot(eject(plain))
    load(plain, tmp_path)
    assert snapshot(eject(plain)) == before


def test_copied_and_pickled(host):
    model, x = host
    base = model(x)
    inject(model, ["qkv", "proj"])
    perturb(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        output = twin(x)
        assert torch.equal(output, model(x))
        perturb(twin)
        assert not torch.allclose(twin(x), output, atol=1e-3)
        assert torch.equal(eject(twin)(x), base)
        for one, other in zip(model.buffers(), twin.buffers(), strict=True):
            assert one is not other


def test_moved_with_its_model(host):
    model, x = host
    inject(model, ["qkv", "proj"])
    perturb(model)
    output = model(x)
    assert torch.allclose(model.double()(x.double()).float(), output, atol=1e-5)


@pytest.mark.slow
def test_compiled(host):
    model, x = host
    torch._dynamo.reset()
    inject(model, ["qkv", "proj", "fc"])
    perturb(model)
    for training in (True, False):
        model.train(training).zero_grad()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        y = compiled(x)
        torch.testing.assert_close(y, model(x), atol=1e-5, rtol=1e-5)
        y.pow(2).sum().backward()
        assert all(p.grad.any() for p in trainable_parameters(model).values())


def test_a_bias_added_in_place_has_its_gradients():
    """BEiT adds q's and v's bias to the adapter's output in place, which the backward must survive."""
    model, x = HOSTS["timm BEiT"][0]().eval(), torch.randn(2, 3, 16, 16)
    nn.init.normal_(model.blocks[0].attn.q_bias)
    inject(model, "qkv")
    perturb(model)
    grads = []
    for backend in ("eager", "concat"):
        for layer in mor_layers(model).values():
            layer.backend = backend
        model.zero_grad()
        model(x).pow(2).sum().backward()
        grads.append([p.grad.clone() for p in trainable_parameters(model).values()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_padding_mask_in_evaluation():
    """Nested tensors are switched off: what is seen stays the same."""
    model, x = encoder().eval(), torch.randn(3, 5, 8)
    padding = torch.arange(5).expand(3, -1) >= torch.tensor([[5], [2], [4]])
    with torch.no_grad():
        output = model(x, src_key_padding_mask=padding)
        inject(model, "fc", layers=1)
        adapted = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(adapted[~padding], output[~padding])
        assert not output[padding].any() and adapted[padding].all(), "what docs/zoo.md says of padded positions"
        perturb(model)
        assert not torch.allclose(model(x, src_key_padding_mask=padding)[~padding], output[~padding], atol=1e-3)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(28, 8), (8, 28), (24, 36)])
def test_torchvision_windows_on_maps_that_are_not_square(version, height, width):
    """Where a side fits into one window, only the other one is shifted."""
    model, x = torchvision_swin(version).eval(), torch.randn(2, 3, height, width)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        output = model(x)
        torch.testing.assert_close(inject(model, ["qkv", "proj"])(x), output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(2, 28, 28), (10, 8, 28), (6, 24, 36), (1, 4, 4)])
def test_torchvision_windows_on_videos(size):
    """A window larger than the video shrinks to it, and is not shifted along that side."""
    model, x = torchvision_video_swin().eval(), torch.randn(2, 3, *size)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        output = model(x)
        torch.testing.assert_close(inject(model, ["qkv", "proj"])(x), output, atol=1e-5, rtol=1e-4)
    assert note(torchvision_video_swin(), "features.0.0.attn.qkv") == "attention replaced"


@pytest.mark.parametrize(("of_weights", "of_output"), [(0.5, 0.0), (0.0, 0.5), (0.3, 0.3)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [lambda: torchvision_swin(1), lambda: torchvision_swin(2), torchvision_video_swin])
def test_torchvision_windows_drop_out_what_they_did(build, training, of_weights, of_output):
    """The same draws in the same order, so the same seed drops the same."""
    model = build().train(training)
    size = (6, 28, 28) if "3d" in type(model).__name__ else (28, 28)
    x = torch.randn(2, 3, *size)
    for attention in [module for module in model.modules() if hasattr(module, "attention_dropout")]:
        attention.attention_dropout, attention.dropout = of_weights, of_output
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)

    def output() -> torch.Tensor:
        torch.manual_seed(4)
        return model(x)

    with torch.no_grad():
        before = output()
        prepare(model, [name for name in linear_names(model) if name.endswith("qkv")])
        torch.testing.assert_close(output(), before, atol=1e-4, rtol=1e-4)


def open_clip_attention(**options) -> nn.Module:
    attention = pytest.importorskip("open_clip").transformer.Attention(32, 2, **options).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=str)
def test_open_clip_attention_sees_what_it_saw(options):
    attention = open_clip_attention(**options)
    twin = copy.deepcopy(attention)
    prepare(twin, ["in_proj"])
    x = torch.randn(3, 5, 32)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for mask in (None, hidden, torch.randn(5, 5), hidden.expand(6, 5, 5), torch.randn(6, 5, 5)):
        same(twin(x, mask), attention(x, mask))
    assert not torch.allclose(twin(x, hidden), twin(x), atol=1e-3)


@pytest.mark.parametrize(("of_weights", "of_output"), [(0.5, 0.0), (0.0, 0.5), (0.3, 0.3)])
@pytest.mark.parametrize("training", [True, False])
def test_open_clip_attention_drops_out_what_it_did(training, of_weights, of_output):
    attention = open_clip_attention(attn_drop=of_weights, proj_drop=of_output).train(training)
    twin = copy.deepcopy(attention)
    prepare(twin, ["in_proj"])
    x, outputs = torch.randn(3, 5, 32), []
    for module in (twin, attention):
        torch.manual_seed(4)
        outputs.append(module(x))
    same(*outputs)


@pytest.mark.parametrize("training", [True, False])
def test_open_clip_cosine_attention_drops_out_in_training_only(training):
    """open_clip's own cannot compute it (bmm on four dimensions)."""
    attention = open_clip_attention(scaled_cosine=True, attn_drop=0.5).train(training)
    prepare(attention, ["in_proj"])
    x = torch.randn(3, 5, 32)
    assert torch.equal(attention(x), attention(x)) != training


def test_text_towers_and_their_masks():
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
        text_cfg={"layers": 2, "width": 64, "heads": 2, "vocab_size": 50, "context_length": 6},
    ).eval()
    text = torch.randint(1, 50, (2, 6))
    with torch.no_grad():
        output = model.encode_text(text)
        inject(model, "qkv", exclude="visual.*")
        torch.testing.assert_close(model.encode_text(text), output, atol=1e-5, rtol=1e-5)
        perturb(model)
        assert not torch.allclose(model.encode_text(text), output, atol=1e-3)


def test_siglip_pool_by_name():
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    model, x = transformers.SiglipVisionModel(config).eval(), torch.randn(2, 3, 16, 16)
    output = model(x).pooler_output
    inject(model, "head.attention.*")
    assert list(mor_layers(model)) == ["head.attention.out_proj", "head.attention.in_proj"]
    torch.testing.assert_close(model(x).pooler_output, output, atol=1e-5, rtol=1e-5)
    model(x).pooler_output.pow(2).sum().backward()
    assert all(layer.mor_B.grad.any() for layer in mor_layers(model).values())


class Subclass(nn.MultiheadAttention):
    pass


class OldBeit(nn.Module):
    """As BEiT before it had a flag: q_bias apart, and qkv's weight read."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(8))


def clip_resnet() -> nn.Module:
    return pytest.importorskip("open_clip").model.ModifiedResNet([1, 1, 1, 1], 16, 4, image_size=32, width=8)


@pytest.mark.parametrize(
    ("build", "targets", "message"),
    [
        (lambda: nn.Sequential(Subclass(8, 2)), "*.out_proj", r"0.out_proj: Subclass is a MultiheadAttention"),
        (lambda: nn.Sequential(Subclass(8, 2)), "*.in_proj", r"0.in_proj: Subclass is a MultiheadAttention"),
        (lambda: nn.Sequential(OldBeit()), "*.qkv", "0.qkv: .* has no flag qkv_bias_separate; update timm"),
        (clip_resnet, "attnpool.*", "attnpool.k_proj, .*: the attention pool of CLIP's ResNet only reads"),
        (lambda: nn.Sequential(encoder(), OldBeit()), ["*.linear1", "*.in_proj", "*.qkv"], "1.qkv"),
    ],
)
def test_an_unsupported_host_anywhere_leaves_the_model_untouched(build, targets, message):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        inject(model, targets)
    assert "exclude" in str(error.value)
    assert snapshot(model) == before


def test_a_layer_that_fails_puts_the_hosts_back(host, monkeypatch):
    model, _ = host
    last = list(linear_names(model))[-1]
    before = snapshot(model)

    def fail_at_last(base, config, backend):
        if base is model.get_submodule(last):
            raise KeyboardInterrupt
        return MoRLinear(base, config)

    monkeypatch.setattr("mor.injection.MoRLinear", fail_at_last)
    with pytest.raises(KeyboardInterrupt):
        inject(model, ["qkv", last])
    assert snapshot(model) == before


def encoder_of_two() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def test_eject_does_what_can_be_done_after_blocks_were_removed():
    model, x = encoder_of_two(), torch.randn(2, 3, 8)
    shorter = copy.deepcopy(model)
    shorter.layers, model.layers = shorter.layers[:1], inject(model, "all").layers[:1]
    eject(model)
    assert not mor_layers(model) and type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert model.layers[0].activation_relu_or_gelu and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), shorter(x))


def test_eject_refuses_before_changing_anything_where_blocks_were_moved():
    model = inject(encoder_of_two(), "all", layers=[1])
    model.layers = model.layers[1:]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers that mor.inject did not put there \(layers.0.self_attn.out_proj"):
        eject(model)
    assert snapshot(model) == before and mor_layers(model)


def test_notes():
    model = encoder()
    assert note(model, "layers.0.self_attn.in_proj") == "attention replaced"
    assert note(model, "layers.0.linear1") == "host flag activation_relu_or_gelu, use_nested_tensor"
    assert note(nn.Sequential(nn.Linear(2, 2)), "0") == "plain"
    assert note(nn.Sequential(OldBeit()), "0.qkv").startswith("refused: their host adds q_bias")
