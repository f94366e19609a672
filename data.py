"""Images from `shapes`, a data set or a folder; two aligned views of each, and its mask; loaders.

Every draw is a function of (seed, epoch, index) alone: neither the number of workers nor of processes nor a restart
changes anything. Between processes images travel as uint8.
"""
import colorsys
import functools
import math
import os
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as F

from masking import blockwise_mask, random_mask

# ---------------------------------------------------------------------------------------------------------------------
# shapes: scenes drawn from nothing but their index
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = ("disc", "square", "triangle", "hexagon", "star", "cross", "ring", "crescent", "ellipse", "bar")


def _outline(shape, u, v):
    """Signed distance (about; negative inside) from the outline of a shape of radius 1 at the origin."""
    r = np.hypot(u, v)
    if shape == "disc":
        return r - 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.8
    if shape in ("triangle", "hexagon"):
        half = np.pi / (3 if shape == "triangle" else 6)
        return r * np.cos((np.arctan2(v, u) + np.pi) % (2 * half) - half) - np.cos(half)
    if shape == "star":
        point = abs((np.arctan2(v, u) * 5 / (2 * np.pi)) % 1 - 0.5) * 2          # 0 between two points, 1 at a point
        return (r - 0.45 - 0.6 * point ** 1.3) * 0.6
    if shape == "cross":
        return np.minimum(np.maximum(abs(u) - 1, abs(v) - 0.33), np.maximum(abs(u) - 0.33, abs(v) - 1))
    if shape == "ring":
        return abs(r - 0.75) - 0.25
    if shape == "crescent":
        return np.maximum(r - 1, 0.8 - np.hypot(u - 0.55, v))
    if shape == "ellipse":
        return (np.hypot(u, v / 0.5) - 1) * 0.5
    return np.maximum(abs(u) - 1, abs(v) - 0.28)                                 # bar


@functools.lru_cache(maxsize=16_384)    # 200 MB at most; a demo epoch is drawn once
def render_scene(split, index, size=64):
    """One scene of `shapes`, a pure function of its arguments.

    Returns (image uint8 (size, size, 3), label, class map uint8 (size, size)). The label is the main object's, an index
    into SHAPES; the class map holds 0 for background and 1 + that index for objects.
    """
    rng = np.random.default_rng([0 if split == "train" else 1, index])
    places = np.arange(size, dtype=np.float32) / size                            # of pixels, in [0, 1)

    def colour(saturation, value):
        return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)), np.float32)

    def textured(a, b, x, y):                                                    # a to b in a ramp, waves or stripes
        angle = rng.uniform(0, 2 * np.pi)
        along = (x - 0.5) * float(np.cos(angle)) + (y - 0.5) * float(np.sin(angle))
        swing = np.sin((2 * np.pi * rng.uniform(0.7, 2.5)) * along + rng.uniform(0, 2 * np.pi))
        blend = (along, swing / 2, swing * 3)[rng.integers(3)]
        return a + (b - a) * np.clip(0.5 + blend, 0, 1)[..., None]               # (rows, columns, 3)

    image = textured(colour((0.1, 0.6), (0.2, 0.9)), colour((0.1, 0.6), (0.2, 0.9)), places, places[:, None])
    classes = np.zeros((size, size), np.uint8)

    def draw(shape, radius, centre):
        window = tuple(slice(max(0, int((c - 1.1 * radius) * size)), int((c + 1.1 * radius) * size) + 2) for c in centre)
        x, y = places[window[1]], places[window[0], None]                        # only where the shape can be
        angle = rng.uniform(0, 2 * np.pi)
        cos, sin = float(np.cos(angle)) / radius, float(np.sin(angle)) / radius
        u = (x - centre[1]) * cos + (y - centre[0]) * sin
        v = (y - centre[0]) * cos - (x - centre[1]) * sin
        cover = np.clip(0.5 - _outline(SHAPES[shape], u, v) * (radius * size), 0, 1)    # anti-aliased over one pixel
        tone = colour((0.5, 1.0), (0.4, 1.0))
        fill = textured(tone, tone * rng.uniform(0.4, 0.8), x, y) if rng.random() < 0.4 else tone
        image[window] += (fill - image[window]) * cover[..., None]
        classes[window][cover > 0.5] = 1 + shape

    label = int(rng.integers(len(SHAPES)))
    for _ in range(rng.integers(4)):                                             # behind the main object
        draw(int(rng.integers(len(SHAPES))), rng.uniform(0.08, 0.16), rng.uniform(0.05, 0.95, 2).tolist())
    draw(label, rng.uniform(0.2, 0.36), rng.uniform(0.33, 0.67, 2).tolist())
    if rng.random() < 0.4:                                                       # in front, hiding a part of it
        draw(int(rng.integers(len(SHAPES))), rng.uniform(0.06, 0.12), rng.uniform(0.1, 0.9, 2).tolist())
    return (image * 255).round().astype(np.uint8), label, classes


# ---------------------------------------------------------------------------------------------------------------------
# Sources: len(source), source.image(index) -> PIL image in RGB, source.name(index)
# ---------------------------------------------------------------------------------------------------------------------

DATASETS = {"fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
FOLDERS = {"fashion-mnist": "FashionMNIST/raw (four unpacked files such as train-images-idx3-ubyte)",
           "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
HELD_OUT = 50    # of a folder without val/, every 50th image is kept from training


class Shapes:
    """Scenes of render_scene. There are as many as there are integers; an epoch is 10,000 of them, 1,000 to validate."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return 10_000 if self.split == "train" else 1_000

    def image(self, index):
        return Image.fromarray(render_scene(self.split, index)[0])

    def name(self, index):
        return f"shapes/{self.split}/{index}"


class TorchvisionImages:
    """Fashion-MNIST, CIFAR-10 or CIFAR-100 as torchvision reads them, grey images as RGB. Nothing is downloaded."""

    def __init__(self, name, root, split):
        self.label = f"{name}/{split}"
        try:
            self.dataset = getattr(torchvision.datasets, DATASETS[name])(root, train=split == "train", download=False)
        except RuntimeError:
            raise ValueError(f"data_root: {root} has no {FOLDERS[name]}") from None

    def __len__(self):
        return len(self.dataset)

    def image(self, index):
        return self.dataset[index][0].convert("RGB")

    def name(self, index):
        return f"{self.label}/{index}"


class Folder:
    """Image files, of any size and mode: grey, palette, CMYK, transparent (over white), turned by EXIF."""

    def __init__(self, paths):
        self.paths = np.array(paths)                # one buffer: a list's strings would be copied into every worker

    def __len__(self):
        return len(self.paths)

    def image(self, index):
        with Image.open(self.paths[index]) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):      # 16-bit grey, which convert would cut at 255
                image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")

    def name(self, index):
        return str(self.paths[index])


def open_splits(data, root):
    """(training images, held-out images) of --data, as open_images finds them."""
    return open_images(data, root, "train"), open_images(data, root, "val")


def open_images(data, root, split):
    """The images of --data for pre-training, labels aside; split "train" or "val".

    A folder's train/ and val/ (or validation/) if there are any, else every image below it, each 50th held out.
    Raises ValueError ("field: what is wrong").
    """
    if data == "shapes":
        return Shapes(split)
    if data in DATASETS:
        return TorchvisionImages(data, root, split)
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"data: {data} is not a folder, nor shapes, {', '.join(DATASETS)}")
    split_folders = [folder / name for name in (("train",) if split == "train" else ("val", "validation"))]
    for candidate in split_folders:
        if candidate.is_dir():
            paths = image_paths(candidate)
            break
    else:
        if (folder / "train").is_dir():
            folder = folder / "train"
        paths = [path for path in image_paths(folder) if Path(path).relative_to(folder).parts[0] not in ("val", "validation")]
        if len(paths) > 1 and not any(candidate.is_dir() for candidate in (folder / "val", folder / "validation")):
            held_out = paths[::HELD_OUT]
            paths = held_out if split == "val" else sorted(set(paths) - set(held_out))
    if not paths:
        raise ValueError(f"data: no images under {folder} ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return Folder(paths)


def image_paths(folder):
    """The image files below a folder, links followed, sorted."""
    return sorted(os.path.join(where, name) for where, _, names in os.walk(folder, followlinks=True) for name in names
                  if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)


class CorruptImages:
    """Keeps count of unreadable images: each is named once, and too many in an epoch are an error."""

    def __init__(self, images_per_epoch, say, state=None):
        self.limit, self.say = max(1, images_per_epoch // 100), say
        self.names, self.epoch, self.in_epoch = state or ([], 0, 0)

    def state(self):
        """What a checkpoint keeps of it."""
        return [self.names, self.epoch, self.in_epoch]

    def warn(self, names):
        """Name each image that was not named before."""
        for name in names:
            if name not in self.names:
                self.names.append(name)
                self.say(f"warning: {name} cannot be read; the next image takes its place")

    def add(self, epoch, names):
        """names: what was unreadable in one global batch. Raises ValueError above 1 % of an epoch (and above one image)."""
        self.warn(names)
        self.in_epoch = len(names) + (self.in_epoch if epoch == self.epoch else 0)
        self.epoch = epoch
        if self.in_epoch > self.limit:
            raise ValueError(f"data: more than 1 % of the images of an epoch cannot be read: {', '.join(self.names[:10])}")


# ---------------------------------------------------------------------------------------------------------------------
# Two views and a mask
# ---------------------------------------------------------------------------------------------------------------------

def random_crop_box(width, height, rng, scale, ratio=(3 / 4, 4 / 3)):
    """(left, top, right, bottom) of a random resized crop: a share scale[0]..scale[1] of the area, uniform; aspect ratio
    log-uniform. What does not fit in ten draws is the largest centred crop of an allowed ratio, as in torchvision."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * min(max(width / height, ratio[0]), ratio[1])))
    h = min(height, round(width / min(max(width / height, ratio[0]), ratio[1])))
    return (width - w) // 2, (height - h) // 2, (width - w) // 2 + w, (height - h) // 2 + h


def centre_box(width, height):
    """(left, top, right, bottom) of the largest centred square."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2


class Views(Dataset):
    """For (epoch, index): the image for the patches, the same crop for the tokenizer, and a mask over the patch grid.

    Training: one random resized crop, one flip, one colour jitter (brightness, contrast, saturation, in random order; after
    the crop, so that it costs little), resized once for each view. Validation: the largest centred square, as it is.

    source      of open_images
    sizes       pixels a side of the two views: the patches', the tokenizer's
    grid, num_masked, masking    of the mask: "blockwise", "random" or "none"
    Returns (uint8 (3, S, S), uint8 (3, T, T), bool (h, w), [] or [name of the unreadable image that another replaces]).
    """

    def __init__(self, source, sizes, grid, *, num_masked=0, masking="none", seed=0, train=True, crop_scale=0.08, jitter=0.4,
                 exact=True, log_aspect=False):
        self.source, self.sizes, self.grid, self.num_masked, self.masking = source, sizes, grid, num_masked, masking
        self.seed, self.train, self.crop_scale, self.jitter = seed, train, crop_scale, jitter
        self.block_options = dict(exact=exact, log_aspect=log_aspect)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng([self.seed, int(self.train), epoch, index])
        image, unreadable = self.read(index)
        views = self.views(image, rng)
        if self.masking == "blockwise":
            mask = blockwise_mask(self.grid, self.num_masked, rng, **self.block_options)
        elif self.masking == "random":
            mask = random_mask(self.grid, self.num_masked, rng)
        else:
            mask = np.zeros(self.grid, dtype=bool)
        views = [torch.from_numpy(np.array(view)).permute(2, 0, 1) for view in views]     # (3, S, S)
        return *views, torch.from_numpy(mask), unreadable

    def read(self, index):
        """(image, [] or [the name of the file that could not be read]): a broken file is replaced by the next that can be
        read, or after 20 that cannot by a grey square; CorruptImages stops the run before that matters."""
        unreadable = []
        for candidate in range(index, index + 20):
            try:
                return self.source.image(candidate % len(self.source)), unreadable
            except Exception:                        # image decoders raise whatever they like on broken files
                unreadable = [self.source.name(index)]
        return Image.new("RGB", (self.sizes[0], self.sizes[0]), "grey"), unreadable

    def views(self, image, rng):
        if not self.train:
            return [image.resize((size, size), Image.BICUBIC, box=centre_box(*image.size)) for size in self.sizes]
        box = random_crop_box(*image.size, rng, (self.crop_scale, 1.0))
        flip = rng.random() < 0.5
        factors = rng.uniform(1 - self.jitter, 1 + self.jitter, 3)
        order = rng.permutation(3)
        views = []
        for size in self.sizes:
            view = image.resize((size, size), Image.BICUBIC, box=box)
            if flip:
                view = view.transpose(Image.FLIP_LEFT_RIGHT)
            for i in order if self.jitter else ():
                view = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[i](view, float(factors[i]))
            views.append(view)
        return views


# ---------------------------------------------------------------------------------------------------------------------
# Loaders
# ---------------------------------------------------------------------------------------------------------------------

class GlobalBatches(Sampler):
    """The (epoch, index) lists of one process, from step start to step stop, accumulated parts one after the other.

    The images of a step depend on (seed, step) alone; they are dealt out to parts and processes in order.
    """

    def __init__(self, images, batch_size, *, seed, start, stop, parts=1, rank=0, world_size=1):
        self.images, self.batch_size, self.seed, self.start, self.stop = images, batch_size, seed, start, stop
        self.parts, self.rank, self.world_size = parts, rank, world_size

    def __len__(self):
        return (self.stop - self.start) * self.parts

    def __iter__(self):
        per_epoch, shuffled = self.images // self.batch_size, None
        for step in range(self.start, self.stop):
            epoch, at = divmod(step, per_epoch)
            if epoch != shuffled:
                order, shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.images), epoch
            batch = order[at * self.batch_size:(at + 1) * self.batch_size].reshape(self.parts, self.world_size, -1)
            for part in range(self.parts):
                yield [(epoch, int(index)) for index in batch[part, self.rank]]


def held_out_batches(images, batch_size, *, rank=0, world_size=1):
    """(0, index) lists over the images (a range of indices), each in exactly one batch of one process."""
    indices = images[rank::world_size]
    return [[(0, index) for index in indices[i:i + batch_size]] for i in range(0, len(indices), batch_size)]


def train_loader(views, config, device, *, start, stop, rank, world_size):
    """Batches of one process for steps start to stop: stacked samples, and the names of unreadable images."""
    return _loader(views, GlobalBatches(len(views), config.batch_size, seed=config.seed, start=start, stop=stop,
                                        parts=config.accumulate, rank=rank, world_size=world_size), config.workers, device)


def val_loader(views, config, device, *, rank, world_size, images=512):
    """Batches of one process's share of at most so many held-out images, evenly spaced over all."""
    chosen = range(0, len(views), math.ceil(len(views) / images))
    batch_size = max(1, config.batch_size // config.accumulate // world_size)
    return _loader(views, held_out_batches(chosen, batch_size, rank=rank, world_size=world_size), config.workers, device)


def first_batch(views, count, device):
    """The first count samples, as one batch."""
    return next(iter(_loader(views, held_out_batches(range(min(count, len(views))), count), 0, device)))


def _loader(views, batches, workers, device):
    if workers is None:
        workers = 8 if device.type == "cuda" else 0
    return DataLoader(views, batch_sampler=batches, num_workers=workers, collate_fn=_collate, worker_init_fn=_start_worker,
                      pin_memory=device.type == "cuda", prefetch_factor=4 if workers else None)


def _collate(samples):
    *tensors, unreadable = zip(*samples)
    return *(torch.stack(column) for column in tensors), [name for names in unreadable for name in names]


def _start_worker(_):
    os.setpgrp()    # Ctrl-C and torchrun signal the whole group: workers must live until the step has ended


def to_float(images):
    """uint8 -> float in [0, 1]."""
    return images.float() / 255
