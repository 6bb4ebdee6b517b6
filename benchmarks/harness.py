"""What the benchmarks of one linear share: the layers, what each has to compute, how wrong it is, and where it ran.

All layers stand around one and the same frozen nn.Linear. Timing on a GPU is in `mor_kernels.measure`.

Shapes: T rows (all tokens), K in, O out.
"""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mor
from mor import MoRConfig, MoRLinear
from mor_kernels.measure import git_state

LORA_RANK, LORA_ALPHA = 8, 16

Errors = dict[str, float]  # relative error by tensor
Function = Callable[[Tensor], Tensor]


def frozen_linear(in_features: int, out_features: int, **factory: Any) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, **factory).requires_grad_(False)


def mor_layers(makers: Mapping[str, Callable[[], MoRLinear]]) -> dict[str, MoRLinear]:
    """Each of the layers, with the same parameters; B is drawn, since the zeros that B starts from hide errors."""
    torch.manual_seed(0)
    layers = {name: make() for name, make in makers.items()}
    first, *others = layers.values()
    nn.init.normal_(first.mor_B, std=0.02)
    for layer in others:
        layer.load_state_dict(first.state_dict())
    return layers


def lora_layer(base: nn.Linear) -> nn.Module:
    """peft's LoRA around `base`, in base's dtype, without the model that peft puts around it."""
    import peft

    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=["0"])
    wrapped: Any = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    layer = wrapped.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layer


def draw_inputs(
    rows: int, in_features: int, out_features: int, *, seed: int = 1, **factory: Any
) -> tuple[Tensor, Tensor]:
    """x (T, K), which requires grad, and the gradient of the output, (T, O)."""
    generator = torch.Generator(factory.get("device", "cpu")).manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator, **factory).requires_grad_()
    return x, torch.randn(rows, out_features, generator=generator, **factory)


def expected_frozen(p: Mapping[str, Tensor]) -> Function:
    """The function of a frozen linear with these parameters, by name."""
    return lambda x: F.linear(x, p["weight"], p["bias"])


def expected_mor(p: Mapping[str, Tensor]) -> Function:
    """The function of a default MoRLinear with these parameters, one expert after the other."""
    config = MoRConfig()

    def layer(x: Tensor) -> Tensor:
        y = F.linear(x, p["base.weight"], p["base.bias"])
        gates = F.linear(x, p["mor_router.weight"], p["mor_router.bias"]).softmax(-1)
        experts = zip(p["mor_A"].split(config.ranks), p["mor_B"].split(config.ranks), config.scaling, strict=True)
        for i, (A, B, scale) in enumerate(experts):
            y = y + gates[:, i, None] * scale * (x @ A.T @ B)
        return y

    return layer


def expected_lora(p: Mapping[str, Tensor]) -> Function:
    """The function of `lora_layer` with these parameters."""
    A, B = p["lora_A.default.weight"], p["lora_B.default.weight"]
    scale = LORA_ALPHA / LORA_RANK
    return lambda x: F.linear(x, p["base_layer.weight"], p["base_layer.bias"]) + scale * (x @ A.T @ B.T)


def exact(expected: Callable[[Mapping[str, Tensor]], Function], layer: nn.Module, x: Tensor, dy: Tensor) -> dict:
    """Output and gradients in float64, on the very numbers that `layer` has."""
    wide = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    return output_and_gradients(expected(wide), x.detach().double().requires_grad_(), dy.double(), wide)


def errors_of(layer: nn.Module, x: Tensor, dy: Tensor, expected: Mapping[str, Tensor]) -> Errors:
    """|got - expected| / |expected|, Frobenius, of the output and of every gradient."""
    got = output_and_gradients(layer, x, dy, dict(layer.named_parameters()))
    return {name: ((got[name].double() - value).norm() / value.norm()).item() for name, value in expected.items()}


def output_and_gradients(
    layer: Function | nn.Module, x: Tensor, dy: Tensor, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    trained = {"x": x, **{name: tensor for name, tensor in parameters.items() if tensor.requires_grad}}
    y = layer(x)
    gradients = torch.autograd.grad(y, list(trained.values()), dy)
    return {"output": y.detach(), **{f"gradient of {name}": g for name, g in zip(trained, gradients, strict=True)}}


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that forward keeps for backward, besides x and the parameters."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    for tensor in (x, *layer.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def setup(packages: Sequence[str], code: Sequence[Path] = (Path(mor.__file__).parent,)) -> dict[str, Any]:
    """Versions, processor and commit. Call it first: a commit made while the benchmark runs is not what it ran."""
    return {
        "versions": {name: __import__(name).__version__ for name in packages},
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "git": git_state(code),
    }


def store(path: Path, results: Mapping[str, Any], table: str) -> None:
    """Write results as JSON, with their table as Markdown beside it, and print the table."""
    print(table)
    path.with_suffix(".md").write_text(table + "\n")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
