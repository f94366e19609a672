"""Views, labels, batches, and folders of files that are not all what they should be."""
import os
import pickle
import struct
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unicodedata import normalize
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import finished, start
from PIL import Image, ImageFile, PngImagePlugin
from torchvision import tv_tensors
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

import data
import folders
from data import Images, Labelled, Views, open_image, open_splits, rank_batches
from launch import UserError
from masking import blockwise_mask
from shapes import Shapes

CPU = torch.device("cpu")
TURN = 0x0112    # EXIF orientation; 6: turn by 90 degrees clockwise


def views(source=None, sizes=(32, 16), mask=partial(blockwise_mask, (4, 4), 6), **more):
    return Views(source or Shapes("train"), *sizes, mask, **more)


def augmented(source, seed=0):
    transform = data.classification_transform(32, train=True, randaugment=9, erasing=0.5)
    return Labelled(source, transform, seed)


def equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = a.values(), b.values()
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True))


def tensor_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).int()


def picture(seed=0, width=40, height=30):
    """A smooth colour image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def fill(folder, count, suffix=".jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i:04}{suffix}")


# ---- Samples ----

@pytest.mark.parametrize("make, image", [(views, "image"), (augmented, 0)])
def test_draws_depend_on_seed_epoch_and_index_alone(make, image):
    scenes = [Shapes("train")[0]] * 9    # so that only the draws differ
    first = make(scenes)[2, 7]
    np.random.seed(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert equal(first, make(scenes)[2, 7])
    assert torch.equal(torch.get_rng_state(), state)    # the model's draws are not disturbed
    for other in (make(scenes)[3, 7], make(scenes)[2, 8], make(scenes, seed=1)[2, 7]):
        assert not torch.equal(first[image], other[image])


def test_views_can_be_left_out_and_are_fixed_in_evaluation():
    sample = views()[0, 0]
    image, token_image, mask = sample["image"], sample["token_image"], sample["mask"]
    assert {type(part) for part in sample.values()} == {torch.Tensor} and len(sample) == 3
    assert image.shape == (3, 32, 32) and token_image.shape == (3, 16, 16) and image.dtype == torch.uint8
    assert mask.shape == (4, 4) and mask.dtype == torch.bool and mask.sum() == 6
    assert equal(views(sizes=(32, None))[0, 0], {"image": image, "mask": mask})
    assert equal(views(sizes=(None, 16), mask=None)[0, 0], {"token_image": token_image})
    fixed = [views(train=False)[epoch, 0] for epoch in range(9)]
    masks = {sample.pop("mask").numpy().tobytes() for sample in fixed}
    assert all(equal(sample, fixed[0]) for sample in fixed) and len(masks) > 5    # but the masks vary
    batch = data.sample_batch(views(), 5)
    assert {name: part.shape for name, part in batch.items()} == {
        "image": (5, 3, 32, 32), "token_image": (5, 3, 16, 16), "mask": (5, 4, 4)}


@pytest.mark.parametrize("make", [views, augmented, lambda source: Labelled(
    Shapes("train", maps=True), data.segmentation_transform(32, train=True))])
def test_samples_are_the_same_in_spawned_workers(make):
    """Which get the data set pickled."""
    samples = make(Shapes("train"))
    assert equal(pickle.loads(pickle.dumps(samples))[1, 2], samples[1, 2])


@pytest.mark.parametrize("train", [True, False])
def test_one_crop_is_resized_twice_as_pil_does(monkeypatch, train):
    """Bicubic for the patches, Lanczos for the tokenizer; one flip for both."""
    def get_params(image, scale, ratio):
        assert (scale, ratio) == ([0.3, 1], [3 / 4, 4 / 3])
        return 11, 7, 41, 43

    box, flips = (7, 11, 50, 52) if train else (0, 0, 64, 64), set()
    monkeypatch.setattr(v2.RandomResizedCrop, "get_params", get_params)
    bicubic, lanczos = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
    for index in range(12):
        crop = Shapes("train")[index][0].crop(box)
        patches, tokens, _ = views(train=train, jitter=0.0, crop_scale=0.3)[0, index].values()

        def distance(view, size, resampling):
            return (view - tensor_of(crop.resize((size, size), resampling))).abs().max().item()
        flipped = distance(patches, 32, bicubic) > 2
        flips.add(flipped)
        if flipped:
            patches, tokens = patches.flip(2), tokens.flip(2)
        assert distance(patches, 32, bicubic) <= 2 < distance(patches, 32, lanczos)
        assert distance(tokens, 16, lanczos) <= 2 < distance(tokens, 16, bicubic)
    assert flips == ({True, False} if train else {False})


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 3, 1, 0]])
def test_jitter_is_torchvisions(monkeypatch, order):
    """Brightness, contrast and saturation with their own factors, in the order drawn, on both views."""
    def make_params(jitter, inputs):
        assert jitter.brightness == jitter.contrast == jitter.saturation == (0, 2.5) and jitter.hue is None
        return dict(fn_idx=torch.tensor(order), brightness_factor=0.7, contrast_factor=1.3,
                    saturation_factor=0.8, hue_factor=None)

    monkeypatch.setattr(v2.ColorJitter, "make_params", make_params)
    jittered, plain = (list(views(jitter=jitter)[0, 3].values()) for jitter in (1.5, 0.0))
    adjust = {0: partial(adjust_brightness, brightness_factor=0.7),
              1: partial(adjust_contrast, contrast_factor=1.3),
              2: partial(adjust_saturation, saturation_factor=0.8)}
    for view, expected in zip(jittered[:2], plain[:2], strict=True):
        expected = expected / 255
        for k in (k for k in order if k in adjust):
            expected = adjust[k](expected)
        torch.testing.assert_close(view / 255, expected, atol=0.6 / 255, rtol=0)


def test_erasing_and_randaugment():
    """A rectangle of noise; two operations, each on half of the images, so that 1/4 has none."""
    transform, changed, noise = partial(data.classification_transform, 64, train=True), 0, []
    transforms = transform(), transform(erasing=1.0), transform(randaugment=9)
    for i in range(30):
        plain, erased, augmented = (Labelled(Shapes("train"), transform)[0, i][0] for transform in transforms)
        rows, columns = (plain != erased).any(0).nonzero().t()
        window = erased[:, rows.min():rows.max() + 1, columns.min():columns.max() + 1]
        assert 0.01 < len(rows) / 64 ** 2 < 0.4 and len(rows) > 0.99 * window[0].numel()
        noise.append(window.flatten(1).float())
        changed += not torch.equal(plain, augmented)
    noise = torch.cat(noise, 1)                                        # clipped at 0 and 255, it varies less
    assert (noise.mean(1) - torch.tensor([124.0, 116, 104])).abs().max() < 3 and 50 < noise.std() < 58
    assert 12 < changed < 28


def test_magnitudes_of_randaugment_vary(monkeypatch):
    """A tenth of 30 steps is one magnitude: mean 9, std 0.5, but at most 10."""
    made, used = v2.RandAugment, []

    def spied(count, step, *rest):
        operation = made(count, step, *rest)
        operation.register_forward_pre_hook(lambda *_: used.append(step))
        return operation
    monkeypatch.setattr(v2, "RandAugment", spied)
    transform = data.classification_transform(8, train=True, randaugment=9)
    for i in range(600):
        with data.seeded(i):
            transform(picture(width=8, height=8), 0)
    magnitudes = np.array(used) / 3
    assert 500 < len(used) < 700 and abs(magnitudes.mean() - 8.96) < 0.1 and 0.4 < magnitudes.std() < 0.55


def test_crops_of_one_class_are_drawn_again():
    """Of ten 16 x 16 crops of a strip with another class in a tenth of it, one at least is no crop of one
    class, if there is one; a map of one class is cropped, too."""
    image, classes = Image.new("RGB", (200, 16)), np.zeros((16, 200), np.uint8)
    classes[:, 90:110], classes[:, :20] = 1, data.IGNORE
    seen = []
    for i in range(60):
        with data.seeded(i):
            cropped, target = data.crop_with_variety(16, image, tv_tensors.Mask(torch.from_numpy(classes)))
            assert cropped.size == (16, 16)
        counts = torch.bincount(target.flatten(), minlength=256)[:data.IGNORE]
        seen.append((counts.max() <= 0.75 * counts.sum()).item())
    assert np.mean(seen) > 2 * 24 / 185                                # left edges with 25 to 75 % of a class
    same = torch.zeros(16, 200, dtype=torch.uint8)
    assert data.crop_with_variety(16, image, tv_tensors.Mask(same))[1].shape == (16, 16)


def test_evaluation_sees_the_centre(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    ramp.save(tmp_path / "a.png")
    source, transform = [(ramp, 1)], partial(data.classification_transform, 50, train=False)
    for image, reach in ((255 * data.load_images([tmp_path / "a.png"], 50)[0], 50),
                         (Views(source, 50, None, train=False)[0, 0]["image"], 50),
                         (Labelled(source, transform(eval_crop=1.0))[0, 0][0], 50),
                         (Labelled(source, transform(eval_crop=0.5))[0, 0][0], 25)):
        assert image.shape == (3, 50, 50)
        assert image[0, 0, [0, -1]].tolist() == pytest.approx([100 - reach, 100 + reach], abs=3)


# ---- Batches; their division between processes and parts: test_determinism.py ----

def test_an_epoch_shows_no_image_twice():
    keys = [key for batch in rank_batches(50, 12, seed=3, start=0, stop=8) for key in batch]
    assert len(set(keys)) == 96 and {epoch for epoch, _ in keys} == {0, 1}


@pytest.mark.parametrize("images, batch, different", [(50, 12, 4), (48, 16, 6)])
def test_repeated_augmentation(images, batch, different):
    """Three copies of an image in a batch, with draws of three epochs; none beside another copy, with which
    mixup would mix it. As many steps as without, whatever the processes."""
    batches = list(rank_batches(images, batch, seed=3, start=0, stop=8, repeats=3))
    for keys in batches:
        counts = np.unique([index for _, index in keys], return_counts=True)[1]
        assert len(set(keys)) == batch and len(counts) == different and counts.max() == 3
        assert all(a[1] != b[1] for a, b in zip(keys, keys[1:]))
    steps = images // batch
    of_epoch = [{index for keys in batches[at:at + steps] for _, index in keys} for at in (0, steps)]
    assert len(of_epoch[0]) == steps * different and of_epoch[0] != of_epoch[1]
    assert {epoch for keys in batches[steps:2 * steps] for epoch, _ in keys} == {3, 4, 5}
    halves = [list(rank_batches(images, batch, seed=3, start=2, stop=3, repeats=3, rank=rank, world_size=2))
              for rank in (0, 1)]
    assert halves[0][0] + halves[1][0] == batches[2]


@pytest.mark.parametrize("images, batch, world, wanted", [(10, 4, 1, None), (10, 4, 3, None), (2, 8, 3, None),
                                                          (7, 2, 2, None), (10_000, 8, 2, 100)])
def test_held_out_images_are_counted_once(monkeypatch, images, batch, world, wanted):
    class Keys:
        def __len__(self):
            return images

        def __getitem__(self, key):
            return key
    seen, config = [], SimpleNamespace(batch_size=batch, accumulate=1, workers=0)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(data, "all_gather", lambda count: [images])
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        loader = data.val_loader(Keys(), config, CPU, collate=list, num_images=wanted)
        seen += [index for keys in loader for _, index in keys]
    assert sorted(seen) == list(range(0, images, images // wanted if wanted else 1))


# ---- Image files ----

def test_files_of_every_mode(tmp_path):
    image, white = picture(), Image.new("RGB", (40, 30), "white")
    grey, black, clear = image.convert("L"), image.convert("1"), image.convert("RGBA")
    clear.putalpha(0)
    image.save(tmp_path / "misnamed.jpg", "PNG")
    for name, saved, shown, tolerance in (
            ("cmyk.jpg", image.convert("CMYK"), image, 12), ("palette.gif", image.convert("P"), image, 30),
            ("misnamed.jpg", None, image, 0.1), ("clear.png", clear, white, 0.1),
            ("clear.gif", clear, white, 0.1), ("clear-grey.png", clear.convert("LA"), white, 0.1),
            ("grey.png", grey, grey, 0.1), ("black-and-white.png", black, black, 0.1)):
        if saved:
            saved.save(tmp_path / name)
        loaded = open_image(tmp_path / name)
        assert loaded.mode == "RGB", name
        assert (tensor_of(loaded) - tensor_of(shown.convert("RGB"))).abs().float().mean() < tolerance, name


def write_png(path, bits, colour, numbers, *chunks):
    """A PNG of these samples as they are, with (name, bytes) chunks before them."""
    packed = np.unpackbits(numbers.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits:]
    rows = np.packbits(packed.reshape(len(numbers), -1), axis=1)
    header = struct.pack(">IIBBBBB", *numbers.shape[::-1], bits, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", content), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in chunks))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_of_few_bits_with_a_transparent_value(tmp_path, bits):
    largest = 2 ** bits - 1
    numbers = np.arange(40 * 30).reshape(30, 40) % (largest + 1)
    write_png(tmp_path / "a.png", bits, 0, numbers, (b"tRNS", struct.pack(">H", largest - 1)))
    shown = np.where(numbers == largest - 1, 255, numbers * (255 // largest))
    assert (np.asarray(open_image(tmp_path / "a.png")) == shown[..., None]).all()


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("dtype, white", [(bool, 1), (np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_white_is_zero(tmp_path, dtype, white, compression, turn):
    """In TIFFs of this kind; Pillow inverts bool and uint8 when it writes them, and nothing else."""
    grey = np.arange(16 * 8).reshape(8, 16) % 2 * 255 if dtype is bool else np.arange(256).reshape(8, 32)
    stored = grey if white <= 255 and dtype != np.float32 else 255 - grey
    image = Image.fromarray((stored * (white / 255)).astype(dtype))
    image.save(tmp_path / "a.tif", tiffinfo={262: 0, TURN: turn}, compression=compression)
    shown = np.asarray(open_image(tmp_path / "a.tif")).astype(int)
    assert abs(shown - (np.rot90(grey, -1) if turn == 6 else grey)[..., None]).max() <= 1


def test_premultiplied_grey(tmp_path):
    """A TIFF with ExtraSamples 1: its grey is already multiplied by its opacity."""
    grey = np.stack([np.arange(256).reshape(16, 16) // 2, np.full((16, 16), 128)], -1).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    tag = struct.pack("<HHIH", 338, 3, 1, 2)
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes().replace(tag, tag[:-2] + b"\1\0"))
    shown = np.asarray(open_image(tmp_path / "a.tif"))
    assert abs(shown - (grey[..., :1] + 127.0)).max() <= 1


@pytest.mark.parametrize("suffix, dtype, white", [
    (".tiff", np.float32, 1), (".tiff", np.float32, 255), (".tiff", np.float32, 65535),
    (".tiff", np.int32, 255), (".tiff", np.int32, 65535), (".tiff", np.int32, 10 ** 7),
    (".tiff", np.uint16, 255), (".png", np.uint16, 65535)])
def test_grey_is_scaled_by_its_range(tmp_path, suffix, dtype, white):
    grey = np.asarray(picture().convert("L")).copy()
    grey[0, :2] = 0, 255
    Image.fromarray((grey * (white / 255)).astype(dtype)).save(tmp_path / f"a{suffix}")
    loaded = np.asarray(open_image(tmp_path / f"a{suffix}"))
    assert abs(loaded.astype(int) - grey[..., None]).max() <= 1


def test_grey_without_light_or_with_holes(tmp_path):
    floats = np.zeros((2, 3), np.float32)
    Image.fromarray(floats).save(tmp_path / "dark.tiff")
    floats[0] = np.nan, np.inf, 1
    Image.fromarray(floats).save(tmp_path / "holes.tiff")
    assert not np.asarray(open_image(tmp_path / "dark.tiff")).any()
    assert np.asarray(open_image(tmp_path / "holes.tiff"))[..., 0].tolist() == [[0, 0, 255], [0, 0, 0]]


# Where the first row and column of the stored pixels lie in the picture, by the EXIF standard's numbers
STORED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
          5: lambda a: a.swapaxes(0, 1), 6: np.rot90, 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
          8: lambda a: np.rot90(a, -1), "garbage": lambda a: a, "9": lambda a: a}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("turn", STORED)
def test_pictures_are_upright_whatever_their_format_and_tag(tmp_path, monkeypatch, suffix, turn):
    """And each file is opened and decoded once."""
    upright = np.asarray(picture())
    stored, exif = Image.fromarray(np.ascontiguousarray(STORED[turn](upright))), Image.Exif()
    exif[TURN] = int(turn) if turn != "garbage" else 1
    garbage = exif if suffix == ".tiff" else b"Exif\0\0garbage"
    options = {".jpg": dict(quality=100, subsampling=0), ".webp": dict(lossless=True)}.get(suffix, {})
    stored.save(tmp_path / f"a{suffix}", exif=garbage if turn == "garbage" else exif, **options)
    calls = []
    for where, name in ((Image, "open"), (ImageFile.ImageFile, "load_prepare")):
        function = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, of=function: calls.append(of) or of(*args))
    loaded = np.asarray(open_image(tmp_path / f"a{suffix}")).astype(int)
    assert loaded.shape == upright.shape and abs(loaded - upright).mean() < 2
    assert len(set(calls)) == len(calls)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_uncompressed_tiffs_are_upright(tmp_path, mode):
    image = picture().convert("L").convert("I").convert(mode) if mode == "I;16" else picture().convert(mode)
    for compression in ("raw", "tiff_lzw"):
        image.save(tmp_path / f"{compression}.tif", tiffinfo={TURN: 6}, compression=compression)
    raw, compressed = (np.asarray(open_image(tmp_path / f"{name}.tif")) for name in ("raw", "tiff_lzw"))
    assert raw.shape == (40, 30, 3) and np.array_equal(raw, compressed)


def test_the_reason_is_given_and_errors_in_the_program_pass(tmp_path, monkeypatch):
    Image.new("1", (14_000, 14_000)).save(tmp_path / "large.png")
    with pytest.raises(data.BadFile, match=r"large.png cannot be read \(.*exceeds limit of 178956970 pixels"):
        open_image(tmp_path / "large.png")
    comments = PngImagePlugin.PngInfo()
    comments.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "comments.png", pnginfo=comments)
    assert open_image(tmp_path / "comments.png").size == (8, 8)
    monkeypatch.delattr(Image, "alpha_composite")    # as in a library that is too old
    Image.new("RGBA", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(AttributeError, match="alpha_composite"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("turn, how", [(1, None), (3, "ROTATE_180"), (6, "ROTATE_270"), (8, "ROTATE_90")])
def test_large_jpegs_are_decoded_reduced_and_upright(tmp_path, monkeypatch, turn, how):
    image, exif = picture(width=500, height=400), Image.Exif()
    exif[TURN] = turn
    image.save(tmp_path / "a.jpg", quality=95, exif=exif)
    whole = image.transpose(Image.Transpose[how]) if how else image
    for large, size in ((101, (250, 200)), (201, (500, 400)), (100, (125, 100))):
        monkeypatch.setattr(folders, "JPEG_MIN_SIDE", large)
        loaded = open_image(tmp_path / "a.jpg")
        assert loaded.size == (size if turn in (1, 3) else size[::-1])
        assert (tensor_of(loaded) - tensor_of(whole.resize(loaded.size))).abs().float().mean() < 3
    assert open_image(tmp_path / "a.jpg", reduce=False).size == whole.size


def write_large_size(path):
    """Write 60,000 x 60,000 into the header of a JPEG's frame."""
    whole = path.read_bytes()
    assert whole[158:163] == b"\xff\xc0\0\x11\x08"
    path.write_bytes(whole[:163] + b"\xea\x60\xea\x60" + whole[167:])


DAMAGED = {
    "vanished": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a web page": lambda path: path.write_text("<!DOCTYPE html><html></html>"),
    "60,000 x 60,000": write_large_size,
}


@pytest.mark.parametrize("how", DAMAGED)
def test_an_unreadable_image_is_named_and_the_next_is_taken(tmp_path, how, capfd):
    fill(tmp_path, 3)
    source, bad = Images(data.image_paths(tmp_path)), tmp_path / "0001.jpg"
    DAMAGED[how](bad)
    fixed = Labelled(source, data.classification_transform(32, train=False))
    data.warn_once.cache_clear()
    assert equal(fixed[0, 1], fixed[0, 2]) and equal(fixed[1, 1], fixed[0, 2])
    assert views(source)[0, 1]["image"].shape == (3, 32, 32)
    out, err = capfd.readouterr()
    assert not out and err.count("\n") == 1                            # once, and no library adds its own
    assert err.startswith(f"warning: {bad} cannot be read (") and err.endswith("); the next one is taken\n")


def unreadable(folder, count, bad, make=lambda source: views(source, train=False)):
    """Samples, in evaluation, of a folder of `count` images, of which those numbered in `bad` are damaged."""
    fill(folder, count)
    paths = data.image_paths(folder)
    for i in bad:
        os.truncate(paths[i], 0)
    data.warn_once.cache_clear()
    return make(Images(paths))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [lambda source: views(source, train=False), lambda source: Labelled(
    source, data.classification_transform(32, train=False), train=False)])
def test_an_evaluation_leaves_out_unreadable_images(tmp_path, make, workers, capfd):
    """Each is named; a batch may have none that is readable."""
    samples = unreadable(tmp_path, 7, [1, 2, 3, 6], make)
    args = SimpleNamespace(batch_size=2, accumulate=1, workers=workers)
    batches = list(data.val_loader(samples, args, CPU))
    images = torch.cat([batch["image"] if isinstance(batch, dict) else batch[0] for batch in batches])
    assert len(batches) == 2 and len(images) == 3
    expected = [samples[0, i]["image" if isinstance(samples, Views) else 0] for i in (0, 4, 5)]
    assert torch.equal(images, torch.stack(expected))
    out, err = capfd.readouterr()
    assert out == "warning: 3 of 7 images are counted; the others cannot be read\n"
    for i in (1, 2, 3, 6):
        line = f"warning: {tmp_path / f'{i:04}.jpg'} cannot be read ("
        assert line in err and err.count("; it is not counted\n") == err.count("\n")


@pytest.mark.parametrize("count, bad, message", [
    (3, range(3), "3 images in a row cannot be used; the first: .*0000.jpg cannot be read .*"),
    (40, range(40), "16 images in a row cannot be used; the first: .*0000.jpg cannot be read .*"),
    (40, range(0, 40, 2), "none of 20 images to evaluate can be read")])
def test_an_evaluation_without_readable_images_is_an_error(tmp_path, count, bad, message):
    samples = unreadable(tmp_path, count, bad)
    args = SimpleNamespace(batch_size=8, accumulate=1, workers=0)
    with pytest.raises(OSError, match=f"^--data: {message}$"):
        list(data.val_loader(samples, args, CPU, num_images=20))


def test_figures_show_readable_images_from_all_over_the_set(tmp_path):
    samples = unreadable(tmp_path, 30, [8, 20], lambda source: Labelled(
        source, data.classification_transform(32, train=False), train=False))
    shown = data.spread_samples(samples, 6)
    expected = [0, 5, 10, 15, 25, 1]                                   # 1 in place of 20
    assert equal([image for image, _ in shown], [samples[0, i][0] for i in expected])
    assert equal(data.sample_batch(samples, 6)[0], torch.stack([image for image, _ in shown]))


def test_sixteen_unreadable_files_in_a_row_end_a_run(tmp_path):
    fill(tmp_path, 30)
    paths = data.image_paths(tmp_path)
    for i in range(20, 35):
        os.truncate(paths[i % 30], 0)
    assert data.read_sample(Images(paths), 20)[0].size == (40, 30)
    os.truncate(paths[5], 0)
    with pytest.raises(OSError, match="^--data: 16 images in a row cannot be used; .*0020.jpg cannot"):
        data.read_sample(Images(paths), 20)


# ---- Folders ----

def test_which_files_are_held_out(tmp_path):
    def splits(name):
        return [source.paths.tolist() for source in open_splits(str(tmp_path / name), "")]
    fill(tmp_path / "loose" / "deep" / "down.jpg", 60)                 # a folder named like an image
    train, val = splits("loose")
    assert len(val) == 2 and len(train) == 58 and not set(train) & set(val)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "class").symlink_to(tmp_path / "loose")
    assert len(data.image_paths(tmp_path / "linked")) == 60
    fill(tmp_path / "halved" / "val", 2)
    fill(tmp_path / "halved" / "value", 60, ".PNG")
    (tmp_path / "halved" / "notes.txt").write_text("no image")
    assert [len(paths) for paths in splits("halved")] == [60, 2]
    fill(tmp_path / "split" / "train" / "cat", 3)
    fill(tmp_path / "split" / "validation" / "cat", 1)
    assert [len(paths) for paths in splits("split")] == [3, 1]
    assert [len(paths) for paths in splits("split/validation")] == [1, 1]    # a single image is both


def linked(link, to):
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(to)


JUNK = ("._0000.jpg", ".ipynb_checkpoints/0000-checkpoint.jpg", "__MACOSX/._0000.jpg", "__MACOSX/0000.jpg",
        "notes.txt", ".hidden/0000.jpg", "@eaDir/0000.jpg")
LINKS = {"to the folder itself": ("again", "."), "to the folder above": ("up", ".."), "to a file": (
    "b/copy.jpg", "0000.jpg"), "to a class": ("0", "a"), "from class to class": ("a/b", "../b"),
    "in a circle": ("a/deep/round", "..")}


@pytest.mark.parametrize("how", ["junk", *LINKS])
def test_each_image_is_found_once_and_junk_never(tmp_path, how):
    for split in ("train", "val"):
        for name in "ab":
            fill(tmp_path / split / name, 2)
        if how != "junk":
            linked(tmp_path / split / LINKS[how][0], LINKS[how][1])
        for name in JUNK if how == "junk" else ():
            for folder in ("", "a"):
                path = tmp_path / split / folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"no picture")
    found = [os.path.realpath(path) for path in data.image_paths(tmp_path / "train")]
    assert len(found) == len(set(found)) == 4
    assert [len(source) for source in open_splits(str(tmp_path), "")] == [4, 4]
    train, val = open_splits(str(tmp_path), "", "classes")
    assert train.classes == val.classes == ["a", "b"]
    assert np.bincount(train.targets).tolist() == np.bincount(val.targets).tolist() == [2, 2]


def test_held_out_images_stay_out_of_training_through_links(tmp_path):
    fill(tmp_path / "val", 2)
    fill(tmp_path / "more", 3)
    linked(tmp_path / "a-link", "val")
    linked(tmp_path / "elsewhere", tmp_path / "val" / "0000.jpg")
    train, val = open_splits(str(tmp_path), "")
    assert len(val) == 2 and len(train) == 3


def write_fashion_mnist(dataset):
    """In place of torchvision's download: two images to train and one held out."""
    folder = Path(dataset.raw_folder)
    folder.mkdir(parents=True)
    for split, count in (("train", 2), ("t10k", 1)):
        for name, values in ("images-idx3", np.zeros((count, 28, 28))), ("labels-idx1", np.arange(count)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (folder / f"{split}-{name}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())


def test_download(tmp_path, monkeypatch):
    """Only the first process fetches files. Errors name the flag."""
    def refused(message, **flags):
        with pytest.raises(UserError, match=f"^{message}$"):
            open_splits("fashion-mnist", tmp_path, **flags)

    def without_network(dataset):
        raise URLError("no\nnetwork")
    monkeypatch.setattr(FashionMNIST, "download", without_network)
    refused(rf"--data-root: {tmp_path} has no FashionMNIST/raw/\*-ubyte; --download fetches them")
    refused(rf"--download: fashion-mnist could not be fetched into {tmp_path} \(<urlopen error no network>\)",
            download=True)
    monkeypatch.setattr(FashionMNIST, "download", write_fashion_mnist)
    monkeypatch.setenv("RANK", "1")
    refused("--data-root: .* has no .*", download=True)
    monkeypatch.setenv("RANK", "0")
    train, val = open_splits("fashion-mnist", tmp_path, "classes", download=True)
    assert (len(train), len(val), len(train.classes)) == (2, 1, 10)
    assert train[1][0].mode == "RGB" and train[1][1] == 1
    os.truncate(tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte", 9)
    refused("--data-root: .* has damaged files .*--download fetches them again")


@pytest.mark.parametrize("suffix", sorted({*folders.SUFFIXES, ".avif", ".jp2", ".tga", ".Jp2"}))
def test_images_of_every_suffix_are_found_and_read(tmp_path, suffix):
    if Image.registered_extensions()[suffix.lower()] not in Image.SAVE:
        pytest.skip("this Pillow does not write such files")
    picture().save(tmp_path / f"a{suffix}")
    assert data.image_paths(tmp_path) == [str(tmp_path / f"a{suffix}")]
    assert open_image(tmp_path / f"a{suffix}").size == (40, 30)


def test_images_of_other_kinds_are_left_out_with_a_warning(tmp_path, capsys):
    fill(tmp_path, 2)
    for name in ("a.heic", "b.JXL", "notes.txt", "paper.pdf", "._c.heic"):
        (tmp_path / name).write_bytes(b"")
    assert len(data.image_paths(tmp_path)) == 2
    out = capsys.readouterr().out
    assert out.startswith(f"warning: {tmp_path}: 2 files are left out, for example ") and out.count("\n") == 1


def test_accents_are_composed_in_class_names(tmp_path):
    """A copy made by macOS may have them decomposed; one class may even be in two folders."""
    composed, decomposed = "\u00e9t\u00e9", "e\u0301te\u0301"
    for split, names in (("train", (composed, decomposed, "zoo")), ("val", (decomposed, "zoo"))):
        for name in names:
            fill(tmp_path / split / name, 1)
    train, val = open_splits(str(tmp_path), "", "classes")
    assert train.classes == val.classes == ["zoo", composed]
    assert sorted(train.targets) == [0, 1, 1] and sorted(val.targets) == [0, 1]


def test_labelled_folders(tmp_path):
    """Red is the class, green the number of the image; the held-out images are of classes a and c alone."""
    for split, classes in (("train", "abc"), ("validation", "ac")):
        for k, name in enumerate(classes):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 30), (k, i, 0)).save(tmp_path / split / name / f"{i}.png")
    train, held_out = open_splits(str(tmp_path), "", "classes")
    assert train.classes == held_out.classes == ["a", "b", "c"]
    assert train.targets == [0, 0, 1, 1, 2, 2]
    assert [held_out[i][1] for i in range(4)] == [0, 0, 2, 2] and held_out[3][0].getpixel((0, 0)) == (1, 1, 0)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")      # its label goes with it
    assert Labelled(train, data.classification_transform(16, train=False))[0, 1][1] == 1


def ade(folder, count=6):
    """A folder in ADE20K's layout; all maps hold class 2, sky."""
    for split in ("training", "validation"):
        (folder / "annotations" / split).mkdir(parents=True)
        fill(folder / "images" / split, count)
        for path in (folder / "images" / split).iterdir():
            Image.new("L", (40, 30), 2).convert("P").save(folder / "annotations" / split / f"{path.stem}.png")
    (folder / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tsky\n3\ttree, other\n")
    return folder


def test_folders_that_are_refused(tmp_path):
    """Others: test_commands.py."""
    def refused(message, labels="classes"):
        with pytest.raises(UserError, match=f"^--data: {message}"):
            open_splits(str(tmp_path), "", labels)
    for name in ("train/a", "val/a"):
        fill(tmp_path / name, 1)
    refused(".*/train must hold folders of images of at least two classes")
    for name in ("train/b", "train/c"):
        fill(tmp_path / name, 1)
    (tmp_path / "train" / "c" / "0000.jpg").rename(tmp_path / "train" / "c" / "notes.txt")
    refused(".*/train/c has no images")
    (tmp_path / "train" / "c" / "0000.jpg").symlink_to("../b/0000.jpg")
    refused(".*/train/c has no images")
    (tmp_path / "train" / "c" / "0000.jpg").unlink()
    (tmp_path / "train" / "c" / "notes.txt").rename(tmp_path / "train" / "c" / "0000.jpg")
    (tmp_path / "val" / "a" / "0000.jpg").rename(tmp_path / "val" / "0000.jpg")
    (tmp_path / "val" / "a").rmdir()
    refused(".*/val has no folders of images, one for each class")
    (tmp_path / "val").rename(tmp_path / "held-out")
    refused(r".* needs train/ and val/ \(or validation/\)")
    (tmp_path / "held-out").rename(tmp_path / "val")
    (tmp_path / "train").rename(tmp_path / "training")
    refused(r".* needs train/ and val/ \(or validation/\)")

    maps, table = ade(tmp_path) / "annotations", tmp_path / "objectInfo150.txt"
    (maps / "training" / "0003.png").rename(tmp_path / "0003.png")
    refused(f"1 maps are missing, for example {maps / 'training' / '0003.png'}", labels="maps")
    (tmp_path / "0003.png").rename(maps / "training" / "0003.png")
    for count in (0, 1, 255):
        table.write_text("Idx\tName\n" + "1\tx\n" * count)
        refused(f"{table} names {count} classes", labels="maps")
    table.unlink()
    assert open_splits(str(tmp_path), "", "maps")[1].classes[149] == "150"
    (maps / "validation").rename(tmp_path / "validation")
    refused(".* needs images/training, ", labels="maps")


ADE_TITLES = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"


@pytest.mark.parametrize("table", [
    "Idx\tName\n1\twall\n2\tsky\n3\ttree, other\n", "\ufeffIdx\tName\r\n1\twall\r\n\r\n2\tsky\r\n3\ttree\r\n",
    ADE_TITLES + "2\t.1\t9\t9\t1\tsky\n3\t.2\t9\t9\t1\ttree, other\n1\t.3\t9\t9\t1\twall\n",
    "Name\tIdx\nsky\t2\nwall\t1\ntree\t3\n", "name\nwall\nsky\ntree", "wall\nsky\ntree, other\n",
    "1\twall\n2\tsky\n3\ttree\n", "3\ttree\n1\twall\n2\tsky\n", "id\tlabel\n1\twall\n2\tsky\n3\ttree\n"])
def test_names_of_classes_by_number(tmp_path, table):
    (tmp_path / "objectInfo150.txt").write_text(table, encoding="utf-8")
    assert data.segmentation_classes(tmp_path) == ["wall", "sky", "tree"]


@pytest.mark.parametrize("numbers", ["1 1 2", "1 2 4", "0 1 2", "1 2 x", "1 2 -3"])
@pytest.mark.parametrize("titles", ["", "Idx\tName\n"])
def test_wrong_numbers_of_classes_are_refused(tmp_path, numbers, titles):
    path = tmp_path / "objectInfo150.txt"
    path.write_text(titles + "".join(f"{number}\tname{k}\n" for k, number in enumerate(numbers.split())))
    with pytest.raises(UserError, match=f"^--data: {path} must number its classes 1 to 3, each once$"):
        data.segmentation_classes(tmp_path)


@pytest.mark.parametrize("bits, colour", [(1, 0), (2, 0), (4, 0), (8, 0), (1, 3), (2, 3), (4, 3), (8, 3)])
def test_class_numbers_are_those_in_the_file(tmp_path, bits, colour):
    """Also in grey PNGs of few bits (colour 0), which decoders scale to 8 bits, and in palettes (3)."""
    numbers = np.arange(40 * 30).reshape(30, 40) % min(2 ** bits, 4)
    write_png(ade(tmp_path, 1) / "annotations/training/0000.png", bits, colour, numbers,
              *([(b"PLTE", bytes(range(12)))] if colour else ()))
    source, _ = open_splits(str(tmp_path), "", "maps")
    assert np.array_equal(source[0][1], (numbers - 1).astype(np.uint8))


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_map_whose_name_composes_accents_differently(tmp_path, form, other):
    """As after a copy of the images alone by macOS."""
    for folder, name in (("images", form), ("annotations", other)):
        path = next((ade(tmp_path, 1) if folder == "images" else tmp_path).glob(f"{folder}/training/*"))
        path.rename(path.with_name(normalize(name, "caf\u00e9") + path.suffix))
    assert open_splits(str(tmp_path), "", "maps")[0][0][1].max() == 1


def test_class_maps_follow_their_images(tmp_path, monkeypatch, capfd):
    """Crop, flip and scale are the same for both, the padding is IGNORE, and class numbers start at 0."""
    folder, rng = ade(tmp_path), np.random.default_rng(0)
    monkeypatch.setattr(folders, "JPEG_MIN_SIDE", 10)                     # no image is reduced for it
    for path in (folder / "annotations" / "training").iterdir():
        numbers = rng.choice([0, 1, 2, 3, data.IGNORE], (3, 4)).astype(np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(numbers).save(path)
        grey = np.where(numbers == data.IGNORE, 0, numbers * 60).astype(np.uint8)
        shown = folder / "images" / "training" / f"{path.stem}.jpg"
        Image.fromarray(grey).convert("RGB").save(shown, quality=100)
    source, _ = open_splits(str(folder), "", "maps")
    assert source.classes == ["wall", "sky", "tree"]
    samples = Labelled(source, data.segmentation_transform(32, train=True, jitter=0.0))
    for epoch in range(4):
        for index in range(6):
            image, target = samples[epoch, index]
            assert image.shape == (3, 32, 32) and target.shape == (32, 32) and type(target) is torch.Tensor
            shown = image[0].float() / 60 - 1
            assert (shown - target)[target < 3].abs().mean() < 0.35    # edges are blurred
            assert (image[0, target == data.IGNORE] < 170).all()       # class 0, none, or padding
            assert set(target.unique().tolist()) <= {0, 1, 2, data.IGNORE}
    assert not capfd.readouterr().err                                  # no map was refused


WRONG_MAPS = {
    "is 10x10, but its image is 40x30": Image.new("L", (10, 10), 1),
    "holds class 9, but there are only 3 classes": Image.new("L", (40, 30), 9),
    "is not a map of 8-bit class numbers, but mode RGB": Image.new("RGB", (40, 30)),
    "is not a map of 8-bit class numbers, but mode I;16": Image.new("I;16", (40, 30)),
}


@pytest.mark.parametrize("reason", WRONG_MAPS)
def test_a_wrong_map_is_named_with_its_reason(tmp_path, reason, capfd):
    file = ade(tmp_path) / "annotations" / "training" / "0004.png"
    WRONG_MAPS[reason].save(file)
    source, _ = open_splits(str(tmp_path), "", "maps")
    samples = Labelled(source, data.segmentation_transform(16, train=False))
    image, target = samples[0, 4]
    assert torch.equal(image, samples[0, 5][0]) and target.shape == (30, 40) and (target == 1).all()
    err = capfd.readouterr().err
    assert err.startswith(f"warning: {file} {reason}") and err.endswith("; the next one is taken\n")


# ---- Runs ----

@pytest.mark.long
def test_runs_among_bad_files(tmp_path, record_fault):
    """Two among good ones are named and replaced; if there are no good ones, the run ends with one line."""
    fill(tmp_path / "images" / "train", 60)
    fill(tmp_path / "images" / "val", 12)
    bad = [tmp_path / "images" / "train" / name for name in ("0003.jpg", "0050.jpg")]
    for path, how in zip(bad, ("cut", "empty")):
        DAMAGED[how](path)

    flags = ("--data", tmp_path / "images", "--target", "pixels", "--preset", "demo",
             "--workers", 2, "--steps", 12)
    _, said = finished(start(tmp_path / "a", *flags))
    assert (tmp_path / "a" / "result.json").exists()
    named = [said.count(f"warning: {path} cannot be read") for path in bad]
    assert set(named) <= {1, 2} and said.count("\n") == sum(named)    # once in each of the loader processes
    for path in (tmp_path / "images" / "train").iterdir():
        os.truncate(path, 0)
    _, said = finished(start(tmp_path / "b", *flags), 1)
    errors = [line for line in said.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("pretrain.py: error: --data: ")
    assert "error: --data: 16 images in a row cannot be used; the first: " in errors[0]
    record_fault("unreadable images: two among good ones, nothing else", 2)


def test_ade20k_without_labels_is_its_photos(tmp_path):
    """Not its class maps; and images/validation is held out."""
    for part in ("images/training", "images/validation", "annotations/training", "annotations/validation"):
        (tmp_path / part).mkdir(parents=True)
        Image.new("RGB" if part.startswith("images") else "L", (4, 4)).save(tmp_path / part / "1.png")
    source, held_out = data.open_splits(str(tmp_path), "data")
    assert list(source.paths) == [str(tmp_path / "images/training/1.png")]
    assert list(held_out.paths) == [str(tmp_path / "images/validation/1.png")]


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    scandir = os.scandir

    def refuse_b(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_b)
    with pytest.raises(UserError, match="^--data: .*/b cannot be listed .Permission denied"):
        data.open_splits(str(tmp_path), "data")
