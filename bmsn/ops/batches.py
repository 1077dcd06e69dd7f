"""One pass from stored images to a batch: gather, random crop, flip, normalise and cast, wherever the images lie.

    pixels[i,c,y,x] = table[v, c],  v = images[order[B * place + i], y + top - PADDING, column + left - PADDING, c],
    0 where that lies outside the image;  place = step mod steps in an epoch,  column = W - 1 - x if flipped, else x

top, left and flip come from words 0, 1 and 2 of Philox-4x32-10 (`bmsn.rng.philox`) with the counter
(i, step mod 2^32, step / 2^32, 0), and values from a table that is made once on the host: the same batch, bit for bit,
on every device. `step` is read where the images are, so nothing waits for the host.

Source: Javan et al. 2023, section 3 (crop and flip); Salmon et al. 2011 for Philox.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmsn.backend import resolve
from bmsn.errors import InputError
from bmsn.ops.checks import loaded_extension
from bmsn.rng import below, philox

PADDING = 4  # pixels on each side before the random crop, 0 after normalisation: the channel's mean
DTYPES = (torch.float32, torch.bfloat16)

torch.library.define(
    "bmsn::augment",
    "(Tensor images, Tensor? labels, Tensor order, Tensor table, Tensor step, int key, int batch_size, bool crop, "
    "str backend) -> (Tensor pixels, Tensor labels)",
)


def augment(
    images: Tensor,
    labels: Tensor | None,
    order: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    key: int,
    batch_size: int,
    crop: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Makes the batch of a step.

    Args:
        images: (N, H, W, C) uint8, contiguous.
        labels: (N,) int64; None: no labels are gathered.
        order: (at least batch_size,) int64, indices of images (not checked: `BatchStream` does it once); the epoch.
        table: (256, C) float32 or bfloat16: the value of each pixel, and the dtype of the batch.
        step: () int64, at least 0.
        key: of Philox, 0 to 2^63 - 1.
        batch_size: B; the images that don't fill a batch are left out.
        crop: False: no crop and no flip.
        backend: auto, reference, cpp or triton.
    Returns:
        pixels (B, C, H, W), channels_last, in the dtype of `table`, and labels (B,) int64 (empty without labels).
    Raises:
        InputError: a dtype, shape, layout or device not listed.
    """
    check_images(images, table)
    device = images.device
    for name, tensor, shape in (("labels", labels, images.shape[:1]), ("order", order, None), ("step", step, ())):
        if tensor is None:
            continue
        fits = tensor.ndim == 1 if shape is None else tensor.shape == shape
        if not fits or tensor.dtype != torch.int64 or tensor.device != device or not tensor.is_contiguous():
            raise InputError(
                f"{name} must be contiguous int64 {'(n,)' if shape is None else tuple(shape)} on {device}; "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    if not 1 <= batch_size <= len(order):
        raise InputError(f"batch_size must be in 1..{len(order)}, the length of order; got {batch_size}")
    if not 0 <= key < 2**63:
        raise InputError(f"key must be in 0..2^63 - 1; got {key}")
    chosen = resolve("augment", backend, device=device)
    return torch.ops.bmsn.augment(images, labels, order, table, step, key, batch_size, crop, chosen)


def check_images(images: Tensor, table: Tensor) -> None:
    """Raises InputError unless `images` can be looked up in `table`."""
    if images.dtype != torch.uint8 or images.ndim != 4 or not images.is_contiguous():
        raise InputError(f"images must be C-contiguous uint8 (N, H, W, C); got {_kind(images)}")
    wanted = (256, images.shape[3])
    if table.dtype not in DTYPES or table.shape != wanted or not table.is_contiguous() or table.device != images.device:
        raise InputError(
            f"table must be float32 or bfloat16 {wanted}, contiguous, on {images.device}; "
            f"got {_kind(table)} on {table.device}"
        )


def _kind(tensor: Tensor) -> str:
    strided = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}{strided}"


def augment_reference(
    images: Tensor,
    labels: Tensor | None,
    order: Tensor,
    table: Tensor,
    step: Tensor,
    key: int,
    batch_size: int,
    crop: bool,
) -> tuple[Tensor, Tensor]:
    """The specification, on any device."""
    chosen = _indices(order, step, batch_size)
    _, height, width, channels = images.shape
    rows = torch.arange(height, device=images.device).repeat(batch_size, 1)  # (B, H), in the image as it is stored
    columns = torch.arange(width, device=images.device).repeat(batch_size, 1)  # (B, W)
    if crop:
        top, left, flip = draws(key, step, batch_size)
        rows = rows + (top - PADDING)[:, None]
        columns = torch.where(flip[:, None], width - 1 - columns, columns) + (left - PADDING)[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    stored = images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    values = table[stored.int(), torch.arange(channels, device=images.device)]
    pixels = torch.where(inside[..., None], values, 0).permute(0, 3, 1, 2)  # stored as NHWC: channels_last
    return pixels, _empty_labels(images) if labels is None else labels[chosen]


def draws(key: int, step: Tensor, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top and left of each image's crop, (B,) int64 in 0..2 * PADDING, and whether it is flipped, (B,) bool."""
    image = torch.arange(batch_size, device=step.device)
    halves = (step & 0xFFFFFFFF, step >> 32, torch.zeros_like(step))
    words = philox(key, torch.stack((image, *(half.expand(batch_size) for half in halves)), -1))
    return below(2 * PADDING + 1, words[:, 0]), below(2 * PADDING + 1, words[:, 1]), below(2, words[:, 2]) == 1


def _indices(order: Tensor, step: Tensor, batch_size: int) -> Tensor:
    steps_per_epoch = len(order) // batch_size
    epoch = order[: steps_per_epoch * batch_size].view(steps_per_epoch, batch_size)
    return epoch.index_select(0, (step % steps_per_epoch).view(1))[0]


def _empty_pixels(images: Tensor, table: Tensor, batch_size: int) -> Tensor:
    return table.new_empty((batch_size, *images.shape[1:])).permute(0, 3, 1, 2)


def _empty_labels(images: Tensor, num_labels: int = 0) -> Tensor:
    return images.new_empty(num_labels, dtype=torch.int64)


def _augment_cpp(
    images: Tensor,
    labels: Tensor | None,
    order: Tensor,
    table: Tensor,
    step: Tensor,
    key: int,
    batch_size: int,
    crop: bool,
) -> tuple[Tensor, Tensor]:
    number = step.item()
    place = number % (len(order) // batch_size)
    chosen = order[place * batch_size : (place + 1) * batch_size]
    pixels = _empty_pixels(images, table, batch_size)
    loaded_extension().augment(
        images.data_ptr(),
        (batch_size, *images.shape[1:]),
        chosen.data_ptr(),
        key,
        number if crop else None,
        PADDING,
        table.data_ptr(),
        pixels.data_ptr(),
        table.dtype == torch.bfloat16,
    )
    return pixels, _empty_labels(images) if labels is None else labels[chosen]


@torch.library.impl("bmsn::augment", "CompositeExplicitAutograd")
def _augment_impl(
    images: Tensor,
    labels: Tensor | None,
    order: Tensor,
    table: Tensor,
    step: Tensor,
    key: int,
    batch_size: int,
    crop: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return augment_reference(images, labels, order, table, step, key, batch_size, crop)
    if backend == "cpp":
        return _augment_cpp(images, labels, order, table, step, key, batch_size, crop)
    from bmsn.kernels.batches import launch_augment

    pixels, chosen = _augment_fake(images, labels, order, table, step, key, batch_size, crop, backend)
    launch_augment(images, labels, order, table, step, key, crop, PADDING, pixels, chosen)
    return pixels, chosen


@torch.library.register_fake("bmsn::augment")
def _augment_fake(
    images: Tensor,
    labels: Tensor | None,
    order: Tensor,
    table: Tensor,
    step: Tensor,
    key: int,
    batch_size: int,
    crop: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty_pixels(images, table, batch_size), _empty_labels(images, 0 if labels is None else batch_size)
