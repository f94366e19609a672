"""Initialise a model from a pre-trained checkpoint (--init): sizes, weights, positions, head."""
import textwrap
from pathlib import Path
from typing import NamedTuple

import run_folder
import weights
from launch import UserError, say
from positions import TABLE, resize_positions

MODEL_FIELDS = ("patch_size", "dim", "depth", "heads", "mlp_ratio", "layer_norm_eps", "position",
                "layer_scale", "pixel_mean", "pixel_std")    # fields of vit.ViTConfig, from the checkpoint


class Checkpoint(NamedTuple):
    """A file of weights that has been read: its path, and the state_dict and info of weights.load."""
    path: str
    state: dict
    info: dict


def open_checkpoint(args, *, evaluate=False, copy_shared_table=True):
    """Read the checkpoint --init, and set the flags of the model's sizes to those of the checkpoint.

    Default: the model.pt that pretrain.py wrote for the same --data; to evaluate, that of the run args.out.
    Returns a Checkpoint, or None for --init none. Raises UserError.
    """
    if args.init == "none":
        if evaluate:
            raise UserError("--init: there is nothing to evaluate with none; give a model.pt")
        if args.image_size is None:
            args.image_size = 64 if args.preset == "demo" else 224
        return None
    if args.init is None:
        if evaluate:
            args.init, script = f"{args.out}/model.pt", "this script without --eval"
        else:
            args.init = f"runs/pretrain-{Path(args.data).resolve().name}/model.pt"
            script = "pretrain.py with the same --data"
        if not Path(args.init).is_file():
            raise UserError(f"--init: {args.init} does not exist; {script} writes it, --init FILE names "
                            "another checkpoint, --init none trains from scratch")
        run_folder.check_default("init", args.init, args.data)
    state, info = weights.load(args.init)
    if evaluate and "image_size" not in args.given:
        args.image_size = None                                         # the checkpoint's, not the preset's
    if evaluate and "eval_crop" not in args.given and info["eval_crop"]:
        args.eval_crop = info["eval_crop"]
    apply_checkpoint_sizes(args, args.init, info, copy_shared_table=copy_shared_table and not evaluate)
    return Checkpoint(args.init, state, info)


def apply_checkpoint_sizes(args, path, info, *, copy_shared_table):
    """Set the flags named in MODEL_FIELDS to the values of a checkpoint. path, info: its file, and its info.

    A flag of the command line (args.given) that contradicts the checkpoint raises UserError. Where the
    checkpoint's value is only a guess, the flag is kept. args.image_size is set only if it is None.
    copy_shared_table: unless --position is given, a position table shared by all blocks becomes one for each
    block, as in the released code for fine-tuning.
    """
    config = info["config"]
    sizes = {name: getattr(config, name) for name in MODEL_FIELDS}
    given = {name: getattr(args, name) for name in MODEL_FIELDS if name in args.given}
    position = given.get("position")
    if position is None and copy_shared_table:
        position = "relative"
    if config.position == "shared_relative" and position == "relative":
        sizes["position"] = "relative"
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        # The value of layer_scale is a guess, but not whether there is one: the parameters show that.
        contradicts = name == "layer_scale" and (value > 0) != (sizes[name] > 0)
        if name in info["guessed"] and not contradicts:
            sizes[name] = value
        elif value != sizes[name]:
            raise UserError(f"--{name.replace('_', '-')}: {path} has {sizes[name]}, not {value}")
    vars(args).update(sizes)
    if args.image_size is None:
        args.image_size, width = config.image_hw
        if args.image_size != width:
            raise UserError(f"--image-size: {path} has {args.image_size}x{width}; give the side of a square")


def load_weights(model, checkpoint, classes, *, need_head=False):
    """Load a Checkpoint into a model, unless it is None. need_head: UserError if its head does not fit."""
    if checkpoint is None:
        return
    new = initialise(model, *checkpoint, classes)
    if need_head and any(name.startswith(weights.HEADS) for name in new):
        found = checkpoint.info["classes"] or ["without names"]
        expected = textwrap.shorten(", ".join(classes), 200, placeholder=" ...")
        found = textwrap.shorten(", ".join(found), 200, placeholder=" ...")
        raise UserError(f"--eval: {checkpoint.path} has no head for this task and these classes: {expected}. "
                        f"Its task is {checkpoint.info['task']}, its classes: {found}. A model.pt of this "
                        "script for the same --data has one")


def initialise(model, path, state, info, classes=None):
    """Fill a model from a checkpoint, and print what was taken, what was converted and what is new.

    state, info: those of weights.load(path). Positions are resized to the model's grid, and a table shared by
    all blocks is copied into each block. fc_norm is new, not filled from norm, as in the released code.
    classes: names of the model's classes. The head is taken only if it fits the model and these classes.
    Raises UserError for any other difference. Returns the names of the parameters that are new.
    """
    source, target, initial = info["config"], model.config, model.state_dict()
    for name in ("heads", "layer_norm_eps"):                           # tensor shapes do not show these
        expected, found = getattr(target, name), getattr(source, name)
        if expected != found and name not in info["guessed"]:
            raise UserError(f"{path}: expected {name} {expected} as in the model, found {found}")
    with weights.file_errors(path, "expected weights that fit the model"):
        taken, converted = convert_positions(state, source, target, path)
        taken, converted_head = match_head(taken, info, initial, classes)
        # Drop what this model does not need. Any other unknown name makes load_state_dict raise.
        taken = {name: tensor for name, tensor in taken.items()
                 if name in initial or not name.startswith(("mask_token", "norm.", "fc_norm."))}
        new = [name for name in initial if name not in taken]
        allowed = (*weights.HEADS, "fc_norm.", "norm.")
        may_be_new = {name: initial[name] for name in new if name.startswith(allowed)}
        model.load_state_dict({**may_be_new, **taken})
    head_taken = ", its head among them" if any(name.startswith(weights.HEADS) for name in taken) else ""
    left_behind = [name for name in state if name not in taken and not name.endswith(TABLE)]
    say(f"taken from {path} ({info['source']}, {info['task']}): {len(taken)} tensors{head_taken}")
    say(f"converted: {'; '.join(converted + converted_head) or 'nothing'}")
    say(f"new: {modules_of(new)}; left behind: {modules_of(left_behind + info['dropped'])}")
    return new


def modules_of(names):
    """Return the modules that hold these parameters, as a line of text."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in names)) or "nothing"


def convert_positions(state, source, target, path):
    """Return (state_dict with positions as in the config `target`, list of what was converted)."""
    state, converted = dict(state), []
    if (source.position, target.position) == ("shared_relative", "relative"):
        table = state.pop(f"rel_pos_bias.{TABLE}")
        state |= {f"blocks.{i}.attn.{TABLE}": table for i in range(target.depth)}
        converted.append("the shared position table, into one for each block")
    elif source.position != target.position:
        raise UserError(f"{path}: expected {target.position} positions as in the model, found "
                        f"{source.position}; --position {source.position} fits")
    if source.grid != target.grid:
        state = resize_positions(state, target, source.grid)
        converted.append("positions, from {}x{} to {}x{}".format(*source.grid, *target.grid))
    return state, converted


def match_head(state, info, initial, classes):
    """Return (state_dict, list of what was converted). The head stays only if it fits the model.

    It fits if its shapes are those in `initial`, the model's own state_dict, and if the file names either no
    classes or the same set as `classes`. Its rows are then put into the order of `classes`.
    """
    head = [name for name in state if name.startswith(weights.HEADS)]
    fits = all(name in initial and initial[name].shape == state[name].shape for name in head)
    found = list(info["classes"] or classes or [])
    expected = list(classes or found)
    # Another order can only be undone if no name occurs twice (ImageNet has two cranes).
    can_reorder = len(set(expected)) == len(expected) and sorted(found) == sorted(expected)
    if found != expected and not can_reorder:
        fits = False
    if not fits:
        return {name: tensor for name, tensor in state.items() if name not in head}, []
    if not head or found == expected:
        return state, []
    order = [found.index(name) for name in expected]
    reordered = {name: state[name][order] for name in ("head.weight", "head.bias")}
    return {**state, **reordered}, ["the head, into the order of these classes"]
