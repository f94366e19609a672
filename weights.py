"""Checkpoints of this project, the released BEiT, timm, Hugging Face and DALL-E.

    python weights.py FILE                              # describe a checkpoint
    python weights.py FILE --to huggingface FOLDER      # convert it; or --to timm FILE

`load` reads a file into a state_dict with our names and a config, and `build` returns the model in a file.
A wrong file raises UserError, one line that names it. pretrained.py starts other models from a file.
"""
import argparse
import collections
import dataclasses
import json
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
from launch import UserError, one_line_errors, say
from positions import resize_positions, square_grid  # noqa: F401, also weights.resize_positions
from run_folder import write_atomically, write_json

try:
    import safetensors.torch as safetensors
except ImportError:
    safetensors = None

PATCH_WEIGHTS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
HEADS = ("lm_head.", "head.", "decoder.")    # parameters of a task, not of the backbone


# ---- Reading a file without running it ----

@contextmanager
def file_errors(path, problem):
    """Raise any error inside as a UserError of one line: "path: problem (error)".

    Torch, pickle, zipfile and json raise a dozen kinds of errors for a damaged file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind = "missing" if isinstance(error, KeyError) else type(error).__name__
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: {problem} ({kind}: {reason})") from error


class StandIn:
    """Replaces a foreign class or function: accepts any arguments, keeps its state, does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):    # without it, a pickle could change the class itself
        self.state = state


class RebuiltTensor(StandIn):
    """Replaces torch's functions that rebuild a tensor or a parameter. Returns the tensor, without hooks."""

    def __new__(cls, data, *layout):
        if isinstance(data, torch.Tensor):                             # as _rebuild_parameter
            return data
        return torch._utils._rebuild_tensor(data, *layout[:3])         # storage, offset, size, stride


class RestrictedUnpickler(pickle.Unpickler):
    """Resolves only the names in ALLOWED, most of them to stand-ins. torch.load resolves tensor storages."""
    ALLOWED = re.compile(r"""collections\.(OrderedDict|defaultdict)
        | torch\._utils\._rebuild_(tensor|tensor_v2|parameter) | torch\.(Size|device|bool|b?float\d+|int\d+)
        | argparse\.Namespace | pathlib(\._local)?\.\w*Path | builtins\.(set|frozenset|list|dict|int|float)
        | _codecs\.encode | numpy\.(dtype|ndarray|_?core\.multiarray\.(scalar|_reconstruct))
        | dall_e\.(encoder\.Encoder(Block)?|decoder\.Decoder(Block)?|utils\.Conv2d)
        | torch\.nn\.modules\.(container\.Sequential|activation\.ReLU|pooling\.MaxPool2d|linear\.Identity
                               |upsampling\.Upsample)""", re.VERBOSE)

    def find_class(self, module, name):
        full_name = f"{module}.{name}".replace("__builtin__", "builtins")
        if not self.ALLOWED.fullmatch(full_name):
            raise pickle.UnpicklingError(f"refers to {full_name}, which no checkpoint needs; nothing was run")
        if module == "collections":
            return getattr(collections, name)
        return type(name, (RebuiltTensor if module == "torch._utils" else StandIn,), {})


RESTRICTED_PICKLE = types.SimpleNamespace(    # the pickle_module for torch.load
    __name__="restricted", Unpickler=RestrictedUnpickler,
    load=lambda file, **kwargs: RestrictedUnpickler(file, **kwargs).load())


def read_file(path):
    """Return the containers and tensors in a file of torch.save or safetensors, on the CPU.

    Nothing in the file is executed; foreign objects become stand-ins. Raises UserError.
    """
    path = Path(path)
    with file_errors(path, "cut off, damaged or not a checkpoint"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                                # of classes whose source has changed
        if not path.exists():
            raise UserError(f"{path}: no such file")
        if path.is_dir() or path.suffix == ".json":
            raise UserError(f"{path}: expected a file with weights, such as model.pt, model.safetensors or "
                            "pytorch_model.bin; save_pretrained(..., max_shard_size='100GB') joins shards")
        if path.suffix == ".safetensors":
            if safetensors is None:
                raise UserError(f"{path}: safetensors is not installed; give a .bin or .pth file")
            return safetensors.load_file(path)
        broken = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()    # torch skips the checksums
        if broken:
            raise UserError(f"{path}: damaged, {broken} fails its checksum")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:    # foreign classes; TorchScript, which is code, is a RuntimeError
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=RESTRICTED_PICKLE)


def read_json(path):
    """Return the dict that a JSON file holds, and {} if there is no such file. Raises UserError."""
    with file_errors(path, "expected JSON with an object"):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def class_name(contents):
    """Return the class name of a model of ours or DALL-E's; for other contents, the name of their type."""
    return contents.get("kind", "dict") if isinstance(contents, dict) else type(contents).__name__


# ---- Tokenizers ----

def load_tokenizer(path):
    """Return the DiscreteVAE in a model.pt of train_dvae.py or in DALL-E's encoder.pkl, in evaluation mode.

    A decoder.pkl beside encoder.pkl is loaded too. Raises UserError.
    """
    contents, decoder = read_file(path), Path(path).with_name("decoder.pkl")
    kind = class_name(contents)
    if kind == "Encoder":
        return load_dalle(path, decoder if decoder.exists() else None)
    if kind != "DiscreteVAE":
        raise UserError(f"{path}: expected a tokenizer (model.pt of train_dvae.py, or DALL-E's encoder.pkl), "
                        f"found {kind}")
    with file_errors(path, "expected a tokenizer whose weights fit its config"), torch.device("meta"):
        contents["config"].pop("in_channels", None)                    # written by earlier versions
        model = dvae.DiscreteVAE(**contents["config"])
        model.load_state_dict(contents["model"], assign=True)
        model.image_size = contents.get("image_size")
    return model.eval().requires_grad_(False)


def load_dalle(encoder, decoder=None):
    """Return the DiscreteVAE in DALL-E's public encoder.pkl and decoder.pkl, in evaluation mode.

    Without a decoder it can only tokenize, and .decoder is None. Raises UserError.
    """
    state = read_dalle_module(encoder, "Encoder")
    if decoder:
        state |= read_dalle_module(decoder, "Decoder")
    with file_errors(encoder, "expected DALL-E's architecture"), torch.device("meta"):
        names = " ".join(state)
        model = dvae.DiscreteVAE(vocab_size=len(state["encoder.blocks.output.conv.w"]),
                                 hidden=len(state["encoder.blocks.input.w"]),
                                 groups=max(map(int, re.findall(r"\.group_(\d+)\.", names))),
                                 blocks_per_group=max(map(int, re.findall(r"\.block_(\d+)\.", names))))
        if not decoder:
            model.decoder = None
        model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def read_dalle_module(path, kind):
    """Return {name in a DiscreteVAE: tensor} of a pickled module of DALL-E. kind: Encoder or Decoder."""
    module, tensors = read_file(path), {}
    if class_name(module) != kind:
        raise UserError(f"{path}: expected DALL-E's {kind}, found {class_name(module)}")

    def collect(module, prefix):
        for name, tensor in module.state["_parameters"].items():
            tensors[prefix + name] = tensor.float()
        for name, child in module.state["_modules"].items():
            collect(child, f"{prefix}{name}.")

    with file_errors(path, f"expected DALL-E's {kind}, found a damaged one"):
        collect(module, f"{kind.lower()}.")
    return tensors


# ---- Backbones in ----

# Prefixes of parameter names: ours, Hugging Face's in files and, where they differ, Hugging Face's in memory
# (transformers 5). * is the number of a block. Models with a head put "beit." before those of the backbone.
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
    """Replace the beginning of a name by the first of the pairs (old, new) that matches."""
    for old, new in pairs:
        pattern = re.escape(old).replace(r"\*", r"(\d+)")
        if re.match(pattern, name):
            return re.sub(pattern, new.replace("*", r"\1"), name, count=1)
    return name


def load(path):
    """Read a BEiT of this project, the released code, timm or Hugging Face, with or without a head.

    Returns (state_dict with our names, info). The entries of info:
        source     "ours", "released BEiT", "timm" or "Hugging Face"
        task       "masked image modeling", "classification", "segmentation", "linear probe" or "none"
        config     vit.ViTConfig
        guessed    names of the fields of config that the file does not give
        outputs    number of tokens or classes that the head predicts, or None
        classes    names of the classes, or None
        eval_crop  side of the evaluated centre crop / shorter side of the image, or None if not known
        dropped    names of tensors that our models lack: of a linear probe, a UperNet decoder or other models
    Raises UserError for other files. Shapes are checked when a model takes the state_dict.
    """
    contents = read_file(path)
    kind = class_name(contents)
    with file_errors(path, "expected a BEiT"):
        state, prefix, source = find_state_dict(contents, kind, path)
        state, dropped = convert_names(state, prefix, source, kind, path)
        patches = list(state["patch_embed.proj.weight"].shape)
        if patches[1:] != [3, *patches[-1:] * 2]:
            raise UserError(f"{path}: expected square patches of 3 colours, [D, 3, P, P], found {patches}")
        head = state.get("lm_head.weight", state.get("head.weight"))
        task = "linear probe" if kind == "LinearProbe" else "none"
        if "lm_head.weight" in state:
            task = "masked image modeling"
        elif head is not None:
            task = {2: "classification", 4: "segmentation"}.get(head.dim(), "none")
        info = dict(source=source, task=task, outputs=None if head is None else len(head), guessed=[],
                    dropped=dropped)
        folder, fields, classes, eval_crop = Path(path).parent, {}, None, None
        if source == "ours":
            fields = contents["config"]["vit"]
            fields.pop("in_channels", None)                            # written by earlier versions
            info["config"] = vit.ViTConfig(**fields)
            classes, eval_crop = contents["config"].get("classes"), contents["config"].get("eval_crop")
        else:
            if source == "Hugging Face":
                fields, classes, eval_crop = read_huggingface_config(folder, task, info["outputs"])
            elif source == "timm":
                fields, classes, eval_crop = read_timm_config(folder, task, info["outputs"])
            info["config"], info["guessed"] = infer_config(state, fields)
            if source == "Hugging Face" and "pixel_mean" in info["guessed"]:
                half = (0.5, 0.5, 0.5)                                 # its default for BEiT
                info["config"] = dataclasses.replace(info["config"], pixel_mean=half, pixel_std=half)
        info |= dict(classes=classes, eval_crop=eval_crop)
        if task == "classification" and "fc_norm.weight" not in state:
            raise UserError(f"{path}: expected a head for the mean of the patches, found a head for [S]")
    return state, info


def find_state_dict(contents, kind, path):
    """Return (state_dict, prefix of the backbone's names, source as in `load`) from what a file holds."""
    state, source = contents, "timm"
    if isinstance(contents, dict) and "log_size" in contents:          # last.pt or previous.pt
        raise UserError(f"{path}: expected final weights, found a checkpoint to continue a run from; give "
                        f"{Path(path).with_name('model.pt')}, which the run writes at its end")
    for key in ("model", "module", "state_dict"):                      # released, DeepSpeed, mmsegmentation
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state, source = state[key], "released BEiT"
    names = [str(name) for name in state] if isinstance(state, dict) else []
    found = [name for name in names if name.endswith(PATCH_WEIGHTS)]
    if not found:
        kind += f" with {', '.join(names[:5])}" if names else ""
        raise UserError(f"{path}: expected a BEiT of this project, the released code, timm or Hugging Face, "
                        f"with {PATCH_WEIGHTS[0]}, found {kind}")
    if len(found) > 1:
        raise UserError(f"{path}: expected one BEiT, found {len(found)}, with {', '.join(found)}; save one")
    if "kind" in contents:
        source = "ours"
    elif "patch_embeddings" in found[0]:
        source = "Hugging Face"
    return state, found[0].removesuffix(PATCH_WEIGHTS[1]).removesuffix(PATCH_WEIGHTS[0]), source


def convert_names(state, prefix, source, kind, path):
    """Return (state_dict with our names in fp32, names of the tensors that our models lack).

    prefix: of the backbone's names, such as "module.beit.". A head and the last norm may lack it or a part of
    it; other tensors without it are not of this model. Buffers that follow from the config are removed.
    """
    pairs, foreign, converted, dropped = [], ["decode_head.", "auxiliary_head.", "fpn", "neck."], {}, []
    if source == "Hugging Face":
        pairs = [(hf_name, ours) for ours, *hf_names in HUGGINGFACE for hf_name in hf_names]
    if kind == "LinearProbe":
        foreign += HEADS
    for name, tensor in state.items():
        in_backbone = name.startswith(prefix)
        for part in prefix.split(".")[:-1]:
            name = name.removeprefix(f"{part}.")
        name = rename(name, pairs)
        of_model = in_backbone or name.startswith(("lm_head.", "head.", "norm."))
        if name.startswith(tuple(foreign)) or not of_model:
            dropped.append(name)
            continue
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: expected tensors, found {name}, which is not one")
        if name in converted:
            raise UserError(f"{path}: expected one {name}, found two")
        if not name.endswith(("relative_position_index", "attn.k_bias")):
            converted[name] = tensor.float() if tensor.is_floating_point() else tensor
    # Hugging Face has separate queries, keys and values, here q_weight, k_weight and v_weight: join them.
    for attn in [name.removesuffix("q_weight") for name in converted if name.endswith("attn.q_weight")]:
        converted[f"{attn}qkv.weight"] = torch.cat([converted.pop(f"{attn}{part}_weight") for part in "qkv"])
    return converted, dropped


def read_huggingface_config(folder, task, outputs):
    """Return (fields of vit.ViTConfig, classes, eval_crop) from the JSON files beside the weights.

    Raises UserError if our models would compute something other than config.json describes.
    """
    path, fields, eval_crop = folder / "config.json", {}, None
    hf_config, processor = read_json(path), read_json(folder / "preprocessor_config.json")
    if processor:
        with file_errors(folder / "preprocessor_config.json", "expected numbers for the pixels"):
            mean, std = processor.get("image_mean", 0.5), processor.get("image_std", 0.5)
            if not processor.get("do_normalize", True):
                mean, std = 0, 1
            factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
            fields = pixel_fields(mean, std, 255 * factor)
    if not hf_config:
        return fields, None, None
    if hf_config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path}: expected hidden_act gelu, found {hf_config['hidden_act']}")
    if task != "none" and not hf_config.get("use_mean_pooling", True):
        raise UserError(f"{path}: expected use_mean_pooling true, as our models average the patches")
    image_size, size = hf_config.get("image_size", 224), processor.get("size")
    height, width = image_size if isinstance(image_size, list) else (image_size, image_size)
    if height != width:
        raise UserError(f"{path}: expected a square image_size, found {image_size}, for which transformers "
                        "mixes up the positions")
    if processor.get("do_center_crop") and isinstance(size, dict) and "shortest_edge" in size:
        eval_crop = min(1.0, height / size["shortest_edge"])
    fields |= dict(image_size=height, heads=hf_config.get("num_attention_heads", 12),
                   layer_norm_eps=hf_config.get("layer_norm_eps", 1e-12),
                   layer_scale=hf_config.get("layer_scale_init_value", 0.1))
    return fields, class_names(hf_config.get("id2label"), task, outputs, path), eval_crop


def read_timm_config(folder, task, outputs):
    """Return (fields of vit.ViTConfig, classes, eval_crop) from timm's config.json beside the weights.

    Raises UserError if our models would compute something other than config.json describes.
    """
    path, eval_crop = folder / "config.json", None
    timm_config = read_json(path)
    if "architecture" not in timm_config:                              # config.json of something else
        return {}, None, None
    cfg = timm_config.get("pretrained_cfg", timm_config)
    pool = timm_config.get("global_pool", "avg")
    if task == "classification" and pool != "avg":
        raise UserError(f"{path}: expected global_pool avg, as our models average the patches, found {pool}")
    with file_errors(path, "expected numbers for the pixels"):
        fields = pixel_fields(cfg.get("mean", vit.IMAGENET_MEAN), cfg.get("std", vit.IMAGENET_STD))
        _, height, width = cfg.get("input_size", (3, 224, 224))
        if cfg.get("crop_mode", "center") == "center":
            eval_crop = height / int(height / (cfg.get("crop_pct") or 0.875))
    fields["layer_norm_eps"] = 1e-6
    if height != width:                                                # a square follows from the shapes
        fields["image_size"] = (height, width)
    if "num_heads" in timm_config.get("model_args", {}):
        fields["heads"] = timm_config["model_args"]["num_heads"]
    names = timm_config.get("label_names") or cfg.get("label_names") or cfg.get("labels")
    return fields, class_names(names, task, outputs, path), eval_crop


def pixel_fields(mean, std, scale=1.0):
    """Return the fields pixel_mean and pixel_std of vit.ViTConfig, for pixels from 0 to 1.

    mean, std: a number, or a list of one or three, for pixels from 0 to scale.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64).expand(3) / scale for values in (mean, std))
    return dict(pixel_mean=tuple(mean.tolist()), pixel_std=tuple(std.tolist()))


def class_names(names, task, outputs, path):
    """Return the names of classes in the order of the outputs, or None for other tasks and without names.

    names: from the JSON file at path: a list, or {number: name}.
    """
    if not names or task != "classification":
        return None
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]         # the keys of ImageNet-22K have gaps
    if len(names) != outputs:
        raise UserError(f"{path}: expected names of {outputs} classes, found {len(names)}")
    return None if names == [f"LABEL_{k}" for k in range(outputs)] else names    # Hugging Face's default


def infer_config(state, fields):
    """Return (vit.ViTConfig, names of guessed fields) for a state_dict with our names, from its shapes.

    fields: values known from elsewhere. What is not in them or the shapes is guessed: a square grid, heads of
    width 64 with absolute positions, 0.1 for layer_scale if there is one, and the defaults of ViTConfig.
    """
    dim, _, _, patch_size = state["patch_embed.proj.weight"].shape     # (D, 3, P, P)
    guessed = {"layer_norm_eps", "pixel_mean", "pixel_std"}
    table = next((name for name in state if name.endswith("relative_position_bias_table")), None)
    if table is None:
        position, heads = "absolute", max(1, dim // 64)
        guessed.add("heads")
    else:
        position = "shared_relative" if table.startswith("rel_pos_bias.") else "relative"
        heads = state[table].shape[1]
    if "blocks.0.gamma_1" in state:
        guessed.add("layer_scale")
    name = table or "pos_embed"
    side, _ = square_grid(name, state[name].shape[-2])
    inferred = dict(
        image_size=side * patch_size, patch_size=patch_size, dim=dim, heads=heads, position=position,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim,
        layer_scale=0.1 if "layer_scale" in guessed else 0.0)
    return vit.ViTConfig(**{**inferred, **fields}), sorted(guessed - fields.keys())


# ---- Into a model ----

def build(path):
    """Return the model in a file, in evaluation mode, and the info of `load`. Raises UserError.

    The model is a MaskedImageModel, ImageClassifier or SemanticSegmenter. For a linear probe, and without a
    head, it is a VisionTransformer, with norm and fc_norm if the file has them. Forward ignores fc_norm.
    """
    state, info = load(path)
    config, outputs = info["config"], info["outputs"]
    with file_errors(path, "expected weights that fit the config"):
        if info["task"] == "masked image modeling":
            model = vit.MaskedImageModel(config, outputs)
        elif info["task"] == "classification":
            model = vit.ImageClassifier(config, outputs)
        elif info["task"] == "segmentation":
            first = state.get("decoder.0.weight", torch.empty(0, 1))   # there is none for odd patch sizes
            model = vit.SemanticSegmenter(config, outputs, decoder_dim=first.shape[1])
        else:
            model = vit.VisionTransformer(config)
            if "norm.weight" not in state:
                model.norm = nn.Identity()
            if "fc_norm.weight" in state:
                model.fc_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        if not hasattr(model, "mask_token"):                           # written by the first version
            state.pop("mask_token", None)
        model.load_state_dict(state)
    return model.eval(), info


def load_model(path):
    """Return the model in a file, as `build` does, without its info."""
    return build(path)[0]


# ---- Backbones out ----

def write_tensors(state, path):
    """Write a state_dict with torch.save, or as safetensors if the path ends in .safetensors."""
    if Path(path).suffix != ".safetensors":
        write_atomically(path, lambda file: torch.save(state, file))
        return
    if safetensors is None:
        raise UserError(f"{path}: safetensors is not installed; give the name of a .bin or .pth file")
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    write_atomically(path, lambda file: file.write(safetensors.save(state, metadata={"format": "pt"})))


def save_timm(model, path):
    """Write a state_dict for timm.create_model("beit_...", checkpoint_path=path), without [M] and lm_head.

    Raises UserError for a segmenter.
    """
    if isinstance(model, vit.SemanticSegmenter):
        raise UserError(f"{path}: timm has no place for a segmenter's decoder; --to huggingface writes the "
                        "backbone alone")
    state = model.state_dict()
    write_tensors({name: state[name] for name in state if not name.startswith(("mask_", "lm_head."))}, path)


def save_huggingface(model, path, classes=None, eval_crop=None):
    """Write a folder that transformers opens: config.json, preprocessor_config.json and the weights.

    MaskedImageModel -> BeitForMaskedImageModeling, ImageClassifier -> BeitForImageClassification, others ->
    BeitModel (of a segmenter the backbone alone). classes: names of the classes. eval_crop: as for
    data.classification_transform; without it, the centre is the largest square. To classify an image:

        from transformers import AutoImageProcessor, BeitForImageClassification
        processor = AutoImageProcessor.from_pretrained(path)
        model = BeitForImageClassification.from_pretrained(path)
        logits = model(**processor(image, return_tensors="pt")).logits

    The tokenizer is not exported, because Hugging Face has no format for it. To decode predicted tokens, keep
    the file of the tokenizer: a model.pt of train_dvae.py, or DALL-E's .pkl files.

    Raises UserError, before it writes anything, for images that are not square and for a folder with anything
    but an earlier export.
    """
    config, architecture, head = model.config, "BeitModel", {}
    size, width = config.image_hw
    if size != width:
        raise UserError(f"{path}: expected a model of square images, found {size}x{width}, for which "
                        "transformers mixes up the positions")
    folder, weights_name = Path(path), "model.safetensors" if safetensors else "pytorch_model.bin"
    check_export_folder(folder, weights_name)
    if isinstance(model, vit.MaskedImageModel):
        architecture, head = "BeitForMaskedImageModeling", {"vocab_size": len(model.lm_head.weight)}
    elif isinstance(model, vit.ImageClassifier):
        architecture = "BeitForImageClassification"
        classes = list(classes or [f"LABEL_{k}" for k in range(len(model.head.weight))])
        head = {"id2label": dict(enumerate(classes)), "label2id": {name: k for k, name in enumerate(classes)}}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {
        "model_type": "beit", "architectures": [architecture],
        "image_size": size, "patch_size": config.patch_size,
        "num_channels": 3, "hidden_size": config.dim, "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads, "intermediate_size": round(config.dim * config.mlp_ratio),
        "hidden_act": "gelu", "layer_norm_eps": config.layer_norm_eps,
        "layer_scale_init_value": config.layer_scale, "drop_path_rate": config.drop_path,
        "use_mask_token": isinstance(model, vit.MaskedImageModel),
        "use_mean_pooling": architecture != "BeitModel" or isinstance(model.norm, nn.Identity),
        "use_absolute_position_embeddings": config.position == "absolute",
        "use_relative_position_bias": config.position == "relative",
        "use_shared_relative_position_bias": config.position == "shared_relative", **head})
    write_json(folder / "preprocessor_config.json", huggingface_processor(config, eval_crop or 1))
    write_tensors(huggingface_state_dict(model), folder / weights_name)


def check_export_folder(folder, weights_name):
    """Raise UserError if a folder holds anything but an earlier export with weights of this name."""
    found = [file.name for file in folder.iterdir()] if folder.exists() else []
    others = sorted(set(found) - {"config.json", "preprocessor_config.json", weights_name})
    if found and (others or read_json(folder / "config.json").get("model_type") != "beit"):
        raise UserError(f"{folder}: expected a new folder, or one with nothing but an earlier export, found "
                        f"{', '.join(others or found)}")


def huggingface_processor(config, eval_crop):
    """Return preprocessor_config.json, a dict, for a vit.ViTConfig of square images."""
    size, _ = config.image_hw
    # The processor without "Fast" in its name knows no shortest_edge in transformers 4.
    return {
        "image_processor_type": "BeitImageProcessorFast",
        "do_convert_rgb": True, "do_resize": True, "resample": 3,      # bicubic
        "size": {"shortest_edge": round(size / eval_crop)},
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": config.pixel_mean, "image_std": config.pixel_std}


def huggingface_state_dict(model):
    """Return the state_dict of a model with Hugging Face's names; q, k and v are separate there."""
    state, prefix = model.state_dict(), "beit."
    if not isinstance(model, (vit.MaskedImageModel, vit.ImageClassifier)):
        state, prefix = {name: state[name] for name in state if not name.startswith(HEADS)}, ""
    for attn in [f"blocks.{i}.attn." for i in range(model.config.depth)]:
        for part, weight in zip("qkv", state.pop(f"{attn}qkv.weight").chunk(3)):
            state[f"{attn}{part}_weight"] = weight.clone()             # safetensors refuses views
    state = {rename(name, [row[:2] for row in HUGGINGFACE]): tensor for name, tensor in state.items()}
    outside = ("lm_head.", "layernorm.", "classifier.")    # not in the BeitModel of a model with a head
    return {name if name.startswith(outside) else prefix + name: tensor for name, tensor in state.items()}


def main():
    parser = argparse.ArgumentParser(description="Describe a checkpoint, or convert it.", allow_abbrev=False)
    parser.add_argument("file", help="of this project, the released BEiT, timm or Hugging Face")
    parser.add_argument("--to", nargs=2, metavar=("FORMAT", "OUT"), help="huggingface FOLDER or timm FILE")
    args = parser.parse_args()
    target, out = args.to or (None, "")
    if target not in (None, "huggingface", "timm"):
        parser.error(f"--to: must be huggingface or timm, got {target}")
    if target == "huggingface" and Path(out).is_file():
        parser.error(f"--to: huggingface takes a folder, and {out} is a file")
    if target == "huggingface" and Path(out).resolve() == Path(args.file).resolve().parent:
        parser.error(f"--to: huggingface takes another folder than that of {args.file}")
    if target == "timm" and (Path(out).is_dir() or not Path(out).parent.is_dir()):
        parser.error(f"--to: timm takes a file in a folder that exists, got {out or 'nothing'}")
    if target == "timm" and Path(out).exists():
        parser.error(f"--to: timm takes a new file, and {out} exists")
    with one_line_errors():
        model, info = build(args.file)
        say(f"{args.file}: {info['source']}, {type(model).__name__}, {info['outputs'] or 'no'} outputs, "
            f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, "
            f"{len(info['dropped'])} tensors left out\n{info['config']}")
        if info["guessed"]:
            say(f"warning: the file does not give {', '.join(info['guessed'])}; the values above are guesses")
        if target == "huggingface":
            save_huggingface(model, out, info["classes"], info["eval_crop"])
        elif target == "timm":
            save_timm(model, out)
            say("timm has no place for the preprocessing: pass mean={} and std={} to its transforms".format(
                model.config.pixel_mean, model.config.pixel_std))
        if target:
            say(f"written to {out}, for {target}")


if __name__ == "__main__":
    main()
