"""The settings of a run: four small dataclasses, read from YAML or flags, saved with every run.

Field names are unique over all sections, so that each is one flag: ``--backbone tiny --epochs 5``.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

import yaml

from ei.intensity import Intensity

SHIPPED = Path(__file__).with_name("configs")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST = 10**9
"""Beyond this no number of a setting means anything; float32, which torch computes in, ends at 3e38."""
LARGEST_SIZE = 10**6
"""The same of a width, or a number of layers."""


def _from_one_word(**how: Any) -> Any:
    """How the command line reads a setting; None without tyro, where there is no command line."""
    try:
        from tyro.constructors import PrimitiveConstructorSpec
    except ModuleNotFoundError:
        return None
    return PrimitiveConstructorSpec(nargs=1, **how)


def _comma_separated(of: type) -> Any:
    return _from_one_word(
        metavar="A,B,...",
        instance_from_str=lambda words: tuple(of(word.strip()) for word in words[0].split(",") if word.strip()),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(item, of) for item in value),
        str_from_instance=lambda value: [",".join(str(item) for item in value)],
    )


# What of the model's settings changes something with each adapter; any of huggingface/peft's is 'peft:NAME'.
_EXPERTS = ("targets", "ranks", "alphas", "dropout", "blocks")
ADAPTERS: dict[str, tuple[str, ...]] = {
    "mor": _EXPERTS,
    "lora": _EXPERTS,
    "loramoe": _EXPERTS,
    "frozen": (),
    "full": (),
    "bitfit": (),
    "vpt": ("prompts",),
    "rlrr": ("scale_patches",),
    "losa": ("ranks", "blocks"),
    "latelora": ("ranks", "blocks"),
}
OF_PEFT = "peft:"

AdapterName = Annotated[
    str,
    _from_one_word(
        metavar="{" + ",".join((*ADAPTERS, OF_PEFT + "NAME")) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]
Names = Annotated[tuple[str, ...], _comma_separated(str)]
Integers = Annotated[tuple[int, ...], _comma_separated(int)]
Floats = Annotated[tuple[float, ...], _comma_separated(float)]

Fusion = Literal[
    "ei",
    "late",
    "mm-mil",
    "sfusion",
    "coscat",
    "raddiag",
    "dynmm",
    "mmrad",
    "unimodel",
    "early",
    "late-average",
    "late-weighted",
    "late-max",
    "late-learned",
    "cross",
    "joint",
]
GATED = ("ei", "late")
"""Fusions with the paper's gate, and so with its loss."""
TWO_STAGES = (*GATED, "late-average", "late-weighted", "late-max", "late-learned")
"""Fusions that start from a model of each modality alone; the others are trained at once."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which table, which columns, and how files become tensors."""

    manifest: str = ""
    """The CSV that lists the samples (docs/ei.md)."""
    modalities: Names = ()
    """Columns with image paths, in the order in which results name them."""
    labels: Names = ("label",)
    """One column of class names, or several 0/1 columns (then a sample may have several labels)."""
    classes: Names = ()
    """Order of the classes of a single label column; empty: sorted by name."""
    images: Literal["mean", "one"] = "mean"
    """Of several files per modality: the mean of their features, or one file (random in training, else the first)."""
    slices: int = 4
    """Slices taken from a volume: one from each of so many equal parts, random in training, else the middle."""
    intensity: Names = ("type",)
    """What is black and white beyond 8 bits: type, percentiles or LOW:HIGH; one for all modalities, or one for each."""
    allow_outside: bool = False
    """Image paths may be absolute, or lead out of the manifest's folder."""
    allow_missing: bool = False
    """A sample may lack modalities: an empty cell."""
    cache: str = ""
    """Folder in which decoded images are kept, so that later epochs read them faster; empty: none."""
    image_size: int = 224
    """Side of the square that images are resized to, in pixels."""
    mean: Floats = CLIP_MEAN
    """Subtracted from each channel, in units of the pixel range 0..1."""
    std: Floats = CLIP_STD
    """Each channel is then divided by this."""
    rotation: float = 180.0
    """Training images are turned by up to so many degrees."""
    crop: float = 0.1
    """With probability a half, up to this share of each side of a training image is cut away."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    jitter: float = 0.3
    """Contrast, brightness and saturation of training images are scaled by 1 - jitter .. 1 + jitter."""
    balance: Literal["off", "oversample", "auto", "weights"] = "off"
    """How rare classes are made up for.
    'oversample': their samples are repeated in training until all classes are equally frequent;
    'auto': they count more in the loss, by how rare they are;
    'weights': by --class-weights."""
    class_weights: Floats = ()
    """What a sample of each class counts in the loss, in the order of the classes; with several labels, each label."""
    modality_dropout: float = 0.0
    """Probability with which each modality of a training sample is left out; one always stays."""

    def __post_init__(self) -> None:
        _require(self.images in ("mean", "one"), "images", "'mean' or 'one'", self.images)
        _require(self.slices >= 1, "slices", "at least 1", self.slices)
        for text in self.intensity:
            Intensity.parse(text)
        counts = {1, len(self.modalities)} if self.modalities else {1, len(self.intensity)}
        fits = len(self.intensity) in counts and not isinstance(self.intensity, str)
        _require(fits, "intensity", "one for all modalities, or one for each", self.intensity)
        _require(self.image_size >= 1, "image_size", "at least 1", self.image_size)
        _require(self.image_size <= 8192, "image_size", "at most 8192", self.image_size)
        _require(len(self.mean) == 3, "mean", "three numbers", self.mean)
        _require(len(self.std) == 3 and min(self.std) > 0, "std", "three positive numbers", self.std)
        _require(0 <= self.rotation <= 180, "rotation", "between 0 and 180", self.rotation)
        _require(0 <= self.crop < 0.5, "crop", "at least 0 and less than 0.5", self.crop)
        _require(0 <= self.flip <= 1, "flip", "between 0 and 1", self.flip)
        choices = ("off", "oversample", "auto", "weights")
        _require(self.balance in choices, "balance", f"one of {', '.join(choices)}", self.balance)
        has_weights = self.balance == "weights"
        _require(not has_weights or bool(self.class_weights), "class_weights", "given with balance 'weights'", "none")
        _require(has_weights or not self.class_weights, "balance", "'weights' with class_weights", self.balance)
        _require(all(weight > 0 for weight in self.class_weights), "class_weights", "positive", self.class_weights)
        _require(0 <= self.jitter < 1, "jitter", "at least 0 and less than 1", self.jitter)
        dropout = self.modality_dropout
        _require(0 <= dropout < 1, "modality_dropout", "at least 0 and less than 1", dropout)
        for name, values in (("modalities", self.modalities), ("labels", self.labels), ("classes", self.classes)):
            _require(not isinstance(values, str), name, "a tuple of names", values)
            _require(len(set(values)) == len(values), name, "without repetition", values)
        if self.knows_missing:
            joined = ["+".join(subset) for subset in self.subsets]
            _require(len(set(joined)) == len(joined), "modalities", "told apart when joined by '+'", self.modalities)
        for modality in self.modalities:
            # Folders and columns of results are named after modalities.
            usable = not modality.startswith(".") and modality not in ("fused", "weight")
            _require(usable, "modalities", "called other than fused, weight, or with a dot first", modality)
        _require_sane(self)

    @property
    def multi_label(self) -> bool:
        """Several label columns: a sample may have several labels."""
        return len(self.labels) > 1

    @property
    def knows_missing(self) -> bool:
        """Training shows, or may show, samples that lack a modality."""
        return self.allow_missing or self.modality_dropout > 0

    @property
    def subsets(self) -> list[tuple[str, ...]]:
        """What evaluation gives the model if it knows missing modalities: every subset of them, the smallest first.

        Of more than six modalities only each alone, all but each, and all.

        >>> DataConfig(modalities=("cfp", "oct")).subsets
        [('cfp',), ('oct',), ('cfp', 'oct')]
        """
        count = len(self.modalities)
        sizes = range(1, count + 1) if count <= 6 else (1, count - 1, count)
        return [subset for size in sizes for subset in combinations(self.modalities, size)]

    def intensity_of(self, modality: str) -> Intensity:
        """The rule for the files of a modality."""
        return Intensity.parse(self._rule_of(modality))

    def alone(self, modality: str) -> Self:
        """The same with one modality only."""
        return replace(self, modalities=(modality,), intensity=(self._rule_of(modality),))

    def _rule_of(self, modality: str) -> str:
        one_for_each = len(self.intensity) > 1
        return self.intensity[self.modalities.index(modality) if one_for_each else 0]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Backbone, adapters, and how modalities meet."""

    fusion: Fusion = "ei"
    """'ei': summaries of the other modalities enter each ViT; 'late': the ablation without them;
    the others are baselines (docs/baselines.md)."""
    backbone: str = "vit_base_patch16_clip_224.openai"
    """A timm name, open_clip:NAME[:PRETRAINED], or 'tiny' (a small ViT for trials on a CPU)."""
    pretrained: bool = True
    """Load the backbone's published weights from the hub (ignored by 'tiny' and with --weights)."""
    weights: str = ""
    """A local .safetensors or .pth file with the backbone's weights; 'tiny' is random without one."""
    adapter: AdapterName = "mor"
    """How the backbone learns.
    mor, lora, loramoe: Mixture of Ranks, one LoRA, equal LoRAs with a router;
    frozen, full, bitfit: not at all, all of it, its biases;
    vpt: prompts before each block; rlrr: rescaled weights;
    losa: a network beside it (late fusions only); latelora: LoRA on q and v of the later blocks;
    peft:NAME: a method of huggingface/peft with its own defaults, such as peft:ia3 or peft:ln_tuning."""
    targets: Names = ("fc",)
    """Layers that the adapters go to: qkv, proj, fc, fc1, fc2, or patterns of module names."""
    ranks: Integers = ()
    """Ranks of the experts; empty: 2,4,8 for mor, 4,4,4 for loramoe, and a single 4 for lora, losa and latelora."""
    blocks: Integers = ()
    """Blocks that are adapted, or after which losa reads, from 0; empty: all;
    for latelora the second half; for losa every second, up to the last (a guess: its paper does not say)."""
    alphas: Floats = ()
    """Alpha of each expert, which is scaled by alpha / rank; empty: twice its rank."""
    bypass: bool = True
    """The router of mor has an output without an expert, so that it may decline to adapt."""
    dropout: float = 0.0
    """Dropout on what the experts read."""
    prompts: int = 5
    """Tokens that vpt puts before each block."""
    scale_patches: bool = True
    """rlrr scales and shifts the patch embedding, too, as its parameter count in EI's paper has it."""
    int_hidden: int = 384
    """Hidden width of the network that turns a reference's summary into an intervention token."""
    int_from: int = 0
    """Block of the reference ViT after which its summary is read, from 1; 0: the last."""
    int_at: int = 0
    """Block of the target ViT before which intervention tokens enter, from 0."""
    aux_backbone: str = ""
    """Backbone of the auxiliary ViTs, such as a smaller one; empty: that of the primary ViTs."""
    aux_weights: str = ""
    """A local file with its weights, as --weights."""
    share_adapters: bool = False
    """The auxiliary and the primary ViT of a modality have one set of adapters: one ViT in both roles."""
    detach_fusion: bool = True
    """The loss of the fused prediction trains only the fusion's gate, not the ViTs."""

    @property
    def auxiliary(self) -> Self | None:
        """Settings of the auxiliary ViTs by themselves, if they have a backbone of their own."""
        if not self.aux_backbone:
            return None
        return replace(self, backbone=self.aux_backbone, weights=self.aux_weights, aux_backbone="", aux_weights="")

    @property
    def _used(self) -> tuple[str, ...]:
        """The settings that the adapter heeds."""
        if self.adapter in ADAPTERS:
            return ADAPTERS[self.adapter]
        return () if self.adapter == OF_PEFT + "ln_tuning" else ("targets",)

    def __post_init__(self) -> None:
        fusions = get_args(Fusion)
        _require(self.fusion in fusions, "fusion", f"one of {', '.join(fusions)}", self.fusion)
        of_peft = self.adapter.startswith(OF_PEFT)
        known = f"one of {', '.join(ADAPTERS)}, or {OF_PEFT}NAME"
        _require(self.adapter in ADAPTERS or (of_peft and self.adapter != OF_PEFT), "adapter", known, self.adapter)
        _require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1", self.dropout)
        _require(self.prompts >= 1, "prompts", "at least 1", self.prompts)
        numbers = all(block >= 0 for block in self.blocks) and len(set(self.blocks)) == len(self.blocks)
        _require(numbers, "blocks", "different numbers from 0 on", self.blocks)
        # Tokens from other modalities would change the number of tokens, which its layers are made for.
        alone = self.fusion.startswith("late") or self.adapter != "losa"
        _require(alone, "fusion", "'late' with adapter 'losa', which works for one number of tokens", self.fusion)
        _require(self.int_hidden >= 1, "int_hidden", "at least 1", self.int_hidden)
        _require(self.int_from >= 0, "int_from", "at least 0", self.int_from)
        _require(self.int_at >= 0, "int_at", "at least 0", self.int_at)
        own = self.share_adapters and self.aux_backbone
        _require(not own, "share_adapters", "off with aux_backbone, whose layers are others", self.share_adapters)
        if self.fusion != "ei":
            intervention = ("int_hidden", "int_from", "int_at", "aux_backbone", "aux_weights", "share_adapters")
            _refuse_idle(self, intervention, f"fusion '{self.fusion}'")
        if self.fusion not in GATED:
            _refuse_idle(self, ("detach_fusion",), f"fusion '{self.fusion}'")
        # To say that there is no bypass is right of all adapters but mor, so it is allowed.
        settings = {name for used in ADAPTERS.values() for name in used}
        _refuse_idle(self, list(settings.difference(self._used)), f"adapter '{self.adapter}'")
        if self.adapter == "frozen":
            _refuse_idle(self, ("share_adapters",), "adapter 'frozen'")
        if not self.aux_backbone:
            _refuse_idle(self, ("aux_weights",), "no aux_backbone")
        _require_sane(self, largest_size=LARGEST_SIZE)


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """What the baselines leave open. A field is of the fusion that its name begins with (mil: mm-mil)."""

    mil_heads: int = 8
    """Ways to attend to the images of a sample; the prediction is the mean over them."""
    mil_hidden: int = 256
    """Width of each of them; 8 x 256 gives the paper's number of parameters."""
    sfusion_layers: int = 8
    """Layers of the transformer over the tokens of all modalities."""
    sfusion_heads: int = 4
    """Their heads."""
    sfusion_grid: int = 8
    """Patch maps are pooled to this side before."""
    sfusion_dropout: float = 0.1
    """Dropout in the layers, and on what they read."""
    coscat_cosine: float = 1.0
    """Weight of the loss 1 - cosine between the modalities' features; the authors' is not public."""
    raddiag_layers: int = 2
    """Layers of the transformer over the modalities; that over the images of each has one."""
    raddiag_heads: int = 4
    """Their heads."""
    raddiag_slices: int = 32
    """Most images of a modality: learned positions."""
    raddiag_table: int = 16
    """Rows of the table of modality embeddings, of which the first are used; the authors' table has 16."""
    dynmm_hidden: int = 128
    """Hidden width of the gate that chooses among the experts."""
    dynmm_temperature: float = 1.0
    """Scores of the gate are divided by this."""
    dynmm_hard: bool = False
    """The sample's best expert answers alone; gradients are those of the soft choice."""
    dynmm_cost: float = 0.1
    """Weight of the loss on the choice of the expert of all modalities, the costly one."""
    dynmm_experts: bool = True
    """Experts of one modality have losses of their own, too; the authors train them before."""
    mmrad_depth: int = 1
    """Layers of the two-way transformer between a modality and the others; 1 gives the paper's number of parameters."""
    mmrad_heads: int = 8
    """Its heads."""
    mmrad_mlp: int = 2048
    """Hidden width of its MLPs."""
    mmrad_prompts: bool = True
    """Prompts made from the image are added to its patch tokens before each block; off in MMRAD-MoR."""
    mmrad_prompt_width: int = 48
    """Width of the network that makes them; not public, 48 gives the paper's number of parameters."""
    unimodel_embeddings: bool = False
    """Patches are told by a learned embedding which modality they are of; not in the paper."""
    early_hidden: Integers = (512, 256)
    """Hidden widths of the MLP on the joined features."""
    learned_hidden: int = 64
    """Hidden width of the MLP on the modalities' predictions."""
    cross_width: int = 512
    """Width of the attention from each modality's patches to the others'."""
    cross_heads: int = 8
    """Its heads."""
    joint_width: int = 512
    """Width of the joint embedding."""
    joint_temperature: float = 0.07
    """Similarities are divided by this in the contrastive loss; the start of what is learned."""
    joint_weight: float = 1.0
    """Weight of the contrastive loss beside that of the classifier."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type is int:
                _require(value >= 1, item.name, "at least 1", value)
        _require(0 <= self.sfusion_dropout < 1, "sfusion_dropout", "at least 0 and below 1", self.sfusion_dropout)
        for name in ("coscat_cosine", "dynmm_cost", "joint_weight"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("dynmm_temperature", "joint_temperature"):
            _require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        _require(all(width >= 1 for width in self.early_hidden), "early_hidden", "positive", self.early_hidden)
        if not self.mmrad_prompts:
            _refuse_idle(self, ("mmrad_prompt_width",), "mmrad_prompts off")
        _require_sane(self, largest_size=LARGEST_SIZE)

    @classmethod
    def of(cls, fusion: str) -> list[str]:
        """Names of a fusion's own settings.

        >>> BaselineConfig.of("mm-mil")
        ['mil_heads', 'mil_hidden']
        """
        return [item.name for item in fields(cls) if item.name.startswith(fusion.rpartition("-")[2] + "_")]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimiser, schedule, losses. The defaults are the paper's."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 1e-3
    """Upper end of the cyclic learning rate."""
    lr_low: float = 1e-5
    """Lower end of it."""
    cycle_epochs: float = 4.0
    """Epochs from the lower end to the upper, and as many back down."""
    cycle_decay: float = 0.8
    """Factor on the height of each cycle after the first."""
    momentum: float = 0.95
    """Of SGD."""
    weight_decay: float = 1e-4
    """On all trained parameters."""
    batch_size: int = 8
    """Samples per step of the optimiser, over all processes."""
    micro_batch: int = 0
    """Most samples that a process takes through the model at once; 0: all of its share. Gradients are accumulated."""
    epochs: int = 200
    """Most epochs of a stage; without validation rows, exactly so many."""
    patience: int = 10
    """A stage stops after so many validations without a better mAP."""
    aux_weight: float = 0.3
    """Weight of the losses of the auxiliary ViTs."""
    gate_weight: float = 0.1
    """Weight of the loss that pulls the fusion towards the best modality."""
    gate_prior: str = ""
    """That modality; empty: the one whose stage-1 model has the best mAP on the training rows."""
    stages: Literal["both", "2"] = "both"
    """'both': first each modality alone, then together;
    '2': together at once, from the backbone, as are all baselines but the late ones."""
    stage1_from: str = ""
    """A run on the same data whose stage 1 is taken over instead of being trained again."""
    bootstrap: int = 1000
    """Resamplings of the patients for the 95 % intervals; 0: none."""
    temperature: bool = False
    """Divide logits by temperatures fitted on the val rows, so that probabilities can be believed; ranks stay."""
    report_images: int = 12
    """Worst errors that the report shows with their images, which are then part of it; 0: none."""
    seed: int = 0
    """Of initialisation, order, augmentation and resampling."""
    device: str = "auto"
    """'auto' (CUDA, Apple's, else the CPU) or a torch device."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the ViTs' arithmetic; weights and losses stay in fp32. With fp16 the loss is scaled."""
    compile: Literal["off", "on", "graphs"] = "off"
    """torch.compile of the ViTs in training, for small batches; 'graphs': and CUDA graphs. Takes minutes to start."""
    workers: int = 0
    """Processes that load images."""
    tensorboard: bool = False
    """Write the history for TensorBoard, too: tensorboard --logdir RUN shows it."""
    save_minutes: float = 10.0
    """A snapshot to go on from is written after so many minutes within an epoch, and after each epoch."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", "positive", self.lr)
        _require(0 < self.lr_low <= self.lr, "lr_low", "positive and at most lr", self.lr_low)
        _require(self.cycle_epochs > 0, "cycle_epochs", "positive", self.cycle_epochs)
        _require(0 < self.cycle_decay <= 1, "cycle_decay", "above 0 and at most 1", self.cycle_decay)
        _require(0 <= self.momentum < 1, "momentum", "at least 0 and below 1", self.momentum)
        _require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        _require(self.micro_batch >= 0, "micro_batch", "at least 0", self.micro_batch)
        precisions = ("fp32", "bf16", "fp16")
        _require(self.precision in precisions, "precision", f"one of {', '.join(precisions)}", self.precision)
        _require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _require(self.patience >= 1, "patience", "at least 1", self.patience)
        _require(self.aux_weight >= 0, "aux_weight", "at least 0", self.aux_weight)
        _require(self.gate_weight >= 0, "gate_weight", "at least 0", self.gate_weight)
        _require(self.bootstrap >= 0, "bootstrap", "at least 0", self.bootstrap)
        _require(self.report_images >= 0, "report_images", "at least 0", self.report_images)
        _require(self.compile in ("off", "on", "graphs"), "compile", "'off', 'on' or 'graphs'", self.compile)
        _require(self.save_minutes >= 0, "save_minutes", "at least 0", self.save_minutes)
        _require(0 <= self.seed < 2**63, "seed", "at least 0 and below 2 to the 63rd", self.seed)
        _require(0 <= self.workers <= 1024, "workers", "between 0 and 1024", self.workers)
        _require(not (self.stage1_from and self.stages == "2"), "stages", "'both' with stage1_from", self.stages)
        if self.optimizer != "sgd":
            _refuse_idle(self, ("momentum",), f"optimizer '{self.optimizer}'")
        if not self.gate_weight:
            _refuse_idle(self, ("gate_prior",), "gate_weight 0")
        elif self.stages == "2" and not self.gate_prior:
            _refuse_idle(self, ("gate_weight",), "stages '2' and no gate_prior")
        _require_sane(self, but=("save_minutes", "seed"))

    def samples_at_once(self, processes: int) -> int:
        """How many samples one process takes through a model at once.

        >>> [TrainConfig(batch_size=8).samples_at_once(processes) for processes in (1, 3)]
        [8, 3]
        """
        share = math.ceil(self.batch_size / processes)
        return min(self.micro_batch, share) if self.micro_batch else share


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)

    def __post_init__(self) -> None:
        fusion, of_others = self.model.fusion, {item.name for item in fields(BaselineConfig)}
        idle = [] if fusion == "ei" else ["aux_weight"]
        idle += [] if fusion in GATED else ["gate_weight", "gate_prior"]
        idle += [] if fusion in TWO_STAGES else ["stage1_from"]
        _refuse_idle(self.train, idle, f"fusion '{fusion}'")
        _refuse_idle(self.baseline, sorted(of_others.difference(BaselineConfig.of(fusion))), f"fusion '{fusion}'")
        compiled = self.train.compile != "off" and self.model.adapter.startswith(OF_PEFT)
        _require(not compiled, "compile", f"'off' with adapter '{self.model.adapter}'", self.train.compile)

    @property
    def auxiliary(self) -> Self | None:
        """These settings for the auxiliary ViTs by themselves, if they have a backbone of their own."""
        model = self.model.auxiliary
        return replace(self, model=model) if model else None

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {
            section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            for section, values in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration of a nested mapping; what is left out has its default.

        Raises:
            ValueError: a section or field that does not exist, or a value that a field refuses.
        """
        sections = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig, "baseline": BaselineConfig}
        _refuse_unknown("section", values, sections)
        parsed: dict[str, Any] = {}
        for section, kind in sections.items():
            given = values.get(section) or {}
            if not isinstance(given, Mapping):
                raise ValueError(f"section '{section}' must hold 'name: value' lines, got {given!r}")
            _refuse_unknown(f"field of section '{section}'", given, [item.name for item in fields(kind)])
            parsed[section] = kind(**{key: _as_field(kind, key, value) for key, value in given.items()})
        return cls(**parsed)

    def save(self, path: Path) -> None:
        from mor.files import write_atomically  # here, because it brings torch with it

        write_atomically(path, yaml.safe_dump(self.to_dict(), sort_keys=False).encode())

    @classmethod
    def without_idle(cls, values: Mapping[str, Any], *, kept: Collection[str] = ()) -> Self:
        """:meth:`from_dict`, with settings that would change nothing left out instead of refused.

        Args:
            values: A nested mapping.
            kept: Names of settings that are refused all the same.

        >>> Config.without_idle({"model": {"fusion": "late", "int_hidden": 5}}).model.int_hidden
        384
        """
        left = {key: dict(given) if isinstance(given, Mapping) else given for key, given in values.items()}
        while True:
            try:
                return cls.from_dict(left)
            except IdleError as error:
                idle = [name for name in error.names if name not in kept]
                if not idle:
                    raise
                left = {
                    key: {name: value for name, value in given.items() if name not in idle}
                    if isinstance(given, dict)
                    else given
                    for key, given in left.items()
                }

    @classmethod
    def load(cls, path: Path, *, of_run: bool = False) -> Self:
        """Read a YAML file.

        Args:
            path: The file.
            of_run: It is what a run was trained with, perhaps by an earlier version: settings that would change nothing
                are left out instead of refused.

        Raises:
            ValueError: the file is missing, is not YAML, or does not fit; the message names the file.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            if not isinstance(values, Mapping):
                raise ValueError("it must hold the sections data, model, train and baseline")
            return cls.without_idle(values) if of_run else cls.from_dict(values)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"cannot use the configuration {path}: {' '.join(str(error).split())}") from error


def find_config(name: str) -> Path:
    """The file of that path, else the shipped configuration of that name.

    Raises:
        ValueError: there is neither.

    >>> Config.load(find_config("mrnet-clip")).data.image_size
    256
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if name not in shipped:
        names = ", ".join(shipped)
        raise ValueError(f"cannot use the configuration '{name}': there is no such file, and those shipped are {names}")
    return shipped[name]


class IdleError(ValueError):
    """Settings that were set, and would change nothing: a comparison of two such runs would be one of noise."""

    def __init__(self, names: Sequence[str], other: str) -> None:
        super().__init__(f"with {other}, {' and '.join(names)} would change nothing; leave it out")
        self.names = names


def _require(condition: bool, name: str, requirement: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {requirement}, got {value!r}")


def _require_sane(settings: Any, *, largest_size: int = LARGEST, but: Collection[str] = ()) -> None:
    """Every number is finite, and not so large that torch cannot hold it; integers have a limit of their own."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        for number in (value if isinstance(value, tuple) else (value,)) if item.name not in but else ():
            if isinstance(number, float):
                _require(math.isfinite(number), item.name, "finite", value)
                _require(abs(number) <= LARGEST, item.name, f"between -{LARGEST} and {LARGEST}", value)
            elif isinstance(number, int):
                _require(number <= largest_size, item.name, f"at most {largest_size}", value)


def _refuse_idle(settings: Any, names: Sequence[str], other: str) -> None:
    idle = [item.name for item in fields(settings) if item.name in names and vars(settings)[item.name] != item.default]
    if idle:
        raise IdleError(idle, other)


def _refuse_unknown(what: str, given: Mapping[str, Any], known: Any) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"unknown {what}: {', '.join(map(str, unknown))}; known are {', '.join(known)}")


def _as_field(kind: type, key: str, value: Any) -> Any:
    """A YAML value as the field's type; YAML writes some names and numbers in ways of its own."""
    declared = get_type_hints(kind)[key]
    if get_origin(declared) is tuple:
        values = value.split(",") if isinstance(value, str) else value
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{key} must be a list, got {value!r}")
        return tuple(_as_scalar(key, item, get_args(declared)[0]) for item in values)
    if get_origin(declared) is Literal:
        if isinstance(value, bool):
            # YAML reads on and off as booleans.
            word, known = "on" if value else "off", get_args(declared)
            _require(word in known, key, f"one of {', '.join(known)}", value)
            return word
        return _as_scalar(key, value, str)
    return _as_scalar(key, value, declared)


def _as_scalar(key: str, value: Any, kind: type) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    # YAML reads yes, no, on and off as booleans, and 1e-3 as a string, because its floats need a dot.
    if kind is not bool and not isinstance(value, bool) and isinstance(value, (str, int, float)):
        try:
            converted = kind(value.strip() if isinstance(value, str) else value)
        except (ValueError, OverflowError):
            converted = None
        if converted is not None and not (kind is int and isinstance(value, float) and converted != value):
            return converted
    wanted = {bool: "true or false", int: "an integer", float: "a number", str: "text (quote yes, no, on, off)"}[kind]
    raise ValueError(f"{key} must be {wanted}, got {value!r}")
