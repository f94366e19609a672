"""Checkpoints across our border: DALL-E's tokenizer, the released BEiT, timm, Hugging Face, and our own.

`python weights.py FILE` describes one; `python weights.py FILE --to huggingface|timm|beit OUT` converts it.
`read` turns a file into containers and tensors, `load` these into a state_dict in our names and a config;
then `build` makes the model that the file holds, or `initialise` fills a model of yours.
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
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import dvae
import vit
from training import UserError, one_line_errors, say, write_atomically, write_json
from vit import check

try:
    import safetensors.torch as safetensors
except ImportError:
    safetensors = None

HEADS = ("lm_head.", "head.", "decoder.")    # what belongs to a task, not to the backbone


@contextmanager
def naming(path, problem):
    """Turn any error inside into a ValueError of one line: the file, and our own message or the problem."""
    try:
        yield
    except Exception as error:    # torch, pickle, zipfile and json raise a dozen kinds
        reason = " ".join(str(error).split())[:300]
        if type(error) is not ValueError:
            reason = f"{problem} ({type(error).__name__}: {reason})"
        raise ValueError(f"{path} {reason}") from None


# ---- Reading a file without running it ----

class StandIn:
    """In place of a foreign class or function: accepts any arguments, keeps its state, does nothing."""

    def __init__(self, *args, **options):
        pass

    def __setstate__(self, state):    # fails for the class itself, which a pickle thus cannot change
        self.state = state


class Rebuilt(StandIn):
    """In place of torch's functions that rebuild a tensor or a parameter: the tensor, without its hooks."""

    def __new__(cls, data, *layout):
        if isinstance(data, torch.Tensor):    # of a parameter
            return data
        return torch._utils._rebuild_tensor(data, *layout[:3])    # storage, offset, size, stride


ALLOWED = re.compile(r"""collections\.(OrderedDict|defaultdict)
    | torch\._utils\._rebuild_(tensor|tensor_v2|parameter) | torch\.(Size|device|bool|b?float\d+|int\d+)
    | argparse\.Namespace | pathlib(\._local)?\.\w*Path | builtins\.(set|frozenset|list|dict|int|float)
    | _codecs\.encode | numpy\.(dtype|ndarray|_?core\.multiarray\.(scalar|_reconstruct))
    | dall_e\.(encoder\.Encoder(Block)?|decoder\.Decoder(Block)?|utils\.Conv2d)
    | torch\.nn\.modules\.(container\.Sequential|activation\.ReLU|pooling\.MaxPool2d|linear\.Identity
                           |upsampling\.Upsample)""", re.VERBOSE)


class RestrictedUnpickler(pickle.Unpickler):
    """Finds what is ALLOWED, most of it as stand-ins. torch.load adds the storages of tensors."""

    def find_class(self, module, name):
        full_name = f"{module}.{name}".replace("__builtin__", "builtins")
        check(ALLOWED.fullmatch(full_name),
              f"asks for {full_name}, which weights do not need; nothing of it was run")
        if module == "collections":
            return getattr(collections, name)
        return type(name, (Rebuilt if module == "torch._utils" else StandIn,), {})


RESTRICTED = types.SimpleNamespace(    # the pickle_module for torch.load
    __name__="restricted", Unpickler=RestrictedUnpickler,
    load=lambda file, **options: RestrictedUnpickler(file, **options).load())


def read(path):
    """The containers and tensors in a file of torch.save (zip or older format) or safetensors, on the CPU.

    Nothing in the file is executed; foreign objects become stand-ins. ValueError with one line if that fails.
    """
    path = Path(path)
    with naming(path, "is cut off, damaged or no file of weights"), warnings.catch_warnings():
        warnings.simplefilter("ignore")    # the older format compares the sources of classes
        check(path.exists(), "does not exist")
        check(not path.is_dir(), "is a folder, not a file: give its model.pt, model.safetensors or "
              "pytorch_model.bin")
        check(path.suffix != ".json", "holds no weights: give model.safetensors or pytorch_model.bin; shards "
              "become one file by save_pretrained(..., max_shard_size='100GB')")
        if path.suffix == ".safetensors":
            check(safetensors, "needs a package: pip install safetensors, or take the .bin or .pth file")
            return safetensors.load_file(path)
        broken = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()    # torch skips the checksums
        check(not broken, f"is damaged: {broken} fails its checksum")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:    # foreign classes; TorchScript, which is code, is a RuntimeError
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=RESTRICTED)


def kind_of(found):
    """What `read` found: the class of a model of ours or of DALL-E's, else the type."""
    return found.get("kind", "dict") if isinstance(found, dict) else type(found).__name__


# ---- Tokenizers ----

def load_tokenizer(path, flag="--tokenizer"):
    """The DiscreteVAE in a model.pt of ours, or in DALL-E's encoder.pkl with the decoder.pkl beside it, in
    evaluation mode. UserError names the flag."""
    try:
        found, decoder = read(path), Path(path).with_name("decoder.pkl")
        if kind_of(found) == "Encoder":
            return load_dalle(path, decoder if decoder.exists() else None)
        with naming(path, "holds a tokenizer whose weights and sizes do not fit"), torch.device("meta"):
            check(kind_of(found) == "DiscreteVAE", f"holds a {kind_of(found)}")
            model = dvae.DiscreteVAE(**found["config"])
            model.load_state_dict(found["model"], assign=True)
    except ValueError as error:
        raise UserError(f"{flag}: {error}; a model.pt of dvae.py or DALL-E's encoder.pkl would do") from None
    return model.eval().requires_grad_(False)


def load_dalle(encoder, decoder=None):
    """The DiscreteVAE of DALL-E's public encoder.pkl and decoder.pkl (whole modules, pickled), in evaluation
    mode. Without a decoder it only tokenizes, and .decoder is None. ValueError names the file."""
    state = module_tensors(encoder, "Encoder")
    state |= module_tensors(decoder, "Decoder") if decoder else {}
    with naming(encoder, "does not fit DALL-E's architecture"), torch.device("meta"):
        groups, blocks = (max(map(int, re.findall(rf"\.{part}_(\d+)\.", " ".join(state))))
                          for part in ("group", "block"))
        hidden, channels = state["encoder.blocks.input.w"].shape[:2]
        vocab_size = len(state["encoder.blocks.output.conv.w"])
        model = dvae.DiscreteVAE(vocab_size, hidden, groups, blocks, channels)
        model.decoder = model.decoder if decoder else None
        model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def module_tensors(path, kind):
    """(name inside a DiscreteVAE -> tensor) of the pickled module in a file, DALL-E's Encoder or Decoder."""
    found, tensors = read(path), {}

    def collect(module, prefix):
        for name, tensor in module.state["_parameters"].items():
            tensors[prefix + name] = tensor.float()
        for name, child in module.state["_modules"].items():
            collect(child, f"{prefix}{name}.")

    with naming(path, f"holds a damaged {kind}"):
        check(kind_of(found) == kind, f"holds a {kind_of(found)}, not DALL-E's pickled {kind}")
        collect(found, f"{kind.lower()}.")
    return tensors


# ---- Backbones in ----

# How names begin, * for the number of a block: ours, Hugging Face's in files and, where it differs, in memory
# (transformers 5). Models with a head put "beit." before the names of their BeitModel.
HUGGINGFACE = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("rel_pos_bias.", "encoder.relative_position_bias.", "shared_position_bias."),
    ("blocks.*.norm1.", "encoder.layer.*.layernorm_before.", "layers.*.layernorm_before."),
    ("blocks.*.attn.q_", "encoder.layer.*.attention.attention.query.", "layers.*.attention.q_proj."),
    ("blocks.*.attn.k_", "encoder.layer.*.attention.attention.key.", "layers.*.attention.k_proj."),
    ("blocks.*.attn.v_", "encoder.layer.*.attention.attention.value.", "layers.*.attention.v_proj."),
    ("blocks.*.attn.rel", "encoder.layer.*.attention.attention.relative_position_bias.rel",
     "layers.*.relative_position_bias.rel"),
    ("blocks.*.attn.proj.", "encoder.layer.*.attention.output.dense.", "layers.*.attention.o_proj."),
    ("blocks.*.gamma_", "encoder.layer.*.lambda_", "layers.*.lambda_"),
    ("blocks.*.norm2.", "encoder.layer.*.layernorm_after.", "layers.*.layernorm_after."),
    ("blocks.*.mlp.fc1.", "encoder.layer.*.intermediate.dense.", "layers.*.mlp.fc1."),
    ("blocks.*.mlp.fc2.", "encoder.layer.*.output.dense.", "layers.*.mlp.fc2."),
    ("norm.", "layernorm."),
    ("fc_norm.", "pooler.layernorm."),
    ("head.", "classifier."))


def rename(name, pairs):
    """Replace the beginning of a name by the first of the pairs (old, new) that fits."""
    for old, new in pairs:
        pattern = re.escape(old).replace(r"\*", r"(\d+)")
        if re.match(pattern, name):
            return re.sub(pattern, new.replace("*", r"\1"), name, count=1)
    return name


def load(path):
    """(state_dict in our names, info) of a backbone: our own, the released BEiT's, timm's or Hugging Face's.

    info: source ("ours", "released BEiT", "timm" or "Hugging Face"), task ("masked image modeling",
    "classification", "segmentation" or "none"), config (vit.ViTConfig), outputs (tokens or classes; None
    without a head), classes (their names, or None), dropped (names that have no place here, such as a UperNet
    decoder's). ValueError: one line that says what was found instead. Shapes are checked when a model takes
    the state_dict.
    """
    found = read(path)
    with naming(path, "is no BEiT"):
        kind, state, source = kind_of(found), found, "timm"
        check(kind not in ("DiscreteVAE", "Encoder", "Decoder"),
              "is a tokenizer (--tokenizer takes it), not a backbone")
        for nest in ("model", "module", "state_dict"):    # released BEiT, DeepSpeed, mmsegmentation
            if isinstance(state, dict) and isinstance(state.get(nest), dict):
                state, source = state[nest], "released BEiT"
        check(isinstance(state, dict) and any("patch_embed" in str(name) for name in state),
              f"holds a {kind}, not a BEiT of ours, the released code, timm or Hugging Face")
        if any("patch_embeddings" in name for name in state):
            source = "Hugging Face"
        state, dropped = to_our_names(state, source)
        head, task = state.get("lm_head.weight", state.get("head.weight")), "none"
        if head is not None:
            task = {2: "classification", 4: "segmentation"}.get(head.dim(), "none")
        if "lm_head.weight" in state:
            task = "masked image modeling"
        info = dict(source=source, task=task, outputs=None if head is None else len(head), classes=None,
                    dropped=dropped)
        if "kind" in found:
            info |= dict(source="ours", config=vit.ViTConfig(**found["config"]["vit"]),
                         classes=found["config"].get("classes"))
        elif source == "Hugging Face":
            info |= read_config(Path(path).parent, state, info)
        else:
            info["config"] = infer_config(state)
        check(task != "classification" or "fc_norm.weight" in state,
              "has a head for [S]; our models average the patches")
    return state, info


def to_our_names(state, source):
    """(name -> tensor in fp32, names that have no place here). Removes prefixes of wrappers, and buffers that
    follow from the config."""
    ours, dropped = {}, []
    pairs = [(theirs, row[0]) for row in HUGGINGFACE for theirs in row[1:] if source == "Hugging Face"]
    for name, tensor in state.items():
        name = rename(re.sub(r"^((module|_orig_mod|backbone|beit)\.)+", "", name), pairs)
        check(isinstance(tensor, torch.Tensor), f"has {name}, which is not a tensor")
        check(name not in ours, f"has {name} twice")
        if name.startswith(("decode_head.", "auxiliary_head.", "fpn", "neck.")):
            dropped.append(name)
        elif not name.endswith(("relative_position_index", "attn.k_bias")):
            ours[name] = tensor.float() if tensor.is_floating_point() else tensor
    for attn in [name.removesuffix("q_weight") for name in ours if name.endswith("attn.q_weight")]:
        ours[f"{attn}qkv.weight"] = torch.cat([ours.pop(f"{attn}{part}_weight") for part in "qkv"])
    return ours, dropped


def read_config(folder, state, info):
    """config and classes for the info of Hugging Face's weights, from the config.json and
    preprocessor_config.json beside them, if any. ValueError if our models would compute something else."""
    config, processor = (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
                         for file in (folder / "config.json", folder / "preprocessor_config.json"))
    fields = {f"pixel_{name}": tuple(processor[f"image_{name}"]) for name in ("mean", "std")
              if f"image_{name}" in processor}
    if not config:
        return {"config": infer_config(state, **fields)}
    activation = config.get("hidden_act", "gelu")
    check(activation == "gelu", f"has hidden_act {activation} in its config.json, not gelu")
    check(config.get("use_mean_pooling", True) or info["task"] == "none",
          "has use_mean_pooling false in its config.json; our models average the patches")
    size, names, classes = config.get("image_size", 224), config.get("id2label"), None
    fields["image_size"] = tuple(size) if isinstance(size, list) else size
    fields["heads"] = config.get("num_attention_heads", 12)
    fields["layer_norm_eps"] = config.get("layer_norm_eps", 1e-12)
    if names and info["task"] == "classification":
        check(len(names) == info["outputs"], f"has {info['outputs']} classes and {len(names)} names for them")
        classes = [names[key] for key in sorted(names, key=int)]       # the keys of ImageNet-22K have gaps
        if classes == [f"LABEL_{k}" for k in range(len(classes))]:     # Hugging Face's default
            classes = None
    return {"config": infer_config(state, **fields), "classes": classes}


def infer_config(state, **told):
    """vit.ViTConfig from the shapes of a state_dict in our names, where fields are not told. Assumes a square
    grid and, with absolute positions, heads of width 64. layer_scale is 0.1 or 0."""
    dim, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    table = next((name for name in state if name.endswith("relative_position_bias_table")), None)
    if table:
        rows, heads = state[table].shape
        side = (math.isqrt(rows - 3) + 1) // 2
        position = "shared_relative" if table.startswith("rel_pos_bias.") else "relative"
    else:
        side, heads = math.isqrt(state["pos_embed"].shape[1] - 1), max(1, dim // 64)
        position = "absolute"
    inferred = dict(image_size=side * patch_size, patch_size=patch_size, in_channels=channels, dim=dim,
                    depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
                    heads=heads, mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim, position=position,
                    layer_scale=0.1 if "blocks.0.gamma_1" in state else 0.0)
    return vit.ViTConfig(**{**inferred, **told})


def build(path):
    """(model, info as of `load`): the MaskedImageModel, ImageClassifier, SemanticSegmenter or
    VisionTransformer in a file, in evaluation mode. ValueError as `load`, and for tensors that do not fit.

    A VisionTransformer has the norm that the file has; fc_norm is kept, but forward does not use it.
    """
    state, info = load(path)
    config, outputs = info["config"], info["outputs"]
    with naming(path, "does not fit its own sizes"):
        if info["task"] == "masked image modeling":
            model = vit.MaskedImageModel(config, outputs)
        elif info["task"] == "classification":
            model = vit.ImageClassifier(config, outputs)
        elif info["task"] == "segmentation":
            model = vit.SemanticSegmenter(config, outputs, state["decoder.0.weight"].shape[1])
        else:
            model = vit.VisionTransformer(config)
            model.norm = model.norm if "norm.weight" in state else nn.Identity()
            model.fc_norm = nn.LayerNorm(config.dim) if "fc_norm.weight" in state else nn.Identity()
        if not hasattr(model, "mask_token"):    # classifiers of the first edition had one, unused
            state.pop("mask_token", None)
        model.load_state_dict(state)
    return model.eval(), info


def initialise(model, path, classes=None, flag="--init"):
    """Fill a model from a checkpoint, and say in three lines what was taken, converted, new and left behind.

    Positions are resized to the model's grid, and a table shared by all blocks is copied into each block. As
    released, fc_norm is not filled from norm: it is new, and norm is left behind. A head is taken if task,
    size and, where the file names them, classes are the same; its rows are put into the order of `classes`.
    Any other difference is a UserError.
    Returns the names of the parameters that are new.
    """
    try:
        state, info = load(path)
        with naming(path, "does not fit"):
            state, converted, left = adapt(state, info, model, classes)
            ours = model.state_dict()
            new = [name for name in ours if name not in state]
            kept = {name: ours[name] for name in new if name.startswith((*HEADS, "fc_norm.", "norm."))}
            model.load_state_dict({**kept, **state})
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None
    head = ", its head among them" if any(name.startswith(HEADS) for name in state) else ""
    say(f"taken from {path} ({info['source']}, {info['task']}): {len(state)} tensors{head}")
    say(f"converted: {'; '.join(converted) or 'nothing'}")
    say(f"new: {modules_of(new)}; left behind: {modules_of(left)}")
    return new


def modules_of(names):
    """Names of modules for names of parameters, on one line."""
    return ", ".join(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in names)) or "nothing"


def adapt(state, info, model, classes):
    """(state_dict that the model should take, what was converted, names that were left behind)."""
    source, target, ours, converted = info["config"], model.config, model.state_dict(), []
    if (source.position, target.position) == ("shared_relative", "relative"):
        table = state.pop("rel_pos_bias.relative_position_bias_table")
        state |= {f"blocks.{i}.attn.relative_position_bias_table": table for i in range(target.depth)}
        converted.append("the shared position table, into one for each block")
    elif source.position != target.position:
        raise ValueError(f"has {source.position} positions, the model {target.position}; "
                         f"--position {source.position} fits")
    check(source.heads == target.heads or info["source"] in ("released BEiT", "timm"),    # a guess
          f"has {source.heads} heads, the model {target.heads}")
    if source.grid != target.grid:
        state = vit.resize_positions(state, target, source.grid)
        converted.append("positions, from {}x{} to {}x{}".format(*source.grid, *target.grid))
    check(source.layer_norm_eps == target.layer_norm_eps,
          f"has LayerNorms with eps {source.layer_norm_eps}, the model {target.layer_norm_eps}")
    head, theirs = [name for name in state if name.startswith(HEADS)], info["classes"] or classes
    same = classes is None or list(theirs) == list(classes)
    reordered = not same and sorted(theirs) == sorted(set(classes))
    takes_head = (same or reordered) and all(
        name in ours and ours[name].shape == state[name].shape for name in head)
    if head and takes_head and reordered:
        order = [theirs.index(name) for name in classes]
        state |= {name: state[name][order] for name in ("head.weight", "head.bias")}
        converted.append("the head, into the order of these classes")
    unused = [name for name in state.keys() - ours.keys()
              if name.startswith(("mask_token", "norm.", "fc_norm."))]
    left = sorted(unused) + ([] if takes_head else head)
    return {name: tensor for name, tensor in state.items() if name not in left}, converted, left


# ---- Backbones out ----

def write_tensors(state, path):
    """Write a state_dict, as safetensors if path ends so."""
    if Path(path).suffix == ".safetensors":
        check(safetensors, f"{path} needs a package: pip install safetensors")
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        write_atomically(path, lambda file: file.write(safetensors.save(state, metadata={"format": "pt"})))
    else:
        write_atomically(path, lambda file: torch.save(state, file))


def save_beit(model, path):
    """The released BEiT's format: {"model": state_dict}."""
    write_tensors({"model": model.state_dict()}, path)


def save_timm(model, path):
    """A state_dict for timm.create_model("beit_...", checkpoint_path=...), without [M] and token head; as
    safetensors if path ends so. ValueError for a segmenter."""
    check(not isinstance(model, vit.SemanticSegmenter),
          "timm has no place for a segmenter's decoder; huggingface takes the backbone")
    state = model.state_dict()
    write_tensors({name: state[name] for name in state if not name.startswith(("mask_", "lm_head."))}, path)


def save_huggingface(model, folder, classes=None):
    """A folder for from_pretrained: config.json, preprocessor_config.json and the weights, in
    model.safetensors where that package is installed, else in pytorch_model.bin.

    MaskedImageModel -> BeitForMaskedImageModeling, ImageClassifier -> BeitForImageClassification, others ->
    BeitModel (of a segmenter the backbone alone). classes: names of the classes.
    """
    config, folder, state, more = model.config, Path(folder), model.state_dict(), {}
    for attn in [f"blocks.{i}.attn." for i in range(config.depth)]:
        parts = zip("qkv", state.pop(f"{attn}qkv.weight").chunk(3))
        state |= {f"{attn}{part}_weight": rows.clone() for part, rows in parts}
    architecture, prefix = "BeitModel", "beit."
    if isinstance(model, vit.MaskedImageModel):
        architecture, more["vocab_size"] = "BeitForMaskedImageModeling", len(model.lm_head.weight)
    elif isinstance(model, vit.ImageClassifier):
        architecture = "BeitForImageClassification"
        classes = list(classes or [f"LABEL_{k}" for k in range(len(model.head.weight))])
        more = {"id2label": dict(enumerate(classes)), "label2id": {name: k for k, name in enumerate(classes)}}
    else:
        prefix, state = "", {name: state[name] for name in state if not name.startswith(HEADS)}
    state = {rename(name, [row[:2] for row in HUGGINGFACE]): tensor for name, tensor in state.items()}
    outside = ("lm_head.", "layernorm.", "classifier.")    # not in the BeitModel of a model with a head
    state = {name if name.startswith(outside) else prefix + name: state[name] for name in state}
    height, width = config.image_hw
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {
        "model_type": "beit", "architectures": [architecture],
        "image_size": height if height == width else [height, width], "patch_size": config.patch_size,
        "num_channels": config.in_channels, "hidden_size": config.dim, "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads, "intermediate_size": int(config.dim * config.mlp_ratio),
        "hidden_act": "gelu", "layer_norm_eps": config.layer_norm_eps,
        "layer_scale_init_value": config.layer_scale, "drop_path_rate": config.drop_path,
        "use_mask_token": isinstance(model, vit.MaskedImageModel),
        "use_mean_pooling": architecture != "BeitModel" or isinstance(model.norm, nn.Identity),
        "use_absolute_position_embeddings": config.position == "absolute",
        "use_relative_position_bias": config.position == "relative",
        "use_shared_relative_position_bias": config.position == "shared_relative", **more})
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "BeitImageProcessor", "size": {"height": height, "width": width},
        "do_center_crop": False, "image_mean": config.pixel_mean, "image_std": config.pixel_std})
    write_tensors(state, folder / ("model.safetensors" if safetensors else "pytorch_model.bin"))


def main():
    parser = argparse.ArgumentParser(description="Describe a checkpoint, or convert it.", allow_abbrev=False)
    parser.add_argument("file", help="ours, the released BEiT's, timm's or Hugging Face's")
    parser.add_argument("--to", nargs=2, metavar=("FORMAT", "OUT"),
                        help="huggingface FOLDER, timm FILE or beit FILE")
    with one_line_errors():
        args = parser.parse_args()
        form, out = args.to or (None, "")
        try:
            check(form in (None, "huggingface", "timm", "beit"),
                  f"--to: huggingface, timm or beit, not {form}")
            check(form != "huggingface" or not Path(out).is_file(),
                  f"--to: {out} is a file; huggingface takes a folder")
            check(form not in ("timm", "beit") or Path(out).parent.is_dir() and not Path(out).is_dir(),
                  f"--to: {out or 'nothing'} is not a file in a folder that exists")
            model, info = build(args.file)
            say(f"{args.file}: {info['source']}, {type(model).__name__}, {info['outputs'] or 'no'} outputs, "
                f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(info['dropped'])} tensors "
                f"left out\n{info['config']}")
            if form == "huggingface":
                save_huggingface(model, out, info["classes"])
            elif form:
                {"timm": save_timm, "beit": save_beit}[form](model, out)
        except ValueError as error:
            raise UserError(str(error)) from None
        if form:
            say(f"written to {out}, for {form}")


if __name__ == "__main__":
    main()
