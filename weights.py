"""Checkpoints in and out: DALL-E's public tokenizer, the released BEiT, timm, Hugging Face, and our own.

`python weights.py FILE` describes one; `python weights.py FILE --to huggingface|timm|beit OUT` converts it.

A checkpoint is a pickle, and unpickling runs whatever the file asks for. `read` lets a file ask for tensors,
containers and inert stand-ins of the classes in STAND_INS, by name, and for nothing else.
"""
import argparse
import collections
import json
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
from training import UserError, one_line_errors, say, write_atomically, write_json

LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")    # how torch.save began until 1.6


# ---- Reading a file without running it ----

class Refused(pickle.UnpicklingError):
    """A file asks for something that weights do not need."""


class StandIn:
    """In place of an object of a foreign class: its attributes, none of its code."""

    def __setstate__(self, state):
        self.__dict__.update(state)


class Function:
    """A function that a pickle can call, but not change."""
    __slots__ = ()


def only_call(function):
    """The function as a Function."""
    return type("Only", (Function,), {"__slots__": (), "__call__": staticmethod(function)})()


STAND_INS = {name: type(name.rpartition(".")[2], (StandIn,), {}) for name in (
    "dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock", "dall_e.utils.Conv2d", "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU", "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.linear.Identity", "torch.nn.modules.upsampling.Upsample", "argparse.Namespace")}
REBUILD = {f"torch._utils.{name}": only_call(getattr(torch._utils, name)) for name in (
    "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")}
ADMITTED = {**STAND_INS, **REBUILD, "collections.OrderedDict": collections.OrderedDict, "builtins.set": set,
            "torch.device": torch.device}


class RestrictedUnpickler(pickle.Unpickler):
    """Finds what is ADMITTED; torch.load, which it is given to, adds the storages of tensors."""

    def find_class(self, module, name):
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full_name not in ADMITTED:
            raise Refused(full_name)
        return ADMITTED[full_name]


def load_restricted(path):
    """What torch.save wrote, in its zip or its older format, on the CPU, by RestrictedUnpickler."""
    module = types.SimpleNamespace(__name__="pickle", Unpickler=RestrictedUnpickler,
                                   load=lambda file, **options: RestrictedUnpickler(file, **options).load())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # the older format compares the sources of classes
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)


def read(path):
    """What torch.save wrote into the file, in its zip or its older format, tensors on the CPU and classes as
    stand-ins.

    Nothing in the file is executed. ValueError says in one line what was found where that is something else.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    size = path.stat().st_size
    damaged = f"{path} is cut off or damaged ({size:,} bytes); fetch it again"
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page ({size:,} bytes), not weights: the download went to the "
                         f"wrong address")
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return _read_safetensors(path, damaged)
    is_zip = head.startswith(b"PK\x03\x04")
    if is_zip:
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.rpartition("/")[2] for name in archive.namelist()}
        except Exception:    # zipfile has more errors than its own
            raise ValueError(damaged) from None
        if "data.pkl" not in names or "constants.pkl" in names:
            raise ValueError(f"{path} is a zip archive, but not one of torch.save with weights")
    elif not head.startswith(b"\x80"):
        raise ValueError(f"{path} is not a file of torch.save: it begins with {head[:16]!r}")
    try:
        if is_zip or head.startswith(LEGACY_MAGIC):
            return load_restricted(path)
        with open(path, "rb") as file:
            RestrictedUnpickler(file).load()
    except Refused as error:
        reason = f"{path} asks for {error}, which weights do not need; nothing of it was run"
        raise ValueError(reason) from None
    except Exception:    # a broken pickle can raise anything
        raise ValueError(damaged) from None
    raise ValueError(f"{path} is a pickle, but not one of torch.save")


def _read_safetensors(path, damaged):
    library = safetensors_torch()
    if not library:
        raise ValueError(f"{path} is a safetensors file: pip install safetensors, or take the .bin or "
                         f".pth one")
    try:
        return library.load_file(path)
    except Exception:    # safetensors' own errors
        raise ValueError(damaged) from None


def kind_of(found):
    """In words, what `read` found."""
    name = type(found).__name__
    if isinstance(found, dict) and isinstance(found.get("kind"), str):
        name = found["kind"]
    if isinstance(found, dict) and found and all(isinstance(value, torch.Tensor) for value in found.values()):
        return f"a state_dict of {len(found)} tensors, {next(iter(found))} first"
    if name == "dict":
        return f"a dict of {', '.join(map(str, list(found)[:5])) or 'nothing'}"
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


# ---- DALL-E's tokenizer ----

def load_dalle(encoder, decoder=None):
    """DiscreteVAE with the weights of DALL-E's public encoder.pkl and decoder.pkl, in evaluation mode.

    Both are whole modules, pickled; width, depth, channels and vocabulary are read off their tensors. Without
    a decoder the model tokenizes, and .decoder is None. ValueError names the file and says what it holds
    instead.
    """
    weights = _pickled_module(encoder, "Encoder")
    sizes = dict(vocab_size=len(weights["blocks.output.conv.w"]), hidden=len(weights["blocks.input.w"]),
                 groups=len({name.split(".")[1] for name in weights if name.startswith("blocks.group_")}),
                 blocks_per_group=len({name.split(".")[2] for name in weights
                                       if name.startswith("blocks.group_1.block_")}),
                 in_channels=weights["blocks.input.w"].shape[1])
    try:
        with torch.device("meta"):
            model = dvae.DiscreteVAE(**sizes)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{encoder} does not fit DALL-E's architecture: "
                         f"{' '.join(str(error).split())[:200]}") from None
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
        raise ValueError(f"{path} holds {kind_of(found)}, not the pickled {expected} of DALL-E's public "
                         f"{expected.lower()}.pkl")
    tensors, seen = {}, set()

    def collect(module, prefix):
        if id(module) in seen:    # a file can nest a module in itself
            return
        seen.add(id(module))
        for name, tensor in module.__dict__.get("_parameters", {}).items():
            tensors[prefix + name] = tensor.detach()
        for name, child in module.__dict__.get("_modules", {}).items():
            collect(child, f"{prefix}{name}.")

    try:
        collect(found, "")
        tensors = {name: tensor.float() for name, tensor in _no_larger_than(path, tensors).items()}
        for name in ("blocks.input.w", "blocks.output.conv.w"):
            if tensors[name].dim() != 4:
                raise TypeError(name)
    except (KeyError, AttributeError, TypeError, RecursionError):
        reason = f"{path} holds a {expected} without the expected weights, such as blocks.input.w"
        raise ValueError(reason) from None
    return tensors


def _fill(part, weights, path):
    try:
        part.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n", 1)[-1].split())[:200]
        raise ValueError(f"{path} does not fit DALL-E's architecture: {reason}") from None


def _tokenizer_of_ours(found, path):
    try:
        state = {name: tensor.float() for name, tensor in _no_larger_than(path, found["model"]).items()}
        if found["config"]["groups"] * found["config"]["blocks_per_group"] > len(state):
            raise ValueError("more blocks than tensors")
        with torch.device("meta"):    # memory only for what the file holds
            model = dvae.DiscreteVAE(**found["config"])
        model.load_state_dict(state, assign=True)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} holds a tokenizer whose weights and sizes do not fit "
                         f"({' '.join(str(error).split())[:100]})") from None
    return model.eval().requires_grad_(False)


def _no_larger_than(path, state):
    """The state_dict. ValueError if its tensors hold more numbers than the file has bytes."""
    numbers = sum(tensor.numel() for tensor in state.values() if isinstance(tensor, torch.Tensor))
    if numbers > Path(path).stat().st_size:
        raise ValueError(f"{path} has {numbers:,} numbers in {Path(path).stat().st_size:,} bytes")
    return state


def load_tokenizer(path, flag="--tokenizer"):
    """The DiscreteVAE in a model.pt of ours, or in DALL-E's encoder.pkl with the decoder.pkl beside it.

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
        return _tokenizer_of_ours(found, path)
    except ValueError as error:
        raise UserError(f"{flag}: {error}; a model.pt of dvae.py or DALL-E's encoder.pkl would do") from None


# ---- Backbones in ----

HEADS = ("lm_head.", "head.", "decoder.")    # what belongs to a task, not to the backbone


def load(path):
    """(state_dict in our names, info) of a backbone: our own, the released BEiT's, timm's or Hugging Face's.

    info: source ("ours", "released BEiT", "timm" or "Hugging Face"), task ("masked image modeling",
    "classification", "segmentation" or "none"), config (vit.ViTConfig; but for our own, from shapes), outputs
    (tokens or classes; None without a head), classes (their names, or None), dropped (what has no place here,
    such as Hugging Face's segmentation decoder). ValueError says in one line what was found instead.
    """
    path = Path(path)
    found = read(path)
    kind = found.get("kind") if isinstance(found, dict) else None
    if kind == "DiscreteVAE" or isinstance(found, StandIn):
        raise ValueError(f"{path} is a tokenizer (--tokenizer takes it), not a backbone")
    state, beside = found, None
    for nest in ("model", "module", "state_dict"):    # the released BEiT's, and those who wrapped it
        if isinstance(state, dict) and isinstance(state.get(nest), dict):
            state = state[nest]
    if not isinstance(state, dict) or not any("patch_embed" in str(name) for name in state):
        raise ValueError(f"{path} holds {kind_of(found)}, not a Vision Transformer of ours, the released "
                         f"BEiT, timm or Hugging Face")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: {name} is not the name of a tensor")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {name} is not a tensor")
    empty = [name for name, tensor in _no_larger_than(path, state).items() if not tensor.numel()]
    if empty:
        raise ValueError(f"{path}: {empty[0]} is empty")
    source, dropped = "ours" if kind else "timm" if state is found else "released BEiT", []
    if any("patch_embeddings.projection" in name for name in state):
        source, beside = "Hugging Face", path.with_name("config.json")
        state, dropped = from_huggingface(state, path)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()
             if not name.endswith(("relative_position_index", "attn.k_bias"))}
    try:
        if kind:
            config = vit.ViTConfig(**{name: tuple(value) if isinstance(value, list) else value
                                      for name, value in found["config"]["vit"].items()})
        else:
            config = infer_config(state, beside)
        check_config(config, state)
    except (KeyError, ValueError, IndexError, ArithmeticError, RuntimeError, TypeError,
            AttributeError) as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:100]}"
        raise ValueError(f"{path} is no BEiT: {reason}") from None
    check_shapes(state, config, path)
    head = next((state[name] for name in ("lm_head.weight", "head.weight") if name in state), None)
    if head is not None and (head.dim() not in (2, 4) or head.dim() == 2 and head.shape[1] != config.dim):
        raise ValueError(f"{path}: the head is {'x'.join(map(str, head.shape))}, the other tensors call for "
                         f"a width of {config.dim}")
    task = "none"
    if "lm_head.weight" in state:
        task = "masked image modeling"
    elif head is not None:
        task = "segmentation" if head.dim() == 4 else "classification"
    return state, dict(source=source, task=task, config=config, outputs=None if head is None else len(head),
                       classes=_names_of_classes(found, path) if kind else None, dropped=dropped)


def _names_of_classes(found, path):
    names = found["config"].get("classes")
    if names is not None and not (isinstance(names, (list, tuple))
                                  and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path}: its classes are not a list of names")
    return names


def infer_config(state, beside=None):
    """vit.ViTConfig from the shapes of a state_dict in our names.

    With absolute positions heads are taken to be 64 wide, unless Hugging Face's config.json lies beside.
    layer_scale is only "some" (0.1) or none.
    """
    dim, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    if tables:
        rows, heads = state[tables[0]].shape
        side = (math.isqrt(rows - 3) + 1) // 2
        position = "shared_relative" if tables[0].startswith("rel_pos_bias.") else "relative"
    else:
        heads, side, position = max(1, dim // 64), math.isqrt(state["pos_embed"].shape[1] - 1), "absolute"
        if beside and beside.is_file():
            heads = json.loads(beside.read_text())["num_attention_heads"]
    more = {}
    processor = beside and beside.with_name("preprocessor_config.json")
    if processor and processor.is_file():
        told = json.loads(processor.read_text())
        for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
            if theirs in told:
                more[ours] = tuple(told[theirs])
    return vit.ViTConfig(image_size=side * patch_size, patch_size=patch_size, in_channels=channels, dim=dim,
                         depth=depth, heads=heads, mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim,
                         position=position, layer_scale=0.1 if "blocks.0.gamma_1" in state else 0.0, **more)


def check_config(config, state):
    """ValueError or TypeError where values have the wrong kind, or call for more than the state_dict
    holds."""
    whole = [*config.image_hw, config.patch_size, config.in_channels, config.dim, config.depth, config.heads]
    if not all(type(number) is int and 0 < number < 2 ** 31 for number in whole):
        raise TypeError(f"sizes are whole numbers, not {whole}")
    if config.depth > len(state):
        raise ValueError(f"{config.depth} blocks in {len(state)} tensors")
    for name in ("pixel_mean", "pixel_std"):
        values = getattr(config, name)
        numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        if len(values) not in (1, config.in_channels) or not numbers:
            raise ValueError(f"{name}: {config.in_channels} numbers, not {values}")


def check_shapes(state, config, path):
    """ValueError where the backbone's tensors lack one, or contradict each other."""
    try:
        with torch.device("meta"):
            expected = vit.VisionTransformer(config).state_dict()
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:    # sizes beyond all memory
        raise ValueError(f"{path} is no BEiT: {' '.join(str(error).split())[:100]}") from None
    for name, tensor in expected.items():
        if name not in state and not name.startswith("norm."):
            raise ValueError(f"{path} lacks {name}")
        if name in state and state[name].shape != tensor.shape:
            there, here = ("x".join(map(str, shape)) for shape in (state[name].shape, tensor.shape))
            raise ValueError(f"{path}: {name} is {there}, the other tensors call for {here}")


# Hugging Face's names, as in the files on the hub and as in transformers 5's memory, and ours; applied in
# this order.
HUGGINGFACE = [(re.compile(theirs), ours) for theirs, ours in (
    (r"^beit\.", ""),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.(attention\.attention\.)?relative_position_bias\.", ".attn."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^classifier\.", "head."))]
NOT_OURS = ("decode_head.", "auxiliary_head.", "fpn", "neck.")    # Hugging Face's UperNet decoder


def from_huggingface(state, path):
    """(state_dict in our names, the names that have no place here) from BeitForMaskedImageModeling,
    BeitForImageClassification, BeitModel or the backbone of BeitForSemanticSegmentation."""
    ours, dropped = {}, []
    for name, tensor in state.items():
        if name.startswith(NOT_OURS):
            dropped.append(name)
            continue
        for theirs, replacement in HUGGINGFACE:
            name = theirs.sub(replacement, name)
        ours[name] = tensor
    for prefix in sorted({name.removesuffix("q.weight") for name in ours if name.endswith(".attn.q.weight")}):
        try:
            ours[prefix + "qkv.weight"] = torch.cat([ours.pop(f"{prefix}{part}.weight") for part in "qkv"])
            for part in "qv":
                ours[f"{prefix}{part}_bias"] = ours.pop(f"{prefix}{part}.bias")
        except (KeyError, RuntimeError):
            raise ValueError(f"{path}: the queries, keys and values of {prefix.removesuffix('.attn.')} are "
                             f"not whole") from None
    return ours, dropped


def build(path):
    """(model, info): the MaskedImageModel, ImageClassifier, SemanticSegmenter or VisionTransformer in a
    checkpoint, in evaluation mode. ValueError as `load`."""
    state, info = load(path)
    config = info["config"]
    if info["task"] == "masked image modeling":
        model = vit.MaskedImageModel(config, info["outputs"])
    elif info["task"] == "classification":
        model = vit.ImageClassifier(config, info["outputs"])
    elif info["task"] == "segmentation":
        if "decoder.0.weight" not in state or state["decoder.0.weight"].dim() != 4:
            raise ValueError(f"{path} lacks decoder.0.weight")
        model = vit.SemanticSegmenter(config, info["outputs"], state["decoder.0.weight"].shape[1])
    else:
        model = vit.VisionTransformer(config)
        if "fc_norm.weight" in state:    # a classifier without its head
            state.update({f"norm.{part}": state.pop(f"fc_norm.{part}") for part in ("weight", "bias")})
        elif "norm.weight" not in state:    # the backbone of Hugging Face's segmenter, which has none
            model.norm = torch.nn.Identity()
    missing = model.state_dict().keys() - state.keys()
    unknown = state.keys() - model.state_dict().keys() - {"norm.weight", "norm.bias", "mask_token"}
    if missing:
        raise ValueError(f"{path} lacks {min(missing)}")
    if unknown:
        raise ValueError(f"{path} has {min(unknown)}, which belongs to no model here")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    return model.eval(), info


# ---- Out ----

def save_beit(model, path):
    """The released BEiT's format: {"model": state_dict}."""
    write_atomically(Path(path), lambda file: torch.save({"model": _plain(model)}, file))


def save_timm(model, path):
    """A state_dict for timm's Beit (timm.create_model("beit_...", checkpoint_path=...)), without [M] and
    token head.

    As safetensors where the path says so. ValueError for a segmenter.
    """
    if isinstance(model, vit.SemanticSegmenter):
        raise ValueError("timm has no place for a segmenter's decoder; huggingface takes the backbone")
    state = {name: tensor for name, tensor in _plain(model).items() if name != "mask_token"
             and not name.startswith("lm_head.")}
    _write_tensors(state, Path(path))


def save_huggingface(model, folder, classes=None):
    """A folder for from_pretrained: config.json, preprocessor_config.json and the weights, under the names of
    the files on the hub; model.safetensors where that package is installed, else pytorch_model.bin.

    MaskedImageModel -> BeitForMaskedImageModeling, ImageClassifier -> BeitForImageClassification, others ->
    BeitModel (of a segmenter the backbone alone). classes: names of the classes.
    """
    config, folder = model.config, Path(folder)
    architecture = {vit.MaskedImageModel: "BeitForMaskedImageModeling",
                    vit.ImageClassifier: "BeitForImageClassification"}.get(type(model), "BeitModel")
    state = {}
    for name, tensor in _plain(model).items():
        state.update(to_huggingface(name, tensor, architecture))
    more = {}
    if architecture == "BeitForMaskedImageModeling":
        more["vocab_size"] = len(model.lm_head.weight)
    if architecture == "BeitForImageClassification":
        classes = list(classes or [f"LABEL_{k}" for k in range(len(model.head.weight))])
        more["id2label"] = {str(k): name for k, name in enumerate(classes)}
        more["label2id"] = {name: k for k, name in enumerate(classes)}
    height, width = config.image_hw
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {
        "model_type": "beit", "architectures": [architecture],
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size, "num_channels": config.in_channels, "hidden_size": config.dim,
        "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
        "intermediate_size": int(config.dim * config.mlp_ratio), "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        "layer_scale_init_value": config.layer_scale, "drop_path_rate": config.drop_path,
        "use_mask_token": isinstance(model, vit.MaskedImageModel),
        "use_mean_pooling": architecture != "BeitModel",
        "use_absolute_position_embeddings": config.position == "absolute",
        "use_relative_position_bias": config.position == "relative",
        "use_shared_relative_position_bias": config.position == "shared_relative", **more})
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "BeitImageProcessor", "do_resize": True,
        "size": dict(zip(("height", "width"), config.image_hw)), "resample": 3, "do_center_crop": False,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(config.pixel_mean), "image_std": list(config.pixel_std)})
    _write_tensors(state, folder / ("model.safetensors" if safetensors_torch() else "pytorch_model.bin"))


def to_huggingface(name, tensor, architecture):
    """One of our parameters as a dict under Hugging Face's names; queries, keys and values apart."""
    if name.startswith(("decoder.", "head.")) and architecture == "BeitModel":
        return {}
    outside = ("lm_head.", "norm.") if architecture == "BeitForMaskedImageModeling" else ()
    if name.startswith(outside):
        return {name.replace("norm.", "layernorm."): tensor}
    prefix, block = "" if architecture == "BeitModel" else "beit.", re.match(r"blocks\.(\d+)\.(.*)", name)
    if not block:
        for ours, theirs in (("head.", "classifier."), ("fc_norm.", f"{prefix}pooler.layernorm."),
                             ("norm.", f"{prefix}layernorm."),
                             ("rel_pos_bias.", f"{prefix}encoder.relative_position_bias."),
                             ("pos_embed", f"{prefix}embeddings.position_embeddings"),
                             ("patch_embed.proj.", f"{prefix}embeddings.patch_embeddings.projection."),
                             ("", f"{prefix}embeddings.")):
            if name.startswith(ours):
                return {theirs + name.removeprefix(ours): tensor}
    layer, rest = f"{prefix}encoder.layer.{block[1]}.", block[2]
    if rest == "attn.qkv.weight":
        return {f"{layer}attention.attention.{part}.weight": some.clone()
                for part, some in zip(("query", "key", "value"), tensor.chunk(3))}
    for ours, theirs in (("attn.q_bias", "attention.attention.query.bias"),
                         ("attn.v_bias", "attention.attention.value.bias"),
                         ("attn.proj.", "attention.output.dense."),
                         ("attn.", "attention.attention.relative_position_bias."),
                         ("mlp.fc1.", "intermediate.dense."), ("mlp.fc2.", "output.dense."),
                         ("norm1.", "layernorm_before."), ("norm2.", "layernorm_after."),
                         ("gamma_", "lambda_")):
        if rest.startswith(ours):
            return {layer + theirs + rest.removeprefix(ours): tensor}
    raise ValueError(f"{name} has no name at Hugging Face")


def _plain(model):
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _write_tensors(state, path):
    if path.suffix != ".safetensors":
        return write_atomically(path, lambda file: torch.save(state, file))
    library = safetensors_torch()
    if not library:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors")
    write_atomically(path, lambda file: file.write(library.save(state, metadata={"format": "pt"})))


def safetensors_torch():
    """The module safetensors.torch, or None where it is not installed."""
    try:
        import safetensors.torch
        return safetensors.torch
    except ImportError:
        return None


# ---- Into a model ----

def initialise(model, path, classes=None, flag="--init"):
    """Fill a backbone with a head (vit.ImageClassifier, vit.SemanticSegmenter, ...) from a checkpoint, and
    say in three lines what was taken, what was resized or made over, and what is new or left behind.

    Positions are resized to the model's grid; a table that all blocks share is copied into a table per block
    where the model has those; norm and fc_norm stand for each other; a head is taken where it has the same
    task and size and, if the file says what its classes are called, the same classes. What else differs is a
    UserError, and the model is as it was. Returns the names of the parameters that are new.
    """
    try:
        state, info = load(path)
        source, target = info["config"], model.config
        change = (source.position, target.position)
        if source.position != target.position and change != ("shared_relative", "relative"):
            raise ValueError(f"{path} has {source.position} positions, the model {target.position}; "
                             f"--position {source.position} fits")
        ours, made_over = model.state_dict(), []
        shared = state.get("rel_pos_bias.relative_position_bias_table")
        if shared is not None and target.position == "relative":
            del state["rel_pos_bias.relative_position_bias_table"]
            state.update({f"blocks.{i}.attn.relative_position_bias_table": shared
                          for i in range(target.depth)})
            made_over.append("the shared position table, into one for each block")
        for old, new in (("norm", "fc_norm"), ("fc_norm", "norm")):
            here, there = f"{old}.weight" in state and f"{new}.weight" not in state, f"{new}.weight" in ours
            if here and there and f"{old}.weight" not in ours:
                state.update({f"{new}.{part}": state.pop(f"{old}.{part}") for part in ("weight", "bias")})
                made_over.append(f"{old}, into {new}")
        left = [name for name in state if name.startswith(HEADS)
                and (name not in ours or ours[name].shape != state[name].shape)]
        # a head comes whole or not at all
        if left or (classes and info["classes"] and list(classes) != list(info["classes"])):
            left = [name for name in state if name.startswith(HEADS)]
        left += [name for name in ("norm.weight", "norm.bias", "mask_token") if name in state
                 and name not in ours]
        state = {name: tensor for name, tensor in state.items() if name not in left}
        resized = vit.resize_positions(state, target, source.grid)
        changed = [name for name in resized if resized[name].shape != state[name].shape]
        if changed:
            made_over.append(f"positions, from {source.grid[0]}x{source.grid[1]} to "
                             f"{target.grid[0]}x{target.grid[1]}")
        new = [name for name in ours if name not in resized]
        missing = [name for name in new if not name.startswith((*HEADS, "fc_norm.", "norm."))]
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
    head = ", its head among them" if any(name.startswith(HEADS) for name in resized) else ""
    say(f"taken from {path} ({info['source']}, {info['task']}): {len(resized)} tensors{head}")
    say(f"made over: {'; '.join(made_over) or 'nothing'}")
    say(f"new: {_names(new)}; left behind: {_names(left)}")
    return new


def _names(names):
    """Parameters in short: their modules, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in names)) or "nothing"


# ---- Command line ----

def describe(path, info, model):
    """What a checkpoint is, a line each."""
    config = info["config"]
    say(f"{path}: {info['source']}, {type(model).__name__}")
    outputs = "tokens" if info["task"] == "masked image modeling" else "classes"
    say(f"task        {info['task']}" + (f", {info['outputs']} {outputs}" if info["outputs"] else ""))
    say(f"images      {config.image_hw[0]}x{config.image_hw[1]} pixels, {config.in_channels} channels; "
        f"patches {config.patch_size}x{config.patch_size}, grid {config.grid[0]}x{config.grid[1]}")
    say(f"backbone    {config.depth} blocks, width {config.dim}, {config.heads} heads, FFN "
        f"{int(config.dim * config.mlp_ratio)}")
    say(f"positions   {config.position}; layer scale {'yes' if config.layer_scale else 'no'}")
    say(f"parameters  {sum(p.numel() for p in model.parameters()):,}")
    if info["dropped"]:
        say(f"left out    {len(info['dropped'])} tensors of another decoder, {info['dropped'][0]} first")


def main():
    parser = argparse.ArgumentParser(usage="%(prog)s FILE [flags]", allow_abbrev=False,
                                     description="Describe a checkpoint, or convert it.")
    parser.add_argument("file", help="of ours, the released BEiT, timm or Hugging Face (.pt .pth .bin "
                        ".safetensors)")
    parser.add_argument("--to", nargs=2, metavar=("FORMAT", "OUT"),
                        help="huggingface FOLDER, timm FILE or beit FILE")
    with one_line_errors():
        args = parser.parse_args()
        savers = {"huggingface": save_huggingface, "timm": save_timm, "beit": save_beit}
        if args.to and args.to[0] not in savers:
            raise UserError(f"--to: huggingface, timm or beit, not {args.to[0]}")
        if args.to and args.to[0] == "huggingface" and Path(args.to[1]).is_file():
            raise UserError(f"--to: {args.to[1]} is a file; huggingface takes a folder")
        if args.to and (not args.to[1] or args.to[0] != "huggingface" and (
                Path(args.to[1]).is_dir() or not Path(args.to[1]).parent.is_dir())):
            raise UserError(f"--to: {args.to[1] or 'nothing'} is not a file in a folder that exists")
        try:
            model, info = build(args.file)
            describe(args.file, info, model)
            if args.to:
                more = {"classes": info["classes"]} if args.to[0] == "huggingface" else {}
                savers[args.to[0]](model, args.to[1], **more)
                say(f"written to {args.to[1]}, for {args.to[0]}")
        except ValueError as error:
            raise UserError(str(error)) from None


if __name__ == "__main__":
    main()
