"""Mixture of Ranks in a Vision Transformer: inject, train a step, look at the gates, save, load.

Not faithful: the ViT is small and random, and so are the images. With a network at hand take
timm.create_model("vit_base_patch16_224", pretrained=True) and your own data.
"""

import tempfile

import timm
import torch

import mor


def vision_transformer():
    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=64, patch_size=16, embed_dim=96, depth=4, num_heads=3, num_classes=10)


model = vision_transformer()
images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
before = model(images)

mor.inject(model, targets=["qkv", "fc"])  # in place; everything but the adapters is frozen
assert torch.equal(model(images), before)  # an adapter begins as the identity
model.head.requires_grad_(True)  # a new task needs its head, too

trained = mor.trainable_parameters(model)
print(
    f"{sum(p.numel() for p in trained.values()):,} of {sum(p.numel() for p in model.parameters()):,} parameters train"
)
print(model.blocks[0].mlp)

optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
for step in range(5):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}  loss {loss.item():.4f}")

with mor.record_gates(model) as record, torch.no_grad():
    model(images)
for name, summary in list(record.summary().items())[:3]:
    gates = ", ".join(f"{gate:.2f}" for gate in summary.gates)
    print(f"{name}: gates {gates}, bypass {summary.bypass:.2f}, effective rank {summary.effective_rank:.1f}")

with tempfile.TemporaryDirectory() as folder:
    mor.save(model, folder, extra="head.*")  # two small files: adapters and head, not the backbone
    restored = mor.load(vision_transformer(), folder)
assert torch.equal(restored(images), model(images))

with mor.disabled(model), torch.no_grad():
    print("without adapters:", model(images)[0, :3].tolist())
mor.eject(model)  # the original layers are back
