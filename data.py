"""Images from `shapes`, a data set or a folder; two aligned views of each, and its mask; labelled images; loaders.

Every draw is a function of (seed, epoch, index) alone: neither the number of workers nor of processes nor a restart
changes anything. Between processes images travel as uint8.

torchvision and, in the scripts, matplotlib are imported where they are used: they take three of the five seconds that a script
would need to begin.
"""
import colorsys
import errno
import functools
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from masking import blockwise_mask, random_mask

# ---------------------------------------------------------------------------------------------------------------------
# shapes: scenes drawn from nothing but their index
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = ("disc", "square", "triangle", "hexagon", "star", "cross", "ring", "crescent", "ellipse", "bar")
HUE_SPREAD = 0.04    # objects vary by this about their shape's hue, the next shape's is 0.1 away: hue alone would name four in five


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

    def colour(hue, saturation, value):
        return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value)), np.float32)

    def textured(a, b, x, y):                                                    # a to b in a ramp, waves or stripes
        angle = rng.uniform(0, 2 * np.pi)
        along = (x - 0.5) * float(np.cos(angle)) + (y - 0.5) * float(np.sin(angle))
        swing = np.sin((2 * np.pi * rng.uniform(0.7, 2.5)) * along + rng.uniform(0, 2 * np.pi))
        blend = (along, swing / 2, swing * 3)[rng.integers(3)]
        return a + (b - a) * np.clip(0.5 + blend, 0, 1)[..., None]               # (rows, columns, 3)

    image = textured(*(colour(rng.random(), (0.1, 0.6), (0.2, 0.9)) for _ in range(2)), places, places[:, None])
    classes = np.zeros((size, size), np.uint8)

    def draw(shape, radius, centre):
        window = tuple(slice(max(0, int((c - 1.1 * radius) * size)), int((c + 1.1 * radius) * size) + 2) for c in centre)
        x, y = places[window[1]], places[window[0], None]                        # only where the shape can be
        angle = rng.uniform(0, 2 * np.pi)
        cos, sin = float(np.cos(angle)) / radius, float(np.sin(angle)) / radius
        u = (x - centre[1]) * cos + (y - centre[0]) * sin
        v = (y - centre[0]) * cos - (x - centre[1]) * sin
        cover = np.clip(0.5 - _outline(SHAPES[shape], u, v) * (radius * size), 0, 1)    # anti-aliased over one pixel
        tone = colour(shape / len(SHAPES) + rng.normal(0, HUE_SPREAD), (0.5, 1.0), (0.5, 1.0))
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
# Sources: len(source), source.image(index) -> PIL image in RGB, source.name(index); with labels also source.classes, their
# names, and source.target(index): an int, or for segmentation a map of them, (H, W) uint8
# ---------------------------------------------------------------------------------------------------------------------

DATASETS = {"fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
FOLDERS = {"fashion-mnist": "FashionMNIST/raw (four unpacked files such as train-images-idx3-ubyte)",
           "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
ORIENTATION = 0x0112    # EXIF's tag
warnings.filterwarnings("ignore", module=r"PIL\.")    # of odd tags and the like, two lines for each file that has them
HELD_OUT = 50    # of a folder without val/, every 50th image is kept from training


class Shapes:
    """Scenes of render_scene. There are as many as there are integers; an epoch is 10,000 of them, 1,000 to validate."""

    def __init__(self, split, maps=False):
        self.split, self.maps = split, maps
        self.classes = ["background", *SHAPES] if maps else list(SHAPES)

    def __len__(self):
        return 10_000 if self.split == "train" else 1_000

    def image(self, index):
        return Image.fromarray(render_scene(self.split, index)[0])

    def target(self, index):
        return render_scene(self.split, index)[2 if self.maps else 1]

    def labels(self):
        return np.array([self.target(index) for index in range(len(self))])

    def name(self, index):
        return f"shapes/{self.split}/{index}"


class TorchvisionImages:
    """Fashion-MNIST, CIFAR-10 or CIFAR-100 as torchvision reads them, grey images as RGB. Nothing is downloaded."""

    def __init__(self, name, root, split):
        from torchvision import datasets
        self.label = f"{name}/{split}"
        try:
            self.dataset = getattr(datasets, DATASETS[name])(root, train=split == "train", download=False)
        except RuntimeError:
            raise ValueError(f"data_root: {root} has no {FOLDERS[name]}") from None
        except Exception as error:                      # files that are there, and empty or cut off
            raise ValueError(f"data_root: {root} holds damaged files of {FOLDERS[name]}: {type(error).__name__} {error}") from None
        self.classes = list(self.dataset.classes)

    def __len__(self):
        return len(self.dataset)

    def image(self, index):
        return self.dataset[index][0].convert("RGB")

    def target(self, index):
        return int(self.dataset.targets[index])

    def labels(self):
        return np.asarray(self.dataset.targets)

    def name(self, index):
        return f"{self.label}/{index}"


class Folder:
    """Image files, of any size and mode: grey, palette, CMYK, transparent (over white), turned by EXIF."""

    def __init__(self, paths):
        self.paths = np.array(paths)                # one buffer: a list's strings would be copied into every worker

    def __len__(self):
        return len(self.paths)

    def size(self, index):
        """(width, height) in pixels, upright, from the head of the file."""
        with Image.open(self.paths[index]) as file:
            return file.size[::-1] if file.getexif().get(ORIENTATION, 1) > 4 else file.size

    def image(self, index, at_least=None):
        """at_least (width, height), upright: a JPEG that is larger is decoded at 1/2, 1/4 or 1/8 of its size, if that is no
        less, in a fraction of the time."""
        with Image.open(self.paths[index]) as file:
            turned = file.getexif().get(ORIENTATION, 1)
            if at_least and file.format == "JPEG":
                file.draft(None, at_least[::-1] if turned > 4 else at_least)
            file.load()
            image = ImageOps.exif_transpose(file) if turned != 1 else file
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):      # 16-bit grey, or floats up to 1: convert would cut at 255
                values = np.asarray(image, dtype=np.float32)
                values = values * 255 if image.mode == "F" and values.max() <= 1 else values / 257
                image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB") if image.mode != "RGB" else image

    def name(self, index):
        return str(self.paths[index])


class LabelledFolder(Folder):
    """A folder of a folder of images for each class, as torchvision's ImageFolder reads it."""

    def __init__(self, folder, classes=None):
        self.classes = classes or sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if len(self.classes) < 2:
            raise ValueError(f"data: {folder} must hold a folder of images for each of at least two classes")
        files = [image_paths(folder / name) for name in self.classes]
        for name, paths in zip(self.classes, files):
            if not paths and not classes:
                raise ValueError(f"data: class {name} of {folder} has no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
        super().__init__([path for paths in files for path in paths])
        self.of = np.repeat(np.arange(len(files)), [len(paths) for paths in files])
        if not len(self.paths):
            raise ValueError(f"data: no images under {folder} ({' '.join(sorted(IMAGE_SUFFIXES))})")

    def target(self, index):
        return int(self.of[index])

    def labels(self):
        return self.of


class WrongMap(ValueError):
    """(file, what it is): a map that can be read, and does not fit its image or its classes."""


IGNORE = 255    # in a map: not to be predicted, nor counted


class SegmentationFolder(Folder):
    """ADE20K's layout: <folder>/images/<split>/NAME.jpg and <folder>/annotations/<split>/NAME.png.

    A map's values are class numbers, 0 for "none of them" (ADE20K), which becomes IGNORE; class k of the map is k - 1 here.
    objectInfo150.txt in the folder, if there is one, names the classes.
    """

    def __init__(self, folder, split, classes):
        images, maps = folder / "images" / split, folder / "annotations" / split
        for part in (images, maps):
            if not part.is_dir():
                raise ValueError(f"data: {folder} lacks {part.relative_to(folder)}; segmentation takes images/training, "
                                 f"images/validation, annotations/training and annotations/validation")
        super().__init__(image_paths(images))
        if not len(self.paths):
            raise ValueError(f"data: no images under {images} ({' '.join(sorted(IMAGE_SUFFIXES))})")
        self.maps = np.array([str(maps / Path(path).relative_to(images).with_suffix(".png")) for path in self.paths])
        missing = [path for path in self.maps if not os.path.exists(path)]
        if missing:
            raise ValueError(f"data: {len(missing)} images have no map, {missing[0]} first")
        self.classes = segmentation_classes(folder) if classes is None else classes

    def target(self, index):
        try:
            with Image.open(self.maps[index]) as file:
                mode, numbers = file.mode, np.array(file)
        except Exception:                            # image decoders raise whatever they like on broken files
            raise WrongMap(self.maps[index], "cannot be read") from None
        if mode not in ("L", "P"):
            raise WrongMap(self.maps[index], f"is not a map of 8-bit class numbers, but mode {mode}")
        found = numbers[numbers != IGNORE].max(initial=0)
        if found > len(self.classes):
            raise WrongMap(self.maps[index], f"holds class {found}, there are {len(self.classes)}")
        return np.where((numbers == 0) | (numbers == IGNORE), IGNORE, numbers - 1).astype(np.uint8)

    def image(self, index):
        image = super().image(index)
        try:
            with Image.open(self.maps[index]) as file:
                size = file.size
        except Exception:
            raise WrongMap(self.maps[index], "cannot be read") from None
        if size != image.size:
            raise WrongMap(self.maps[index], f"is {size[0]}x{size[1]}, its image {image.size[0]}x{image.size[1]}")
        return image


def segmentation_classes(folder):
    """The names in ADE20K's objectInfo150.txt, a tab-separated table with a line of titles; without the file, 150 numbers.
    ValueError for another table: 1 to 254 classes, since a map has 8 bits, and 0 and IGNORE are none."""
    table = folder / "objectInfo150.txt"
    if not table.exists():
        return [str(number) for number in range(1, 151)]
    try:
        lines = table.read_text(encoding="utf-8").splitlines()[1:]
    except UnicodeDecodeError:
        raise ValueError(f"data: {table} is not a table of class names: it is not text") from None
    classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    if not 1 <= len(classes) < IGNORE:
        raise ValueError(f"data: {table} names {len(classes)} classes, below its line of titles; from 1 to {IGNORE - 1} can be told apart")
    return classes


def open_splits(data, root):
    """(training images, held-out images) of --data, as open_images finds them."""
    return open_images(data, root, "train"), open_images(data, root, "val")


def open_labelled(data, root, maps=False):
    """(training images, held-out images) of --data with classes and targets: labels, or for segmentation maps.

    A folder needs train/ and val/ (or validation/) with a folder for each class; for maps, ADE20K's layout. Raises
    ValueError ("field: what is wrong").
    """
    if data == "shapes":
        return Shapes("train", maps), Shapes("val", maps)
    folder = Path(data)
    if data not in DATASETS and not folder.is_dir():
        raise ValueError(f"data: {data} is not a folder, nor shapes, {', '.join(DATASETS)}")
    if maps:
        if data in DATASETS:
            raise ValueError(f"data: {data} has no maps to segment; shapes has, and folders in ADE20K's layout")
        train = SegmentationFolder(folder, "training", None)
        return train, SegmentationFolder(folder, "validation", train.classes)
    if data in DATASETS:
        return TorchvisionImages(data, root, "train"), TorchvisionImages(data, root, "val")
    held_out = next((folder / name for name in ("val", "validation") if (folder / name).is_dir()), None)
    if held_out is None or not (folder / "train").is_dir():
        raise ValueError(f"data: {data} needs train/ and val/ (or validation/), a folder for each class in both")
    train = LabelledFolder(folder / "train")
    unknown = {entry.name for entry in held_out.iterdir() if entry.is_dir()} - set(train.classes)
    if unknown:
        raise ValueError(f"data: {held_out} has class {min(unknown)}, {folder / 'train'} has not")
    return train, LabelledFolder(held_out, train.classes)


class Subset:
    """Some images of a source."""

    def __init__(self, source, indices):
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self):
        return len(self.indices)

    def image(self, index):
        return self.source.image(self.indices[index])

    def target(self, index):
        return self.source.target(self.indices[index])

    def labels(self):
        return self.source.labels()[self.indices]

    def name(self, index):
        return self.source.name(self.indices[index])


def split_off(source, count):
    """(all images but count, those count): Subsets of a source, the same at each call. ValueError where none would be left."""
    if not 1 <= count < len(source):
        raise ValueError(f"validate: from 1 to {len(source) - 1}, not {count}")
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    return Subset(source, sorted(order[count:])), Subset(source, sorted(order[:count]))


def few_labels(source, count, seed):
    """A Subset of count images, as many of each class as of any other (give or take one), drawn by seed.

    Raises ValueError where a class has too few.
    """
    classes = len(source.classes)
    if not classes <= count <= len(source):
        raise ValueError(f"labels: from {classes}, one a class, to {len(source)}, not {count}")
    labels, rng, chosen = source.labels(), np.random.default_rng([seed, count]), []
    for k, extra in zip(range(classes), rng.permutation(classes) < count % classes):
        of_class, wanted = np.flatnonzero(labels == k), count // classes + int(extra)
        if len(of_class) < wanted:
            raise ValueError(f"labels: {count} are {wanted} of class {source.classes[k]}, which has {len(of_class)}")
        chosen.append(rng.permutation(of_class)[:wanted])
    return Subset(source, np.sort(np.concatenate(chosen)).tolist())


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


IN_A_ROW = 20    # unreadable images, at least, before none is looked for to take their place


class CorruptImages:
    """Keeps count of unreadable images and wrong maps, as `read` reports them: each is named once, and too many in an epoch
    are an error."""

    def __init__(self, images_per_epoch, say, state=None):
        self.limit, self.say = max(1, images_per_epoch // 100), say
        self.names, self.epoch, self.in_epoch = state or ([], 0, 0)

    def state(self):
        """What a checkpoint keeps of it."""
        return [self.names, self.epoch, self.in_epoch]

    def warn(self, names):
        """Name each image that was not named before. OSError where none could take their place."""
        self._name(names)
        if len(names) >= IN_A_ROW:
            raise OSError(errno.EIO, f"cannot be read, nor can the {IN_A_ROW - 1} images after it", names[0].partition("\t")[0])

    def _name(self, names):
        for name in names:
            if name not in self.names:
                self.names.append(name)
                path, _, reason = name.partition("\t")
                self.say(f"warning: {path} {reason or 'cannot be read'}; the next image takes its place")

    def add(self, epoch, names):
        """names: what was unreadable in one global batch. Raises ValueError above 1 % of an epoch (and above one image)."""
        self._name(names)
        self.in_epoch = len(names) + (self.in_epoch if epoch == self.epoch else 0)
        self.epoch = epoch
        if self.in_epoch > self.limit:
            some = ", ".join(self.names[:10]).replace("\t", " ")
            raise ValueError(f"data: more than 1 % of the images of an epoch cannot be read: {some}")


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


def read(source, index, what=lambda source, index: source.image(index)):
    """(image, its index, [] or [the file that could not be read]): a broken file is replaced by the next that can be read, and
    each is reported in its own turn. If more than 1 % in a row cannot, the image is None and all of them are reported, which
    makes CorruptImages stop the run. A file is reported by its name; a wrong map by its name, a tab and what it is."""
    unreadable = []
    for candidate in range(index, index + max(IN_A_ROW, len(source) // 50)):
        try:
            return what(source, candidate % len(source)), candidate % len(source), unreadable[:1]
        except WrongMap as error:
            unreadable.append("\t".join(error.args))
        except Exception:                            # image decoders raise whatever they like on broken files
            unreadable.append(source.name(candidate % len(source)))
    return None, index, unreadable


class Views(Dataset):
    """For (epoch, index): the image for the patches, the same crop for the tokenizer, and a mask over the patch grid.

    Training: one random resized crop, resized once for each view, one flip, and one colour jitter, which is left to the device:
    to_float applies it. Validation: the largest centred square, as it is.

    source      of open_images
    sizes       pixels a side of the two views: the patches', the tokenizer's
    grid, num_masked, masking    of the mask: "blockwise", "random" or "none"
    Returns (uint8 (3, S, S), uint8 (3, T, T), colours (3,), bool (h, w), [] or [name of the unreadable image that another
    replaces]).
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
        crop, _, unreadable = read(self.source, index, lambda source, i: self.crop(source, i, rng))
        views, colours = self.views(torch.full((3, 1, 1), 128, dtype=torch.uint8) if crop is None else crop, rng)
        if self.masking == "blockwise":
            mask = blockwise_mask(self.grid, self.num_masked, rng, **self.block_options)
        elif self.masking == "random":
            mask = random_mask(self.grid, self.num_masked, rng)
        else:
            mask = np.zeros(self.grid, dtype=bool)
        return *views, colours, torch.from_numpy(mask), unreadable

    def crop(self, source, index, rng):
        """The part of an image that the views show, uint8 (3, ., .): a random crop to train, the centre else."""
        image = None if isinstance(source, Folder) else source.image(index)
        width, height = image.size if image else source.size(index)
        left, top, right, bottom = random_crop_box(width, height, rng, (self.crop_scale, 1.0)) if self.train else centre_box(width, height)
        if not image:                                   # at a size that leaves the crop the pixels of the largest view
            scale = max(self.sizes) / min(right - left, bottom - top)
            image = source.image(index, (math.ceil(width * scale), math.ceil(height * scale)))
        across, down = image.width / width, image.height / height      # 1, unless it was decoded at a smaller size
        part = image.crop((round(left * across), round(top * down), round(right * across), round(bottom * down)))
        return torch.from_numpy(np.array(part)).permute(2, 0, 1)

    def views(self, crop, rng):
        """A crop for each of self.sizes, uint8 (3, size, size), and their colours (3,)."""
        views = [interpolate(crop[None], (size, size), mode="bicubic", antialias=True)[0].contiguous() for size in self.sizes]    # PIL takes three times as long
        if not self.train:
            return views, NO_JITTER
        if rng.random() < 0.5:
            views = [view.flip(2) for view in views]
        mean_grey = (views[-1].float().mean((1, 2)) @ torch.tensor(GREY_OF_RGB)).item() / 255
        return views, colour_jitter(mean_grey, rng, self.jitter)


GREY_OF_RGB = (0.299, 0.587, 0.114)
NO_JITTER = torch.tensor([1.0, 0.0, 0.0])


def colour_jitter(mean_grey, rng, jitter):
    """Brightness, contrast and saturation, each by a factor uniform in 1 - jitter ... 1 + jitter, in random order. Each, and so
    all three together, maps a pixel x with grey value g to a x + b g + c: returns the three numbers (a, b, c), for to_float.

    mean_grey: the image's, in [0, 1]. Values are cut to [0, 1] after all three, not after each.
    """
    a, b, c = 1.0, 0.0, 0.0
    factors, order = rng.uniform(1 - jitter, 1 + jitter, 3).tolist(), rng.permutation(3).tolist()
    for i in order if jitter else ():
        f = factors[i]
        if i == 0:                                      # brightness: towards black
            a, b, c = f * a, f * b, f * c
        elif i == 1:                                    # contrast: towards the image's mean grey
            a, b, c = f * a, f * b, f * c + (1 - f) * ((a + b) * mean_grey + c)
        else:                                           # saturation: towards each pixel's own grey
            a, b = f * a, f * b + (1 - f) * (a + b)
    return torch.tensor([a, b, c])


# ---------------------------------------------------------------------------------------------------------------------
# Labelled images, for fine-tuning
# ---------------------------------------------------------------------------------------------------------------------

GREY = (124, 116, 104)    # ImageNet's mean colour, where there is nothing


class Labelled(Dataset):
    """For (epoch, index): (uint8 image (3, S, S), its label or its uint8 map (S, S), [] or [name of an unreadable file]).

    transform maps (PIL image, label or tv_tensors.Mask) to the first two; it draws from torch's global generator, which is
    seeded by (seed, epoch, index) for it and put back after it.
    """

    def __init__(self, source, transform, seed=0):
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        sample, _, unreadable = read(self.source, index, lambda source, i: (source.image(i), source.target(i)))
        if sample is None:                              # anything: CorruptImages stops the run
            mapped = isinstance(getattr(self.source, "source", self.source), SegmentationFolder)
            sample = Image.new("RGB", (64, 64), GREY), np.zeros((64, 64), np.uint8) if mapped else 0
        image, target = sample
        if isinstance(target, np.ndarray):
            from torchvision import tv_tensors
            target = tv_tensors.Mask(torch.from_numpy(target))
        with torch.random.fork_rng(devices=[]):
            seed = int(np.random.default_rng([self.seed, epoch, index]).integers(2 ** 63))
            torch.default_generator.manual_seed(seed)   # torch.manual_seed, which seeds all devices, takes as long as the image and more
            image, target = self.transform(image, target)
        return image, target if isinstance(target, int) else target.as_subclass(torch.Tensor), unreadable


def classification_transform(size, *, train, crop_scale=0.08, randaugment=0.0, erasing=0.0, eval_crop=0.875):
    """Training: random resized crop, flip, RandAugment, random erasing (appendix, "fine-tuning"). Else the centre.

    randaugment   magnitude from 0 (none) to 10: two operations, each applied to half of the images, as in the released recipe
    erasing       probability that a rectangle is painted over with the mean colour
    eval_crop     side of the square that is evaluated, as a share of the shorter side
    """
    from torchvision.transforms import v2
    if not train:
        return v2.Compose([v2.Resize(round(size / eval_crop), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])
    operation = v2.RandAugment(num_ops=1, magnitude=round(3 * randaugment), fill=GREY, interpolation=v2.InterpolationMode.BILINEAR)
    return v2.Compose([
        v2.RandomResizedCrop(size, scale=(crop_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        *[v2.RandomApply([operation], p=0.5) for _ in range(2) if randaugment],
        v2.PILToTensor(),
        *[v2.RandomErasing(p=erasing, value=GREY) for _ in range(1) if erasing]])


def segmentation_transform(size, *, train, scale=(0.5, 2.0), jitter=0.4):
    """Image and map together. Training: the shorter side to scale[0]..scale[1] times size, a random crop of size x size
    (what lies outside the image is IGNORE), flip, colour jitter. Else as they are. Maps are resized by nearest neighbour."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    if not train:
        return v2.Compose([v2.PILToTensor()])
    sides = sorted({round(size * (scale[0] + (scale[1] - scale[0]) * i / 32)) for i in range(33)})
    return v2.Compose([
        v2.RandomShortestSize(sides, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomCrop(size, pad_if_needed=True, fill={Image.Image: GREY, tv_tensors.Mask: IGNORE}),
        v2.RandomHorizontalFlip(),
        *[v2.ColorJitter(jitter, jitter, jitter) for _ in range(1) if jitter],
        v2.PILToTensor()])


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
        self.order, self.shuffled = None, None          # the permutation of an epoch, and which epoch's it is

    def __len__(self):
        return (self.stop - self.start) * self.parts

    def __iter__(self):
        for step in range(self.start, self.stop):
            yield from self.of_step(step)

    def of_step(self, step):
        """This process's batches of a step, one for each part."""
        epoch, at = divmod(step, self.images // self.batch_size)
        if epoch != self.shuffled:
            self.order, self.shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.images), epoch
        batch = self.order[at * self.batch_size:(at + 1) * self.batch_size].reshape(self.parts, self.world_size, -1)
        return [[(epoch, int(index)) for index in part[self.rank]] for part in batch]


def held_out_batches(images, batch_size, *, rank=0, world_size=1):
    """(0, index) lists over the images (a range of indices), each in exactly one batch of one process."""
    indices = images[rank::world_size]
    return [[(0, index) for index in indices[i:i + batch_size]] for i in range(0, len(indices), batch_size)]


def train_loader(views, config, device, *, start, stop, rank, world_size):
    """Batches of one process for steps start to stop: stacked samples, and the names of unreadable images."""
    return _loader(views, GlobalBatches(len(views), config.batch_size, seed=config.seed, start=start, stop=stop,
                                        parts=config.accumulate, rank=rank, world_size=world_size), config.workers, device)


def val_loader(views, config, device, *, rank, world_size, images=512, batch_size=None):
    """Batches of one process's share of at most so many held-out images, evenly spaced over all; by default as large as in
    training."""
    chosen = range(0, len(views), math.ceil(len(views) / images))
    batch_size = batch_size or max(1, config.batch_size // config.accumulate // world_size)
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
    *columns, unreadable = zip(*samples)
    return *(default_collate(column) for column in columns), [name for names in unreadable for name in names]


def _start_worker(_):
    os.setpgrp()    # Ctrl-C and torchrun signal the whole group: workers must live until the step has ended


def to_float(images, colours=None):
    """uint8 (B, 3, H, W) -> float in [0, 1], after each image's colours (B, 3) of colour_jitter, if any."""
    images = images.float() / 255
    if colours is None:
        return images
    a, b, c = colours[..., None, None, None].unbind(1)                 # (B, 1, 1, 1) each
    grey = sum(weight * images[:, k:k + 1] for k, weight in enumerate(GREY_OF_RGB))                     # (B, 1, H, W)
    return (a * images + (b * grey + c)).clamp_(0, 1)
