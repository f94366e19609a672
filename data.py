"""Images from `shapes`, data sets and folders; two views of each and its mask; labelled images; loaders.

A source is a Dataset: source[index] -> (PIL image in RGB, label). All draws are a function of (seed, epoch,
index) alone, whatever the number of workers and processes.
"""
import colorsys
import functools
import math
import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import datasets, tv_tensors
from torchvision.transforms import ColorJitter, InterpolationMode, RandomErasing, RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as F

from training import UserError, rank, resource, world_size

# ---- shapes: scenes that are a function of their index ----

SHAPES = ("disc", "square", "triangle", "hexagon", "star", "cross", "ring", "crescent", "ellipse", "bar")
HUE_SPREAD = 0.04    # std of an object's hue around its shape's; the hues of shapes are 0.1 apart


def signed_distance(shape, u, v):
    """Approximate distance, negative inside, from the outline of a shape of radius 1 around the origin."""
    r = np.hypot(u, v)
    if shape == "disc":
        return r - 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.8
    if shape in ("triangle", "hexagon"):
        half = np.pi / (3 if shape == "triangle" else 6)
        return r * np.cos((np.arctan2(v, u) + np.pi) % (2 * half) - half) - np.cos(half)
    if shape == "star":
        point = abs((np.arctan2(v, u) * 5 / (2 * np.pi)) % 1 - 0.5) * 2    # 0 between points, 1 at one
        return (r - 0.45 - 0.6 * point ** 1.3) * 0.6
    if shape == "cross":
        return np.minimum(np.maximum(abs(u) - 1, abs(v) - 0.33), np.maximum(abs(u) - 0.33, abs(v) - 1))
    if shape == "ring":
        return abs(r - 0.75) - 0.25
    if shape == "crescent":
        return np.maximum(r - 1, 0.8 - np.hypot(u - 0.55, v))
    if shape == "ellipse":
        return (np.hypot(u, v / 0.5) - 1) * 0.5
    return np.maximum(abs(u) - 1, abs(v) - 0.28)    # bar


@functools.lru_cache(maxsize=16_384)    # all 11,000 scenes fit in 200 MB, so each is drawn once per process
def render_scene(split, index, size=64):
    """A scene of `shapes`: (image uint8 (size, size, 3), label, class map uint8 (size, size)).

    The label is the main object's index into SHAPES. The map is 0 in the background and 1 + index on objects.
    """
    rng = np.random.default_rng([0 if split == "train" else 1, index])
    coordinates = np.arange(size, dtype=np.float32) / size    # of pixels, in [0, 1)

    def colour(hue, saturation, value):
        rgb = colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value))
        return np.array(rgb, np.float32)

    def textured(a, b, x, y):    # colours from a to b, in a ramp, in waves or in stripes
        angle = rng.uniform(0, 2 * np.pi)
        along = (x - 0.5) * float(np.cos(angle)) + (y - 0.5) * float(np.sin(angle))
        swing = np.sin((2 * np.pi * rng.uniform(0.7, 2.5)) * along + rng.uniform(0, 2 * np.pi))
        blend = (along, swing / 2, swing * 3)[rng.integers(3)]    # ramp, waves, stripes
        return a + (b - a) * np.clip(0.5 + blend, 0, 1)[..., None]    # (rows, columns, 3)

    first, second = (colour(rng.random(), (0.1, 0.6), (0.2, 0.9)) for _ in range(2))
    image = textured(first, second, coordinates, coordinates[:, None])
    classes = np.zeros((size, size), np.uint8)

    def draw(shape, radius, centre):
        reach = 1.1 * radius    # only the pixels in this window around the centre are computed
        window = tuple(slice(max(0, int((c - reach) * size)), int((c + reach) * size) + 2) for c in centre)
        x, y = coordinates[window[1]], coordinates[window[0], None]
        angle = rng.uniform(0, 2 * np.pi)
        cos, sin = float(np.cos(angle)) / radius, float(np.sin(angle)) / radius
        u = (x - centre[1]) * cos + (y - centre[0]) * sin
        v = (y - centre[0]) * cos - (x - centre[1]) * sin
        cover = np.clip(0.5 - signed_distance(SHAPES[shape], u, v) * (radius * size), 0, 1)    # antialiased
        tone = colour(shape / len(SHAPES) + rng.normal(0, HUE_SPREAD), (0.5, 1.0), (0.5, 1.0))
        fill = textured(tone, tone * rng.uniform(0.4, 0.8), x, y) if rng.random() < 0.4 else tone
        image[window] += (fill - image[window]) * cover[..., None]
        classes[window][cover > 0.5] = 1 + shape

    label = int(rng.integers(len(SHAPES)))
    for _ in range(rng.integers(4)):    # behind the main object
        draw(int(rng.integers(len(SHAPES))), rng.uniform(0.08, 0.16), rng.uniform(0.05, 0.95, 2).tolist())
    draw(label, rng.uniform(0.2, 0.36), rng.uniform(0.33, 0.67, 2).tolist())
    if rng.random() < 0.4:    # in front of it
        draw(int(rng.integers(len(SHAPES))), rng.uniform(0.06, 0.12), rng.uniform(0.1, 0.9, 2).tolist())
    return (image * 255).round().astype(np.uint8), label, classes


# ---- Sources ----

DATASETS = {"fashion-mnist": datasets.FashionMNIST,
            "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
FILES = {"fashion-mnist": "FashionMNIST/raw (unpacked: train-images-idx3-ubyte and three more)",
         "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
JPEG_MIN_SIDE = 1024      # JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if both sides stay this large
HOLD_OUT_EVERY = 50       # every 50th image of a folder without val/ is held out
IGNORE = 255              # in a class map: a pixel that is not counted
MAX_BAD_IN_A_ROW = 16     # so many unreadable files end a run
ORIENTATION = 0x0112      # EXIF's tag; TURNS: what makes an image upright
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
warnings.filterwarnings("ignore", module=r"PIL\.")    # two lines for each file with odd metadata
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY    # long comments do not cost the pixels


class BadFile(Exception):
    """A file that cannot be used: its name and why."""


def open_file(path, decode):
    """decode(PIL image) of an image file. Raises BadFile, with the reason, if it cannot be decoded."""
    try:
        with Image.open(str(path)) as image:
            return decode(image)
    except (AttributeError, NameError):                                # an error in the program
        raise
    except Exception as error:                                         # decoders raise a dozen kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadFile(f"{path} cannot be read ({reason})") from error


def upright(image):
    """A PIL image, loaded and turned as its orientation tag says; one that cannot be parsed is none."""
    image.load()                                                       # which by itself turns a TIFF
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:                                                  # parsers, too, raise a dozen kinds
        turn = None
    return image if turn is None else image.transpose(turn)


def upright_rgb(image, reduce=True):
    """A PIL image as upright RGB: grey of other depths scaled to 8 bits, transparency laid over white.

    reduce: large JPEGs are decoded at a part of their size.
    """
    if reduce and image.format == "JPEG":
        image.draft(None, (JPEG_MIN_SIDE, JPEG_MIN_SIDE))
    image = upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(grey_to_8_bits(np.asarray(image, dtype=np.float32)))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")    # convert would copy


def grey_to_8_bits(grey):
    """Grey values from 0 to 1, to 255 or to 65535, whichever holds the largest: float (H, W) -> uint8."""
    grey = np.nan_to_num(grey, posinf=0, neginf=0)
    white = next((white for white in (1, 255, 65535) if grey.max() <= white), grey.max())
    return (grey * (255 / white)).clip(0, 255).round().astype(np.uint8)


def open_image(path):
    """The image in a file as upright RGB. Raises BadFile."""
    return open_file(path, upright_rgb)


@functools.cache
def warn_once(text):
    """Warn about a BadFile, once in each process; cached for that."""
    sys.stderr.write(f"warning: {text}; the next one is taken\n")    # one write: processes do not mix lines


def read(source, index):
    """source[index], or the next sample that can be read. OSError after MAX_BAD_IN_A_ROW that cannot."""
    first, tries = None, min(MAX_BAD_IN_A_ROW, len(source))
    for i in range(index, index + tries):
        try:
            return source[i % len(source)]
        except BadFile as error:
            first = first or error
            warn_once(str(error))
    raise OSError(f"--data: {first}, nor can the {tries - 1} files after it")


class Shapes(Dataset):
    """Scenes of render_scene, 10,000 to train and 1,000 held out, with labels, or with class maps."""

    def __init__(self, split, maps=False):
        self.split, self.maps = split, maps
        self.classes = ["background", *SHAPES] if maps else list(SHAPES)

    def __len__(self):
        return 10_000 if self.split == "train" else 1_000

    def __getitem__(self, index):
        image, label, classes = render_scene(self.split, index)
        return Image.fromarray(image), classes if self.maps else label

    @property
    def targets(self):
        return [self[index][1] for index in range(len(self))]


class Images(Dataset):
    """Image files without labels: (image, 0)."""

    def __init__(self, paths):
        self.paths = np.array(paths)    # loader processes would copy a list: reading it counts references

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return open_image(self.paths[index]), 0


class ClassFolders(Images):
    """A folder for each class, with image files: (image, class). UserError for a class that is not one of
    classes, or without images."""

    def __init__(self, folder, classes=None):
        paths, start = image_paths(folder), len(os.path.join(folder, ""))
        super().__init__([path for path in paths if os.sep in path[start:]])
        if not len(self):
            raise UserError(f"--data: {folder} has no folders of images, one for each class")
        names = [printable(path[start:].split(os.sep)[0]) for path in self.paths.tolist()]
        folders = {printable(entry.name) for entry in os.scandir(folder)
                   if entry.is_dir() and not entry.is_symlink() and is_data(entry.name)}
        for name in sorted(folders - set(names)):
            raise UserError(f"--data: no images of its own under {folder}/{name} ({' '.join(SUFFIXES)})")
        self.classes = classes or sorted(set(names))
        for name in sorted(set(names) - set(self.classes)):
            raise UserError(f"--data: {folder} has class {name}, the training images have not")
        number = {name: k for k, name in enumerate(self.classes)}
        self.targets = [number[name] for name in names]

    def __getitem__(self, index):
        return open_image(self.paths[index]), self.targets[index]


def printable(name):
    """The name of a file or folder, whose bytes may not be UTF-8, as text that can be written and drawn."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class Segmentation(Images):
    """ADE20K's images/<split>/a.jpg and annotations/<split>/a.png: (image, class map uint8 (H, W)).

    Class k of a file becomes k - 1, and its 0, which means none of the classes, IGNORE.
    """

    def __init__(self, root, split, classes):
        images, maps = root / "images" / split, root / "annotations" / split
        if not images.is_dir() or not maps.is_dir():
            raise UserError(f"--data: {root} needs images/training, images/validation, annotations/training, "
                            "annotations/validation")
        super().__init__(image_paths(images))
        maps = [maps / Path(path).relative_to(images).with_suffix(".png") for path in self.paths]
        self.maps, self.classes = np.array(maps, dtype=str), classes
        missing = [path for path in maps if not path.exists()]
        if missing:
            raise UserError(f"--data: {len(missing)} images have no map, {missing[0]} first")

    def __getitem__(self, index):
        image = open_file(self.paths[index], partial(upright_rgb, reduce=False))
        path = self.maps[index]
        mode, numbers = open_file(path, lambda file: (file.mode, np.array(upright(file))))
        if mode not in ("L", "P"):
            raise BadFile(f"{path} is not a map of 8-bit class numbers, but mode {mode}")
        if numbers.shape != (image.height, image.width):
            h, w = numbers.shape
            turned = " turned upright" if (h, w) == image.size else ""
            raise BadFile(f"{path} is {w}x{h}, its image{turned} {image.width}x{image.height}")
        largest = numbers[numbers != IGNORE].max(initial=0)
        if largest > len(self.classes):
            raise BadFile(f"{path} holds class {largest}, there are {len(self.classes)}")
        return image, np.where(numbers == IGNORE, IGNORE, numbers - 1)    # uint8: 0 - 1 = 255 = IGNORE


def segmentation_classes(root):
    """Names from ADE20K's objectInfo150.txt (tab-separated, with a title line); without it 150 numbers."""
    table = root / "objectInfo150.txt"
    if not table.exists():
        return [str(number) for number in range(1, 151)]
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    if not 2 <= len(classes) < IGNORE:
        raise UserError(f"--data: {table} names {len(classes)} classes; a map can hold 2 to {IGNORE - 1}")
    return classes


def image_paths(folder, without=None):
    """The image files below a folder, sorted, each once. Links are followed, but not to a folder above.

    Hidden files, folders of the system and the folder `without` are left out. UserError if no image is left.
    """
    top, found, linked = os.path.realpath(folder), {}, []              # found: real path -> path
    seen, to_walk = {os.path.realpath(without or folder)} - {top}, [str(folder)]
    while to_walk:    # links come last, so that an image is found in its own place if it has one
        for where, folders, names in os.walk(to_walk.pop(0)):
            real = os.path.realpath(where)
            if real in seen or real != top and os.path.commonpath([real, top]) == real:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(filter(is_data, folders))
            to_walk += filter(os.path.islink, [os.path.join(where, name) for name in folders])
            for name in (name for name in names if is_data(name) and name.lower().endswith(SUFFIXES)):
                path = os.path.join(where, name)
                if os.path.islink(path):
                    linked.append(path)
                else:
                    found[os.path.join(real, name)] = path
    for path in sorted(linked):
        found.setdefault(os.path.realpath(path), path)
    if not found:
        raise UserError(f"--data: no images under {folder} ({' '.join(SUFFIXES)})")
    return sorted(found.values())


def is_data(name):
    """Whether a file or folder of this name may belong to a data set: not ._a.png or .ipynb_checkpoints."""
    return not name.startswith(".") and name not in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")


def open_named(data, root, maps=False):
    """(training, held-out) sources of shapes or of a torchvision data set under root; None for a folder."""
    if data == "shapes":
        return Shapes("train", maps), Shapes("val", maps)
    if data not in DATASETS:
        if not Path(data).is_dir():
            raise UserError(f"--data: {data} is not a folder, nor shapes, {', '.join(DATASETS)}")
        return None
    if maps:
        raise UserError(f"--data: {data} has no maps to segment; shapes has, and folders like ADE20K's")
    try:
        return tuple(DATASETS[data](root, train=train, transform=v2.RGB()) for train in (True, False))
    except Exception as error:    # torchvision: RuntimeError for absent files, anything for damaged ones
        reason = "has no" if "not found" in str(error) else f"has damaged files ({type(error).__name__}) in"
        raise UserError(f"--data-root: {root} {reason} {FILES[data]}") from None


def held_out_folder(folder):
    """val/ or validation/ in a folder, or None."""
    return next((folder / name for name in ("val", "validation") if (folder / name).is_dir()), None)


def open_splits(data, root):
    """(training, held-out) sources of --data, for use without labels; root: --data-root. UserError.

    Of a folder: train/ and val/ (or validation/) if it has them, else all images in it, every 50th held out.
    """
    named = open_named(data, root)
    if named:
        return named
    folder, held_out = Path(data), held_out_folder(Path(data))
    paths = image_paths(folder / "train" if (folder / "train").is_dir() else folder, without=held_out)
    if held_out:
        return Images(paths), Images(image_paths(held_out))
    kept = [path for i, path in enumerate(paths) if i % HOLD_OUT_EVERY]
    return Images(kept or paths), Images(paths[::HOLD_OUT_EVERY])


def open_labelled(data, root, maps=False):
    """(training, held-out) sources of --data with labels, or with class maps; both have .classes. UserError.

    A folder has train/ and val/ (or validation/), with a folder for each class in them, or ADE20K's layout.
    """
    named = open_named(data, root, maps)
    if named:
        return named
    folder, held_out = Path(data), held_out_folder(Path(data))
    if maps:
        classes = segmentation_classes(folder)
        return Segmentation(folder, "training", classes), Segmentation(folder, "validation", classes)
    if held_out is None or not (folder / "train").is_dir():
        raise UserError(f"--data: {data} needs train/ and val/ (or validation/), a folder for each class")
    train = ClassFolders(folder / "train")
    if len(train.classes) < 2:
        raise UserError(f"--data: {folder / 'train'} must hold folders of images of at least two classes")
    return train, ClassFolders(held_out, train.classes)                # it may lack classes


# ---- Two views, or a labelled image ----

@contextmanager
def seeded(*key):
    """Seed torch's CPU generator by integers, and restore it afterwards. Yields a seeded numpy generator."""
    rng = np.random.default_rng(key)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))
        yield rng


def centre_box(width, height):
    """(left, top, right, bottom) of the largest centred square."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def resize_square(crop, pixels, size, interpolation):
    """Resize a PIL image, given also as a tensor uint8 (3, h, w), to uint8 (3, size, size), antialiased."""
    if interpolation == InterpolationMode.LANCZOS and not hasattr(torch.ops.aten, "_upsample_lanczos2d_aa"):
        return F.pil_to_tensor(crop.resize((size, size), Image.Resampling.LANCZOS))    # for older PyTorch
    return F.resize(pixels, [size, size], interpolation)               # several times as fast as PIL


class Views(Dataset):
    """The two views of an image (sec. 2.1) and a mask, for (epoch, index).

    One crop box is resized twice, as released: bicubic to image_size for the patches, Lanczos to token_size
    for the tokenizer. A size of None leaves a view out. In training the box is a random resized crop, and
    both views get the same flip and colour jitter; in evaluation it is the largest centred square.
    draw_mask: rng -> bool ndarray (h, w), such as a partial masking.blockwise_mask; None for no mask.

    Each sample is a tuple: the views, uint8 (3, S, S), then the mask, bool (h, w).
    """

    def __init__(self, source, image_size, token_size, draw_mask=None, *, seed=0, train=True, crop_scale=0.08,
                 jitter=0.4):
        self.source, self.draw_mask = source, draw_mask
        self.seed, self.train, self.crop_scale = seed, train, crop_scale
        sizes = ((image_size, InterpolationMode.BICUBIC), (token_size, InterpolationMode.LANCZOS))
        self.sizes = [(size, interpolation) for size, interpolation in sizes if size]
        self.jitter = (max(0, 1 - jitter), 1 + jitter)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        image, _ = read(self.source, index)
        with seeded(self.seed, self.train, epoch, index) as rng:
            box = centre_box(*image.size)
            if self.train:
                top, left, h, w = RandomResizedCrop.get_params(image, [self.crop_scale, 1], [3 / 4, 4 / 3])
                box = (left, top, left + w, top + h)
            crop = image.crop(box)
            pixels = F.pil_to_tensor(crop)
            views = [resize_square(crop, pixels, size, interpolation) for size, interpolation in self.sizes]
            if self.train:
                views = self.augment(views)
            mask = [torch.from_numpy(self.draw_mask(rng))] if self.draw_mask else []
        return *views, *mask

    def augment(self, views):
        """One random flip, and one jitter of brightness, contrast and saturation, for all views."""
        if torch.rand(()) < 0.5:
            views = [view.flip(-1) for view in views]
        if self.jitter == (1, 1):
            return views
        order, *factors, _ = ColorJitter.get_params(self.jitter, self.jitter, self.jitter, hue=None)
        views = [to_float(view) for view in views]                     # twice as fast as on uint8
        for k in order[order < 3].tolist():
            adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[k]
            views = [adjust(view, factors[k]) for view in views]
        return [(255 * view).round().to(torch.uint8) for view in views]


FILL_COLOUR, FILL_STD = (124, 116, 104), 58    # ImageNet's, where there is no image


class Labelled(Dataset):
    """An image, uint8 (3, S, S), and its label or class map, uint8 (S, S), for (epoch, index).

    transform: a torchvision transform of (PIL image, label or tv_tensors.Mask) that makes the image a tensor.
    """

    def __init__(self, source, transform, seed=0):
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        image, target = read(self.source, index)
        with seeded(self.seed, epoch, index):
            if not isinstance(target, np.ndarray):
                return self.transform(image, target)
            image, target = self.transform(image, tv_tensors.Mask(torch.from_numpy(target)))
            return image, target.as_subclass(torch.Tensor)             # no longer a tv_tensor


def classification_transform(size, *, train, crop_scale=0.08, randaugment=0.0, erasing=0.0, eval_crop=0.875):
    """Training: random resized crop, flip, RandAugment, random erasing (Table 13). Else the centre.

    randaugment: mean magnitude, 0 (none) to 10, with std 0.5, of two operations, each applied to half of the
    images as released. erasing: its probability. eval_crop: side of the centre over the image's.
    """
    if not train:
        resize = v2.Resize(round(size / eval_crop), InterpolationMode.BICUBIC)
        return v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])
    crop = v2.RandomResizedCrop(size, (crop_scale, 1.0), interpolation=InterpolationMode.BICUBIC)
    operations = []
    if randaugment:
        steps = np.arange(31)                                          # of magnitude, a third each
        operation = v2.RandomChoice(
            [v2.RandAugment(1, int(step), 31, InterpolationMode.BICUBIC, FILL_COLOUR) for step in steps],
            p=np.exp(-((steps / 3 - randaugment) / 0.5) ** 2 / 2).tolist())
        operations = [v2.RandomApply([operation], p=0.5)] * 2
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *operations, v2.PILToTensor(),
                       v2.RandomApply([erase], p=erasing)])


def erase(image, label):
    """Fill a random rectangle of an image, uint8 (3, H, W), with noise, N(0, 1) in normalised colours."""
    top, left, h, w, noise = RandomErasing.get_params(image, scale=(0.02, 1 / 3), ratio=(0.3, 10 / 3))
    if noise is image:                                                 # no rectangle was found
        return image, label
    noise = (noise * FILL_STD + torch.tensor(FILL_COLOUR).view(3, 1, 1)).clamp(0, 255)
    return F.erase(image, top, left, h, w, noise.to(torch.uint8)), label


def segmentation_transform(size, *, train, scale=(0.5, 2.0), jitter=0.5):
    """Image and class map together. Training: the shorter side at scale[0] to scale[1] times size, a random
    crop of size x size padded with IGNORE, flip, other colours. Else unchanged.

    jitter: share by which contrast and saturation vary, brightness by a quarter of it, hue by a fifth, each
    of them in half of the images.
    """
    if not train:
        return v2.PILToTensor()
    sides = [round(size * side) for side in np.linspace(*scale, num=33)]
    amounts = dict(brightness=jitter / 4, contrast=jitter, saturation=jitter, hue=jitter / 5)
    distortions = [v2.RandomApply([v2.ColorJitter(**{name: amount})], p=0.5)
                   for name, amount in amounts.items()]                # v2's own also swaps red and blue
    return v2.Compose([
        v2.RandomShortestSize(sides, interpolation=InterpolationMode.BICUBIC), partial(varied_crop, size),
        v2.RandomHorizontalFlip(), *distortions, v2.PILToTensor()])


def varied_crop(size, image, classes):
    """A random crop of size x size, padded with IGNORE. Where one class covers more than 75 % of what is
    counted in it, another is drawn, of ten at most, as usual on ADE20K."""
    crop = v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Mask: IGNORE, "others": FILL_COLOUR})
    for _ in range(10):
        cropped = crop(image, classes)
        counts = torch.bincount(cropped[1].flatten(), minlength=256)[:IGNORE]
        if counts.max() < 0.75 * counts.sum():
            break
    return cropped


# ---- Loaders ----

def rank_batches(images, batch_size, *, seed, start, stop, parts=1, rank=0, world_size=1, repeats=1):
    """Lists of (epoch, index) of one process for steps start to stop - 1, a list for each accumulated part.

    The images of a step are a function of (seed, step), and are dealt to parts and processes in order.
    repeats: up to so many times each image is in its batch, with the draws of different epochs (Table 13:
    repeated augmentation). An epoch has as many steps as without, and fewer images.
    """
    different = math.ceil(batch_size / repeats)                        # images in a batch
    for step in range(start, stop):
        epoch, at = divmod(step, images // batch_size)
        if at == 0 or step == start:
            order = np.random.default_rng([seed, epoch]).permutation(images)
        for part in np.arange(batch_size).reshape(parts, world_size, -1):
            yield [(epoch * repeats + i // different, int(order[at * different + i % different]))
                   for i in part[rank].tolist()]


def train_loader(dataset, config, device, start, stop, collate=default_collate, repeats=1):
    """Batches of this process for steps start to stop - 1."""
    batches = rank_batches(len(dataset), config.batch_size, seed=config.seed, start=start, stop=stop,
                           parts=config.accumulate, rank=rank(), world_size=world_size(), repeats=repeats)
    loader = make_loader(dataset, batches, config, device, collate)
    if loader.num_workers:
        sample, samples = collate([dataset[0, 0]]), config.batch_size // config.accumulate // world_size()
        check_limits(loader, samples * sum(tensor.nbytes for tensor in sample), len(sample))
    return loader


def check_limits(loader, size, tensors):
    """UserError if prefetched batches of so many bytes and tensors take more than this machine has."""
    batches, shared, room = 2 * loader.num_workers * loader.prefetch_factor, Path("/dev/shm"), math.inf
    if shared.is_dir():
        room = shutil.disk_usage(shared).total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if batches * size > room or 0 < files < batches * tensors + 100:   # a tensor is an open file
        raise UserError(f"--workers: {loader.num_workers} loader processes, and as many in evaluation, keep "
                        f"{batches} batches of {size / 1e6:,.1f} MB and {tensors} open files; {shared} has "
                        f"{room / 1e6:,.1f} MB for them, `ulimit -n` allows {files}; take fewer, or 0")


def val_loader(dataset, config, device, collate=default_collate, images=None, batch_size=None):
    """Batches of this process's share of the held-out samples, or of about so many, evenly spaced."""
    every = math.ceil(len(dataset) / images) if images else 1
    chosen = range(0, len(dataset), every)[rank()::world_size()]
    size = batch_size or max(1, config.batch_size // config.accumulate // world_size())
    batches = [[(0, index) for index in chosen[i:i + size]] for i in range(0, len(chosen), size)]
    return make_loader(dataset, batches, config, device, collate)


def make_loader(dataset, batches, config, device, collate):
    """DataLoader of these batches (lists of keys) with --workers processes, pinned for a GPU."""
    on_gpu = device.type == "cuda"
    workers = (8 if on_gpu else 0) if config.workers is None else config.workers
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      pin_memory=on_gpu, prefetch_factor=4 if workers else None,
                      worker_init_fn=leave_process_group)


def leave_process_group(worker):
    """Leave the process group of the main process, so that Ctrl-C lets it finish its step."""
    os.setpgrp()


def some_samples(dataset, count, collate=default_collate):
    """A batch of at most count samples of the first epoch, evenly spaced."""
    indices = range(0, len(dataset), max(1, len(dataset) // count))[:count]
    return collate([dataset[0, index] for index in indices])


def to_float(images):
    """uint8 -> float in [0, 1]."""
    return images.float() / 255
