"""The built-in images, `shapes`: scenes that are a pure function of their index, with nothing to download.

A scene has a textured background, one main object and up to four distractors. Its label is the shape of the
main object; its class map names the shape at each pixel.
"""
import colorsys
import functools

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

SHAPES = ("disc", "square", "triangle", "hexagon", "star", "cross", "ring", "crescent", "ellipse", "bar")
HUE_STD = 0.04    # of an object's hue around the hue of its shape; hues of shapes are 0.1 apart


class Shapes(Dataset):
    """10,000 scenes to train on ("train") or 1,000 held-out ones ("val"): (PIL image, label or class map).

    maps: whether a sample has its class map, uint8 (64, 64), instead of its label.
    """

    def __init__(self, split, maps=False):
        self.split, self.maps = split, maps
        self.classes = ["background", *SHAPES] if maps else list(SHAPES)

    def __len__(self):
        return 10_000 if self.split == "train" else 1_000

    def __getitem__(self, index):
        image, label, class_map = render_scene(self.split, index)
        return Image.fromarray(image), class_map if self.maps else label

    @property
    def targets(self):
        return [self[index][1] for index in range(len(self))]


@functools.lru_cache(maxsize=16_384)    # all 11,000 scenes fit in 200 MB, so each is drawn once per process
def render_scene(split, index, size=64):
    """Draw a scene. Returns (image uint8 (size, size, 3), label, class map uint8 (size, size)).

    The label is an index into SHAPES. The map is 0 on the background and 1 + index on objects.
    """
    rng = np.random.default_rng([0 if split == "train" else 1, index])
    first = random_colour(rng, rng.random(), (0.1, 0.6), (0.2, 0.9))
    second = random_colour(rng, rng.random(), (0.1, 0.6), (0.2, 0.9))
    coordinates = np.arange(size, dtype=np.float32) / size
    image = random_texture(rng, first, second, coordinates, coordinates[:, None])
    class_map = np.zeros((size, size), np.uint8)
    label = int(rng.integers(len(SHAPES)))
    for _ in range(rng.integers(4)):    # distractors behind the main object
        draw_shape(rng, image, class_map, int(rng.integers(len(SHAPES))), (0.08, 0.16), (0.05, 0.95))
    draw_shape(rng, image, class_map, label, (0.2, 0.36), (0.33, 0.67))
    if rng.random() < 0.4:              # a distractor in front of it
        draw_shape(rng, image, class_map, int(rng.integers(len(SHAPES))), (0.06, 0.12), (0.1, 0.9))
    return (image * 255).round().astype(np.uint8), label, class_map


def draw_shape(rng, image, class_map, shape, radius_range, centre_range):
    """Draw a shape, an index into SHAPES, into an image, float (S, S, 3), and its class map, in place.

    Its radius and centre are drawn uniformly from the ranges, where 1 is the side of the image.
    """
    size = len(image)
    radius = rng.uniform(*radius_range)
    row, column = rng.uniform(*centre_range, 2).tolist()
    reach = 1.1 * radius    # only pixels this close to the centre are computed
    window = tuple(slice(max(0, int((centre - reach) * size)), int((centre + reach) * size) + 2)
                   for centre in (row, column))
    coordinates = np.arange(size, dtype=np.float32) / size               # of pixels, in [0, 1)
    y, x = coordinates[window[0], None], coordinates[window[1]]
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = float(np.cos(angle)) / radius, float(np.sin(angle)) / radius
    u = (x - column) * cos + (y - row) * sin     # the shape's own axes, rotated, with radius 1
    v = (y - row) * cos - (x - column) * sin
    distance = signed_distance(SHAPES[shape], u, v) * (radius * size)    # in pixels
    coverage = np.clip(0.5 - distance, 0, 1)                             # of each pixel: antialiasing
    fill = random_colour(rng, shape / len(SHAPES) + rng.normal(0, HUE_STD), (0.5, 1.0), (0.5, 1.0))
    if rng.random() < 0.4:
        fill = random_texture(rng, fill, fill * rng.uniform(0.4, 0.8), x, y)
    image[window] += (fill - image[window]) * coverage[..., None]
    class_map[window][coverage > 0.5] = 1 + shape


def signed_distance(shape, u, v):
    """Approximate distance from the outline of a shape of radius 1 around the origin, negative inside."""
    r = np.hypot(u, v)
    if shape == "disc":
        return r - 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.8
    if shape in ("triangle", "hexagon"):
        half = np.pi / (3 if shape == "triangle" else 6)    # half the angle between two corners
        return r * np.cos((np.arctan2(v, u) + np.pi) % (2 * half) - half) - np.cos(half)
    if shape == "star":
        tip = abs((np.arctan2(v, u) * 5 / (2 * np.pi)) % 1 - 0.5) * 2    # 1 at the five tips, 0 between them
        return (r - 0.45 - 0.6 * tip ** 1.3) * 0.6
    if shape == "cross":
        return np.minimum(np.maximum(abs(u) - 1, abs(v) - 0.33), np.maximum(abs(u) - 0.33, abs(v) - 1))
    if shape == "ring":
        return abs(r - 0.75) - 0.25
    if shape == "crescent":
        return np.maximum(r - 1, 0.8 - np.hypot(u - 0.55, v))
    if shape == "ellipse":
        return (np.hypot(u, v / 0.5) - 1) * 0.5
    return np.maximum(abs(u) - 1, abs(v) - 0.28)            # bar


def random_colour(rng, hue, saturation_range, value_range):
    """A colour of this hue, RGB in [0, 1], float32 (3,)."""
    saturation, value = rng.uniform(*saturation_range), rng.uniform(*value_range)
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def random_texture(rng, first, second, x, y):
    """Colours between two colours, as a ramp, waves or stripes in a random direction.

    x (columns,) and y (rows, 1): coordinates in [0, 1). Returns float32 (rows, columns, 3).
    """
    angle = rng.uniform(0, 2 * np.pi)
    along = (x - 0.5) * float(np.cos(angle)) + (y - 0.5) * float(np.sin(angle))
    frequency, phase = rng.uniform(0.7, 2.5), rng.uniform(0, 2 * np.pi)
    wave = np.sin((2 * np.pi * frequency) * along + phase)
    pattern = (along, wave / 2, wave * 3)[rng.integers(3)]               # a ramp, waves or stripes
    return first + (second - first) * np.clip(0.5 + pattern, 0, 1)[..., None]
