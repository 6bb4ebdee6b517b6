"""Before and after an injection: what would be adapted, and whether every adapter is alive."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mor.config import MoRConfig, make_config
from mor.hosts import identity, linear_names, note
from mor.layer import MoRLinear, has_hooks, mor_layers
from mor.roles import collapse, find_blocks, role_of, select
from mor.wrappers import original, refuse_peft

# With stochastic depth, a layer may be skipped by chance; one that is skipped this often is dead.
DRAWS = 10
WITHOUT_ROLE = "without a role"


@dataclass(frozen=True)
class PreviewRow:
    """Layers of one kind: the same name but for its numbers, the same sizes, the same host."""

    name: str
    role: str
    layers: int
    in_features: int
    out_features: int
    parameters: int
    host: str

    @property
    def is_refused(self) -> bool:
        return self.host.startswith("refused")

    @property
    def is_adapted(self) -> bool:
        return not self.is_refused and self.host != WITHOUT_ROLE


@dataclass(frozen=True)
class Preview:
    """What :func:`mor.inject` would do; as text, a table."""

    rows: tuple[PreviewRow, ...]

    @property
    def layers(self) -> int:
        """Those that would be adapted: neither refused nor without a role."""
        return sum(row.layers for row in self.rows if row.is_adapted)

    @property
    def parameters(self) -> int:
        """Trainable ones, of all layers together."""
        return sum(row.parameters for row in self.rows if row.is_adapted)

    def __str__(self) -> str:
        header = ("layers", "name", "role", "in x out", "parameters", "host")
        cells = [
            (str(r.layers), r.name, r.role, f"{r.in_features} x {r.out_features}", f"{r.parameters:,}", r.host)
            for r in self.rows
        ]
        total = (str(self.layers), "in all", "", "", f"{self.parameters:,}", "")
        widths = [max(map(len, column)) for column in zip(header, *cells, total, strict=True)]
        return "\n".join(_aligned(line, widths) for line in (header, *cells, total))


def preview(
    model: nn.Module,
    targets: str | Sequence[str],
    config: MoRConfig | None = None,
    *,
    exclude: str | Sequence[str] = (),
    layers: int | Iterable[int] | None = None,
    **config_fields: Any,
) -> Preview:
    """What :func:`mor.inject` with the same arguments would adapt; nothing is changed.

    The last column says what is known of the module around a layer: "plain" (no obstacle; :func:`mor.check` makes
    sure), "host flag" or "attention replaced" (it would not call the layer, and will, once injected), or why the layer
    is refused. "without a role" are layers of a block that the target "all" does not know and leaves out. The sums
    hold what would be adapted.

    Raises:
        ValueError, TypeError: as :func:`mor.inject`, but for layers that it refuses; and ``example`` and ``backend``
            are not taken, because nothing is run.

    >>> block = nn.ModuleDict({"attn": nn.Identity(), "mlp": nn.ModuleDict({"fc1": nn.Linear(8, 32)})})
    >>> print(preview(nn.Sequential(block), "fc", ranks=(1, 2)))
    layers  name       role  in x out  parameters  host
         1  *.mlp.fc1  fc1   8 x 32           147  plain
         1  in all                            147
    """
    for name in {"example", "backend"} & set(config_fields):
        raise TypeError(f"mor.preview has no {name}, because it runs nothing; mor.inject has")
    model, config = original(model), make_config(config, config_fields)
    refuse_adapted(model)
    selection = select(model, targets, exclude, layers)
    roles, sizes = role_of(model, selection.names), linear_names(model)
    hosts = {name: _host_note(model, name) for name in selection.names}
    hosts |= dict.fromkeys(selection.without_role, WITHOUT_ROLE)
    counts: dict[tuple[str, str, int, int, str], int] = {}
    # A layer in two places is one layer.
    first = {identity(model, name): name for name in reversed(hosts)}
    for name, host in hosts.items():
        if first[identity(model, name)] == name:
            key = (collapse(name), roles.get(name, ""), *sizes[name], host)
            counts[key] = counts.get(key, 0) + 1
    rank, gates = sum(config.ranks), config.router_outputs
    return Preview(
        tuple(
            PreviewRow(name, role, n, K, O, n * (rank * (K + O) + gates * (K + 1)), host)
            for (name, role, K, O, host), n in counts.items()
        )
    )


def check(model: nn.Module, example: Any) -> None:
    """Run the model in training and in evaluation mode, and make sure that no adapter is dead.

    An adapter is dead if the module around it never calls it, if nothing depends on what it gives, or if it gets
    no gradient; and some are so in one mode only. Because B is zero at first, all adapters are given random values
    meanwhile; afterwards they, all buffers, modes, gradients and random states are what they were, bit for bit.
    A frozen parameter of zeros inside a block (a layer scale, say) hides what is in front of it, and is reported;
    outside of blocks it is filled meanwhile, because new heads are often born as zeros.

    Args:
        model: The module that :func:`mor.inject` was called on, not on the meta device.
        example: A tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        ValueError: some adapters are dead (all of them are named), the model has none, or it gives values that
            are not finite; or the example is at fault: it is empty, or a single image for a model that normalises
            over the batch.
    """
    model = original(model)
    layers = mor_layers(model)
    if not layers:
        refuse_peft(model, "mor.peft_plugin.check(peft_model, example)")
        raise ValueError("the model has no Mixture-of-Ranks layers to check; call mor.inject on it first")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model must hold its weights to be checked, but it is on the meta device")
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model must be made outside of torch.inference_mode, or nothing in it can get a gradient")
    if empty := [tuple(tensor.shape) for tensor in _tensors(example) if not tensor.numel()]:
        raise ValueError(f"example must hold at least one image, got a tensor of shape {empty[0]}")
    if not all(layer.enabled for layer in layers.values()):
        raise ValueError("the adapters must be enabled to be checked; leave mor.disabled first")
    with _everything_restored(model):
        zeros = _fill(model, layers)
        faults: dict[str, list[str]] = {}
        for training in (True, False):
            mode = "training" if training else "evaluation"
            for name, fault in _faults(model, layers, example, training).items():
                faults.setdefault(f"{fault} in {mode}", []).append(name)
    if faults:
        listed = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items())
        hint = (
            f" (frozen parameters that are all zero: {', '.join(zeros[:8])}); such parameters hide what is in front of"
            " them: train or set them first, or"
            if zeros
            else ";"
        )
        raise ValueError(f"some adapters are dead; {listed}{hint} leave the layers out with exclude=[...]")


def _host_note(model: nn.Module, name: str) -> str:
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)._modules.get(child)
    return "refused: forward hooks" if isinstance(module, nn.Linear) and has_hooks(module) else note(model, name)


def refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError if there are adapters in the model, this package's or peft's."""
    refuse_injected(model)
    refuse_peft(
        model,
        "peft.get_peft_model(model, mor.peft_plugin.MorConfig(...)) to put such adapters in, or call its unload()"
        " before mor.inject",
    )


def refuse_injected(model: nn.Module) -> None:
    layers = list(mor_layers(model))
    if layers:
        raise ValueError(
            f"the model has Mixture-of-Ranks layers already ({layers[0]}, ...); call mor.eject on it first"
        )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (0, 4)
    padded = [c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(padded).rstrip()


def _faults(model: nn.Module, layers: Mapping[str, MoRLinear], example: Any, training: bool) -> dict[str, str]:
    """What is wrong with each adapter in one mode."""
    model.train(training)
    called: set[str] = set()
    learning: set[str] = set()
    for draw in range(DRAWS if training else 1):
        with _counted(layers) as calls:
            outputs = _run(model, example, draw)
        called |= calls
        learning |= _learning(model, layers, outputs)
        if len(called & learning) == len(layers):
            break
    if not training:
        # Without gradients, hosts may take yet another way.
        with _counted(layers) as calls, torch.no_grad():
            _run(model, example, 0)
        called &= calls
    faults = {}
    for name, layer in layers.items():
        if name not in called:
            faults[name] = "not called"
        elif name not in learning:
            # A model may switch gradients off in evaluation by itself.
            needs_gradient = training or any(y.requires_grad for y in outputs)
            if not _has_effect(model, layer, example):
                faults[name] = _no_effect(outputs)
            elif needs_gradient:
                faults[name] = "without a gradient"
    return faults


def _no_effect(outputs: Sequence[Tensor]) -> str:
    narrow = {y.dtype for y in outputs} & {torch.float16, torch.bfloat16}
    precision = "".join(f" (perhaps only in {dtype}: try a copy in float32)".replace("torch.", "") for dtype in narrow)
    return f"without effect on the output{precision}"


def _learning(model: nn.Module, layers: Mapping[str, MoRLinear], outputs: list[Tensor]) -> set[str]:
    """The layers all of whose parameters get a gradient."""
    for parameter in model.parameters():
        parameter.grad = None
    # Weights of all signs, because the sum of a normalised output has no gradient.
    losses = [
        (y.flatten() * torch.arange(1, y.numel() + 1, device=y.device).cos().to(y.dtype)).sum()
        for y in outputs
        if y.requires_grad
    ]
    if losses:
        torch.stack([loss.to(losses[0].device) for loss in losses]).sum().backward()
    return {
        name
        for name, layer in layers.items()
        if all(p.grad is not None and bool(p.grad.any()) for p in layer.adapter_parameters().values())
    }


@torch.no_grad()
def _has_effect(model: nn.Module, layer: MoRLinear, example: Any) -> bool:
    enabled = layer.enabled
    try:
        for draw in range(DRAWS if model.training else 1):
            results = []
            for layer.enabled in (True, False):
                results.append(_run(model, example, draw))
            if any(not torch.equal(one, other) for one, other in zip(*results, strict=True)):
                return True
    finally:
        layer.enabled = enabled
    return False


def _run(model: nn.Module, example: Any, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    try:
        if isinstance(example, Mapping):
            outputs = model(**example)
        else:
            outputs = model(*(example if isinstance(example, (tuple, list)) else (example,)))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"example must hold two or more images, because the model normalises over the batch in training: {error}"
        ) from error
    tensors = [tensor for tensor in _tensors(outputs) if tensor.is_floating_point()]
    if not tensors:
        raise ValueError(
            f"the model's output must hold floating-point tensors to be checked, got {type(outputs).__name__}"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError("the model gives values that are not finite for this example, so adapters cannot be checked")
    return tensors


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        yield from _tensors(tuple(outputs.values()))
    elif isinstance(outputs, (tuple, list)):
        for item in outputs:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(outputs):
        yield from _tensors(tuple(vars(outputs).values()))


@contextmanager
def _counted(layers: Mapping[str, MoRLinear]) -> Iterator[set[str]]:
    """Names of the layers that are called. Not by hooks: where it sees some, nn.TransformerEncoderLayer does call."""
    calls: set[str] = set()

    def counting(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            calls.add(name)
            return forward(*args, **kwargs)

        return counted

    # Others may have put a forward of theirs there.
    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        vars(layer)["forward"] = counting(name, layer.forward)
    try:
        yield calls
    finally:
        for name, layer in layers.items():
            del vars(layer)["forward"]
            if before[name] is not None:
                vars(layer)["forward"] = before[name]


@torch.no_grad()
def _fill(model: nn.Module, layers: Mapping[str, MoRLinear]) -> list[str]:
    """Random adapters, and something in heads that are all zero; returns frozen zeros, which are left as they are."""
    torch.manual_seed(0)
    blocks = tuple(f"{block}." for block in find_blocks(model, [*linear_names(model), *layers]))
    for layer in layers.values():
        nn.init.normal_(layer.mor_B, std=0.1)
        for parameter in layer.adapter_parameters().values():
            parameter.requires_grad_(True)
    zeros = []
    for name, parameter in model.named_parameters():
        if _is_zero(parameter):
            if parameter.requires_grad or not name.startswith(blocks):
                nn.init.normal_(parameter, std=0.1)
            elif not name.endswith("bias"):
                zeros.append(name)
    return zeros


@contextmanager
def _everything_restored(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_parameters_restored(model))
        stack.enter_context(_buffers_restored(model))
        stack.enter_context(_random_states_restored([*model.parameters(), *model.buffers()]))
        stack.enter_context(torch.enable_grad())
        # Compiled parts are run as they were written: a change of B or of a forward would compile them again.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        modes = {module: module.training for module in model.modules()}
        try:
            yield
        finally:
            model.train(modes[model])  # for modules that do more than note it
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def _parameters_restored(model: nn.Module) -> Iterator[None]:
    adapters = {id(p) for layer in mor_layers(model).values() for p in layer.adapter_parameters().values()}
    before = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    values = [(p, p.detach().clone()) for p in model.parameters() if id(p) in adapters or _is_zero(p)]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        for parameter, grad, requires_grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _is_zero(parameter: Tensor) -> bool:
    try:
        return parameter.is_floating_point() and parameter.numel() > 0 and not parameter.any()
    except NotImplementedError:  # torchao's, which can do little but be multiplied with
        return False


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    before = [
        (
            module,
            {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in module._buffers.items()},
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, buffers in before:
            module._buffers.clear()
            for name, (buffer, value) in buffers.items():
                module._buffers[name] = buffer
                if buffer is not None and value is not None:
                    buffer.copy_(value)


@contextmanager
def _random_states_restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    state, numpy_state = random.getstate(), np.random.get_state()
    devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    try:
        with torch.random.fork_rng([device.index for device in devices], device_type=kind):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
