"""Views from pixels, in batches on the device: crop, flip, colours, grey, blur."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.colour import grey, jitter_, on_device
from bigsimclr.augment.draws import Draws
from bigsimclr.augment.resize import Resize, tap_table, taps


@torch.no_grad()
def make_views(
    pixels: Tensor,
    draws: Draws,
    settings: ViewSettings,
    *,
    device: torch.device,
    fused: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Apply the drawn decisions to a batch of images.

    The order is the official one: crop, flip, jitter, grey, clip, blur, clip.

    Source: google-research/simclr data_util.py, preprocess_for_train, preprocess_for_eval and
    batch_random_blur.

    Args:
        pixels: [B,3,h,w], uint8 or floating in [0, 1], still to be cropped; or floating
            [V,B,3,H,W], already cropped and resized.
        draws: The decisions for V views of B images.
        settings: How views are made.
        device: Where to compute.
        fused: All of it in three kernels, which Triton must be able to run here; float64 pixels
            take the plain path.
        dtype: What the views are rounded to; None: the type they are computed in.

    Returns:
        [V*B,3,H,W] in [0, 1], channels_last; all of the first view, then all of the second.
        Computed in float32, or float64 for float64 pixels.
    """
    with torch.autocast(device.type, enabled=False):
        pixels = pixels.to(device, non_blocking=True)
        if fused and pixels.dtype != torch.float64:
            return _fused_views(pixels, draws, settings, dtype or torch.float32)
        views = _plain_views(pixels, draws, settings)
        return views.to(dtype or views.dtype, memory_format=torch.channels_last)


def crop_resize(
    pixels: Tensor,
    boxes: npt.NDArray[np.int32],
    size: tuple[int, int],
    resize: Resize,
    *,
    flip: npt.NDArray[np.bool_] | None = None,
    fused: bool = False,
) -> Tensor:
    """Crop and resize a batch of equally large images, several crops of each.

    Args:
        pixels: uint8 [B,3,h,w], or floating in [0, 1].
        boxes: int32 [V,B,4], crops as (y, x, height, width) in pixels.
        size: Height and width of the output in pixels.
        resize: Which kernel.
        flip: bool [V,B], crops to be mirrored left to right; None: none.
        fused: In one kernel, which Triton must be able to run here; float64 pixels take the plain
            path.

    Returns:
        [V*B,3,H,W], view-major, not clipped; float32, or float64 for float64 pixels.
    """
    if fused and pixels.dtype != torch.float64:
        return _fused_crops(pixels, boxes, size, resize, flip=flip).flatten(0, 1)
    return _crops(pixels, boxes, size, resize, flip=flip).flatten(0, 1)


def blur(images: Tensor, sigma: Tensor, *, radius: int) -> Tensor:
    """Blur each image by its own Gaussian, with zeros beyond the border.

    Source: google-research/simclr data_util.py, gaussian_blur.

    Args:
        images: [N,3,H,W].
        sigma: [N], standard deviations in pixels.
        radius: Taps on either side of the centre.

    Returns:
        [N,3,H,W], not clipped.
    """
    count, channels, height, width = images.shape
    distance = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-distance.square() / (2 * sigma.square())[:, None])
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    groups = count * channels
    weight = kernel.repeat_interleave(channels, dim=0)
    planes = images.reshape(1, groups, height, width)
    planes = F.conv2d(planes, weight.view(groups, 1, -1, 1), padding=(radius, 0), groups=groups)
    planes = F.conv2d(planes, weight.view(groups, 1, 1, -1), padding=(0, radius), groups=groups)
    return planes.view(count, channels, height, width)


def _crops(
    pixels: Tensor,
    boxes: npt.NDArray[np.int32],
    size: tuple[int, int],
    resize: Resize,
    *,
    flip: npt.NDArray[np.bool_] | None,
) -> Tensor:
    # -> [V,B,3,H,W], in memory as [B,V,H,3,W].
    views, images = boxes.shape[:2]
    height, width = size
    if not pixels.is_floating_point():
        pixels = pixels.to(torch.float32).div_(255)
    flat = boxes.astype(np.int64).transpose(1, 0, 2).reshape(-1, 4)  # image-major [B*V,4]
    turned = None if flip is None else flip.T.reshape(-1)
    down = _matrices(flat[:, 0::2], height, resize, pixels=pixels, axis=2)
    across = _matrices(flat[:, 1::2], width, resize, pixels=pixels, axis=3, flip=turned)
    rows = torch.bmm(
        down.unflatten(0, (images, views)).flatten(1, 2), pixels.transpose(1, 2).flatten(2)
    )  # [B, V*H, 3*w]
    views_ = torch.bmm(
        rows.view(images * views, height * 3, -1), across.transpose(1, 2)
    )  # [B*V, H*3, W]
    return views_.view(images, views, height, 3, width).permute(1, 0, 3, 2, 4)


def _fused_crops(
    pixels: Tensor,
    boxes: npt.NDArray[np.int32],
    size: tuple[int, int],
    resize: Resize,
    *,
    flip: npt.NDArray[np.bool_] | None,
) -> Tensor:
    # -> [V,B,3,H,W], contiguous.
    from bigsimclr.kernels.crop import crop, pack

    extent = (pixels.shape[2], pixels.shape[3])
    places = pack(boxes, flip=flip, extent=extent)
    down, across = (
        _tap_table(longest, side, resize, pixels.device)
        for longest, side in zip(extent, size, strict=True)
    )
    narrow = bool((boxes[..., 3] < 4).any())
    return crop(pixels, on_device(places, pixels), down=down, across=across, narrow=narrow)


# 1 to 2 MB for images of 224 to 512 pixels; a run has few sizes.
@lru_cache(maxsize=8)
def _tap_table(longest: int, size: int, resize: Resize, device: torch.device) -> Tensor:
    return torch.from_numpy(tap_table(longest, size, resize)).to(device)


def _fused_views(
    pixels: Tensor, draws: Draws, settings: ViewSettings, dtype: torch.dtype
) -> Tensor:
    from bigsimclr.kernels.distort import distort, pack

    flip = draws.flip
    if pixels.ndim == 4:
        size = (settings.image_size, settings.image_size)
        pixels = _fused_crops(pixels, draws.boxes, size, settings.resize, flip=flip)
        flip = np.zeros_like(flip)
    decisions = pack(
        flip=flip,
        jitter=draws.jitter,
        order=draws.order,
        factors=draws.factors,
        grey=draws.grey,
        blur=draws.blur,
        sigma=draws.sigma,
    )
    # No second kernel where nothing is blurred: in fine-tuning and evaluation.
    radius = settings.image_size // 10 // 2 if draws.blur.any() else 0
    return distort(pixels, on_device(decisions, pixels), radius=radius, dtype=dtype)


def _plain_views(pixels: Tensor, draws: Draws, settings: ViewSettings) -> Tensor:
    if pixels.ndim == 4:
        size = (settings.image_size, settings.image_size)
        views = crop_resize(pixels, draws.boxes, size, settings.resize, flip=draws.flip)
    else:
        views = pixels.flatten(0, 1).clone(memory_format=torch.contiguous_format)
        mirrored = _rows(draws.flip)
        if mirrored.size:
            where = on_device(mirrored, views)
            views.index_copy_(0, where, views.index_select(0, where).flip(-1))
    _colour_(views, draws)
    radius = settings.image_size // 10 // 2
    blurred = _rows(draws.blur)
    # A kernel of one tap changes nothing.
    if blurred.size and radius:
        where = on_device(blurred, views)
        sigma = on_device(draws.sigma.reshape(-1)[blurred], views).to(views.dtype)
        soft = blur(views.index_select(0, where), sigma, radius=radius)
        views.index_copy_(0, where, soft.clamp_(0, 1))
    return views


def _colour_(views: Tensor, draws: Draws) -> None:
    jittered = _rows(draws.jitter)
    order = draws.order.reshape(-1, 4)[jittered]
    jitter_(views, jittered, order=order, factors=draws.factors.reshape(-1, 4)[jittered])
    grey_rows = _rows(draws.grey)
    if grey_rows.size:
        where = on_device(grey_rows, views)
        chosen = grey(views.index_select(0, where)).expand(-1, 3, -1, -1)
        views.index_copy_(0, where, chosen)
    views.clamp_(0, 1)


def _rows(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    # bool [V,B] -> rows of the view-major batch.
    return np.flatnonzero(chosen.reshape(-1))


def _matrices(
    spans: npt.NDArray[np.int64],
    size: int,
    resize: Resize,
    *,
    pixels: Tensor,
    axis: int,
    flip: npt.NDArray[np.bool_] | None = None,
) -> Tensor:
    # spans: int64 [N,2], start and length of each crop along the axis -> [N,size,extent], whose
    # product with the pixels along that axis is the resized crop.
    extent = pixels.shape[axis]
    lengths, which = np.unique(spans[:, 1], return_inverse=True)
    first, weight = taps(lengths, size, resize)
    rows = on_device(which, pixels)
    # Weightless taps may lie up to two pixels outside; the margin takes them.
    index = on_device(first + 2, pixels)[rows] + on_device(spans[:, :1], pixels)
    weights = on_device(weight, pixels)[rows].to(pixels.dtype)
    if flip is not None and flip.any():
        turned = on_device(flip, pixels)
        index = torch.where(turned[:, None], index.flip(1), index)
        weights = torch.where(turned[:, None, None], weights.flip(1), weights)
    matrices = weights.new_zeros(len(spans), size, extent + 4)
    matrices.scatter_(2, index[..., None] + torch.arange(4, device=pixels.device), weights)
    return matrices[..., 2:-2]
