"""Thousands of damaged and hostile files: each loads, or is refused in one line. None is run."""
import argparse
import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import dvae
import launch
import pretrain
import run_folder
import vit
import weights
from run import Run

pytestmark = pytest.mark.long
SECONDS = 5
CANARY = "canary"    # the file that a payload would make


# ---- Damage: bytes, bytes of another file, random.Random -> bytes ----

def flip(whole, other, rng):
    hurt, end = bytearray(whole), rng.choice((200, len(whole)))    # often in the head
    for _ in range(rng.choice((1, 3, 30))):
        hurt[rng.randrange(min(end, len(whole)))] ^= 1 << rng.randrange(8)
    return bytes(hurt)


def truncate(whole, other, rng):
    return whole[:rng.randrange(len(whole))]


def splice(whole, other, rng):
    return whole[:rng.randrange(len(whole))] + other[rng.randrange(len(other)):]


DAMAGE = (flip, truncate, splice)


def mutants(wholes, count):
    """(file name, what was done, bytes): count damaged copies of files, bytes by name."""
    rng, names = random.Random(0), list(wholes)
    for k in range(count):
        name, how = names[k % len(names)], DAMAGE[k // len(names) % len(DAMAGE)]
        yield name, f"{name} {how.__name__} {k}", how(wholes[name], wholes[rng.choice(names)], rng)


# ---- Cases, in a forked process, which a file may end ----

def find_wrong_outcomes(cases, folder, found):
    """In a process: write and load each case (what, load, path, bytes). Leaves what was wrong in a file."""
    os.chdir(folder)
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2_000_000_000,) * 2)    # a size in a file may be anything
    wrong = []
    for what, load, path, content in cases:
        path.write_bytes(content)
        signal.alarm(SECONDS)    # ends the process: nothing catches it
        try:
            load(path)
        except ValueError as error:
            if type(error) is not launch.UserError or str(folder) not in str(error) or "\n" in str(error):
                wrong.append(f"{what}: {type(error).__name__}: {str(error)[:300]!r}")
        except BaseException:
            wrong.append(f"{what}: {traceback.format_exc()[-1500:]}")
        signal.alarm(0)
        if Path(CANARY).exists():
            wrong.append(f"{what}: it was run")
            Path(CANARY).unlink()
    found.write_text(json.dumps(wrong))


@pytest.fixture
def check(tmp_path, record_fault):
    """check(fault, cases): run cases (what, load, path, bytes) in a process; fails if any went wrong."""
    def check(fault, cases):
        cases, found = list(cases), tmp_path / "wrong.json"
        process = multiprocessing.get_context("fork").Process(
            target=find_wrong_outcomes, args=(cases, tmp_path, found))
        process.start()
        process.join()
        assert process.exitcode == 0, f"{fault}: a file ended the process, or took over {SECONDS} seconds"
        wrong = json.loads(found.read_text())
        record_fault(fault, len(cases), len(wrong))
        assert not wrong, "\n".join([f"{len(wrong)} of {len(cases)}:", *wrong[:12]])
    return check


# ---- Checkpoints ----

CONFIG = vit.ViTConfig(image_size=16, patch_size=8, dim=8, depth=1, heads=2, layer_scale=0.1)


def saved(value, zipped=True):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def choose(path):
    """Take last.pt as a run does. Raises UserError if it is damaged."""
    run_folder.choose_checkpoint(path.parent)


def restore(path):
    """What is not damaged can be loaded."""
    choose(path)
    assert torch.load(path, weights_only=True)["step"] == 2


def ours(folder):
    """{name of a file: (what loads it, its bytes)}, here and below."""
    model, tokens, linear = vit.MaskedImageModel(CONFIG, 16), dvae.DiscreteVAE(8, 8, 2, 1), nn.Linear(8, 8)
    config = {"vit": dataclasses.asdict(CONFIG), "vocab_size": 16}
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    state = {"step": 2, "log_size": 0, "model": linear.state_dict(), "optimizer": optimizer.state_dict()}
    model = {"model": model.state_dict(), "config": config, "kind": "MaskedImageModel"}
    tokens = {"model": tokens.state_dict(), "config": tokens.config, "kind": "DiscreteVAE"}
    return {"model.pt": (weights.build, saved(model)), "last.pt": (restore, saved(state)),
            "tokenizer.pt": (weights.load_tokenizer, saved(tokens))}


def released_or_timms(folder):
    shared = dataclasses.replace(CONFIG, position="shared_relative")
    released = {"model": vit.MaskedImageModel(shared, 16).state_dict(), "args": argparse.Namespace(lr=1e-3)}
    weights.save_timm(vit.ImageClassifier(CONFIG, 5), folder / "timm.bin")
    files = {"released.pth": saved(released), "older.pth": saved(released, zipped=False),
             "timm.bin": (folder / "timm.bin").read_bytes()}
    return {name: (weights.build, content) for name, content in files.items()}


def dall_es(folder):
    dall_e = pytest.importorskip("dall_e")
    encoder = dall_e.Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512)
    for name, weight in dvae.DiscreteVAE(8, 8, 4, 1).encoder.state_dict().items():
        encoder.get_parameter(name).data = weight    # as small as DALL-E's own classes refuse to be
    return {"encoder.pkl": (weights.load_dalle, saved(encoder)),
            "older.pkl": (weights.load_dalle, saved(encoder, zipped=False))}


@pytest.mark.parametrize("files, count", [(ours, 500), (released_or_timms, 400), (dall_es, 60)])
def test_damaged_checkpoints(files, count, tmp_path, check):
    files = files(tmp_path)
    for name, (load, content) in files.items():    # undamaged: else the mutants would show nothing
        (tmp_path / name).write_bytes(content)
        load(tmp_path / name)
    wholes = {name: content for name, (_, content) in files.items()}
    check(f"{', '.join(files)} damaged", (
        (what, files[name][0], tmp_path / name, content) for name, what, content in mutants(wholes, count)))


# ---- Pickles that call what weights do not need ----

def text(words):
    return b"X" + len(words.encode()).to_bytes(4, "little") + words.encode()


def call(module, name, *arguments):
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


RUN, PYTHON = text(f"touch {CANARY}"), text(f"open({CANARY!r}, 'w')")
HOSTILE = {
    "os.system": call("os", "system", RUN),
    "builtins.exec": call("builtins", "exec", PYTHON),
    "__builtin__.eval": call("__builtin__", "eval", PYTHON),
    "torch.load": call("torch", "load", text("x.pt")),
    "getattr": call("builtins", "getattr", b"cos\nsystem\n", text("__call__")),
    "INST": b"(" + RUN + b"ios\nsystem\n",
    "NEWOBJ": b"cos\nsystem\n" + RUN + b"\x85\x81",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93" + RUN + b"\x85R",
    "a change of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("x") + b"Nsb",
    "a change of a class": b"cargparse\nNamespace\n}" + text("__init__") + b"cos\nsystem\nsb",
    "persistent": b"NQ",
    "extension": b"\x82\x01",
    "an empty stack": b"000",
    "no opcode": b"\xfe",
    "a list in itself": b"]q\x01h\x01a",
}


def hostile_files(whole):
    """(what, bytes): HOSTILE alone, in a dict, in a real file's pickle; as zip, older format and pickle."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    older = b"".join(pickle.dumps(value, 2) for value in (    # as torch.save wrote until 1.6
        torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}))
    for what, ask in HOSTILE.items():
        for rest_of_pickle in (ask + b".", b"}" + text("model") + ask + b"s.", ask + members["data.pkl"][2:]):
            pickled, file = b"\x80\x02" + rest_of_pickle, io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for name, content in {**members, "data.pkl": pickled}.items():
                    archive.writestr(f"archive/{name}", content)
            yield what, file.getvalue()
            yield what, older + pickled + pickle.dumps([], 2)
            yield what, pickled


def test_hostile_pickles(tmp_path, check):
    load, whole = ours(tmp_path)["model.pt"]
    loaders = (weights.read_file, load, weights.load_tokenizer, weights.load_dalle, choose)
    check("a pickle that calls something", (
        (what, load, tmp_path / ("last.pt" if load is choose else "model.pt"), content)
        for what, content in hostile_files(whole) for load in loaders))


# ---- Text ----

JSONS = (b"", b"null", b"[]", b"3", b"{", b"{}", b"NaN", b"\xff\xfe{", b"[" * 100_000, bytes(100),
         b'{"num_attention_heads": "x"}', b'{"num_attention_heads": 0}', b'{"num_attention_heads": [2]}',
         b'{"image_mean": 5}', b'{"image_mean": ["a", "b", "c"]}', b'{"image_std": [0, 0, 0]}')


def test_damaged_json(tmp_path, check):
    out = tmp_path / "run"
    args = pretrain.parse_args(["--out", str(out), "--batch-size", "8", "--steps", "4"])

    def start(path):
        Run(args, torch.device("cpu"), num_images=8)

    def build(path):
        weights.build(next(file for file in path.parent.iterdir() if file.suffix in (".bin", ".safetensors")))

    start(out)
    paths = {out / "config.json": start}
    for name in ("config.json", "preprocessor_config.json"):
        folder = tmp_path / f"hugging-face-{name}"
        weights.save_huggingface(vit.ImageClassifier(CONFIG, 5), folder)
        paths[folder / name] = build
    wholes = {path: path.read_bytes() for path in paths}
    check("config.json, also Hugging Face's, or preprocessor_config.json damaged", (
        *((f"{path} given {content[:30]!r}", load, path, content)
          for path, load in paths.items() for content in JSONS),
        *((what, paths[path], path, content) for path, what, content in mutants(wholes, 400))))


# ---- Images and maps ----

def image_files():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    picture, files = Image.fromarray(pixels), {}
    exif = picture.getexif()
    exif[0x0112] = 6
    modes = {"PNG": "RGBA", "GIF": "P"}
    options = {"JPEG": {"exif": exif}, "TIFF": {"compression": "tiff_lzw"}}
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        file = io.BytesIO()
        picture.convert(modes.get(kind, "RGB")).save(file, kind, **options.get(kind, {}))
        files[f"a.{kind.lower()}"] = file.getvalue()
    return files


def test_damaged_images(tmp_path, check):
    good = tmp_path / "good.png"
    Image.new("RGB", (20, 20)).save(good)

    def load(path):
        views = data.Views(data.Images([path, good]), 16, None)
        assert views[0, 0]["image"].shape == (3, 16, 16)    # its own, or that of the next image
    check("an image damaged", ((what, load, tmp_path / name, content)
                               for name, what, content in mutants(image_files(), 1600)))


def test_damaged_maps(tmp_path, check):
    images, annotations = tmp_path / "images" / "training", tmp_path / "annotations" / "training"
    for folder in (images, annotations):
        folder.mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (32, 24)).save(images / f"{name}.jpg")
        numbers = np.random.default_rng(0).integers(0, 5, (24, 32), dtype=np.uint8)
        Image.fromarray(numbers).save(annotations / f"{name}.png")
    source = data.Segmentation(tmp_path, "training", list("abcd"))
    views = data.Labelled(source, data.segmentation_transform(16, train=True))

    def load(path):
        _, target = views[0, 0]
        assert target.shape == (16, 16) and (target[target != data.IGNORE] < 4).all()
    path = annotations / "a.png"
    check("an annotation damaged", ((what, load, path, content)
                                    for _, what, content in mutants({"a.png": path.read_bytes()}, 300)))
