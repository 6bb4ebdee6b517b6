import copy
import json
import os
import stat

import pytest
import torch
from torch import nn

from mor import MoRConfig, eject, inject, load, save, trainable_parameters
from mor.injection import mor_layers


@pytest.fixture
def plain(vit) -> nn.Module:
    return vit


@pytest.fixture
def trained(plain) -> nn.Module:
    vit = copy.deepcopy(plain)
    inject(vit, targets=["qkv", "fc"], ranks=(1, 2))
    for parameter in [*trainable_parameters(vit).values(), *vit.head.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    return vit


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_into_a_plain_model(trained, plain, images, tmp_path):
    save(trained, tmp_path / "adapter", extra="head.*")
    assert load(plain, tmp_path / "adapter") is plain
    assert torch.equal(plain(images), trained(images))
    assert list(mor_layers(plain)) == list(mor_layers(trained))
    assert not any(parameter.requires_grad for name, parameter in plain.named_parameters() if ".mor_" not in name)


def test_into_an_injected_model(trained, plain, images, tmp_path):
    save(trained, tmp_path, extra=["head.weight", "head.bias"])
    inject(plain, targets=["fc", "qkv"], ranks=(1, 2))
    load(plain, tmp_path)
    assert torch.equal(plain(images), trained(images))


def test_without_extra_the_head_stays(trained, plain, tmp_path):
    save(trained, tmp_path)
    before = plain.head.weight.clone()
    load(plain, tmp_path)
    assert torch.equal(plain.head.weight, before)
    assert torch.equal(plain.blocks[0].mlp.fc1.mor_B, trained.blocks[0].mlp.fc1.mor_B)


def test_the_folder_is_two_readable_files(trained, tmp_path):
    save(trained, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]
    description = json.loads((tmp_path / "config.json").read_text())
    assert MoRConfig.from_dict(description["mor"]) == MoRConfig(ranks=(1, 2))
    assert len(description["modules"]) == 9


def test_files_are_as_readable_as_others(trained, tmp_path):
    save(trained, tmp_path)
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_saving_again_replaces(trained, plain, images, tmp_path):
    save(trained, tmp_path)
    nn.init.ones_(trained.blocks[0].mlp.fc1.mor_B)
    save(trained, tmp_path, extra="head.*")
    assert torch.equal(load(plain, tmp_path)(images), trained(images))


def test_a_failed_write_keeps_the_old_file(trained, tmp_path, monkeypatch):
    save(trained, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(trained, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def damaged(tmp_path, how) -> str:
    tensors, config = tmp_path / "adapter.safetensors", tmp_path / "config.json"
    payload = bytearray(tensors.read_bytes())
    description = json.loads(config.read_text())
    if how == "flipped bit":
        payload[-5] ^= 1
        tensors.write_bytes(payload)
        return "is damaged, or not the file"
    if how == "truncated":
        tensors.write_bytes(payload[:-7])
        return "is damaged, or not the file"
    if how == "no tensors":
        tensors.unlink()
        return "holds no adapter: No such file"
    if how == "no config":
        config.unlink()
        return "holds no adapter: No such file"
    if how == "not JSON":
        config.write_text("{")
        return "config.json is damaged"
    if how == "not UTF-8":
        config.write_bytes(b"\xff\xfe{")
        return "config.json is damaged"
    if how == "foreign":
        config.write_text('{"peft_type": "LORA"}')
        return "does not describe a mixture-of-ranks adapter"
    if how == "newer":
        config.write_text(json.dumps({**description, "format_version": 2}))
        return "format version 2, this package reads 1"
    if how == "lacks a field":
        del description["modules"]
        config.write_text(json.dumps(description))
        return "config.json lacks 'modules'"
    config.write_text(json.dumps({**description, "mor": {"ranks": [0]}}))
    return "is damaged: ranks must be"


FAULTS = ["flipped bit", "truncated", "no tensors", "no config", "not JSON", "not UTF-8", "foreign", "newer"]


@pytest.mark.parametrize("how", [*FAULTS, "lacks a field", "bad setting"])
def test_a_damaged_folder_leaves_the_model_as_it_was(trained, plain, tmp_path, how):
    save(trained, tmp_path)
    message = damaged(tmp_path, how)
    before = state(plain)
    with pytest.raises(ValueError, match=message):
        load(plain, tmp_path)
    assert same(state(plain), before) and not mor_layers(plain)
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_all_misfits_in_one_message(trained, tmp_path):
    from safetensors.torch import load_file
    from safetensors.torch import save as serialise

    save(trained, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    tensors["stranger"] = tensors.pop("blocks.0.mlp.fc1.mor_A")
    tensors["blocks.0.mlp.fc2.mor_B"] = torch.zeros(3, 3)
    rewrite(tmp_path, serialise(tensors))
    twin = eject(copy.deepcopy(trained))
    before = state(twin)
    with pytest.raises(ValueError) as error:
        load(twin, tmp_path)
    for part in (
        "missing in the file: blocks.0.mlp.fc1.mor_A",
        "unexpected in the file: stranger",
        "of another shape: blocks.0.mlp.fc2.mor_B (file (3, 3), model (3, 32))",
    ):
        assert part in str(error.value)
    assert same(state(twin), before)


def rewrite(folder, payload: bytes) -> None:
    import hashlib

    (folder / "adapter.safetensors").write_bytes(payload)
    description = json.loads((folder / "config.json").read_text())
    description["sha256"] = hashlib.sha256(payload).hexdigest()
    (folder / "config.json").write_text(json.dumps(description))


def test_another_architecture(trained, tmp_path):
    save(trained, tmp_path)
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lacks the layers blocks.0.attn.qkv"):
        load(model, tmp_path)
    assert not mor_layers(model)


def test_another_width(trained, tmp_path):
    timm = pytest.importorskip("timm")
    save(trained, tmp_path)
    wider = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=3, num_heads=2)
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.mor_A \(file \(3, 32\), model \(3, 64\)\)"):
        load(wider, tmp_path)
    assert not mor_layers(wider) and all(parameter.requires_grad for parameter in wider.parameters())


@pytest.mark.parametrize("other", [{"targets": "fc", "ranks": (1, 2)}, {"targets": ["qkv", "fc"], "ranks": (4,)}])
def test_injected_otherwise(trained, plain, tmp_path, other):
    save(trained, tmp_path)
    inject(plain, **other)
    before = state(plain)
    with pytest.raises(ValueError, match="call mor.eject on it first"):
        load(plain, tmp_path)
    assert same(state(plain), before)


def test_layers_in_two_places(tmp_path):
    def model():
        torch.manual_seed(0)
        shared = nn.Linear(4, 4)
        return nn.ModuleDict({"one": shared, "two": shared})

    trained = inject(model(), "*", ranks=(2,))
    nn.init.normal_(trained["one"].mor_B)
    save(trained, tmp_path, extra="*")
    loaded = load(model(), tmp_path)
    assert loaded["one"] is loaded["two"] and torch.equal(loaded["one"].mor_B, trained["one"].mor_B)


def test_a_trained_head_is_not_forgotten_in_silence(trained, tmp_path):
    trained.head.requires_grad_(True)
    with pytest.warns(
        UserWarning, match="trainable but not saved: head.bias, head.weight; name them with extra="
    ) as warned:
        save(trained, tmp_path)
    assert [warning.filename for warning in warned] == [__file__]
    save(trained, tmp_path, extra="head.*")


def test_bf16_models(trained, plain, images, tmp_path):
    save(trained, tmp_path, extra="head.*")
    load(plain.to(torch.bfloat16), tmp_path)
    assert plain.blocks[0].mlp.fc1.mor_A.dtype == torch.float32
    assert plain(images.bfloat16()).isfinite().all()


def test_save_needs_adapters_and_matches(trained, plain, tmp_path):
    with pytest.raises(ValueError, match="has no Mixture-of-Ranks layers"):
        save(plain, tmp_path)
    with pytest.raises(ValueError, match=r"extra 'classifier.\*' matches nothing"):
        save(trained, tmp_path, extra="classifier.*")
    assert not list(tmp_path.iterdir())


def test_meta_models_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="meta device"):
        save(copy.deepcopy(trained).to("meta"), tmp_path)
    save(trained, tmp_path)
    with pytest.raises(ValueError, match="on the meta device: blocks.0.attn.qkv.mor_A"):
        load(eject(copy.deepcopy(trained)).to("meta"), tmp_path)


def test_the_config_of_another_library_is_not_replaced(trained, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"config.json is not of this package and would be overwritten"):
        save(trained, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == '{"model_type": "vit"}'


def test_a_file_is_no_folder(trained, tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(ValueError, match="directory must be a folder, but .*adapter is a file"):
        save(trained, tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


def test_compiled_models_have_the_names_of_the_original(trained, plain, images, tmp_path):
    save(torch.compile(trained, backend="eager"), tmp_path, extra="head.*")
    assert "_orig_mod" not in (tmp_path / "config.json").read_text()
    twin = copy.deepcopy(plain)
    assert torch.equal(load(twin, tmp_path)(images), trained(images))
    load(torch.compile(plain, backend="eager"), tmp_path)
    assert torch.equal(plain(images), trained(images))


def test_what_was_loaded_besides_is_saved_again(trained, plain, images, tmp_path):
    save(trained, tmp_path / "one", extra="head.*")
    model = load(copy.deepcopy(plain), tmp_path / "one")
    nn.init.normal_(model.head.weight)
    save(model, tmp_path / "two")
    assert torch.equal(load(copy.deepcopy(plain), tmp_path / "two")(images), model(images))
    save(model, tmp_path / "three", extra="norm.*")
    assert json.loads((tmp_path / "three/config.json").read_text())["extra"] == [
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    ]
    head = model.head.weight.clone()
    assert torch.equal(eject(model).head.weight, head)


def test_loaded_parts_that_are_gone_are_not_saved(trained, plain, tmp_path):
    save(trained, tmp_path / "one", extra="head.*")
    model = load(plain, tmp_path / "one")
    model.head = nn.Identity()
    save(model, tmp_path / "two")
    assert json.loads((tmp_path / "two/config.json").read_text())["extra"] == []


def test_removed_blocks_are_not_saved(trained, plain, images, tmp_path):
    trained.blocks, plain.blocks = trained.blocks[:2], plain.blocks[:2]
    save(trained, tmp_path, extra="head.*")
    assert torch.equal(load(plain, tmp_path)(images), trained(images))
    load(trained, tmp_path)


def test_moved_blocks_are_refused(vit, tmp_path):
    inject(vit, "fc", layers=[2])
    vit.blocks = nn.Sequential(*vit.blocks[2:])
    with pytest.raises(ValueError, match=r"did not put there \(blocks.0.mlp.fc1"):
        save(vit, tmp_path)
    assert not list(tmp_path.iterdir())


def test_swapped_and_odd_arguments(trained, plain, tmp_path):
    save(trained, tmp_path)
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got str"):
        load(str(tmp_path), plain)
    with pytest.raises(TypeError, match=r"directory must be a path, got VisionTransformer; it is mor.load\(model"):
        load(plain, trained)
    with pytest.raises(TypeError, match=r"directory must be a path, got NoneType; it is mor.save\(model"):
        save(trained, None)
    with pytest.raises(TypeError, match="extra must be strings, got None"):
        save(trained, tmp_path, extra=None)


def test_a_pattern_of_parts_that_matches_nothing_names_what_could_be_meant(trained, tmp_path):
    with pytest.raises(ValueError, match=r"extra 'head' matches nothing .*; did you mean 'head\.\*'\?"):
        save(trained, tmp_path, extra="head")
    with pytest.raises(ValueError, match=r"names are head.weight, head.bias, norm.bias"):
        save(trained, tmp_path, extra="classifier.*")
