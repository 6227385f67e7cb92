"""SimCLRv2 in PyTorch: contrastive pretraining, few-label fine-tuning, distillation.

Names are resolved on first use, so importing this package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bigsimclr.errors import BigSimCLRError
    from bigsimclr.losses.classify import distillation
    from bigsimclr.losses.nt_xent import nt_xent
    from bigsimclr.models.heads import ProjectionHead
    from bigsimclr.models.resnet import ResNet
    from bigsimclr.models.simclr import SimCLR
    from bigsimclr.optim import parameter_groups
    from bigsimclr.optim.lars import LARS
    from bigsimclr.optim.schedule import warmup_cosine
    from bigsimclr.recipe import load_recipe
    from bigsimclr.stages import run_recipe
    from bigsimclr.stages.convert import export, import_tf
    from bigsimclr.stages.embed import embed
    from bigsimclr.stages.load import load_model
    from bigsimclr.world import World

_HOMES = {
    "BigSimCLRError": "bigsimclr.errors",
    "LARS": "bigsimclr.optim.lars",
    "ProjectionHead": "bigsimclr.models.heads",
    "ResNet": "bigsimclr.models.resnet",
    "SimCLR": "bigsimclr.models.simclr",
    "World": "bigsimclr.world",
    "distillation": "bigsimclr.losses.classify",
    "embed": "bigsimclr.stages.embed",
    "export": "bigsimclr.stages.convert",
    "import_tf": "bigsimclr.stages.convert",
    "load_model": "bigsimclr.stages.load",
    "load_recipe": "bigsimclr.recipe",
    "nt_xent": "bigsimclr.losses.nt_xent",
    "parameter_groups": "bigsimclr.optim",
    "run_recipe": "bigsimclr.stages",
    "warmup_cosine": "bigsimclr.optim.schedule",
}

__all__ = [
    "LARS",
    "BigSimCLRError",
    "ProjectionHead",
    "ResNet",
    "SimCLR",
    "World",
    "__version__",
    "distillation",
    "embed",
    "export",
    "import_tf",
    "load_model",
    "load_recipe",
    "nt_xent",
    "parameter_groups",
    "run_recipe",
    "warmup_cosine",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'bigsimclr' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
