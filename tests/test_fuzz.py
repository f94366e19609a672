"""A few thousand damaged and hostile files: each loads, or is refused in one line that names it. Nothing in one is run, none
takes more than five seconds or 1.5 GB.

Cases run in forked children, some hundred each; a child that dies, hangs or grows is a failure of the case that it was at.
"""
import argparse
import dataclasses
import io
import json
import os
import pickle
import random
import resource
import signal
import sys
import traceback
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import checkpoints
import data
import dvae
import training
import vit
import weights

pytestmark = pytest.mark.long

SECONDS, MEMORY = 5, 1.5e9
CANARY = "canary"    # what a payload would write, into the folder in which the child works


# Damage: bytes, bytes of another file, a seeded random.Random -> bytes -------------------------------------------------

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


def duplicate(whole, other, rng):
    start, stop = sorted(rng.randrange(len(whole)) for _ in range(2))
    return whole[:stop] + whole[start:]


def splice(whole, other, rng):
    return whole[:rng.randrange(len(whole))] + other[rng.randrange(len(other)):]


def insert(whole, other, rng):
    at = rng.randrange(len(whole))
    return whole[:at] + rng.randbytes(rng.choice((1, 4, 100))) + whole[at:]


DAMAGE = (flip, flip_head, truncate, zero, duplicate, splice, insert)


# Pickles that ask for more than weights need ---------------------------------------------------------------------------

def number(n):
    return b"\x8a\x08" + n.to_bytes(8, "little", signed=True)


def call(module, name, *arguments):
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def text(words):
    return b"X" + len(words.encode()).to_bytes(4, "little") + words.encode()


RUN = f"touch {CANARY}"
PYTHON = f"open({CANARY!r}, 'w')"
HOSTILE = {
    "os.system": call("os", "system", text(RUN)), "posix.system": call("posix", "system", text(RUN)),
    "builtins.exec": call("builtins", "exec", text(PYTHON)), "__builtin__.eval": call("__builtin__", "eval", text(PYTHON)),
    "subprocess": call("subprocess", "check_output", text(f"touch\0{CANARY}")), "runpy": call("runpy", "_run_code", text(PYTHON), b"}"),
    "torch.load": call("torch", "load", text("x.pt")), "hub": call("torch.hub", "load", text("a/b"), text("c")),
    "numpy": call("numpy", "zeros", number(10 ** 11)), "torch.zeros": call("torch", "zeros", number(10 ** 12)),
    "torch.Tensor": call("torch", "Tensor", number(10 ** 10)), "storage": call("torch", "FloatStorage", number(10 ** 10)),
    "bytes": call("builtins", "bytes", number(10 ** 10)), "bytearray": call("builtins", "bytearray", number(4 * 10 ** 9)),
    "range": call("builtins", "list", call("builtins", "range", number(10 ** 10))),
    "a huge string": b"B" + (2 ** 31 - 1).to_bytes(4, "little") + b"abc", "a huge string of 8 bytes": b"\x8e" + number(10 ** 10)[2:] + b"abc",
    "a huge bytearray": b"\x96" + number(4 * 10 ** 9)[2:] + b"abc", "a huge frame": b"\x95" + number(10 ** 10)[2:] + b"N",
    "a huge memo": b"Nr" + (3 * 10 ** 8).to_bytes(4, "little"), "deep tuples": b")" + b"\x85" * 300_000, "deep lists": b"(" * 200_000 + b"l" * 200_000,
    "a deep key": b"})" + b"\x85" * 300_000 + b"Ns", "a wide key": b"})" + b"2\x86" * 40 + b"Ns", "a wide key of DICT": b"()" + b"2\x86" * 40 + b"Nd",
    "keys of SETITEMS": b"}()" + b"2\x86" * 40 + b"Nu", "a wide set": call("builtins", "set", b"](" + b")" + b"2\x86" * 40 + b"e"),
    "a wide frozenset": b"()" + b"2\x86" * 40 + b"\x91", "ADDITEMS": b"\x8f()" + b"2\x86" * 40 + b"\x90",
    "a wide key of OrderedDict": call("collections", "OrderedDict", b"](" + b")" + b"2\x86" * 40 + b"N\x86e"),
    "a list in itself": b"]q\x01h\x01a", "a dict in itself": b"}q\x01X\x05\0\0\0modelh\x01s", "a long number": b"\x8b" + (10 ** 6).to_bytes(4, "little") + b"\xff" * 10 ** 6,
    "a decimal number": b"L" + b"9" * 100_000 + b"L\n", "instance": b"(" + text(RUN) + b"ios\nsystem\n", "stack global": text("os") + text("system") + b"\x93" + text(RUN) + b"\x85R",
    "object": b"(cos\nsystem\n" + text(RUN) + b"o", "newobj": b"cos\nsystem\n" + text(RUN) + b"\x85\x81", "a change": b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("x") + b"Nsb",
    "getattr": call("builtins", "getattr", b"cos\nsystem\n", text("__call__")), "extension": b"\x82\x01", "persistent": b"NQ", "nothing on the stack": b"000", "no opcode": b"\xfe"}


def torch_zip(pickled, members=(), compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"), *members):
            archive.writestr("archive/" + name, content)
    return file.getvalue()


def legacy(pickled):
    return weights.LEGACY_MAGIC + b"." + b"\x80\x02M\xe9\x03." + pickle.dumps({"little_endian": True}, 2) + pickled + pickle.dumps([], 2)


def members_of(whole):
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


def hostile_files(whole):
    """(what, bytes): each of HOSTILE as a whole pickle and inside the one of a real file, in a zip, the older format, and alone."""
    members = members_of(whole)
    rest = [(name, content) for name, content in members.items() if name.startswith("data/")]
    for what, ask in HOSTILE.items():
        for pickled in (b"\x80\x02" + ask + b".", b"\x80\x02}" + text("model") + ask + b"s.", b"\x80\x02" + ask + members["data.pkl"][2:]):
            yield what, torch_zip(pickled, rest)
            yield what, legacy(pickled)
            yield what, pickled
    for k in range(0, len(members["data.pkl"]) - 2, max(1, len(members["data.pkl"]) // 40)):
        yield "os.system in the middle", torch_zip(members["data.pkl"][:k + 2] + HOSTILE["os.system"] + members["data.pkl"][k + 2:], rest)


def tensor(numbers, size, stride, offset=0, key="0"):
    """The pickle of a float tensor over a storage that is said to have so many numbers."""
    def ints(values):
        return b"(" + b"".join(number(value) for value in values) + b"t"
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numbers) + b"tQ"
    return call("torch._utils", "_rebuild_tensor_v2", storage, number(offset), ints(size), ints(stride), b"\x89", call("collections", "OrderedDict"))


def bombs():
    """(what, bytes): archives that unpack to gigabytes, tensors beyond their storage, sizes that only a config names."""
    names = list(vit.MaskedImageModel(vit.ViTConfig(image_size=16, patch_size=8, dim=8, depth=1, heads=1), 4).state_dict())
    for numbers, size, stride, offset in ((4, [10 ** 9], [1], 0), (10 ** 9, [10 ** 9], [1], 0), (4, [10 ** 10], [0], 0), (4, [2 ** 40, 2 ** 40], [0, 0], 0), (4, [4], [10 ** 9], 0),
                                          (4, [4], [1], 10 ** 9), (4, [4], [-1], 3), (4, [-4], [1], 0), (4, [4], [1], -8), (4, [2, 2, 2], [1, 1, 1], 0), (4, [0, 10 ** 12], [1, 1], 0),
                                          (-4, [4], [1], 0), (2 ** 62, [4], [1], 0), (4, [4], [1, 1], 0)):
        ask = tensor(numbers, size, stride, offset)
        yield "a tensor beyond its storage", torch_zip(b"\x80\x02" + ask + b".", [("data/0", bytes(16))])
        yield "a tensor beyond its storage", torch_zip(b"\x80\x02}" + text("model") + b"}(" + b"".join(text(n) + ask for n in names) + b"us.", [("data/0", bytes(16))])
    zeros = bytes(2 ** 30)
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        bomb = torch_zip(b"\x80\x02" + tensor(2 ** 28, [2 ** 28], [1]) + b".", [("data/0", zeros)], compression)
        yield "an archive that unpacks to a gigabyte", bomb
        yield "one that claims more", bomb.replace((2 ** 30).to_bytes(4, "little"), (2 ** 32 - 2).to_bytes(4, "little"))
    small = torch_zip(b"\x80\x02" + tensor(4, [4], [1]) + b".", [("data/0", bytes(16))])
    yield "one that claims more", small.replace((16).to_bytes(4, "little") * 2, (2 ** 32 - 2).to_bytes(4, "little") * 2)
    pixels = dict(image_size=16, patch_size=8, dim=8, depth=1, heads=1)
    state = vit.MaskedImageModel(vit.ViTConfig(**pixels), 4).state_dict()
    tokens = dvae.DiscreteVAE(8, 8, 2, 1)
    for change in (dict(depth=10 ** 9), dict(dim=10 ** 9), dict(image_size=(8 * 10 ** 6,) * 2), dict(patch_size=0), dict(heads=1.5), dict(mlp_ratio=1e300), dict(mlp_ratio="x"), dict(dim=None), dict(position="relative"),
                   dict(pixel_mean="abc"), dict(pixel_std=(0.0, 1.0, 1.0)), dict(pixel_std=[1e400] * 3), dict(pixel_mean=()), dict(x=1), dict(in_channels=10 ** 12), dict(image_size=[]), dict(drop_path=2)):
        yield "a config of another model", saved({"model": state, "config": {"vit": {**pixels, **change}}, "kind": "MaskedImageModel"})
    for change in (dict(vocab_size=10 ** 9), dict(hidden=10 ** 7), dict(groups=10 ** 9), dict(groups=60), dict(blocks_per_group=10 ** 9), dict(vocab_size="x"), dict(in_channels=-1), dict(y=1), dict(hidden=2.5)):
        yield "a config of another tokenizer", saved({"model": tokens.state_dict(), "config": {**tokens.config, **change}, "kind": "DiscreteVAE"})
    for value in ({"model": None}, {"model": {}}, {"model": {1: torch.ones(2)}, "config": {}, "kind": "DiscreteVAE"}, {"model": {"patch_embed": 1}}, {"model": state, "config": 3, "kind": "x"}, {"model": state, "config": {"vit": 3}, "kind": "x"},
                  {"model": {**state, 5: torch.ones(1)}}, {"model": {**state, "lm_head.weight": torch.tensor(1.0)}}, {"model": {**state, "head.weight": torch.empty(10 ** 10, 0)}}, {"model": {**state, "lm_head.weight": torch.ones(9, 9)}}, {"kind": "DiscreteVAE"},
                  {"model": state, "config": {"vit": pixels, "classes": 7}, "kind": "ImageClassifier"}, {"model": {**state, "patch_embed.proj.weight": torch.ones(8)}}, {"model": {**state, "patch_embed.proj.weight": torch.ones(8, 3, 0, 0)}}):
        yield "a value of another kind", saved(value)


# Cases in children -----------------------------------------------------------------------------------------------------

def saved(value, zipped=True):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def outcome(load, path):
    """None, or what was wrong with the way in which the loader took the file."""
    try:
        load(path)
    except (ValueError, training.UserError) as error:
        message = str(error)
        named = path.name in message or message.startswith(f"--out: {path.parent} ")
        if type(error) not in (ValueError, training.UserError) or not named or "\n" in message or len(message) > 2000:
            return f"{type(error).__name__}: {message[:300]!r}"
    except BaseException:
        return traceback.format_exc()[-1500:]
    return None


def in_children(folder, cases, batch=250):
    """[(case's name, what was wrong)] of cases (name, load, path, bytes or None: a file that is there), run in forked children."""
    folder.mkdir(exist_ok=True)
    cases, wrong, at = list(cases), [], 0
    progress = folder / "progress"
    while at < len(cases):
        stop = min(at + batch, len(cases))
        pid = os.fork()
        if pid == 0:
            try:
                os.chdir(folder)
                torch.set_num_threads(1)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1), os.dup2(nowhere, 2)
                start = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (int(start + 6e9),) * 2)                  # a net below the bound on what is used
                used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                for index in range(at, stop):
                    name, load, path, content = cases[index]
                    if content is not None:
                        path.write_bytes(content)
                    progress.write_text(str(index))
                    signal.alarm(SECONDS)                                                        # kills: nothing catches it
                    problem = outcome(load, path)
                    signal.alarm(0)
                    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    if (peak - used) * 1024 > MEMORY:
                        problem, used = f"took {(peak - used) / 2 ** 20:.1f} GB", peak
                    if Path(CANARY).exists():
                        problem = "it was run"
                        Path(CANARY).unlink()
                    if problem:
                        with open("wrong", "a") as file:
                            file.write(json.dumps([name, problem]) + "\n")
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        if status:                                      # killed: the rest goes to the next child
            at = int(progress.read_text())
            wrong.append((cases[at][0], f"ended the process: {status} ({'over five seconds' if status == signal.SIGALRM else 'signal or exit'})"))
            at += 1
        else:
            at = stop
    if (folder / "wrong").exists():
        wrong += [tuple(json.loads(line)) for line in (folder / "wrong").read_text().splitlines()]
    return wrong


def check(record_fault, fault, folder, cases):
    cases = list(cases)
    wrong = in_children(folder, cases)
    record_fault(fault, len(cases), len(wrong))
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(f"{name}: {problem}" for name, problem in wrong[:12])


def mutants(wholes, count, seed, kinds=DAMAGE):
    """(which and how, bytes): count damaged copies of files, bytes by name."""
    rng, names = random.Random(seed), list(wholes)
    for k in range(count):
        name, how = names[k % len(names)], kinds[k // len(names) % len(kinds)]
        yield f"{name} {how.__name__} {k}", how(wholes[name], wholes[rng.choice(names)], rng)


# Checkpoints -----------------------------------------------------------------------------------------------------------

CONFIG = vit.ViTConfig(image_size=16, patch_size=8, dim=8, depth=1, heads=2, layer_scale=0.1)


def train_state():
    model = nn.Linear(8, 8)
    optimizer = training.adamw([{"params": list(model.parameters()), "weight_decay": 0.1}])
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return {"step": 2, "notes": {"unreadable": [[], 0, 0]}, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}}


def ours():
    model, tokens = vit.MaskedImageModel(CONFIG, 16), dvae.DiscreteVAE(8, 8, 2, 1)
    return {"model.pt": saved({"model": model.state_dict(), "config": {"vit": dataclasses.asdict(CONFIG), "vocab_size": 16}, "kind": "MaskedImageModel"}),
            "tokenizer.pt": saved({"model": tokens.state_dict(), "config": tokens.config, "kind": "DiscreteVAE"}), "last.pt": saved(train_state())}


def theirs(folder):
    released = {"model": vit.MaskedImageModel(dataclasses.replace(CONFIG, position="shared_relative"), 16).state_dict(), "args": argparse.Namespace(lr=1e-3, model="beit"), "epoch": 7}
    classifier = vit.ImageClassifier(dataclasses.replace(CONFIG, position="relative"), 5)
    weights.save_huggingface(classifier, folder / "hf")
    weights.save_timm(classifier, folder / "timm.bin")
    files = {"released.pth": saved(released), "older.pth": saved(released, zipped=False), "timm.bin": (folder / "timm.bin").read_bytes()}
    return {**files, **{f"hf{path.suffix}": path.read_bytes() for path in (folder / "hf").iterdir() if path.suffix in (".bin", ".safetensors")}}


def dall_e_pickles():
    """encoder.pkl as DALL-E's classes pickle, from classes of the same names."""
    modules = {name: types.ModuleType(name) for name in ("dall_e", "dall_e.encoder", "dall_e.utils")}
    Encoder = type("Encoder", (nn.Module,), {"__module__": "dall_e.encoder"})
    EncoderBlock = type("EncoderBlock", (nn.Module,), {"__module__": "dall_e.encoder"})
    Conv2d = type("Conv2d", (nn.Module,), {"__module__": "dall_e.utils"})
    modules["dall_e.encoder"].Encoder, modules["dall_e.encoder"].EncoderBlock, modules["dall_e.utils"].Conv2d = Encoder, EncoderBlock, Conv2d
    kept = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        root = Encoder()
        for name, value in dvae.DiscreteVAE(8, 8, 2, 1).encoder.state_dict().items():
            module, *path = root, *name.split(".")
            for part in path[:-1]:
                if part not in module._modules:
                    module.add_module(part, Conv2d() if part == path[-2] else EncoderBlock())
                module = module._modules[part]
            module.register_parameter(path[-1], nn.Parameter(value))
        return {"encoder.pkl": saved(root), "encoder-older.pkl": saved(root, zipped=False)}
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def read_ours(path):
    return checkpoints.read_checkpoint(path, "--init")


def newest(path):
    """As Run.restore takes last.pt: what is not damaged can be loaded."""
    wrong = checkpoints.damage(path)
    assert wrong is None or ("\n" not in wrong and wrong)
    if not wrong:
        read_ours(path)


LOADERS = (weights.read, weights.load, weights.load_tokenizer, weights.load_dalle, read_ours, checkpoints.read_tensors, newest)


def test_the_whole_files_load(tmp_path):
    """Else the mutants would show nothing."""
    files = {**ours(), **theirs(tmp_path), **dall_e_pickles()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        weights.read(tmp_path / name)
    for name in ("released.pth", "older.pth", "timm.bin", "model.pt"):
        weights.build(tmp_path / name)
    for name in ("encoder.pkl", "encoder-older.pkl", "tokenizer.pt"):
        weights.load_tokenizer(tmp_path / name)
    assert checkpoints.damage(tmp_path / "last.pt") is None and read_ours(tmp_path / "last.pt")["step"] == 2


def test_our_checkpoints(tmp_path, record_fault):
    by_name = {"model.pt": weights.build, "tokenizer.pt": weights.load_tokenizer, "last.pt": newest}
    check(record_fault, "model.pt, tokenizer or last.pt damaged", tmp_path / "x", (
        (name, load, tmp_path / name.split()[0], content) for name, content in mutants(ours(), 700, 1)
        for load in ((by_name[name.split()[0]], read_ours) if int(name.split()[-1]) % 2 else (by_name[name.split()[0]],))))


def test_dall_es_pickles(tmp_path, record_fault):
    check(record_fault, "encoder.pkl damaged", tmp_path / "x", (
        (name, weights.load_dalle if k % 2 else weights.read, tmp_path / name.split()[0], content) for k, (name, content) in enumerate(mutants(dall_e_pickles(), 500, 2))))


def test_files_of_others(tmp_path, record_fault):
    check(record_fault, "released BEiT, timm or Hugging Face weights damaged", tmp_path / "x", (
        (name, weights.build, tmp_path / name.split()[0], content) for name, content in mutants(theirs(tmp_path), 800, 3)))


def test_hostile_pickles(tmp_path, record_fault):
    def cases():
        for name, whole in ours().items():
            for k, (what, content) in enumerate(hostile_files(whole)):
                yield what, LOADERS[k % len(LOADERS)], tmp_path / name, content
    check(record_fault, "a pickle that calls, nests or claims", tmp_path / "x", cases())


def test_bombs(tmp_path, record_fault):
    check(record_fault, "an archive, a tensor or a config that claims gigabytes", tmp_path / "x", (
        (what, load, tmp_path / "bomb.pt", content) for what, content in bombs()
        for load in (weights.build, weights.load_tokenizer, read_ours, newest)))


# Text --------------------------------------------------------------------------------------------------------------------

JSONS = (b"", b"null", b"[]", b"3", b'"x"', b"{", b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b'{"step": null}', b'{"step": []}', b'{"step": "x"}', b'{"step": 1e999}', b"NaN", b"{}",
         b'{"num_attention_heads": "x"}', b'{"num_attention_heads": 0}', b'{"num_attention_heads": 3.5}', b'{"num_attention_heads": [2]}', b'{"num_attention_heads": 1e999}', b'{"image_mean": 5, "image_std": 5}',
         b'{"image_mean": ["a", "b", "c"]}', b'{"image_std": [0, 0, 0]}', b'{"image_mean": [NaN, 1, 1]}', b'{"image_std": null}', b'{"image_mean": [1, 2]}', b"\0" * 100, b"\xef\xbb\xbf{}", b'{"\\ud800": 1}')


def text_cases(whole, count, seed):
    yield from ((f"given {content[:30]!r}", content) for content in JSONS)
    yield from mutants({"text": whole}, count, seed)


def test_the_json_of_a_run(tmp_path, record_fault):
    config = training.build(training.RunConfig, {"batch_size": 8, "steps": 4, "out": str(tmp_path / "run")})
    training.Run(config, torch.device("cpu"), 4).save(2, model=nn.Linear(1, 1))
    training._in_use.clear()
    whole = (tmp_path / "run" / "config.json").read_bytes()

    def open_config(path):
        (path.parent / "metrics.jsonl").unlink(missing_ok=True)
        training.Run(config, torch.device("cpu"), 4)

    def open_log(path):
        (path.parent / "config.json").write_bytes(whole)
        training.Run(config, torch.device("cpu"), 4).restore(model=nn.Linear(1, 1))
        for line in path.read_text().splitlines():
            assert json.loads(line)["step"] <= 2
    log = b"".join(json.dumps({"step": k, "loss": 1.5 / k}).encode() + b"\n" for k in range(1, 5))
    check(record_fault, "config.json of a run", tmp_path / "x", ((f"config {name}", open_config, tmp_path / "run" / "config.json", content) for name, content in text_cases(whole, 300, 4)))
    check(record_fault, "metrics.jsonl of a run", tmp_path / "y", ((f"log {name}", open_log, tmp_path / "run" / "metrics.jsonl", content) for name, content in text_cases(log, 300, 5)))


def test_the_json_beside_hugging_face_weights(tmp_path, record_fault):
    weights.save_huggingface(vit.ImageClassifier(CONFIG, 5), tmp_path / "hf")
    file = next(path for path in (tmp_path / "hf").iterdir() if path.suffix in (".bin", ".safetensors"))
    for k, name in enumerate(("config.json", "preprocessor_config.json")):
        beside = tmp_path / "hf" / name
        whole = beside.read_bytes()
        def cases():
            for what, content in text_cases(whole, 150, 6 + k):
                yield what, lambda path, content=content: (beside.write_bytes(content), weights.build(path)), file, None
        check(record_fault, f"{name} of Hugging Face", tmp_path / f"x{k}", cases())
        beside.write_bytes(whole)


def test_the_table_of_classes(tmp_path, record_fault):
    whole = b"Idx\tRatio\tName\n" + b"".join(b"%d\t0.1\tname, other %d\n" % (k, k) for k in range(150))
    check(record_fault, "objectInfo150.txt", tmp_path / "x", (
        (name, lambda path: data.segmentation_classes(path.parent), tmp_path / "objectInfo150.txt", content) for name, content in text_cases(whole, 200, 8)))


# Images ------------------------------------------------------------------------------------------------------------------

def image_files():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    exif, files = picture.getexif(), {}
    exif[0x0112] = 6
    for kind, image, more in (("JPEG", picture, dict(exif=exif)), ("PNG", picture.convert("RGBA"), {}), ("GIF", picture.convert("P"), {}), ("TIFF", picture, dict(compression="tiff_lzw")),
                              ("WEBP", picture, {}), ("BMP", picture, {}), ("PPM", picture, {})):
        file = io.BytesIO()
        image.save(file, kind, **more)
        files[f"a.{kind.lower()}"] = file.getvalue()
    return files


def huge_images():
    """(name, bytes): headers that claim 60,000 x 60,000 pixels, or as many as are not refused by size alone."""
    for name, whole in image_files().items():
        for at in range(4, min(len(whole) - 4, 260)):
            for old, new in (((32).to_bytes(2, "big"), (60_000).to_bytes(2, "big")), ((32).to_bytes(2, "little"), (60_000).to_bytes(2, "little"))):
                if whole[at:at + 2] == old:
                    yield f"{name} claims 60,000 at {at}", whole[:at] + new + whole[at + 2:]
    for side in (9_000, 60_000):
        png = bytearray(image_files()["a.png"])
        png[16:24] = side.to_bytes(4, "big") * 2
        png[29:33] = zlib.crc32(bytes(png[12:29])).to_bytes(4, "big")
        yield f"a.png of {side}", bytes(png)


def test_images(tmp_path, record_fault):
    def pretraining(path):
        view, *_, unreadable = data.Views(data.Folder([path]), [16], (4, 4))[0, 0]
        assert view.shape == (3, 16, 16) and set(unreadable) <= {str(path)}

    def labelled(path):
        image, _, unreadable = data.Labelled(Source([path]), data.classification_transform(16, train=True))[0, 0]
        assert image.shape == (3, 16, 16) and set(unreadable) <= {str(path)}

    class Source(data.Folder):
        def target(self, index):
            return 0
    check(record_fault, "an image damaged", tmp_path / "x", (
        (name, labelled if k % 3 == 0 else pretraining, tmp_path / name.split()[0], content)
        for k, (name, content) in enumerate([*mutants(image_files(), 1000, 9), *huge_images()])))


def test_maps(tmp_path, record_fault):
    for part in ("images", "annotations"):
        (tmp_path / part / "training").mkdir(parents=True)
    Image.new("RGB", (32, 24)).save(tmp_path / "images" / "training" / "a.jpg")
    annotation = tmp_path / "annotations" / "training" / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 5, (24, 32), dtype=np.uint8)).save(annotation)
    views = data.Labelled(data.SegmentationFolder(tmp_path, "training", list("abcd")), data.segmentation_transform(16, train=True))

    def load(path):
        _, target, unreadable = views[0, 0]
        assert target.shape == (16, 16) and (target[target != data.IGNORE] < 4).all()
        assert all(name.partition("\t")[0] in (str(path), views.source.name(0)) for name in unreadable)
    files = {"a.png": annotation.read_bytes(), **{name: content for name, content in image_files().items() if name in ("a.gif", "a.tiff")}}
    check(record_fault, "an annotation damaged", tmp_path / "x", ((name, load, annotation, content) for name, content in mutants(files, 400, 10)))
