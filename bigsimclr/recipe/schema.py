"""Every recipe: the sections and keys of each stage, and of pipelines.

With `bigsimclr.recipe.sections`, which holds the sections that stages share, this is the
reference of all keys. The text under a key is its documentation: `bigsimclr explain
loss.temperature` prints it and the JSON Schema carries it. Nothing ever writes to a recipe; what
follows from it (steps, learning rates, micro-batches) lives in `bigsimclr.recipe.plan.Plan`.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from bigsimclr.recipe.sections import (
    BatchSection,
    CheckpointSection,
    CropFlip,
    Distort,
    HeadSection,
    InputSection,
    LabelsSection,
    LogSection,
    NtXentLoss,
    OptimizerSection,
    Probability,
    ProbeSection,
    ResNetBackbone,
    ScheduleSection,
    Section,
    UserPath,
)
from bigsimclr.recipe.sources import DataSection
from bigsimclr.recipe.strategies import ParallelSection


class StageRecipe(Section):
    """Keys of every stage that reads images."""

    seed: NonNegativeInt = 0
    """Seed of initial weights, order of images and augmentation; label draws use `labels.draw`."""
    data: DataSection
    """The images."""
    input: InputSection = InputSection()
    """How images are read."""
    parallel: ParallelSection = ParallelSection()
    """How ranks share the work, on which device, in which precision."""


class TrainingRecipe(StageRecipe):
    """Keys of every stage that trains."""

    optimizer: OptimizerSection
    """The optimizer and its rate."""
    schedule: ScheduleSection
    """How long to train."""
    batch: BatchSection
    """Images per update."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When state is saved."""
    log: LogSection = LogSection()
    """What is recorded."""


class PretrainRecipe(TrainingRecipe):
    """Contrastive pretraining on unlabelled images."""

    stage: Literal["pretrain"]
    """Selects contrastive pretraining."""
    augment: Distort
    """The two random views of each image."""
    backbone: ResNetBackbone
    """The encoder."""
    head: HeadSection = HeadSection()
    """The projection head."""
    loss: NtXentLoss = NtXentLoss()
    """The contrastive loss."""
    probe: ProbeSection = ProbeSection()
    """Quality of the features while training."""


class LinearRecipe(TrainingRecipe):
    """Linear evaluation: a classifier on frozen features, batch norm in inference mode."""

    stage: Literal["linear"]
    """Selects linear evaluation."""
    parent: UserPath | None = None
    """Run directory of the pretraining run, or a model file (.safetensors) written by `import-tf`
    or `export`; relative to the current directory."""
    augment: CropFlip
    """Random crops for training, the centre crop for evaluation."""
    labels: LabelsSection = LabelsSection(percent=100.0)
    """The labelled training images."""
    from_layer: NonNegativeInt = 0
    """Head layer whose output is classified; 0: the backbone's features (paper)."""


class KnnRecipe(StageRecipe):
    """Nearest-neighbour evaluation of frozen features; nothing is trained."""

    stage: Literal["knn"]
    """Selects nearest-neighbour evaluation."""
    parent: UserPath | None = None
    """Run directory of the pretraining run, or a model file (.safetensors) written by `import-tf`
    or `export`; relative to the current directory."""
    augment: CropFlip
    """Only `image_size`, `resize` and `eval_crop_proportion` are used: no randomness."""
    labels: LabelsSection = LabelsSection(percent=100.0)
    """The labelled training images that may vote."""
    from_layer: NonNegativeInt = 0
    """Head layer whose output is compared; 0: the backbone's features."""
    neighbours: PositiveInt = 20
    """Neighbours that vote, weighted by exp(cosine / 0.1)."""
    batch_size: PositiveInt = 256
    """Images per forward pass."""


class FinetuneRecipe(TrainingRecipe):
    """Fine-tuning on few labels, from the middle of the projection head."""

    stage: Literal["finetune"]
    """Selects fine-tuning."""
    parent: UserPath | None = None
    """Run directory of the pretraining run, or a model file (.safetensors) written by `import-tf`
    or `export`; relative to the current directory."""
    augment: CropFlip
    """Random crops and flips for training, the centre crop for evaluation."""
    labels: LabelsSection
    """The labelled training images."""
    from_layer: NonNegativeInt = 1
    """Head layer that feeds the classifier: 1 (paper, 1% and 10% labels) or 0 (100%). Layers up to
    it are trained, layers after it are dropped."""


class SupervisedRecipe(TrainingRecipe):
    """The baseline: the same network and labels, trained from scratch."""

    stage: Literal["supervised"]
    """Selects supervised training from scratch."""
    augment: CropFlip
    """Random crops and flips for training, the centre crop for evaluation."""
    labels: LabelsSection
    """The labelled training images."""
    backbone: ResNetBackbone
    """The encoder."""
    head: HeadSection = HeadSection()
    """The head, of which layers up to `from_layer` are used."""
    from_layer: NonNegativeInt = 0
    """Head layer that feeds the classifier; 0: the backbone's features."""


class DistillRecipe(TrainingRecipe):
    """Distillation of a fine-tuned teacher into a student, on unlabelled images."""

    stage: Literal["distill"]
    """Selects distillation."""
    parent: UserPath | None = None
    """The teacher: run directory of a finetune, supervised, distill or linear run, or a model file
    (.safetensors) with a classifier; relative to the current directory."""
    augment: CropFlip
    """Random crops and flips; teacher and student see the same image."""
    backbone: ResNetBackbone | None = None
    """The student's encoder; null: the teacher's architecture (self-distillation)."""
    head: HeadSection = HeadSection()
    """The student's head, of which layers up to `from_layer` are used."""
    from_layer: NonNegativeInt = 0
    """Head layer that feeds the student's classifier; 0: the backbone's features."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of teacher and student (paper: 0.1 for self-distillation, else 1)."""
    labelled_weight: Probability = 0.0
    """Weight a of the labels in (1-a) distillation + a cross-entropy (paper eq. 3; 0 is eq. 2)."""
    labels: LabelsSection | None = None
    """The labelled training images of the mix; null when `labelled_weight` is 0."""


class PipelineStep(Section):
    """One stage of a pipeline, run once or once per point of a grid."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    """Name of the step and of its folder in the run directory."""
    recipe: str
    """A recipe: a name that `bigsimclr recipes` lists, or a file beside this one."""
    parent: str | None = None
    """Name of an earlier step whose run is this step's parent: a pretrain step for linear, knn and
    finetune; a finetune, supervised, distill or linear step for distill. Without it, `parent` of
    the stage's recipe, of `changes` or of the command line names a run or a model file."""
    changes: dict[str, bool | int | float | str | None] = {}  # noqa: RUF012 - pydantic copies it
    """Keys of the stage recipe, dotted, each with another value for this step. The command line
    wins over them; a key of the grid cannot be among them."""
    grid: dict[str, tuple[int | float | str, ...]] = {}  # noqa: RUF012 - pydantic copies it
    """Keys of the stage recipe, each with values; one run per combination. A step without a grid
    runs once for every run of its parent; with one, its parent has the same grid or none."""


class PipelineRecipe(Section):
    """Stages run in order; each knows its parent, and finished ones are skipped on a re-run."""

    stage: Literal["pipeline"]
    """Selects a pipeline."""
    steps: tuple[PipelineStep, ...] = Field(min_length=1)
    """The stages, in order."""


AnyTraining = PretrainRecipe | LinearRecipe | FinetuneRecipe | SupervisedRecipe | DistillRecipe
AnyStage = AnyTraining | KnnRecipe
Recipe = AnyStage | PipelineRecipe
"""Any recipe; the key `stage` says which."""
