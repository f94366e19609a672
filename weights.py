"""Checkpoints: DALL-E's public tokenizer, the released BEiT's and our own, and how they enter a model.

A checkpoint is a pickle, and unpickling runs whatever the file asks for. `read` lets a file ask for tensors, containers and
inert stand-ins of the classes in STAND_INS, by name, and for nothing else.
"""
import collections
import math
import pickle
import re
import types
import warnings
import zipfile
from pathlib import Path

import torch

import dvae
import vit
from training import UserError, say

LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")    # how torch.save began until 1.6


# ---------------------------------------------------------------------------------------------------------------------
# Reading a file without running it
# ---------------------------------------------------------------------------------------------------------------------

class Refused(pickle.UnpicklingError):
    """A file asks for something that weights do not need."""


class _Inert(type):
    """A class that a pickle can instantiate and fill, and not change."""

    def __setattr__(cls, name, value):
        raise Refused(f"a change of {cls.__name__}")


class StandIn(metaclass=_Inert):
    """In place of an object of a known class: its attributes, none of its code."""

    def __setstate__(self, state):
        self.__dict__.update(state)


def stand_in(name):
    return _Inert(name.rpartition(".")[2], (StandIn,), {})


class _Function:
    """A function that a pickle can call, and not change."""
    __slots__ = ()


def _only_call(function):
    return type(function.__name__, (_Function,), {"__slots__": (), "__call__": staticmethod(function)})()


STAND_INS = {name: stand_in(name) for name in (
    "dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d", "torch.nn.modules.container.Sequential", "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.pooling.MaxPool2d", "argparse.Namespace", "torch.nn.modules.linear.Identity", "torch.nn.modules.upsampling.Upsample")}
ADMITTED = {**STAND_INS, "collections.OrderedDict": collections.OrderedDict, "builtins.set": set, "torch.device": torch.device,
            "torch._utils._rebuild_tensor": _only_call(torch._utils._rebuild_tensor),
            "torch._utils._rebuild_tensor_v2": _only_call(torch._utils._rebuild_tensor_v2),
            "torch._utils._rebuild_parameter": _only_call(torch._utils._rebuild_parameter)}


class RestrictedUnpickler(pickle.Unpickler):
    """Finds what is ADMITTED; torch.load adds the storages and reads their bytes."""

    def find_class(self, module, name):
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full_name not in ADMITTED:
            raise Refused(full_name)
        return ADMITTED[full_name]


_restricted = types.SimpleNamespace(__name__="pickle", Unpickler=RestrictedUnpickler,
                                    load=lambda file, **options: RestrictedUnpickler(file, **options).load())


def read(path):
    """What torch.save wrote into the file, in its zip or its older format, tensors on the CPU and classes as stand-ins.

    Nothing in the file is executed. ValueError says in one line what was found where that is something else.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    size, damaged = path.stat().st_size, f"{path} is cut off or damaged ({path.stat().st_size:,} bytes); fetch it again"
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page ({size:,} bytes), not weights: the download went to the wrong address")
    is_zip = head.startswith(b"PK\x03\x04")
    if is_zip:
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.rpartition("/")[2] for name in archive.namelist()}
        except zipfile.BadZipFile:
            raise ValueError(damaged) from None
        if "data.pkl" not in names or "constants.pkl" in names:
            raise ValueError(f"{path} is a zip archive, but not one of torch.save with weights")
    elif not head.startswith(b"\x80"):
        raise ValueError(f"{path} is not a file of torch.save: it begins with {head[:16]!r}")
    try:
        if is_zip or head.startswith(LEGACY_MAGIC):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")         # the older format compares the sources of classes: stand-ins have none
                return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_restricted)
        with open(path, "rb") as file:
            RestrictedUnpickler(file).load()
    except Refused as error:
        raise ValueError(f"{path} asks for {error}, which weights do not need; nothing of it was run") from None
    except Exception:                                   # a broken pickle can raise anything
        raise ValueError(damaged) from None
    raise ValueError(f"{path} is a pickle, but not one of torch.save")


def kind_of(found):
    """In words, what `read` found."""
    name = found["kind"] if isinstance(found, dict) and isinstance(found.get("kind"), str) else type(found).__name__
    if isinstance(found, dict) and found and all(isinstance(value, torch.Tensor) for value in found.values()):
        return f"a state_dict of {len(found)} tensors, {next(iter(found))} first"
    if name == "dict":
        return f"a dict of {', '.join(map(str, list(found)[:5])) or 'nothing'}"
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


# ---------------------------------------------------------------------------------------------------------------------
# DALL-E's tokenizer
# ---------------------------------------------------------------------------------------------------------------------

def load_dalle(encoder, decoder=None):
    """DiscreteVAE with the weights of DALL-E's public encoder.pkl and decoder.pkl, in evaluation mode.

    Both are whole modules, pickled; width, depth, channels and vocabulary are read off their tensors. Without a decoder the
    model tokenizes, and .decoder is None. ValueError names the file and says what it holds instead.
    """
    weights = _pickled_module(encoder, "Encoder")
    sizes = dict(vocab_size=len(weights["blocks.output.conv.w"]), hidden=len(weights["blocks.input.w"]),
                 groups=len({name.split(".")[1] for name in weights if name.startswith("blocks.group_")}),
                 blocks_per_group=len({name.split(".")[2] for name in weights if name.startswith("blocks.group_1.block_")}),
                 in_channels=weights["blocks.input.w"].shape[1])
    with torch.device("meta"):
        model = dvae.DiscreteVAE(**sizes)
    _fill(model.encoder, weights, encoder)
    if decoder is None:
        model.decoder = None
    else:
        _fill(model.decoder, _pickled_module(decoder, "Decoder"), decoder)
    return model.eval().requires_grad_(False)


def _pickled_module(path, expected):
    """The tensors of a pickled DALL-E module by name, (name -> fp32)."""
    found = read(path)
    if not isinstance(found, STAND_INS[f"dall_e.{expected.lower()}.{expected}"]):
        raise ValueError(f"{path} holds {kind_of(found)}, not the pickled {expected} of DALL-E's public {expected.lower()}.pkl")
    tensors = {}

    def collect(module, prefix):
        for name, tensor in module.__dict__.get("_parameters", {}).items():
            tensors[prefix + name] = tensor.detach().float()
        for name, child in module.__dict__.get("_modules", {}).items():
            collect(child, f"{prefix}{name}.")
    try:
        collect(found, "")
        for name in ("blocks.input.w", "blocks.output.conv.w"):
            tensors[name]
    except (KeyError, AttributeError, TypeError):
        raise ValueError(f"{path} holds a {expected} without the expected weights, such as blocks.input.w") from None
    return tensors


def _fill(part, weights, path):
    try:
        part.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n", 1)[-1].split())[:200]
        raise ValueError(f"{path} does not fit DALL-E's architecture: {reason}") from None


def load_tokenizer(path, flag="--tokenizer"):
    """The DiscreteVAE in a model.pt of ours, or in DALL-E's encoder.pkl, with the decoder.pkl beside it if there is one.

    UserError names the flag.
    """
    path = Path(path)
    try:
        found = read(path)
        if isinstance(found, StandIn):
            beside = path.with_name("decoder.pkl")
            return load_dalle(path, beside if beside.exists() else None)
        if not isinstance(found, dict) or found.get("kind") != "DiscreteVAE":
            raise ValueError(f"{path} holds {kind_of(found)}")
        model = dvae.DiscreteVAE(**found["config"])
        model.load_state_dict(found["model"])
        return model.eval().requires_grad_(False)
    except ValueError as error:
        raise UserError(f"{flag}: {error}; a model.pt of dvae.py or DALL-E's encoder.pkl would do") from None


# ---------------------------------------------------------------------------------------------------------------------
# Backbones
# ---------------------------------------------------------------------------------------------------------------------

HEADS = ("lm_head.", "head.", "decoder.")    # what belongs to a task, not to the backbone


def load(path):
    """(state_dict in our names, info) of a backbone's checkpoint: our own, or the released BEiT's.

    info: source ("ours" or "released BEiT"), task ("masked image modeling", "classification", "segmentation" or "none"),
    config (vit.ViTConfig), outputs (tokens or classes; None without a head), classes (their names, or None). ValueError says what was found instead.
    """
    found = read(path)
    kind = found.get("kind") if isinstance(found, dict) else None
    if kind == "DiscreteVAE":
        raise ValueError(f"{path} is a tokenizer (--tokenizer takes it), not a backbone")
    state = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(state, dict) or "patch_embed.proj.weight" not in state:
        raise ValueError(f"{path} holds {kind_of(found)}, not a Vision Transformer of ours or of the released BEiT")
    state = {name: tensor for name, tensor in state.items() if not name.endswith("relative_position_index")}
    strangers = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if strangers:
        raise ValueError(f"{path}: {strangers[0]} is not a tensor")
    if kind:
        config = found["config"].get("vit", {})
        config = vit.ViTConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in config.items()})
    else:
        config = infer_config(state, path)
    head = next((state[name] for name in ("lm_head.weight", "head.weight") if name in state), None)
    task = ("none" if head is None else "masked image modeling" if "lm_head.weight" in state
            else "segmentation" if head.dim() == 4 else "classification")
    return state, dict(source="ours" if kind else "released BEiT", task=task, config=config,
                       outputs=None if head is None else len(head), classes=found["config"].get("classes") if kind else None)


def infer_config(state, path):
    """vit.ViTConfig from the shapes of a state_dict of the released BEiT. ValueError where they contradict each other."""
    try:
        dim, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        tables = [name for name in state if name.endswith("relative_position_bias_table")]
        if tables:
            rows, heads = state[tables[0]].shape
            side = (math.isqrt(rows - 3) + 1) // 2
            position = "shared_relative" if "rel_pos_bias.relative_position_bias_table" in state else "relative"
        else:
            heads, side, position = dim // 64, math.isqrt(state["pos_embed"].shape[1] - 1), "absolute"
        return vit.ViTConfig(image_size=side * patch_size, patch_size=patch_size, in_channels=channels, dim=dim, depth=depth,
                             heads=heads, mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim, position=position,
                             layer_scale=0.1 if "blocks.0.gamma_1" in state else 0.0)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is no BEiT: {type(error).__name__} {error}") from None


def initialise(model, path, classes=None, flag="--init"):
    """Fill a backbone with a head (vit.ImageClassifier, vit.SemanticSegmenter, ...) from a checkpoint, and say in three lines
    what was taken, what was resized or made over, and what is new or left behind.

    Positions are resized to the model's grid; a table that all blocks share is copied into a table per block where the model
    has those; norm and fc_norm stand for each other; a head is taken where it has the same task and size and, if the file
    says what its classes are called, the same classes. What else differs is a UserError, and the model is as it was.
    """
    try:
        state, info = load(path)
        source, target = info["config"], model.config
        if source.position != target.position and (source.position, target.position) != ("shared_relative", "relative"):
            raise ValueError(f"{path} has {source.position} positions, the model {target.position}; --position {source.position} fits")
        ours, made_over = model.state_dict(), []
        shared = state.get("rel_pos_bias.relative_position_bias_table")
        if shared is not None and target.position == "relative":
            del state["rel_pos_bias.relative_position_bias_table"]
            state.update({f"blocks.{i}.attn.relative_position_bias_table": shared for i in range(target.depth)})
            made_over.append("the shared position table, into one for each block")
        for old, new in (("norm", "fc_norm"), ("fc_norm", "norm")):
            if f"{old}.weight" in state and f"{old}.weight" not in ours and f"{new}.weight" in ours and f"{new}.weight" not in state:
                state.update({f"{new}.{part}": state.pop(f"{old}.{part}") for part in ("weight", "bias")})
                made_over.append(f"{old}, into {new}")
        left = [name for name in state if name.startswith(HEADS) and (name not in ours or ours[name].shape != state[name].shape)]
        if left or (classes and info["classes"] and list(classes) != list(info["classes"])):    # a head comes whole or not at all
            left = [name for name in state if name.startswith(HEADS)]
        left += [name for name in ("norm.weight", "norm.bias", "mask_token") if name in state and name not in ours]
        state = {name: tensor for name, tensor in state.items() if name not in left}
        resized = vit.resize_positions(state, target, source.grid)
        changed = [name for name in resized if resized[name].shape != state[name].shape]
        if changed:
            made_over.append(f"positions, from {source.grid[0]}x{source.grid[1]} to {target.grid[0]}x{target.grid[1]}")
        new = [name for name in ours if name not in resized]
        missing = [name for name in new if not name.startswith((*HEADS, "fc_norm.", "norm.", "mask_token"))]
        unknown = [name for name in resized if name not in ours]
        misfits = [name for name in resized if name in ours and ours[name].shape != resized[name].shape]
        for names, what in ((missing, "lacks"), (unknown, "has, and the model has not,")):
            if names:
                raise ValueError(f"{path} {what} {len(names)} tensors, {names[0]} first")
        if misfits:
            shapes = ("x".join(map(str, tensors[misfits[0]].shape)) for tensors in (resized, ours))
            raise ValueError("{}: {} is {} there and {} in the model".format(path, misfits[0], *shapes))
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None
    model.load_state_dict({**ours, **resized})
    say(f"taken from {path} ({info['source']}, {info['task']}): {len(resized)} tensors" + (", its head among them" if any(
        name.startswith(HEADS) for name in resized) else ""))
    say(f"made over: {'; '.join(made_over) or 'nothing'}")
    say(f"new: {_names(new)}; left behind: {_names(left)}")


def _names(names):
    """Parameters in short: their modules, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in names)) or "nothing"
