"""Mixture of Ranks in huggingface/peft: wrap, train, save, load, mix adapters in a batch, and get a plain LoRA.

Not faithful: the ViT is small and random, so are the images, and five steps teach it nothing.
"""

import tempfile
from pathlib import Path

import peft
import timm
import torch

import mor
from mor.peft_format import from_peft
from mor.peft_plugin import MorConfig, check  # this import makes peft know the method


def vision_transformer():
    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=64, patch_size=16, embed_dim=96, depth=4, num_heads=3, num_classes=10)


scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))

config = MorConfig(target_modules=["qkv", "fc"], modules_to_save=["head"])  # the roles of mor.inject, or peft's names
model = peft.get_peft_model(vision_transformer(), config)
model.print_trainable_parameters()
check(model, images)  # no adapter is silently dead

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(5):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}  loss {loss.item():.4f}")

model.eval().save_pretrained(folder / "peft")  # its README.md says what to import
expected = model(images).detach()
loaded = peft.PeftModel.from_pretrained(vision_transformer(), folder / "peft", "trained").eval()
assert torch.equal(loaded(images), expected)

rows = loaded(images[:2], adapter_names=["trained", "__base__"])  # one adapter per image, or none
torch.testing.assert_close(rows[1], vision_transformer().eval()(images[:2])[1])

from_peft(folder / "peft", folder / "mor")  # the same adapter without peft
torch.testing.assert_close(mor.load(vision_transformer(), folder / "mor").eval()(images), expected)

try:
    loaded.merge_and_unload()
except NotImplementedError as error:
    print("no merging:", error)

# The honest way to one matrix per layer: freeze the gates at their mean, and look at what that costs.
print(mor.to_lora(loaded, [images], folder / "lora"))  # "overall" is what the last line measures again
merged = peft.PeftModel.from_pretrained(vision_transformer(), folder / "lora").merge_and_unload().eval()
print(f"merged: {(merged(images) - expected).norm() / expected.norm():.2%} from the adapter, no adapter left")
