"""Images for training: samples made of them, loaders of batches, and the sources that --data names.

A source is a Dataset: source[index] -> (PIL image in RGB, label). Views returns the two views and the mask of
an image for pre-training, Labelled returns an image and its label. Both are indexed by (epoch, index). Every
random draw depends on (seed, epoch, index) only, not on the number of workers or processes.
"""
import functools
import math
import os
import sys
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision import datasets, tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from folders import (
    IGNORE,
    BadFile,
    ClassFolders,
    Images,
    Segmentation,
    image_paths,
    one_line,
    open_image,
    segmentation_classes,
)
from launch import UserError, all_gather, on_first_process, rank, say, world_size
from shapes import Shapes

BICUBIC, LANCZOS = InterpolationMode.BICUBIC, InterpolationMode.LANCZOS


# ---- Two views of an image, and a mask ----

class Views(Dataset):
    """The two views of an image (sec. 2.1) and a mask, for a key (epoch, index).

    One crop is resized twice, as released: bicubic to image_size for the patches, Lanczos to token_size for
    the tokenizer. In training it is a random resized crop, and both views get the same flip and the same
    jitter of brightness, contrast and saturation (Table 12). Otherwise it is the largest centred square.

    draw_mask: function of a numpy generator that returns bool (h, w), such as a partial blockwise_mask.

    A sample is a dict of "image" and "token_image", uint8 (3, S, S), and "mask", bool (h, w). An entry is
    missing if its image_size, token_size or draw_mask is None. In evaluation, a sample that cannot be read is
    None.
    """

    def __init__(self, source, image_size, token_size, draw_mask=None, *, seed=0, train=True, crop_scale=0.08,
                 jitter=0.4):
        self.source, self.seed, self.train = source, seed, train
        self.image_size, self.token_size, self.draw_mask = image_size, token_size, draw_mask
        self.crop_scale, self.jitter = crop_scale, jitter
        augmentation = [v2.RandomHorizontalFlip()]
        if jitter:
            augmentation.append(v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter))
        self.augmentation = v2.Compose(augmentation)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        original = read_sample(self.source, index, self.train)
        if original is None:
            return None
        image, sample = original[0], {}
        with seeded(self.seed, self.train, epoch, index) as rng:
            crop = self.crop(image)
            if self.image_size:
                sample["image"] = resize_square(crop, self.image_size, BICUBIC)
            if self.token_size:
                sample["token_image"] = resize_square(crop, self.token_size, LANCZOS)
            if self.train:
                sample = self.augment(sample)
            if self.draw_mask:
                sample["mask"] = torch.from_numpy(self.draw_mask(rng))
        return sample

    def crop(self, image):
        """The part of a PIL image that both views show, uint8 (3, h, w)."""
        box = centre_box(*image.size)
        if self.train:
            top, left, h, w = v2.RandomResizedCrop.get_params(image, [self.crop_scale, 1], [3 / 4, 4 / 3])
            box = (left, top, left + w, top + h)
        return F.pil_to_tensor(image.crop(box))

    def augment(self, views):
        """Flip and jitter both views with the same draws, as v2 does with all tv_tensors of one call."""
        if self.jitter:                                                # on floats, twice as fast as on uint8
            views = {name: to_float(view) for name, view in views.items()}
        views = self.augmentation({name: tv_tensors.Image(view) for name, view in views.items()})
        if self.jitter:
            return {name: (255 * view).round().to(torch.uint8) for name, view in views.items()}
        return {name: view.as_subclass(torch.Tensor) for name, view in views.items()}


def centre_box(width, height):
    """(left, top, right, bottom) of the largest centred square."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def resize_square(image, size, interpolation):
    """Resize an image, uint8 (3, h, w), to uint8 (3, size, size), antialiased."""
    if interpolation == LANCZOS and not hasattr(torch.ops.aten, "_upsample_lanczos2d_aa"):    # older PyTorch
        image = F.to_pil_image(image)
        return F.pil_to_tensor(F.resize(image, [size, size], interpolation))
    return F.resize(image, [size, size], interpolation)                # several times as fast as PIL


def to_float(images):
    """uint8 -> float in [0, 1]."""
    return images.float() / 255


def load_images(paths, size):
    """Read image files as a batch for a model: float (n, 3, size, size) in [0, 1]. Raises BadFile."""
    return prepare_images([open_image(path) for path in paths], size)


def prepare_images(images, size):
    """A batch of PIL images, float (n, 3, size, size) in [0, 1]: the largest centred squares, resized."""
    resized = [image.resize((size, size), Image.Resampling.BICUBIC, box=centre_box(*image.size))
               for image in images]
    return to_float(torch.stack([F.pil_to_tensor(image) for image in resized]))


@contextmanager
def seeded(*key):
    """Seed torch's CPU generator by integers, and restore it afterwards. Yields a seeded numpy generator."""
    rng = np.random.default_rng(key)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))
        yield rng


MAX_BAD_FILES = 16    # this many unreadable files in a row end a run


def read_sample(source, index, train=True):
    """source[index]. If it cannot be read: in training the next sample that can, in evaluation None.

    Raises OSError if MAX_BAD_FILES in a row cannot be read.
    """
    first_error = None
    tries = min(MAX_BAD_FILES, len(source))
    for i in range(index, index + tries):
        try:
            sample = source[i % len(source)]
            return sample if train or i == index else None
        except BadFile as error:
            first_error = first_error or error
            warn_once(f"{error}; {'the next one is taken' if train else 'it is not counted'}")
    raise OSError(f"--data: {tries} images in a row cannot be used; the first: {first_error}")


@functools.cache
def warn_once(message):
    """Warn of a file that is skipped. Each process says a message once, because of the cache."""
    sys.stderr.write(f"warning: {message}\n")    # one write, so that lines stay whole


# ---- Labelled images ----

class Labelled(Dataset):
    """An image, uint8 (3, H, W), and its label or class map, uint8 (H, W), for a key (epoch, index).

    transform: a transform of torchvision for a PIL image and its label or tv_tensors.Mask, which makes the
    image a tensor. train: what to do if the image cannot be read, as in read_sample.
    """

    def __init__(self, source, transform, seed=0, train=True):
        self.source, self.transform, self.seed, self.train = source, transform, seed, train

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        sample = read_sample(self.source, index, self.train)
        if sample is None:
            return None
        image, target = sample
        with seeded(self.seed, epoch, index):
            if not isinstance(target, np.ndarray):
                return self.transform(image, target)
            image, target = self.transform(image, tv_tensors.Mask(torch.from_numpy(target)))
            return image, target.as_subclass(torch.Tensor)             # not a tv_tensor


FILL_COLOUR, FILL_STD = (124, 116, 104), 58    # mean and std of the pixels of ImageNet


def classification_transform(size, *, train, crop_scale=0.08, randaugment=0.0, erasing=0.0, eval_crop=0.875):
    """In training: random resized crop, flip, RandAugment, random erasing (Table 13). Otherwise: the centre.

    randaugment    mean magnitude of two operations, 0 (none) to 10; as released, its std is 0.5, and each
                   operation is applied to half of the images
    erasing        probability of erasing a rectangle
    eval_crop      side of the centre / side of the image
    """
    if not train:
        resize = v2.Resize(round(size / eval_crop), BICUBIC)
        return v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])
    crop = v2.RandomResizedCrop(size, (crop_scale, 1.0), interpolation=BICUBIC)
    operations = []
    if randaugment:
        steps = np.arange(31)                                          # magnitudes 0, 1/3, 2/3 ... 10
        operation = v2.RandomChoice(
            [v2.RandAugment(1, int(step), 31, BICUBIC, FILL_COLOUR) for step in steps],
            p=np.exp(-((steps / 3 - randaugment) / 0.5) ** 2 / 2).tolist())
        operations = [v2.RandomApply([operation], p=0.5)] * 2
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *operations, v2.PILToTensor(),
                       v2.RandomApply([erase], p=erasing)])


def erase(image, label):
    """Fill a random rectangle of an image, uint8 (3, H, W), with noise, N(0, 1) in normalised colours."""
    top, left, h, w, noise = v2.RandomErasing.get_params(image, scale=(0.02, 1 / 3), ratio=(0.3, 10 / 3))
    if noise is image:                                                 # no rectangle was found
        return image, label
    noise = (noise * FILL_STD + torch.tensor(FILL_COLOUR).view(3, 1, 1)).clamp(0, 255)
    return F.erase(image, top, left, h, w, noise.to(torch.uint8)), label


def segmentation_transform(size, *, train, scale=(0.5, 2.0), jitter=0.5):
    """In training: random scale, crop, flip and colours of an image and its class map. Otherwise: unchanged.

    scale     range of the shorter side / size; then size x size pixels are cropped, with IGNORE as padding
    jitter    largest relative change of contrast and saturation; brightness changes by a quarter of it, hue
              by a fifth, each of them with probability 0.5
    """
    if not train:
        return v2.PILToTensor()
    sides = [round(size * factor) for factor in np.linspace(*scale, num=33)]
    amounts = dict(brightness=jitter / 4, contrast=jitter, saturation=jitter, hue=jitter / 5)
    distortions = [v2.RandomApply([v2.ColorJitter(**{name: amount})], p=0.5)
                   for name, amount in amounts.items()]              # RandomPhotometricDistort swaps channels
    return v2.Compose([
        v2.RandomShortestSize(sides, interpolation=BICUBIC), partial(crop_with_variety, size),
        v2.RandomHorizontalFlip(), *distortions, v2.PILToTensor()])


def crop_with_variety(size, image, class_map):
    """A random crop of size x size pixels, padded with IGNORE.

    As usual on ADE20K, another crop is drawn if one class covers more than 75 % of the pixels that are
    counted, up to ten crops in all.
    """
    crop = v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Mask: IGNORE, "others": FILL_COLOUR})
    for _ in range(10):
        cropped = crop(image, class_map)
        counts = torch.bincount(cropped[1].flatten(), minlength=256)[:IGNORE]
        if counts.max() < 0.75 * counts.sum():
            break
    return cropped


# ---- Loaders ----

def rank_batches(num_images, batch_size, *, seed, start, stop, parts=1, rank=0, world_size=1, repeats=1):
    """Yield `parts` lists of (epoch, index) for each step from start to stop - 1: the images of one process.

    The images of a step are a function of (seed, step), and are dealt to parts and processes in order.
    repeats: how often each image occurs in a batch (repeated augmentation, Table 13). Repeat r has the key
    (epoch * repeats + r, index), so that each repeat gets its own crop. An epoch keeps its number of steps,
    and so sees 1 / repeats of the images.
    """
    unique_per_batch = math.ceil(batch_size / repeats)
    for step in range(start, stop):
        epoch, step_of_epoch = divmod(step, num_images // batch_size)
        if step_of_epoch == 0 or step == start:
            order = np.random.default_rng([seed, epoch]).permutation(num_images)
        first = step_of_epoch * unique_per_batch
        for part in np.arange(batch_size).reshape(parts, world_size, -1):
            yield [(epoch * repeats + i // unique_per_batch, int(order[first + i % unique_per_batch]))
                   for i in part[rank].tolist()]


def train_loader(dataset, args, device, start, stop, collate=default_collate, repeats=1):
    """Load the batches of this process for steps start to stop - 1, each in args.accumulate parts."""
    batches = rank_batches(len(dataset), args.batch_size, seed=args.seed, start=start, stop=stop,
                           parts=args.accumulate, rank=rank(), world_size=world_size(), repeats=repeats)
    return make_loader(dataset, batches, args, device, collate)


def val_loader(dataset, args, device, collate=default_collate, num_images=None, batch_size=None):
    """Yield batches of every held-out sample that can be read, exactly once, split over the processes.

    batch_size: by default that of a process in training. num_images: load about this many samples, evenly
    spaced; by default all. At the end, says how many could not be read. Raises OSError if none could.
    """
    spacing = math.ceil(len(dataset) / num_images) if num_images else 1
    wanted = range(0, len(dataset), spacing)
    indices = wanted[rank()::world_size()]
    size = batch_size or max(1, args.batch_size // args.accumulate // world_size())
    batches = [[(0, index) for index in indices[i:i + size]] for i in range(0, len(indices), size)]
    num_read = 0
    for count, batch in make_loader(dataset, batches, args, device, partial(collate_readable, collate)):
        num_read += count
        if count:
            yield batch
    num_read = sum(all_gather(num_read))
    if not num_read:
        raise OSError(f"--data: none of {len(wanted)} images to evaluate can be read")
    if num_read < len(wanted):
        say(f"warning: {num_read} of {len(wanted)} images are counted; the others cannot be read")


def collate_readable(collate, samples):
    """(number of samples that could be read, a batch of them or None if there are none)."""
    samples = list(filter(None, samples))
    return len(samples), collate(samples) if samples else None


def make_loader(dataset, batches, args, device, collate):
    """A DataLoader of batches, which are lists of keys, with args.workers processes."""
    on_gpu = device.type == "cuda"
    workers = args.workers
    if workers is None:
        workers = 8 if on_gpu else 0
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      pin_memory=on_gpu, prefetch_factor=4 if workers else None,
                      worker_init_fn=leave_process_group)


def leave_process_group(worker):
    """Put a loader process into its own group, so that Ctrl-C does not kill it within a step."""
    os.setpgrp()


def sample_batch(dataset, count, collate=default_collate):
    """A batch of at most count samples of the first epoch, as spread_samples returns them."""
    return collate(spread_samples(dataset, count))


def spread_samples(dataset, count):
    """At most count samples of the first epoch, evenly spaced, with others for those that cannot be read."""
    count = min(count, len(dataset))
    spread = [i * len(dataset) // count for i in range(count)]
    others = sorted(set(range(len(dataset))) - set(spread))
    return list(islice(filter(None, (dataset[0, index] for index in [*spread, *others])), count))


# ---- The splits of --data ----

TORCHVISION = {    # name: its Dataset, and its files below --data-root
    "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw/*-ubyte"),
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python"),
}
HOLD_OUT_EVERY = 50    # every 50th image of a folder without val/ is held out


def open_splits(data, root, labels=None, download=False):
    """Open --data. Returns the sources of its training images and of its held-out images.

    data        shapes, fashion-mnist, cifar10, cifar100, or a folder
    root        folder with the files of torchvision's data sets
    labels      "classes": a label is the number of a class; "maps": a label is a class map, uint8 (H, W);
                None: labels are not used. A source with labels has `classes`, the names of the classes.
    download    let torchvision fetch its data sets

    With "classes", a folder has train/ and val/ (or validation/), which hold a folder for each class. With
    "maps", it has ADE20K's layout. With None, it holds images in any arrangement, and if it has no val/ (or
    validation/), every 50th image is held out. Raises UserError if files are missing or arranged differently.
    """
    assert labels in (None, "classes", "maps"), labels
    if download and data not in TORCHVISION:
        raise UserError(f"--download: only for {', '.join(TORCHVISION)}, not for {data}")
    if data == "shapes":
        return Shapes("train", labels == "maps"), Shapes("val", labels == "maps")
    if data in TORCHVISION:
        if labels == "maps":
            raise UserError(f"--data: {data} has no class maps; use shapes, or a folder in ADE20K's layout")
        return open_torchvision(data, root, download)
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"--data: {data} is neither a folder nor one of shapes, {', '.join(TORCHVISION)}")
    if labels == "maps":
        classes = segmentation_classes(folder)
        return Segmentation(folder, "training", classes), Segmentation(folder, "validation", classes)
    train = folder / "train"
    val = next((folder / name for name in ("val", "validation") if (folder / name).is_dir()), None)
    if labels == "classes":
        if val is None or not train.is_dir():
            raise UserError(f"--data: {data} needs train/ and val/ (or validation/), with a folder per class")
        training = ClassFolders(train)
        return training, ClassFolders(val, training.classes)
    if (folder / "images/training").is_dir() and (folder / "annotations").is_dir():    # ADE20K's layout
        train, val = folder / "images/training", folder / "images/validation"
    paths = image_paths(train if train.is_dir() else folder, without=val)
    if val is not None:
        return Images(paths), Images(image_paths(val))
    held_out = paths[::HOLD_OUT_EVERY]
    others = [path for i, path in enumerate(paths) if i % HOLD_OUT_EVERY]
    return Images(others or held_out), Images(held_out)                # a single image is in both


def open_torchvision(data, root, download):
    """(training, held-out) sources of a data set of torchvision, a key of TORCHVISION."""
    dataset, files = TORCHVISION[data]
    if download:
        on_first_process(partial(download_files, data, root))
    try:
        return tuple(dataset(root, train=train, transform=v2.RGB()) for train in (True, False))
    except Exception as error:    # RuntimeError for missing files, a dozen kinds for damaged ones
        if "not found" in str(error):
            raise UserError(f"--data-root: {root} has no {files}; --download fetches them") from None
        raise UserError(f"--data-root: {root} has damaged files ({type(error).__name__}), {files}; remove "
                        "them, and --download fetches them again") from None


def download_files(data, root):
    """Let torchvision fetch the files of both splits, unless they are there. Raises UserError if it fails."""
    dataset, _ = TORCHVISION[data]
    try:
        dataset(root, download=True)
    except Exception as error:    # of urllib, tarfile or torchvision
        raise UserError(f"--download: {data} could not be fetched into {root} ({one_line(error)})") from None


# ---- Parts of a labelled source ----

def labels_of(source):
    """The labels of all samples as an array, without opening a file."""
    if isinstance(source, Subset):
        return labels_of(source.dataset)[source.indices]
    return np.array(source.targets)


def split_off(source, count):
    """Split a source into (all other samples, `count` samples), always in the same way: two Subsets.

    Raises UserError if no sample would be left.
    """
    if not 1 <= count < len(source):
        raise UserError(f"--validate: must be from 1 to {len(source) - 1}, got {count}")
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    return Subset(source, sorted(order[count:])), Subset(source, sorted(order[:count]))


def balanced_subset(source, count, classes, seed):
    """A Subset of `count` samples with the same number of each class, to within one.

    Raises UserError if a class has too few samples.
    """
    if not len(classes) <= count <= len(source):
        raise UserError(f"--labels: must be from {len(classes)}, one per class, to {len(source)}, "
                        f"got {count}")
    rng = np.random.default_rng([seed, count])
    gets_one_more = rng.permutation(len(classes)) < count % len(classes)
    labels, chosen = labels_of(source), []
    for k, name in enumerate(classes):
        samples = np.flatnonzero(labels == k)
        wanted = count // len(classes) + int(gets_one_more[k])
        if len(samples) < wanted:
            raise UserError(f"--labels: {count} images need {wanted} of class {name}, which has "
                            f"{len(samples)}")
        chosen += rng.permutation(samples)[:wanted].tolist()
    return Subset(source, sorted(chosen))


def require_classes(targets, min_classes, where):
    """Raise UserError unless at least min_classes classes occur in the targets. Reads only what it needs."""
    seen = set()
    for target in targets:
        seen |= set(np.unique(target).tolist())
        if len(seen) >= min_classes:
            return
    raise UserError(f"--data: the {where} have {len(seen)} of the classes; at least {min_classes} are "
                    "needed, to have something to learn and to measure")


def counted_pixels(source, train):
    """Yield the pixels of each class map that are not IGNORE."""
    for index in range(len(source)):
        sample = read_sample(source, index, train)
        if sample:
            yield sample[1][sample[1] != IGNORE]


def open_labelled_splits(args, maps=False):
    """Open --data with labels, or with class maps, and take the parts of it for --validate and --labels.

    Returns (training source, held-out source, names of the classes). Raises UserError as open_splits does,
    and if fewer than two classes can be learned.
    """
    source, held_out = open_splits(args.data, args.data_root, "maps" if maps else "classes", args.download)
    classes = list(source.classes)
    if args.validate:
        source, held_out = split_off(source, args.validate)
    if maps:
        require_classes(counted_pixels(source, True), 2, "training maps")
        require_classes(counted_pixels(held_out, False), 1, "held-out maps")
    elif args.labels:
        source = balanced_subset(source, args.labels, classes, args.seed)
    elif args.validate:
        require_classes(labels_of(source), 2, "training labels")
    return source, held_out, classes
