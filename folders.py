"""Folders of images, and the image files in them.

A source is a Dataset: source[index] -> (PIL image in RGB, label); BadFile if the file cannot be read.
"""
import os
import unicodedata
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION
from torch.utils.data import Dataset

from launch import UserError, say

SUFFIXES = (".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
            ".jpx", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp")
LEFT_OUT = (".cr2", ".dcm", ".dds", ".dng", ".exr", ".fits", ".heic", ".heif", ".icns", ".ico", ".jxl",
            ".nef", ".pcx", ".pfm", ".psd", ".ras", ".raw", ".rgb", ".sgi", ".svg", ".xbm", ".xpm")


class Images(Dataset):
    """Image files without labels: (image, 0)."""

    def __init__(self, paths):
        self.paths = np.array(paths)    # not a list: reference counts would make each loader copy it

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return open_image(self.paths[index]), 0


class ClassFolders(Images):
    """A folder that holds a folder of images for each class: (image, class).

    classes: names of the classes; by default the sorted names of the folders, at least two.
    Raises UserError for a folder without images, or of a class that is not in classes.
    """

    def __init__(self, folder, classes=None):
        prefix = os.path.join(folder, "")
        paths = [path for path in image_paths(folder) if os.sep in path.removeprefix(prefix)]
        if not paths:
            raise UserError(f"--data: {folder} has no folders of images, one for each class")
        super().__init__(paths)
        names = [printable(path.removeprefix(prefix).split(os.sep)[0]) for path in paths]
        folders = {printable(entry.name) for entry in os.scandir(folder)
                   if entry.is_dir() and not entry.is_symlink() and is_data(entry.name)}
        empty = sorted(folders - set(names))
        if empty:
            raise UserError(f"--data: {folder}/{empty[0]} has no images ({' '.join(SUFFIXES)}) of its own")
        self.classes = classes or sorted(set(names))
        if len(self.classes) < 2:
            raise UserError(f"--data: {folder} must hold folders of images of at least two classes")
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise UserError(f"--data: {folder} has class {unknown[0]}, which the training images lack")
        class_of = {name: k for k, name in enumerate(self.classes)}
        self.targets = [class_of[name] for name in names]

    def __getitem__(self, index):
        return open_image(self.paths[index]), self.targets[index]


IGNORE = 255    # in a class map: a pixel that is not counted


class Segmentation(Images):
    """ADE20K's images/<split>/a.jpg and annotations/<split>/a.png: (image, class map uint8 (H, W)).

    Class k of a file becomes k - 1. Its 0, which means none of the classes, becomes IGNORE.
    """

    def __init__(self, root, split, classes):
        images, maps = root / "images" / split, root / "annotations" / split
        if not images.is_dir() or not maps.is_dir():
            raise UserError(f"--data: {root} needs images/training, images/validation, annotations/training, "
                            "annotations/validation")
        super().__init__(image_paths(images))
        map_of = {printable(path): path for path in maps.rglob("*.png")}
        maps = [maps / Path(path).relative_to(images).with_suffix(".png") for path in self.paths]
        maps = [path if path.exists() else map_of.get(printable(path), path) for path in maps]
        self.maps, self.classes = np.array(maps, dtype=str), classes
        missing = [path for path in maps if not path.exists()]
        if missing:
            raise UserError(f"--data: {len(missing)} maps are missing, for example {missing[0]}")

    def __getitem__(self, index):
        image = open_image(self.paths[index], reduce=False)
        path = self.maps[index]
        with open_file(path) as file:
            mode, factor = file.mode, grey_factor(file)
            turn_upright(file)
            numbers = np.array(file)
        if mode not in ("1", "L", "P"):
            raise BadFile(f"{path} is not a map of 8-bit class numbers, but mode {mode}")
        numbers = numbers.astype(np.uint8) // factor
        if numbers.shape != (image.height, image.width):
            h, w = numbers.shape
            turned = " turned upright" if (h, w) == image.size else ""
            raise BadFile(f"{path} is {w}x{h}, but its image{turned} is {image.width}x{image.height}")
        largest = numbers[numbers != IGNORE].max(initial=0)
        if largest > len(self.classes):
            raise BadFile(f"{path} holds class {largest}, but there are only {len(self.classes)} classes")
        return image, np.where(numbers == IGNORE, IGNORE, numbers - 1)    # uint8: 0 - 1 = 255 = IGNORE


def segmentation_classes(root):
    """Names from ADE20K's objectInfo150.txt, which is tab-separated; without that file 150 numbers.

    A class has the number in the column Idx, in a file without titles in the first column; if there is none,
    that of its line. Raises UserError unless these are 1, 2, 3 ... in any order.
    """
    table = root / "objectInfo150.txt"
    if not table.exists():
        return [str(number) for number in range(1, 151)]
    lines = table.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    rows = [[field.strip() for field in line.split("\t")] for line in lines if line.strip()]
    numbered = [len(row) > 1 and row[0].isdecimal() for row in rows]
    title = [field.lower() for field in rows[0]] if rows else []
    if "idx" in title or "name" in title or numbered == [False] + [True] * (len(rows) - 1):
        rows = rows[1:]                                                # without the titles
    elif any(numbered):
        title = ["idx"]
    if not 2 <= len(rows) < IGNORE:
        raise UserError(f"--data: {table} names {len(rows)} classes; a map can hold 2 to {IGNORE - 1}")
    name_of = {}
    for line, row in enumerate(rows, start=1):
        fields = dict(zip(title, row))
        name_of[fields.get("idx", str(line))] = fields.get("name", row[-1]).split(",")[0].strip()
    numbers = [str(number) for number in range(1, len(rows) + 1)]
    if name_of.keys() != set(numbers):
        raise UserError(f"--data: {table} must number its classes 1 to {len(rows)}, each once")
    return [name_of[number] for number in numbers]


def image_paths(folder, without=None):
    """Find the image files below a folder. Returns sorted paths, one for each file.

    Symbolic links are followed after all real folders, so that a file which is also linked is listed under
    its real path. Links to a parent of the folder are not followed. Hidden files, files of the operating
    system, and the folder `without` are left out.
    Raises UserError if there are no images.
    """
    top = os.path.realpath(folder)
    visited = set()
    if without and os.path.realpath(without) != top:
        visited.add(os.path.realpath(without))
    to_walk, path_of, links, left_out = [str(folder)], {}, [], []      # path_of: real path -> path
    while to_walk:
        for where, folders, names in os.walk(to_walk.pop(0), onerror=refuse_folder):
            real = os.path.realpath(where)
            contains_top = real != top and os.path.commonpath([real, top]) == real
            if real in visited or contains_top:
                folders.clear()                                        # os.walk then enters none of them
                continue
            visited.add(real)
            folders[:] = sorted(filter(is_data, folders))
            to_walk += filter(os.path.islink, [os.path.join(where, name) for name in folders])
            images = [name for name in names if is_data(name) and name.lower().endswith(SUFFIXES)]
            left_out += [name for name in names if is_data(name) and name.lower().endswith(LEFT_OUT)]
            for name in images:
                path = os.path.join(where, name)
                if os.path.islink(path):
                    links.append(path)
                else:
                    path_of[os.path.join(real, name)] = path
    for path in sorted(links):
        path_of.setdefault(os.path.realpath(path), path)
    if not path_of:
        raise UserError(f"--data: no images under {folder} ({' '.join(SUFFIXES)})")
    if left_out:
        say(f"warning: {folder}: {len(left_out)} files are left out, for example {printable(left_out[0])}; "
            f"images are {' '.join(SUFFIXES)}")
    return sorted(path_of.values())


def refuse_folder(error):
    """Raise UserError for the OSError of a folder that cannot be listed; os.walk would leave it out."""
    raise UserError(f"--data: {error.filename} cannot be listed ({error.strerror})")


def is_data(name):
    """Whether a file or folder of this name may belong to a data set: not ._a.png or .ipynb_checkpoints."""
    return not name.startswith(".") and name not in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")


def printable(name):
    """The name of a file or folder, whose bytes may not be UTF-8, as text that can be written and drawn."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)    # macOS has names with decomposed accents


# ---- Image files ----

JPEG_MIN_SIDE = 1024    # JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if both sides stay this large
warnings.filterwarnings("ignore", module=r"PIL\.")    # Pillow warns of each file with odd metadata
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY    # accept images with long comments


class BadFile(Exception):
    """A file that cannot be used. The message names the file and the reason."""


@contextmanager
def open_file(path):
    """Open an image file as a PIL image. Raises BadFile if it cannot be opened, or decoded by the caller."""
    try:
        with Image.open(str(path)) as file:    # a str of numpy would look odd in a message
            file.filename = ""    # so that Pillow maps no TIFF into memory, which mangles those to be turned
            yield file
    except (AttributeError, NameError):        # an error in the program
        raise
    except Exception as error:                 # decoders raise a dozen kinds
        raise BadFile(f"{path} cannot be read ({one_line(error)})") from error


def one_line(error):
    """The message of an exception on one line, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def open_image(path, reduce=True):
    """Read an image file as an upright PIL image in RGB.

    Greyscale of other bit depths is scaled to 8 bits, transparency is composited onto white, and with
    `reduce` large JPEGs are decoded at a fraction of their size. Raises BadFile.
    """
    with open_file(path) as image:
        factor = grey_factor(image)
        if reduce and image.format == "JPEG":
            image.draft(None, (JPEG_MIN_SIDE, JPEG_MIN_SIDE))
        turn_upright(image)
        if image.mode == "F" or image.mode.startswith("I"):
            grey = grey_to_8_bits(np.asarray(image, dtype=np.float32))
            white_is_zero = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION, 0) == 0
            image = Image.fromarray(255 - grey if white_is_zero else grey)    # Pillow inverts 8 bits only
        if image.mode == "La":                                         # only to be converted to LA
            image = image.convert("LA")
        if factor > 1 and "transparency" in image.info:
            image.info["transparency"] *= factor
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")    # convert would copy


def grey_factor(file):
    """By how much Pillow will multiply the grey values of a PNG of 2 or 4 bits, to decode it as 8 bits."""
    return max([{"L;2": 85, "L;4": 17}.get(tile[3], 1) for tile in file.tile], default=1)


def turn_upright(image):
    """Decode a PIL image and turn it as its EXIF orientation says, in place."""
    image.load()    # outside of `try`: unreadable pixels are an error, unreadable metadata is not
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:    # parsers of metadata, too, raise a dozen kinds
        pass


def grey_to_8_bits(grey):
    """Scale grey values, float (H, W), to uint8. White is 1, 255 or 65535, or the largest value."""
    grey = np.nan_to_num(grey, posinf=0, neginf=0)
    largest = grey.max()
    possible = [white for white in (1, 255, 65535) if largest <= white]
    white = possible[0] if possible else largest
    return (grey * (255 / white)).clip(0, 255).round().astype(np.uint8)
