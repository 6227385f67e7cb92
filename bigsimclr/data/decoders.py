"""Which decoder a stage takes, and why."""

import logging
from importlib.util import find_spec
from typing import Literal, assert_never

import torch

from bigsimclr.errors import MissingExtraError, RecipeError

logger = logging.getLogger(__name__)

Choice = Literal["auto", "pillow", "turbo", "dali"]
Decoder = Literal["pillow", "turbo", "dali"]


def choose_decoder(
    choice: Choice, *, resize: Literal["tf2", "tf1"], device: torch.device
) -> Decoder:
    """Choose what decodes plain JPEGs, and log it; Pillow decodes everything else.

    Args:
        choice: auto takes DALI on a GPU, else libjpeg-turbo, where they are installed; the others
            are orders.
        resize: the kernel of the crops; DALI has one of the two.
        device: where batches are wanted.

    Raises:
        MissingExtraError: a decoder is ordered by name and not installed.
        RecipeError: DALI is ordered by name and lacks the kernel.
    """
    match choice:
        case "auto":
            decoder, reason = _best(resize, device)
        case "pillow":
            decoder, reason = "pillow", "as ordered"
        case "turbo":
            from bigsimclr.data import turbo as _  # noqa: F401 - says what is missing

            decoder, reason = "turbo", "as ordered"
        case "dali":
            _require_dali(resize)
            decoder, reason = "dali", "as ordered"
        case _:
            assert_never(choice)
    logger.info("decoder: %s, %s", _NAMES[decoder], reason)
    return decoder


_NAMES = {"pillow": "Pillow", "turbo": "libjpeg-turbo", "dali": "DALI"}


def _best(resize: Literal["tf2", "tf1"], device: torch.device) -> tuple[Decoder, str]:
    if device.type != "cuda":
        lacks = "there is no GPU"
    elif resize != "tf2":
        lacks = f"DALI has no kernel {resize}"
    elif not _has_dali():
        lacks = "nvidia-dali is not installed (extra dali)"
    else:
        return "dali", "which is installed and has a GPU"
    if find_spec("simplejpeg") is not None:
        return "turbo", f"since {lacks}"
    return "pillow", f"since {lacks} and simplejpeg is not installed (extra turbo)"


def _require_dali(resize: Literal["tf2", "tf1"]) -> None:
    if resize != "tf2":
        raise RecipeError(
            f"input.decoder: DALI has no kernel augment.resize={resize}; "
            "input.decoder=auto, or augment.resize=tf2"
        )
    if not _has_dali():
        raise MissingExtraError(
            "input.decoder: dali needs the package nvidia-dali: pip install 'bigsimclr[dali]' "
            "for CUDA 13, 'bigsimclr[dali-cuda12]' for CUDA 12"
        )


def _has_dali() -> bool:
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package nvidia
        return False
