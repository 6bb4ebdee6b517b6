import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import nn

from mor import inject, load, save, trainable_parameters
from mor.peft_format import add_note_to_card, from_peft, to_peft

peft = pytest.importorskip("peft")


@pytest.fixture
def trained(vit) -> nn.Module:
    model = inject(copy.deepcopy(vit), targets=["qkv", "fc"], ranks=(1, 2), alphas=(3, 1), bypass=False)
    for parameter in [*trainable_parameters(model).values(), *model.head.parameters(), *model.norm.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def folder(trained, tmp_path):
    save(trained, tmp_path / "mor", extra=["head.*", "norm.*"])
    return tmp_path / "mor"


def from_pretrained(model: nn.Module, folder, name: str = "default") -> nn.Module:
    import mor.peft_plugin  # noqa: F401

    return peft.PeftModel.from_pretrained(model, folder, name).eval()


@pytest.mark.parametrize("name", ["default", "other"])
def test_peft_loads_what_mor_saved(trained, vit, images, folder, tmp_path, name):
    to_peft(folder, tmp_path / "peft")
    loaded = from_pretrained(vit, tmp_path / "peft", name)
    assert torch.equal(loaded(images), trained(images))
    assert loaded.peft_config[name].mor == trained.blocks[0].mlp.fc1.config


@pytest.mark.parametrize("name", ["default", "other"])
def test_mor_loads_what_peft_saved(vit, images, tmp_path, name):
    from mor.peft_plugin import MorConfig

    plain = copy.deepcopy(vit)
    config = MorConfig(target_modules=["qkv", "fc1"], ranks=[1, 3], modules_to_save=["head"])
    wrapped = peft.get_peft_model(vit, config, name).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "peft")
    from_peft(tmp_path / "peft" / ("" if name == "default" else name), tmp_path / "mor")
    assert torch.equal(load(plain, tmp_path / "mor")(images), wrapped(images))
    assert plain.blocks[0].mlp.fc1.config == config.mor


def test_there_and_back_is_the_same_adapter(folder, tmp_path):
    to_peft(folder, tmp_path / "peft")
    from_peft(tmp_path / "peft", tmp_path / "again")
    one, other = (load_file(path / "adapter.safetensors") for path in (folder, tmp_path / "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    one, other = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert one["mor"] == other["mor"]
    assert all(set(one[field]) == set(other[field]) for field in ("modules", "extra"))


def test_parts_become_modules_to_save(folder, tmp_path):
    to_peft(folder, tmp_path / "peft")
    written = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert written["modules_to_save"] == ["norm", "head"]
    assert "import mor.peft_plugin" in (tmp_path / "peft/README.md").read_text()


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("pos_embed", "'pos_embed', which belongs to the model itself"),
        ("blocks.0.mlp.fc1.base.bias", "which belongs to blocks.0.mlp.fc1.base, which has adapted layers"),
        ("blocks.1.extra", "'blocks.1.extra', which belongs to blocks.1, which has adapted layers"),
    ],
)
def test_parts_that_peft_cannot_hold(trained, tmp_path, extra, reason):
    trained.blocks[1].register_buffer("extra", torch.zeros(1))
    save(trained, tmp_path / "mor", extra=extra)
    with pytest.raises(ValueError, match=reason):
        to_peft(tmp_path / "mor", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_parts_whose_name_is_the_end_of_an_adapted_layers(vit, tmp_path):
    vit.add_module("fc1", nn.Linear(2, 2))
    save(inject(vit, ["blocks.0.mlp.fc1"]), tmp_path / "mor", extra="fc1.*")
    with pytest.raises(ValueError, match="cannot hold 'fc1' alone, because 'blocks.0.mlp.fc1' ends alike"):
        to_peft(tmp_path / "mor", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_load_says_how_to_convert(folder, vit, tmp_path):
    to_peft(folder, tmp_path / "peft")
    with pytest.raises(ValueError, match=r"written by peft: mor.peft_format.from_peft\(folder, new_folder\)") as error:
        load(vit, tmp_path / "peft")
    assert "`import mor.peft_plugin`" in str(error.value)


def test_both_formats_may_share_a_folder(folder, vit, trained, images):
    to_peft(folder, folder)
    assert torch.equal(load(copy.deepcopy(vit), folder)(images), trained(images))
    assert torch.equal(from_pretrained(vit, folder)(images), trained(images))


def test_another_method_of_peft(vit, tmp_path):
    peft.get_peft_model(vit, peft.LoraConfig(target_modules=["qkv"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapter of peft's method LORA, which peft alone can load"):
        load(vit, tmp_path)
    with pytest.raises(ValueError, match=r"must hold a Mixture-of-Ranks adapter \(MOR\), got peft's method LORA"):
        from_peft(tmp_path, tmp_path / "mor")
    assert not (tmp_path / "mor").exists()


def damage(folder, how: str) -> str:
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    description = json.loads(config.read_text())
    if how == "no tensors":
        tensors.unlink()
        return "holds no adapter of peft: No such file"
    if how == "no config":
        config.unlink()
        return "holds no adapter of peft: No such file"
    if how == "not JSON":
        config.write_text("{")
        return "adapter_config.json is damaged"
    if how == "a list":
        config.write_text("[]")
        return r"must hold a Mixture-of-Ranks adapter \(MOR\), got peft's method None"
    if how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-5])
        return "adapter_model.safetensors is damaged"
    if how == "lacks a field":
        del description["ranks"]
        config.write_text(json.dumps(description))
        return "adapter_config.json is damaged: 'ranks'"
    config.write_text(json.dumps({**description, "ranks": [0]}))
    return "adapter_config.json is damaged: ranks must be"


@pytest.mark.parametrize(
    "how", ["no tensors", "no config", "not JSON", "a list", "truncated", "lacks a field", "bad setting"]
)
def test_damaged_folders(folder, tmp_path, how):
    to_peft(folder, tmp_path / "peft")
    message = damage(tmp_path / "peft", how)
    with pytest.raises(ValueError, match=message):
        from_peft(tmp_path / "peft", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_load_of_a_damaged_folder_of_peft(vit, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is damaged"):
        load(vit, tmp_path)


def test_the_note_goes_between_metadata_and_text(tmp_path):
    (tmp_path / "README.md").write_text("---\na: b\n---\n# Title\n---\n")
    add_note_to_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\na: b\n---\n\n## How to load") and card.endswith("```\n# Title\n---\n")
    add_note_to_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == card


FOREIGN = {
    "a text": ("README.md", b"# Results of my project\n"),
    "a card of something else": ("README.md", b"---\nlibrary_name: timm\n---\nlibrary_name: peft\n"),
    "another configuration": ("adapter_config.json", b'{"name": "LLaMA-Adapter"}'),
    "no JSON": ("adapter_config.json", b"[section]"),
    "tensors": ("adapter_model.safetensors", serialise({"weight": torch.zeros(1)}, metadata={"format": "pt"})),
    "no tensors": ("adapter_model.safetensors", b"text"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_files_of_others_are_not_overwritten(folder, tmp_path, what):
    name, content = FOREIGN[what]
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"has files that no adapter was saved with .* overwritten: {name}; choose"):
        to_peft(folder, tmp_path / "peft")
    assert [path.read_bytes() for path in (tmp_path / "peft").iterdir()] == [content]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"model_type": "vit"}'),
        ("adapter.safetensors", serialise({"weight": torch.zeros(1)}, metadata={"format": "pt"})),
    ],
)
def test_a_models_own_files_are_not_overwritten(folder, tmp_path, name, content):
    to_peft(folder, tmp_path / "peft")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"has files that no adapter was saved with .* overwritten: {name}; choose"):
        from_peft(tmp_path / "peft", tmp_path / "model")
    assert [path.read_bytes() for path in (tmp_path / "model").iterdir()] == [content]


def test_a_file_is_no_folder(folder, tmp_path):
    (tmp_path / "peft").write_text("text")
    with pytest.raises(ValueError, match="peft must be a folder, but is a file"):
        to_peft(folder, tmp_path / "peft")


def test_adapters_may_be_replaced(folder, vit, tmp_path):
    """Those that this package wrote, and those that peft did."""
    for _ in range(2):
        to_peft(folder, tmp_path / "peft")
        from_peft(tmp_path / "peft", tmp_path / "mor again")
    peft.get_peft_model(vit, peft.LoraConfig(target_modules=["qkv"])).save_pretrained(tmp_path / "lora")
    assert (tmp_path / "lora/README.md").exists()
    to_peft(folder, tmp_path / "lora")
    assert "Mixture-of-Ranks" in (tmp_path / "lora/README.md").read_text()
