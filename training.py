"""What the training loops share: flags, processes, schedules, parameter groups, the folder of a run."""
import argparse
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:
    sys.exit("this system has no fcntl, which locks the folder of a run; Linux, macOS and WSL have it")


class UserError(ValueError):
    """A wrong flag or file. Its one line names it and what would be accepted, and ends the script."""


# ---- Flags: each field Annotated[type, help, (least, most)] of a frozen dataclass is one ----

@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Flags of all training scripts. Raises ValueError("field: what is wrong with it")."""
    preset: Annotated[str | None, "default: demo (minutes on a CPU), with --data base"] = None
    data: Annotated[str, "shapes, fashion-mnist, cifar10, cifar100, or a folder of images"] = "shapes"
    data_root: Annotated[str, "folder with the files of fashion-mnist, cifar10 and cifar100"] = "data"
    out: Annotated[str | None, "folder of this run, continued if it exists; else runs/<script>-<data>"] = None
    fresh: Annotated[bool, "rename an existing --out and start over"] = False
    steps: Annotated[int | None, "optimizer steps, instead of --epochs", (1, inf)] = None
    epochs: Annotated[float | None, "passes over the training images", (1e-9, inf)] = None
    batch_size: Annotated[int, "images per step, of all processes together", (1, inf)] = 2048
    accumulate: Annotated[int, "compute a batch in so many parts, to fit memory", (1, inf)] = 1
    lr: Annotated[float, "peak learning rate; else the preset's, scaled by batch size", (1e-12, inf)] = 1.5e-3
    min_lr: Annotated[float, "final learning rate; else the preset's, scaled likewise", (0, inf)] = 1e-5
    warmup: Annotated[float, "share of the steps with rising lr; paper: 10 of 800 epochs", (0, 1)] = 0.0125
    weight_decay: Annotated[float, "of AdamW", (0, inf)] = 0.05
    clip_grad: Annotated[float, "largest norm of the gradient, 0 = no clipping", (0, inf)] = 3.0
    seed: Annotated[int, "of every random draw", (0, 2 ** 32 - 1)] = 0
    workers: Annotated[int | None, "loader processes per rank; 8 on a GPU, 0 on a CPU", (0, inf)] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], "auto: a GPU if there is one"] = "auto"
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"],
                         "auto: bf16 where the hardware has it, else fp16 on a GPU, fp32 on a CPU"] = "auto"
    compile: Annotated[bool, "torch.compile the model"] = False
    log_every: Annotated[int, "steps between two lines of metrics.jsonl", (1, inf)] = 10
    save_every: Annotated[int, "steps between two checkpoints", (1, inf)] = 1000

    def __post_init__(self):
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if value == "":
                raise ValueError(f"{name}: not an empty text")
            for least, most in getattr(hint, "__metadata__", ())[1:]:    # of (help, range) the range, if any
                for number in value if isinstance(value, tuple) else [value]:
                    if number is not None and not (least <= number <= most and number < inf):
                        raise ValueError(f"{name}: a number from {least} to {most}, not {number}")
        parts = world_size() * self.accumulate
        if self.batch_size % parts:
            raise ValueError(f"batch_size: {self.batch_size} does not divide into {world_size()} processes x "
                             f"{self.accumulate} parts; {math.ceil(self.batch_size / parts) * parts} would")
        if hasattr(super(), "__post_init__"):
            super().__post_init__()    # of vit.ViTConfig, in a script's Config


MAY_CHANGE = ("out", "fresh", "workers", "device", "data_root")    # in a run that is continued


def make_parser(Config, presets):
    """argparse's parser with a flag for each annotated field; help shows the defaults of presets."""
    description = sys.modules[Config.__module__].__doc__
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=description, allow_abbrev=False)
    for name, hint in get_type_hints(Config, include_extras=True).items():
        if not hasattr(hint, "__metadata__"):
            continue
        defaults = [f"{preset} {values[name]}" for preset, values in presets.items() if name in values]
        text = f"{hint.__metadata__[0]} ({', '.join([*defaults, f'default {getattr(Config, name)}'])})"
        kind, arguments = hint.__origin__, get_args(hint.__origin__)
        options = {"type": arguments[0] if arguments else kind}        # the int of int | None
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            options = {"choices": arguments}
        elif name == "preset":
            options = {"choices": list(presets)}
        elif get_origin(kind) is tuple:
            options["nargs"] = len(arguments)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)
    return parser


def parse(Config, presets, argv=None, complete=None):
    """Config from the command line: field defaults < preset < flags. Raises UserError for a refused value.

    complete(preset, flags) -> (preset, values) may choose the preset, and values between it and the flags:
    finetune.py takes the sizes of a checkpoint.
    """
    flags = vars(make_parser(Config, presets).parse_args(argv))
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    if "steps" in flags and "epochs" in flags:
        raise UserError("--steps and --epochs: give one of them")
    preset, completed = flags.get("preset", "base" if "data" in flags else "demo"), {}
    if complete:
        preset, completed = complete(preset, flags)
    recipe = {"data": "shapes", "min_lr": Config.min_lr, **presets[preset], "preset": preset}
    values = {**recipe, **completed, **flags}
    if "steps" in flags or "epochs" in flags:    # one of them replaces the preset's other
        values |= {"steps": flags.get("steps"), "epochs": flags.get("epochs")}
    scale = values["batch_size"] / recipe["batch_size"]
    for name in ("lr", "min_lr"):
        values[name] = flags.get(name, recipe[name] * scale)
    script = Path(sys.modules[Config.__module__].__file__).stem
    values.setdefault("out", f"runs/{script}-{Path(values['data']).resolve().name}")
    config = build(Config, values)
    if scale != 1 and "lr" not in flags:
        say(f"lr {config.lr:g} = {recipe['lr']:g} x batch {config.batch_size} / {recipe['batch_size']} "
            f"of preset {preset}; --lr sets another")
    return config


def build(Config, values):
    """Config(**values); its ValueError("field: what is wrong") becomes a UserError that names the flag."""
    try:
        return Config(**values)
    except ValueError as error:
        field, _, wrong = str(error).partition(": ")
        raise UserError(f"--{field.replace('_', '-')}: {wrong}") from None


def steps_and_epoch(config, images):
    """(steps of the run, steps per epoch of so many images). A last, smaller batch is left out."""
    if images < config.batch_size:
        raise UserError(f"--batch-size: {config.batch_size} is more than the {images} training images")
    per_epoch = images // config.batch_size
    return config.steps or max(1, round(config.epochs * per_epoch)), per_epoch


# ---- Processes ----

def rank():
    """Number of this process among all of torchrun's."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """Number of processes on all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def wrong_environment():
    """What is wrong with torchrun's variables: they must be numbers, and RANK and WORLD_SIZE set, or none."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
    values = [os.environ.get(name) for name in names]
    numbers = [(value or "").isdecimal() for value in values]
    if values == [None] * 3 or all(numbers) or numbers[:2] == [True, True] and values[2] is None:
        return None
    given = (f"no {name}" if value is None else f"{name}={value}" for name, value in zip(names, values))
    return (f"the environment has {', '.join(given)}; torchrun sets all three to numbers: start with it, or "
            "unset them")


def say(text):
    """print on the first process, above its progress bar."""
    if rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def run_script(Config, presets, train, complete=None):
    """main() of a training script: read the flags, join the other processes, train(config, device)."""
    with one_line_errors():
        config = parse(Config, presets, complete=complete)
        say(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(config).items()))
        train(config, join_processes(config))
        if dist.is_initialized():
            dist.destroy_process_group()    # not after an error: it would wait for the other processes


@contextmanager
def one_line_errors():
    """One line on stderr and exit status 2 for a UserError, 1 for an OSError or FloatingPointError."""
    with suppress(AttributeError):    # names of files may not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    wrong = wrong_environment()
    try:
        if wrong:
            raise UserError(wrong)
        yield
    except (UserError, OSError, FloatingPointError) as error:
        wrong_use = isinstance(error, UserError)                       # then all ranks say the same
        if wrong or not wrong_use or os.environ.get("LOCAL_RANK", "0") == "0":
            text = str(error).strip() or type(error).__name__
            line = text.splitlines()[-1].removeprefix("OSError: ")     # a loader's error is a whole traceback
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(2 if wrong_use else 1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def join_processes(config):
    """Choose and set up this process's device, and join torchrun's other processes. Returns the device."""
    with suppress(ValueError):                                         # macOS names no highest limit
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))       # loaders keep many files open
    torch.set_flush_denormal(True)    # on some CPUs arithmetic on denormal numbers is many times slower
    gpus, needed = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))    # one per process
    if config.device == "cpu" or (config.device == "auto" and gpus == 0):
        device, backend = torch.device("cpu"), dict(backend="gloo")
    elif gpus < needed:
        raise UserError(f"--device: {needed} GPUs are needed and {gpus} are here; cpu works without")
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = dict(backend="nccl", device_id=device)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    if world_size() > 1:
        try:
            dist.init_process_group(**backend)
        except ValueError as error:                                    # MASTER_ADDR is not set, and the like
            raise UserError(f"{error}; start with torchrun") from None
    return device


def on_first_process(function):
    """Call function() on rank 0; all processes return its result, or raise its UserError or OSError."""
    result_and_error = [None, None]
    if rank() == 0:
        try:
            result_and_error[0] = function()
        except (UserError, OSError) as error:
            result_and_error[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(result_and_error, src=0)
    result, error = result_and_error
    if error:
        raise error
    return result


def all_sum(tensor):
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def distribute(model, device):
    """DistributedDataParallel, which averages gradients over processes, if there are several."""
    if world_size() == 1:
        return model
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)    # its new name is too new
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                   broadcast_buffers=False, gradient_as_bucket_view=True)


def accumulating(network, part, parts):
    """Context of one part of a batch: gradients are exchanged in the last part only."""
    return network.no_sync() if part < parts - 1 and world_size() > 1 else nullcontext()


# ---- One step ----

def seed_step(seed, step):
    """Seed the draws of the model (stochastic depth, Gumbel noise, mixup) by (seed, step, rank)."""
    torch.manual_seed(hash((seed, step, rank())))


def cosine(step, total, start, end):
    """Half a cosine from start, at step 0, to end, at step total and after."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1, step / max(1, total))))


def warmup_cosine(step, total, peak, end, warmup_steps):
    """Learning rate: linear to peak over warmup_steps, then half a cosine to end (Tables 12 and 13)."""
    if step < warmup_steps:
        return peak * min(1, (step + 1) / warmup_steps)
    return cosine(step - warmup_steps, total - warmup_steps, peak, min(end, peak))


def set_lr(optimizer, lr):
    """Give each parameter group the learning rate lr times its "lr_scale". Returns lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def parameter_groups(model, weight_decay, layer_decay=1.0):
    """Groups for AdamW with layer-wise learning-rate decay (Table 13).

    Layer l has the "lr_scale" layer_decay ** (L + 1 - l). Layer 0 are the embeddings and a shared position
    bias, 1 ... L the blocks, L + 1 the heads. As in the released code, vectors, [S] and E_pos have no weight
    decay.
    """
    depth, groups = len(model.blocks), {}
    for name, parameter in model.named_parameters():
        layer = depth + 1
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("cls_token", "mask_token", "pos_embed", "patch_embed", "rel_pos_bias")):
            layer = 0
        scale = layer_decay ** (depth + 1 - layer)
        decay = 0.0 if parameter.dim() == 1 or name in ("cls_token", "pos_embed") else weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


class Precision:
    """The dtype of matrix products, autocast to it, and the gradient scaler that fp16 needs."""

    def __init__(self, name, device):
        if name == "auto" and device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif name == "auto":    # a CPU without AMX emulates bf16, which is slower than fp32
            cpu = Path("/proc/cpuinfo")
            name = "bf16" if cpu.exists() and "amx_bf16" in cpu.read_text() else "fp32"
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
        self.device_type = device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self):
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def update(self, optimizer, clip_grad):
        """Clip the gradient to norm clip_grad (0: do not), step, clear. Returns the norm before clipping."""
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or inf)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        return norm


# ---- The folder of a run ----

def write_atomically(path, write, keep=None):
    """Call write(file) on a new file, fsync, rename it to path, so that path is never half-written.

    keep: the old file gets this name. Raises OSError with the free space of a full disk.
    """
    beside = Path(f"{path}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:                           # torch.save raises RuntimeError, too
        beside.unlink(missing_ok=True)
        free = shutil.disk_usage(Path(path).parent).free / 2 ** 20
        raise OSError(f"{path} could not be written ({error}); {free:,.1f} MB are free") from None
    if keep and Path(path).exists():
        os.replace(path, keep)
    os.replace(beside, path)


def write_json(path, value):
    """write_atomically, as JSON, with null for numbers that are not finite."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def draw_or_warn(draw, *inputs):
    """draw(*inputs), the picture of a finished run: an error is only a warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                            # such as a letter that the font lacks
            draw(*inputs)
    except Exception as error:                                         # whatever libraries raise
        say(f"warning: the picture could not be drawn ({type(error).__name__}: {error})")


def damage(path):
    """What is wrong with a checkpoint, or None. Tests the checksums of torch.save's zip archive.

    testzip skips folders, and a flipped bit can turn a file into one, or give two files the same name.
    """
    folder = 16                                                        # its bit in external_attr
    try:
        with zipfile.ZipFile(path) as archive:
            broken, entries = archive.testzip(), archive.infolist()
        files = {entry.filename for entry in entries if not entry.external_attr & folder}
        if broken or len(files) < len(entries):
            return f"{broken} fails its checksum" if broken else "its table of contents is wrong"
        torch.load(path, map_location="meta", weights_only=True)["step"]
        return None
    except Exception as error:                                         # zipfile and torch raise a dozen kinds
        return type(error).__name__


class Run:
    """The folder config.out of a run. Rank 0 writes, all ranks read.

    It holds config.json, metrics.jsonl, last.pt to continue from, previous.pt before it, and at the end
    model.pt and result.json. Raises UserError if it holds another configuration, is in use, or is not seen by
    all machines.
    """

    def __init__(self, config, device, steps):
        self.config, self.steps, self.folder = config, steps, Path(config.out)
        self.start = 0            # first step to do
        self._received = 0        # signal that this process received during a step
        self.stop_signal = 0      # signal that all processes know about
        try:
            self.finished = on_first_process(self._open)
        except OSError as error:
            raise UserError(f"--out: {error}") from None
        seen = torch.tensor(float((self.folder / "config.json").exists()), device=device)
        if all_sum(seen) < world_size():    # every process must see the file that rank 0 wrote
            raise UserError(f"--out: not all machines see {self.folder}; name a folder that they share")

    def _open(self):
        file, config = self.folder / "config.json", json.loads(json.dumps(dataclasses.asdict(self.config)))
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"    # by torchrun: continue it
        if self.config.fresh and file.exists() and not restarted:
            self._lock()
            aside = (Path(f"{self.folder}.old-{n}") for n in itertools.count(1))
            self.folder.rename(next(path for path in aside if not path.exists()))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        if not file.exists():
            write_json(file, config)
        try:
            before = dict(json.loads(file.read_bytes()))
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"--out: {file} is not JSON; name another, or rename this with --fresh") from None
        differ = [f"{name} ({before.get(name)}, now {config.get(name)})" for name in before | config
                  if name not in MAY_CHANGE and before.get(name) != config.get(name)]
        if differ:
            raise UserError(f"--out: {self.folder} holds a run with another {', '.join(differ)}; "
                            "name another --out, or rename this with --fresh")
        return (self.folder / "result.json").exists()

    def _lock(self):
        self._lock_file = open(self.folder / "lock", "w")              # locked as long as it is open
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"--out: {self.folder} is in use by another process; name another") from None

    def restore(self, **parts):
        """Load the last intact checkpoint into the parts, if there is one; delete later lines of the log."""
        log, size = self.folder / "metrics.jsonl", 0
        if on_first_process(self._find_checkpoint):
            state = torch.load(self.folder / "last.pt", map_location="cpu", weights_only=True)
            for name, part in parts.items():
                if state[name]:                                        # a scaler that was off has no state
                    part.load_state_dict(state[name])
            self.start, size = state["step"], state["log_size"]
            say(f"continuing {self.folder} after step {self.start} of {self.steps}")
        if rank() == 0 and log.exists():
            os.truncate(log, min(size, log.stat().st_size))

    def _find_checkpoint(self):
        """Whether there is a checkpoint. A damaged last.pt is renamed, and previous.pt takes its place."""
        last, damaged = self.folder / "last.pt", []
        for path in (last, self.folder / "previous.pt"):
            wrong = damage(path) if path.exists() else None
            if wrong:
                damaged.append(f"{path} is damaged ({wrong})")
            elif path.exists():
                if damaged:
                    say(f"warning: {damaged[0]} and set aside; {path} is used")
                    os.replace(last, f"{last}.damaged")
                os.replace(path, last)                                 # nothing happens to last.pt itself
                return True
        if damaged:
            raise UserError(f"--out: {' and '.join(damaged)}; put back a copy, or start over with --fresh")
        return False

    def progress(self, label):
        """The steps to do, with a progress bar. SIGTERM and SIGINT take effect at the end of a step."""
        signals = (signal.SIGTERM, signal.SIGINT)
        handlers = [signal.signal(number, self._remember) for number in signals]
        self._last_line = self.start, time.perf_counter()              # of the log: its step and time
        yield from tqdm(range(self.start, self.steps), desc=label, initial=self.start, total=self.steps,
                        leave=False, disable=rank() > 0 or not sys.stderr.isatty())
        for number, handler in zip(signals, handlers):
            signal.signal(number, handler)
        if self._received:                                             # since the last all_reduce
            os.kill(os.getpid(), self._received)

    def _remember(self, number, frame):
        if self._received == number == signal.SIGINT:                  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self._received = number

    def all_reduce(self, step, values):
        """Means over processes of a vector, the loss first, as floats: the only synchronisation of a step.

        All processes learn here if one of them received a signal. FloatingPointError if the mean loss is not
        finite.
        """
        received = values.new_full((1,), float(self._received))
        *means, received = all_sum(torch.cat([values.detach(), received]) / world_size()).tolist()
        self._step_done = time.perf_counter()
        if received:
            self.stop_signal = self._received or signal.SIGTERM
        if not math.isfinite(means[0]):
            raise FloatingPointError(f"step {step}: the loss is {means[0]}; the last checkpoint is kept; "
                                     "try a lower --lr, or --precision bf16 or fp32")
        return means

    def log(self, step, **values):
        """Add a line to metrics.jsonl: every --log-every steps, at the first and last, after an evaluation.

        step: how many are finished. values: numbers, or tensors, which are read only if the line is written.
        """
        evaluated = any(name.startswith("val_") for name in values)
        if rank() > 0 or not (step % self.config.log_every == 0 or step in (1, self.steps) or evaluated):
            return
        before, start = self._last_line
        self._last_line = step, time.perf_counter() if evaluated else self._step_done    # not the evaluation
        values = {name: float(value) for name, value in values.items()}
        images = (step - before) * self.config.batch_size
        values["images_per_second"] = round(images / (self._step_done - start), 1)
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
        except OSError as error:
            raise OSError(f"{self.folder / 'metrics.jsonl'} could not be written ({error})") from None
        if step % max(1, self.steps // 10) < self.config.log_every or evaluated:    # about ten times per run
            say(f"step {step}/{self.steps}  {in_words(values)}")

    def save_or_stop(self, step, **parts):
        """Write last.pt every --save-every steps and at the end; after a signal, write it and end by it."""
        if rank() == 0 and (self.stop_signal or step % self.config.save_every == 0 or step == self.steps):
            self.save(step, **parts)
        if self.stop_signal:
            name = signal.Signals(self.stop_signal).name
            say(f"{name}: stopped after step {step}; the same command continues")
            if dist.is_initialized():
                dist.barrier()
            signal.signal(self.stop_signal, signal.SIG_DFL)
            os.kill(os.getpid(), self.stop_signal)

    def save(self, step, **parts):
        """Write last.pt from the state_dicts of the parts; the one before becomes previous.pt."""
        log = self.folder / "metrics.jsonl"
        state = {"step": step, "log_size": log.stat().st_size if log.exists() else 0}
        state |= {name: part.state_dict() for name, part in parts.items()}
        for name, tensor in state["model"].items():
            if not tensor.isfinite().all():
                raise FloatingPointError(f"step {step}: {name} is not finite; no checkpoint was written")
        last = self.folder / "last.pt"
        write_atomically(last, lambda file: torch.save(state, file), keep=self.folder / "previous.pt")

    def finish(self, model, config, **result):
        """Write model.pt (weights, config, class name), which --init or --tokenizer take, and result.json."""
        if rank() == 0:
            kept = {"model": model.state_dict(), "config": config, "kind": type(model).__name__}
            write_atomically(self.folder / "model.pt", lambda file: torch.save(kept, file))
            write_json(self.folder / "result.json", result)
        if dist.is_initialized():
            dist.barrier()                                             # the others may read model.pt next


def numbers(report):
    """The entries of a report that are single numbers."""
    return {name: value for name, value in report.items() if isinstance(value, (int, float))}


def in_words(report):
    """The numbers of a report on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers(report).items())
