"""Thousands of damaged and hostile files: each loads, or is refused in one line. None is run."""
import argparse
import dataclasses
import io
import json
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
import training
import vit
import weights

pytestmark = pytest.mark.long
SECONDS = 5
CANARY = "canary"    # the file that a payload would make


# ---- Damage: bytes, bytes of another file, random.Random -> bytes ----

def flip(whole, other, rng):
    hurt = bytearray(whole)
    for _ in range(rng.choice((1, 1, 3, 30))):
        hurt[rng.randrange(len(hurt))] ^= 1 << rng.randrange(8)
    return bytes(hurt)


def flip_head(whole, other, rng):
    return flip(whole[:200], other, rng) + whole[200:]


def truncate(whole, other, rng):
    return whole[:rng.randrange(len(whole))]


def zero(whole, other, rng):
    start = rng.randrange(len(whole))
    stop = min(len(whole), start + rng.choice((4, 64, 4096)))
    return whole[:start] + bytes(stop - start) + whole[stop:]


def splice(whole, other, rng):
    return whole[:rng.randrange(len(whole))] + other[rng.randrange(len(other)):]


def insert(whole, other, rng):
    at = rng.randrange(len(whole))
    return whole[:at] + rng.randbytes(rng.choice((1, 4, 100))) + whole[at:]


DAMAGE = (flip, flip_head, truncate, zero, splice, insert)


def mutants(wholes, count):
    """(file name, what was done, bytes): count damaged copies of files, bytes by name."""
    rng, names = random.Random(0), list(wholes)
    for k in range(count):
        name, how = names[k % len(names)], DAMAGE[k // len(names) % len(DAMAGE)]
        yield name, f"{how.__name__} {k}", how(wholes[name], wholes[rng.choice(names)], rng)


# ---- Pickles that call what weights do not need ----

def text(words):
    return b"X" + len(words.encode()).to_bytes(4, "little") + words.encode()


def call(module, name, *arguments):
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


RUN, PYTHON = text(f"touch {CANARY}"), text(f"open({CANARY!r}, 'w')")
HOSTILE = {
    "os.system": call("os", "system", RUN),
    "posix.system": call("posix", "system", RUN),
    "builtins.exec": call("builtins", "exec", PYTHON),
    "__builtin__.eval": call("__builtin__", "eval", PYTHON),
    "runpy": call("runpy", "_run_code", PYTHON, b"}"),
    "torch.load": call("torch", "load", text("x.pt")),
    "torch.hub": call("torch.hub", "load", text("a/b"), text("c")),
    "getattr": call("builtins", "getattr", b"cos\nsystem\n", text("__call__")),
    "INST": b"(" + RUN + b"ios\nsystem\n",
    "OBJ": b"(cos\nsystem\n" + RUN + b"o",
    "NEWOBJ": b"cos\nsystem\n" + RUN + b"\x85\x81",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93" + RUN + b"\x85R",
    "a change of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("x") + b"Nsb",
    "a change of a class": b"cargparse\nNamespace\n}" + text("__init__") + b"cos\nsystem\nsb",
    "persistent": b"NQ",
    "extension": b"\x82\x01",
    "an empty stack": b"000",
    "no opcode": b"\xfe",
    "a list in itself": b"]q\x01h\x01a",
    "deep tuples": b")" + b"\x85" * 10_000,
}


def torch_zip(pickled, members=()):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"), *members):
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def older(pickled):
    """As torch.save wrote until 1.6."""
    values = (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(value, 2) for value in values) + pickled + pickle.dumps([], 2)


def hostile_files(whole):
    """(what, bytes): HOSTILE alone, in a dict, in a real file's pickle; as zip, older format and pickle."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    rest = [(name, content) for name, content in members.items() if name.startswith("data/")]
    for what, ask in HOSTILE.items():
        for rest_of_pickle in (ask + b".", b"}" + text("model") + ask + b"s.", ask + members["data.pkl"][2:]):
            pickled = b"\x80\x02" + rest_of_pickle
            yield what, torch_zip(pickled, rest)
            yield what, older(pickled)
            yield what, pickled


# ---- Cases, in a forked process, which a file may end ----

def saved(value, zipped=True):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def wrong_outcomes(cases, folder):
    """In a process: write and load each case (what, load, path, bytes). Returns what was wrong, in words."""
    os.chdir(folder)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (int(12e9),) * 2)
    wrong = []
    for what, load, path, content in cases:
        path.write_bytes(content)
        signal.alarm(SECONDS)    # ends the process: nothing catches it
        try:
            load(path)
        except ValueError as error:
            ours = type(error) in (ValueError, training.UserError)
            if not ours or path.name not in str(error) or "\n" in str(error):
                wrong.append(f"{what}: {type(error).__name__}: {str(error)[:300]!r}")
        except BaseException:
            wrong.append(f"{what}: {traceback.format_exc()[-1500:]}")
        signal.alarm(0)
        if Path(CANARY).exists():
            wrong.append(f"{what}: it was run")
            Path(CANARY).unlink()
    return wrong


@pytest.fixture
def check(tmp_path, record_fault):
    """check(fault, cases): run cases (what, load, path, bytes) in a process; fails if any went wrong."""
    def check(fault, cases):
        cases, (reader, writer) = list(cases), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writer, json.dumps(wrong_outcomes(cases, tmp_path)).encode()[:60_000])
            os._exit(0)
        os.close(writer)
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"{fault}: a file ended the process, or took longer than {SECONDS} seconds"
        with open(reader) as file:
            wrong = json.loads(file.read())
        record_fault(fault, len(cases), len(wrong))
        assert not wrong, "\n".join([f"{len(wrong)} of {len(cases)}:", *wrong[:12]])
    return check


# ---- Checkpoints ----

CONFIG = vit.ViTConfig(image_size=16, patch_size=8, dim=8, depth=1, heads=2, layer_scale=0.1)


def ours():
    model, tokens, linear = vit.MaskedImageModel(CONFIG, 16), dvae.DiscreteVAE(8, 8, 2, 1), nn.Linear(8, 8)
    config = {"vit": dataclasses.asdict(CONFIG), "vocab_size": 16}
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    state = {"step": 2, "log_size": 0, "model": linear.state_dict(), "optimizer": optimizer.state_dict()}
    return {
        "model.pt": saved({"model": model.state_dict(), "config": config, "kind": "MaskedImageModel"}),
        "tokenizer.pt": saved({"model": tokens.state_dict(), "config": tokens.config, "kind": "DiscreteVAE"}),
        "last.pt": saved(state)}


def theirs(folder):
    shared = dataclasses.replace(CONFIG, position="shared_relative")
    released = {"model": vit.MaskedImageModel(shared, 16).state_dict(), "args": argparse.Namespace(lr=1e-3)}
    weights.save_timm(vit.ImageClassifier(CONFIG, 5), folder / "timm.bin")
    return {"released.pth": saved(released), "older.pth": saved(released, zipped=False),
            "timm.bin": (folder / "timm.bin").read_bytes()}


def intact(path):
    """As a run takes last.pt: what is not damaged can be loaded."""
    if training.damage(path) is None:
        assert torch.load(path, weights_only=True)["step"] >= 0


LOADERS = {"model.pt": weights.build, "tokenizer.pt": weights.load_tokenizer, "last.pt": intact}


def test_whole_files_load(tmp_path):
    """Else the mutants would show nothing."""
    for name, content in {**ours(), **theirs(tmp_path)}.items():
        (tmp_path / name).write_bytes(content)
        LOADERS.get(name, weights.build)(tmp_path / name)
    assert training.damage(tmp_path / "last.pt") is None


def test_our_checkpoints(tmp_path, check):
    check("model.pt, tokenizer or last.pt damaged", (
        (f"{name} {what}", LOADERS[name], tmp_path / name, content)
        for name, what, content in mutants(ours(), 600)))


def test_dall_es_pickles(tmp_path, check):
    dall_e = pytest.importorskip("dall_e")
    encoder = dall_e.Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512)
    for name, weight in dvae.DiscreteVAE(8, 8, 4, 1).encoder.state_dict().items():
        encoder.get_parameter(name).data = weight    # as small as DALL-E's own classes refuse to be
    wholes = {"encoder.pkl": saved(encoder), "older.pkl": saved(encoder, zipped=False)}
    check("encoder.pkl damaged", (
        (f"{name} {what}", weights.load_dalle, tmp_path / name, content)
        for name, what, content in mutants(wholes, 100)))


def test_files_of_others(tmp_path, check):
    check("released BEiT or timm weights damaged", (
        (f"{name} {what}", weights.build, tmp_path / name, content)
        for name, what, content in mutants(theirs(tmp_path), 400)))


def test_hostile_pickles(tmp_path, check):
    loaders = (weights.read, weights.load, weights.load_tokenizer, weights.load_dalle, intact)
    check("a pickle that calls something", (
        (what, loaders[k % len(loaders)], tmp_path / name, content)
        for name, whole in ours().items() for k, (what, content) in enumerate(hostile_files(whole))))


# ---- Text ----

JSONS = (b"", b"null", b"[]", b"3", b"{", b"{}", b"NaN", b"\xff\xfe{", b"[" * 100_000, bytes(100),
         b'{"num_attention_heads": "x"}', b'{"num_attention_heads": 0}', b'{"num_attention_heads": [2]}',
         b'{"image_mean": 5}', b'{"image_mean": ["a", "b", "c"]}', b'{"image_std": [0, 0, 0]}')


def texts(whole, count):
    yield from ((f"given {content[:30]!r}", content) for content in JSONS)
    yield from ((what, content) for _, what, content in mutants({"text": whole}, count))


def test_config_of_a_run(tmp_path, check):
    out = tmp_path / "run"
    config = training.build(training.RunConfig, {"batch_size": 8, "steps": 4, "out": str(out)})
    training.Run(config, torch.device("cpu"), 4)
    whole = (out / "config.json").read_bytes()

    def load(path):
        try:
            training.Run(config, torch.device("cpu"), 4)
        except training.UserError as error:    # it names the folder or the file
            raise ValueError(f"{path.name}: {error}") from None
    check("config.json of a run", (
        (what, load, out / "config.json", content) for what, content in texts(whole, 200)))


def test_json_of_hugging_face(tmp_path, check):
    weights.save_huggingface(vit.ImageClassifier(CONFIG, 5), tmp_path / "hf")
    file = next(path for path in (tmp_path / "hf").iterdir() if path.suffix in (".bin", ".safetensors"))

    def load(path):
        try:
            weights.build(file)
        except ValueError as error:    # it names the file beside it
            raise ValueError(f"{path.name}: {error}") from None
        finally:
            path.write_bytes(wholes[path.name])
    names = ("config.json", "preprocessor_config.json")
    wholes = {name: (tmp_path / "hf" / name).read_bytes() for name in names}
    check("config.json and preprocessor_config.json of Hugging Face", (
        (f"{name} {what}", load, tmp_path / "hf" / name, content)
        for name, whole in wholes.items() for what, content in texts(whole, 100)))


# ---- Images and maps ----

def image_files():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    picture, files = Image.fromarray(pixels), {}
    exif = picture.getexif()
    exif[0x0112] = 6
    for kind, image, options in (
            ("JPEG", picture, dict(exif=exif)), ("PNG", picture.convert("RGBA"), {}),
            ("GIF", picture.convert("P"), {}), ("TIFF", picture, dict(compression="tiff_lzw")),
            ("WEBP", picture, {}), ("BMP", picture, {}), ("PPM", picture, {})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        files[f"a.{kind.lower()}"] = file.getvalue()
    return files


def test_images(tmp_path, check):
    good = tmp_path / "good.png"
    Image.new("RGB", (20, 20)).save(good)

    def load(path):
        views = data.Views(data.Images([path, good]), 16, None)
        assert views[0, 0][0].shape == (3, 16, 16)    # its own, or that of the next image
    check("an image damaged", (
        (f"{name} {what}", load, tmp_path / name, content)
        for name, what, content in mutants(image_files(), 800)))


def test_maps(tmp_path, check):
    for part in ("images", "annotations"):
        (tmp_path / part / "training").mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (32, 24)).save(tmp_path / "images" / "training" / f"{name}.jpg")
        numbers = np.random.default_rng(0).integers(0, 5, (24, 32), dtype=np.uint8)
        Image.fromarray(numbers).save(tmp_path / "annotations" / "training" / f"{name}.png")
    path = tmp_path / "annotations" / "training" / "a.png"
    source = data.Segmentation(tmp_path, "training", list("abcd"))
    views = data.Labelled(source, data.segmentation_transform(16, train=True))

    def load(_):
        _, target = views[0, 0]
        assert target.shape == (16, 16) and (target[target != data.IGNORE] < 4).all()
    check("an annotation damaged", (
        (f"{name} {what}", load, path, content)
        for name, what, content in mutants({"a.png": path.read_bytes()}, 300)))
