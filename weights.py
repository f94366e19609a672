"""Checkpoints from elsewhere: DALL-E's public tokenizer.

A checkpoint is a pickle, and unpickling runs whatever the file asks for. `read` lets a file ask for tensors, containers and
inert stand-ins of the classes in STAND_INS, by name, and for nothing else.
"""
import collections
import pickle
import types
import warnings
import zipfile
from pathlib import Path

import torch

import dvae
import training
from training import UserError

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
    "torch.nn.modules.pooling.MaxPool2d", "torch.nn.modules.linear.Identity", "torch.nn.modules.upsampling.Upsample")}
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
