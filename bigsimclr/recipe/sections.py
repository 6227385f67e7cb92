"""The sections that recipes are made of, each key with its unit and source.

Paper: Chen et al. 2020, "Big Self-Supervised Models are Strong Semi-Supervised Learners",
arXiv 2006.10029. Official code: google-research/simclr.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


def _at_home(path: Path) -> Path:
    # The shell leaves the ~ of key=~/x alone. ~name is kept: it may well be a folder here.
    if path.parts[:1] != ("~",):
        return path
    try:
        return Path.home().joinpath(*path.parts[1:])
    except RuntimeError:  # nobody knows where home is
        return path


UserPath = Annotated[Path, AfterValidator(_at_home)]


class Section(BaseModel):
    """A frozen group of keys; unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
    one_of: ClassVar[tuple[str, ...]] = ()
    """Keys of which exactly one is given."""


# --- input -----------------------------------------------------------------------------------


class LabelsSection(Section):
    """Which training images may show their label; exactly one of `per_class`, `percent`, `list`."""

    one_of: ClassVar[tuple[str, ...]] = ("per_class", "percent", "list")

    per_class: PositiveInt | None = None
    """Labelled images per class."""
    percent: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    """Labelled share of the training images in percent, stratified by class (paper: 1, 10, 100)."""
    list: UserPath | None = None
    """A text file with one image name per line, as the official n01440764_10026.JPEG lists;
    relative to the current directory."""
    draw: NonNegativeInt = 0
    """Number of the random draw: another number is another, independent subset."""

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if sum(getattr(self, key) is not None for key in self.one_of) != 1:
            raise ValueError("give exactly one of per_class, percent and list")
        return self


class InputSection(Section):
    """How images are read; only which of them count as readable can change what is trained."""

    workers: NonNegativeInt = 0
    """Worker processes that read, decode and crop; 0 works in the training process."""
    prefetch_batches: PositiveInt = 2
    """Batches prepared ahead, by all workers together."""
    decoder: Literal["auto", "pillow", "turbo", "dali"] = "auto"
    """What decodes plain JPEGs: auto takes DALI on a GPU (extra `dali`), else libjpeg-turbo (extra
    `turbo`), where they are installed; else Pillow."""
    unreadable_limit: Probability = 0.001
    """Share of unreadable images that are replaced before the run stops (rounded up)."""
    max_pixels: PositiveInt = 64_000_000
    """Images that declare more pixels than this are refused before they are decoded."""
    resident: bool = False
    """Decode all images once and keep them on the training device; they must be of one size."""


# --- augmentation ----------------------------------------------------------------------------


class CropFlip(Section):
    """Random crop and flip: fine-tuning, supervised training, distillation, linear evaluation."""

    image_size: PositiveInt
    """Side of the square network input in pixels (paper: 224)."""
    crop_area: tuple[Fraction, Fraction] = (0.1, 1.0)
    """Range of the crop's share of the image area (official data_util.py: effectively 0.1 to 1)."""
    flip_probability: Probability = 0.5
    """Probability of a horizontal mirror image (official: 0.5)."""
    resize: Literal["tf2", "tf1"] = "tf2"
    """Bicubic kernel: tf2 (half-pixel centres, a=-0.5), or tf1 as for the released weights."""
    eval_crop_proportion: Fraction = 0.875
    """Side of the centre crop for evaluation, as a share of the shorter side (official: 0.875).
    Up to 32 pixels, square images are used whole, as the official code does."""

    @field_validator("crop_area")
    @classmethod
    def _ordered(cls, crop_area: tuple[float, float]) -> tuple[float, float]:
        if crop_area[0] > crop_area[1]:
            raise ValueError(f"the range ends ({crop_area[1]}) before it starts ({crop_area[0]})")
        return crop_area


class Distort(CropFlip):
    """The contrastive views: crop, flip, colour jitter, grey, blur, as the official code."""

    colour_strength: NonNegativeFloat = 1.0
    """Strength s of the jitter: brightness, contrast, saturation 0.8s, hue 0.2s (CIFAR: 0.5)."""
    colour_probability: Probability = 0.8
    """Probability that a view's colours are jittered (official: 0.8)."""
    grey_probability: Probability = 0.2
    """Probability that a view becomes grey (official: 0.2)."""
    blur_probability: Probability = 0.5
    """Probability of a blur, sigma from U(0.1, 2.0) pixels (official: 0.5; CIFAR: 0)."""


# --- model -----------------------------------------------------------------------------------


class ResNetBackbone(Section):
    """A ResNet of the official code, with or without selective kernels."""

    kind: Literal["resnet"] = "resnet"
    """Selects a ResNet."""
    depth: Literal[10, 18, 34, 50, 101, 152, 200]
    """Number of layers; 10 (one basic block a group) is ours, for laptops, the rest official."""
    width: PositiveFloat = 1.0
    """Multiplier of every channel count (paper: 1, 2, 3; fractions make small networks)."""
    selective_kernel: bool = False
    """Selective kernels with ratio 1/16, the ResNet-D stem and shortcuts (the paper's SK)."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """imagenet: 7x7/2 (or three 3x3) and max-pool. cifar: one 3x3 convolution, for 32 pixels."""


class HeadSection(Section):
    """The projection head: dense layers with batch norm, ReLU between them."""

    layers: PositiveInt = 3
    """Number of dense layers (paper: 3)."""
    output_width: PositiveInt = 128
    """Width of the projections (official: 128)."""


# --- loss ------------------------------------------------------------------------------------


class QueueSection(Section):
    """A memory of past projections as further negatives, made by an averaged copy of the model."""

    length: PositiveInt = 65_536
    """Projections kept (paper: 64k)."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """Decay per update of the averaged copy's weights (paper: 0.999)."""


class NtXentLoss(Section):
    """NT-Xent, the contrastive loss of SimCLR, as the official sum over the two directions."""

    kind: Literal["nt_xent"] = "nt_xent"
    """Selects NT-Xent."""
    temperature: PositiveFloat = 0.1
    """Divides the cosine similarities; dimensionless (paper: 0.1; official CIFAR: 0.5)."""
    row_chunk: PositiveInt | None = None
    """Anchors per chunk; bounds memory to row_chunk x 2 global_batch logits. null: all at once."""
    queue: QueueSection | None = None
    """Memory of past projections; null: negatives come from the batch alone."""


# --- optimisation ----------------------------------------------------------------------------


class Lars(Section):
    """LARS with classic momentum; batch norm, biases and the classifier are never adapted."""

    kind: Literal["lars"]
    """Selects LARS."""
    learning_rate: PositiveFloat
    """Base rate, before `rate_scaling` (paper: 0.1 with sqrt)."""
    rate_scaling: Literal["none", "linear", "sqrt"] = "sqrt"
    """none; linear: x global_batch / 256; sqrt: x sqrt(global_batch). Official model_util.py."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay per update, kernels only (paper: 1e-4; fine-tuning: 0)."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum (official: 0.9)."""
    trust_coefficient: PositiveFloat = 0.001
    """Scales |weights| / |gradient| of each kernel (official: 0.001)."""


class Sgd(Section):
    """SGD with Nesterov momentum, as the official `momentum` optimizer."""

    kind: Literal["sgd"]
    """Selects SGD with Nesterov momentum."""
    learning_rate: PositiveFloat
    """Base rate, before `rate_scaling` (official linear evaluation: 0.1 with linear)."""
    rate_scaling: Literal["none", "linear", "sqrt"] = "linear"
    """none; linear: x global_batch / 256; sqrt: x sqrt(global_batch). Official model_util.py."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 decay, not of batch norm (official linear evaluation: CIFAR-10 0, ImageNet 1e-6)."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum (official: 0.9)."""


class AdamW(Section):
    """AdamW: Adam with decoupled weight decay."""

    kind: Literal["adamw"]
    """Selects AdamW."""
    learning_rate: PositiveFloat
    """Base rate, before `rate_scaling`."""
    rate_scaling: Literal["none", "linear", "sqrt"] = "none"
    """none; linear: x global_batch / 256; sqrt: x sqrt(global_batch)."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, kernels only."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running mean of the gradient and of its square."""


OptimizerSection = Annotated[Lars | Sgd | AdamW, Field(discriminator="kind")]


class ScheduleSection(Section):
    """How long to train; exactly one of `epochs` and `steps`. Warm-up is linear, decay cosine."""

    one_of: ClassVar[tuple[str, ...]] = ("epochs", "steps")

    epochs: PositiveFloat | None = None
    """Passes over the images; updates = examples x epochs // global_batch + 1 (official)."""
    steps: PositiveInt | None = None
    """Updates, instead of `epochs`."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs of linear warm-up (paper: 5% of the epochs; fine-tuning: 0)."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self


class BatchSection(Section):
    """How many images make one update, and how they are processed."""

    global_batch: PositiveInt
    """Images per update over all ranks (paper: 4096; fine-tuning: 1024)."""
    micro_batch: PositiveInt | Literal["auto"] | None = None
    """Images per forward pass on one rank; null: the rank's whole share; auto: as many as fit, by
    trying, the same on all ranks. Loss and gradient stay those of the batch; batch norm sees this
    many images of each rank at a time."""
    batch_norm: Literal["per_micro_batch", "two_pass"] = "per_micro_batch"
    """Images whose statistics batch norm takes. two_pass: those of the whole global batch in every
    case; refused with micro-batches, where `parallel.memory` gives the same for less."""
    update: Literal["auto", "direct", "accumulated", "cached"] = "auto"
    """direct: one pass. accumulated: sums of gradients, exact for losses of single images. cached:
    exact for contrastive losses, one more forward pass. auto: the exact one that fits."""


# --- run keeping -----------------------------------------------------------------------------


class CheckpointSection(Section):
    """When state is saved. A stopped run always saves first."""

    every_steps: PositiveInt | None = None
    """Updates between checkpoints; null: a checkpoint at the end and when stopped."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest verified checkpoints that are kept; 2 at least."""


class LogSection(Section):
    """What is recorded while training."""

    every_steps: PositiveInt = 10
    """Updates between two records of training metrics; a GPU is read no more often than this."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""


class ProbeSection(Section):
    """Quality of the features while pretraining; needs labels and changes no feature."""

    linear: bool = True
    """Train a linear classifier behind a stop-gradient on both views (official tf2/model.py)."""
    knn_every_epochs: PositiveFloat | None = None
    """Epochs between nearest-neighbour evaluations on the held-out images, with one more at the
    end of a run that is at least as long; null: none."""
    neighbours: PositiveInt = 20
    """Neighbours that vote, weighted by exp(cosine / 0.1)."""
