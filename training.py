"""What the loops of all scripts share: the command line, processes and signals, schedules, parameter groups, precision,
and the folder of a run with its checkpoints and log. The loops themselves stand in the scripts.
"""
import argparse
import dataclasses
import difflib
import fcntl
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import typing
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, record_function
from tqdm import tqdm

from checkpoints import UserError, damage, one_line_if_disk_fails, read_checkpoint, save_sealed, size_of, write_atomically, write_json


# ---------------------------------------------------------------------------------------------------------------------
# Command line: one flag for each field of a frozen dataclass that has a comment
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run"""
    preset: str | None = None    # where the defaults come from: demo (minutes on a CPU) without --data, base (the paper's) with it
    data: str = "shapes"    # shapes, fashion-mnist, cifar10, cifar100, or a folder of images
    data_root: str = "data"    # folder that holds the files of fashion-mnist, cifar10 and cifar100
    out: str | None = None    # folder of this run, continued if it exists; default runs/<script>-<data>
    fresh: bool = False    # set an existing --out aside (renamed, not deleted) and start over
    steps: int | None = None    # optimizer steps; overrides --epochs
    epochs: float | None = None    # passes over the training images
    batch_size: int = 2048    # images a step, all processes and accumulated parts together
    accumulate: int = 1    # parts a batch is computed in, to fit memory
    lr: float = 1.5e-3    # peak learning rate; without it the preset's, times batch size / the preset's batch size
    min_lr: float = 1e-5    # learning rate that the cosine schedule ends at; without it scaled likewise
    warmup: float = 0.0125    # share of the steps in which the learning rate rises linearly; paper: 10 of 800 epochs
    weight_decay: float = 0.05    # AdamW
    clip_grad: float = 3.0    # largest norm of the gradient, 0 = no clipping
    seed: int = 0    # of every draw
    workers: int | None = None    # processes a rank that load data; default 8 on a GPU, 0 on a CPU, where they would slow the training down
    device: str = "auto"    # auto (a GPU if there is one), cpu, cuda or cuda:N
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"    # auto: bf16 where the hardware multiplies it, else fp16 on a GPU, fp32 on a CPU
    compile: bool = False    # torch.compile the model
    profile: bool = False    # show where the time of the fourth to eighth step goes
    log_every: int = 10    # steps between two lines of metrics.jsonl
    save_every: int = 1000    # steps between two checkpoints

    def __post_init__(self):
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        for name in ("batch_size", "accumulate", "log_every", "save_every", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1, not {getattr(self, name)}")
        for name in ("lr", "epochs"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: above 0, not {getattr(self, name)}")
        for name in ("min_lr", "weight_decay", "clip_grad", "workers", "seed"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: 0 or above, not {getattr(self, name)}")
        if self.seed >= 2 ** 32:
            raise ValueError(f"seed: below 2 ** 32, not {self.seed}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup: a share of the steps, from 0 to 1, not {self.warmup}")
        parts = world_size() * self.accumulate
        if self.batch_size % parts:
            raise ValueError(f"batch_size: {self.batch_size} does not divide into {world_size()} processes x "
                             f"{self.accumulate} accumulated parts; {math.ceil(self.batch_size / parts) * parts} would")


NOT_THE_RUN = ("out", "fresh", "workers", "device", "data_root", "profile")    # fields that may change when a run is continued


def parse(Config, presets, argv=None, complete=None):
    """The resolved config from the command line: field defaults < preset < flags. Raises UserError.

    complete(preset, flags), where a script has more to go by, returns (the preset to take instead, values between it and
    the flags).
    """
    parser = _parser(Config, presets)
    given = vars(parser.parse_args(argv))
    preset, more = given.get("preset", "base" if "data" in given else "demo"), {}
    if complete:
        preset, more = complete(preset, given)
    values = {**presets[preset], **more, **given, "preset": preset}
    if "steps" in given and "epochs" in given:
        raise UserError("--steps and --epochs: give one of them")
    if "steps" in given or "epochs" in given:
        values["epochs" if "steps" in given else "steps"] = None
    reference = {"min_lr": Config.min_lr, **presets[preset]}
    scale = values.get("batch_size", 0) / reference["batch_size"]
    for name in {"lr", "min_lr"} - given.keys():
        values[name] = reference[name] * scale
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    script = Path(sys.argv[0]).stem if Config.__module__ == "__main__" else Config.__module__
    values.setdefault("out", f"runs/{script}-{data_name(values.get('data', 'shapes'))}")
    config = build(Config, values)
    if scale != 1 and "lr" not in given:
        say(f"lr {config.lr:g} = {reference['lr']:g} x batch {config.batch_size} / {reference['batch_size']} of preset {preset}; "
            f"--lr sets another")
    return config


def data_name(data):
    """What --data is called in the name of a run's folder."""
    return Path(data).resolve().name


@contextmanager
def naming_flags():
    """Turn a ValueError("field: what is wrong") into the UserError "--field: what is wrong"."""
    try:
        yield
    except ValueError as error:
        field, _, rest = str(error).partition(": ")
        raise UserError(f"--{field.replace('_', '-')}: {rest}" if rest else str(error)) from None


def build(Config, values):
    """Config(**values); a value that the config refuses is a UserError that names the flag."""
    with naming_flags():
        for name, value in values.items():
            for number in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{name}: a finite number, not {number}")
        return Config(**values)


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line: UserError."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:                                 # said here, a subcommand's come with the flags of that subcommand
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        for action in self._actions:
            value = getattr(namespace, action.dest, None)
            if "" in (value if isinstance(value, list) else [value]):       # an unset variable of the shell
                self.error(f"{(action.option_strings or [action.dest])[0]}: something, not empty")
        return namespace, unknown

    def error(self, message):                       # argparse would print the whole usage before it
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1].split("=")[0], self._option_string_actions, n=1)
            message = f"{unknown[1]}: no such flag" + (f"; {near[0]}?" if near else "; --help lists them")
        kind = re.match(r"argument (\S+): invalid (int|float) value: '(.*)'", message)
        if kind:
            message = f"{kind[1]}: {'a whole number' if kind[2] == 'int' else 'a number'}, not {kind[3]}"
        raise UserError(message.removeprefix("argument "))


def _parser(Config, presets):
    first_line = sys.modules[Config.__module__].__doc__.strip().split("\n\n")[0]
    parser = Parser(usage="%(prog)s [flags]", description=first_line, allow_abbrev=False, formatter_class=argparse.HelpFormatter)
    hints = typing.get_type_hints(Config)
    for cls in Config.__mro__[:-1]:
        group = parser.add_argument_group(cls.__doc__)
        for name, comment in re.findall(r"^    (\w+): .*?    # (.+)$", inspect.getsource(cls), flags=re.M):
            in_presets = ", ".join(f"{p}: {_text(v[name])}" for p, v in presets.items() if name in v)
            default = _text(Config.__dataclass_fields__[name].default)
            text = comment.replace("%", "%%") + (f" ({in_presets}; else {default})" if in_presets else f" ({default})")
            flag, kind, how = "--" + name.replace("_", "-"), hints[name], {}
            if name == "preset":
                how = {"choices": list(presets)}
            elif typing.get_origin(kind) is Literal:
                how = {"choices": typing.get_args(kind)}
            elif kind is bool:
                how = {"action": argparse.BooleanOptionalAction}
            elif typing.get_origin(kind) is tuple:
                how = {"type": typing.get_args(kind)[0], "nargs": len(typing.get_args(kind))}
            else:
                how = {"type": (typing.get_args(kind) or (kind,))[0]}    # the first of int | None and the like
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, **how,
                               **({} if "action" in how or "choices" in how else {"metavar": name.split("_")[-1].upper()}))
    return parser


def show(config):
    """Print the resolved configuration, one line a group."""
    for cls in type(config).__mro__[:-1]:
        fields = [f for f in dataclasses.fields(cls) if f.name in cls.__annotations__]
        if fields:
            say(f"{cls.__doc__.splitlines()[0]}: " + ", ".join(f"{f.name} {_text(getattr(config, f.name))}" for f in fields))


def in_words(values):
    """A dict of numbers on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _text(value):
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else f"{value:g}" if isinstance(value, float) else str(value)


def steps_and_epoch(config, images):
    """(optimizer steps of the run, steps in an epoch over that many images). An epoch's last, smaller batch is left out."""
    if images < config.batch_size:
        raise UserError(f"--batch-size: {config.batch_size} is more than the {images} training images of --data {config.data}")
    per_epoch = images // config.batch_size
    return config.steps or max(1, round(config.epochs * per_epoch)), per_epoch


# ---------------------------------------------------------------------------------------------------------------------
# Processes and signals
# ---------------------------------------------------------------------------------------------------------------------

def rank():
    """This process's number among all of them, from torchrun; 0 without."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """How many processes the run has, on all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    """print, on the first process alone, without breaking a progress bar."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()


_signal = 0    # the last SIGTERM or SIGINT that came, or 0
_parent = os.getppid()


def _orphaned():
    """Whether torchrun's agent has died: its processes live in sessions of their own, and nobody else would end them."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _parent


def _remember_signal(number, frame):
    global _signal
    if _signal == number == signal.SIGINT:
        raise KeyboardInterrupt                         # asked twice: do not wait for the step to end
    _signal = number


def obey_signals():
    """For what has no steps to finish and nothing to save: from here on SIGTERM and SIGINT end the process at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if _signal:                                         # it came before
        os.kill(os.getpid(), _signal)


@contextmanager
def processes(config):
    """Join the other processes of torchrun, if any, and leave them cleanly at the end. Yields this process's device.

    Signals are remembered, not obeyed: Run.end_of_step acts on them (see obey_signals).
    """
    device = choose_device(config.device)
    torch.set_flush_denormal(True)      # before there are other threads, which inherit it: products of nearly-zero softmaxes took 30 times as long
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    if world_size() > 1:
        join("nccl" if device.type == "cuda" else "gloo")
    handlers = {number: signal.signal(number, _remember_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield device
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def check_file_to_write(path, flag):
    """UserError where no file of that name could be written: said before the work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise UserError(f"{flag}: {path.parent} is not a folder")


def join(backend):
    """dist.init_process_group. Where one torchrun restarts processes, they meet in its old store: a place of its own for each
    restart, else they would call on addresses of the dead. (Several torchruns do not count restarts alike: README.)"""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return dist.init_process_group(backend)
    store, number, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(f"restart {restart}", store), rank=number, world_size=size)


def choose_device(name):
    """torch.device for --device; with several processes on a machine, each its own GPU."""
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    match = re.fullmatch(r"auto|cuda(:\d+)?", name)
    if not match:
        raise UserError(f"--device: auto, cpu, cuda or cuda:N, not {name}")
    if match[1]:
        local_rank, local_size = int(match[1][1:]), local_size + int(match[1][1:])
        if world_size() > 1:
            raise UserError(f"--device: cuda, not {name}, for {world_size()} processes")
    if local_rank >= gpus or local_size > gpus:
        raise UserError(f"--device: {local_size} GPUs are needed and {gpus} are here; cpu works without")
    return torch.device("cuda", local_rank)


def on_first_process(function, *args):
    """Call the function on rank 0 alone; every process gets its result, or its UserError."""
    answer = [None, None]
    if rank() == 0:
        try:
            answer[0] = function(*args)
        except UserError as error:
            answer[1] = (str(error), error.status)
        except OSError as error:
            answer[1] = (f"--out: {error}", 2)
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise UserError(*answer[1])
    return answer[0]


def all_sum(tensor):
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_all(value):
    """The values of all processes, a list in order of rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def distribute(model, device):
    """Average gradients over processes (DistributedDataParallel), where there is more than one."""
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)      # its new name is not in torch 2.6
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                       broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def only_last_part_communicates(model, part, parts):
    """While accumulating, processes exchange gradients in the last part alone."""
    if part < parts - 1 and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


@contextmanager
def kineto_silenced():
    """While the profiler starts or stops: its library writes to stderr that it does, whatever it is told."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(nowhere)


@contextmanager
def one_line_errors():
    """For a script's main: a UserError or an error of the disk becomes one line on stderr, and its exit status."""
    script = Path(sys.argv[0]).name
    try:
        yield
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.status)
    except RuntimeError as error:
        if world_size() == 1 or not re.search("gloo|nccl|Connection (closed|reset)", str(error), re.IGNORECASE):
            raise
        print(f"{script}: error: rank {rank()} lost another process ({' '.join(str(error).split())[:200]}); the same command continues "
              f"from the last checkpoint", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename or '--out'}: {error.strerror}" if error.strerror else str(error)
        print(f"{script}: error: {where}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def run_script(Config, presets, train, complete=None):
    """A script's main: parse the command line, join the other processes, train(config, device)."""
    with one_line_errors():
        config = parse(Config, presets, complete=complete)
        show(config)
        with processes(config) as device:
            train(config, device)


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------

def seed_step(seed, step):
    """Seed stochastic depth, mixup and cutmix: a function of (seed, step, rank), so that nothing has to be saved to continue."""
    torch.manual_seed(draw_seed(seed, step, rank()))


def draw_seed(seed, step, index):
    """A 63-bit seed of its own for each (seed, step, index)."""
    return (seed << 31 ^ step) * 1_000_003 + index & 2 ** 63 - 1


def cosine(step, total, start, end):
    """From start at step 0 to end at step total and after, along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


def warmup_linear(step, total, peak, end, warmup_steps):
    """The learning rate of a step: linear up to peak over warmup_steps, then linear down to end (appendix, segmentation)."""
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    return peak + (min(end, peak) - peak) * (step - warmup_steps) / max(1, total - warmup_steps)


def warmup_cosine(step, total, peak, end, warmup_steps):
    """The learning rate of a step: linear up to peak over warmup_steps, then half a cosine down to end (appendix, pre-training)."""
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    return cosine(step - warmup_steps, total - warmup_steps, peak, min(end, peak))


def set_lr(optimizer, lr):
    """Set each group's learning rate to lr, times the group's own "lr_scale" if it has one. Returns lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def parameter_groups(model, weight_decay, layer_decay=1.0, no_decay=("cls_token", "pos_embed")):
    """Groups for AdamW: no weight decay for vectors (biases, norms, gammas), [S] and E_pos (appendix); and, layer by layer, a
    learning rate that is layer_decay ** (depth + 1 - l) of the full one: l = 0 for embeddings and what all blocks share, l for
    block l, depth + 1 for what comes after the blocks (appendix, "layer-wise lr decay"). Each group's share is its "lr_scale".
    """
    depth, groups = len(model.blocks), {}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in trained:
        block = re.match(r"blocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else depth + 1
        if re.match("cls_token|mask_token|pos_embed|patch_embed|rel_pos_bias", name):
            layer = 0
        decays = p.dim() > 1 and name.rpartition(".")[2] not in no_decay
        key = (layer if layer_decay != 1 else 0, not decays)
        groups.setdefault(key, {"params": [], "weight_decay": weight_decay if decays else 0.0,
                                "lr_scale": layer_decay ** (depth + 1 - layer)})["params"].append(p)
    assert len(trained) == sum(len(group["params"]) for group in groups.values())
    return [groups[key] for key in sorted(groups)]


def adamw(groups):
    """torch.optim.AdamW with the paper's betas and epsilon (appendix), fused; set_lr gives it the learning rate of each step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def choose_precision(name, device):
    """The dtype of matrix products, from --precision: torch.bfloat16, torch.float16 or torch.float32."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    cpu = Path("/proc/cpuinfo")                         # a CPU without AMX only emulates bf16, a hundred times slower than fp32
    return torch.bfloat16 if cpu.exists() and "amx_bf16" in cpu.read_text() else torch.float32


PARTS_OF_A_STEP = ("data", "tokenizer", "forward", "backward", "optimizer", "communication")


def in_profiles(label):
    """Decorator: --profile shows the function's time under this label, one of PARTS_OF_A_STEP."""
    def decorate(function):
        @functools.wraps(function)
        def labelled(*args, **kwargs):
            with record_function(label):
                return function(*args, **kwargs)
        return labelled
    return decorate


def where_time_goes(profiler, seconds):
    """A table of a torch.profiler.profile over so many seconds: the parts of a step, and the costliest operations."""
    averages = {}                                       # on a GPU a label has two entries, one with the CPU's time, one with the GPU's
    for event in profiler.key_averages():
        averages.setdefault(event.key, []).append(event)
    lines = [f"{'part of a step':24}{'seconds':>9}{'share':>7}{'GPU s':>9}"]
    for label in PARTS_OF_A_STEP:
        if label in averages:
            spent, on_gpu = (max(getattr(event, name) for event in averages[label]) / 1e6 for name in ("cpu_time_total", "device_time_total"))
            lines.append(f"{label:24}{spent:9.3f}{spent / seconds:7.0%}{on_gpu:9.3f}")
    own = sorted((event for key, events in averages.items() if key not in PARTS_OF_A_STEP for event in events),
                 key=lambda event: -max(event.self_cpu_time_total, event.self_device_time_total))
    lines.append(f"{'operation':40}{'seconds':>9}{'GPU s':>9}{'calls':>8}")
    lines += [f"{event.key[:39]:40}{event.self_cpu_time_total / 1e6:9.3f}{event.self_device_time_total / 1e6:9.3f}{event.count:8}" for event in own[:12]]
    return "\n".join(lines)


class Precision:
    """Autocast in one dtype, and the gradient scaler that float16 needs."""

    def __init__(self, name, device):
        self.dtype, self.device = choose_precision(name, device), device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    @contextmanager
    def autocast(self):
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32), record_function("forward"):
            yield

    def backward(self, loss):
        with record_function("backward"):
            self.scaler.scale(loss).backward()

    @in_profiles("optimizer")
    def update(self, optimizer, clip_grad):
        """Clip the gradient to norm clip_grad (0 = leave it), step, zero the gradients. Returns the norm before clipping."""
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a run
# ---------------------------------------------------------------------------------------------------------------------

_in_use = weakref.WeakValueDictionary()    # a folder's inode -> the lock that this process holds on it
os.register_at_fork(after_in_child=lambda: [lock.file.close() for lock in _in_use.values()])    # loaders' workers outlive a killed run by seconds


class Lock:
    """A run's folder in use by this process, which the system knows and forgets with the process. UserError if by another."""

    def __init__(self, folder):
        self.file = open(folder / "lock", "w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out: {folder} is in use by another process; wait for it, or name another --out") from None
        except OSError:
            pass                                        # a file system without locks


class Run:
    """The folder --out: config.json, metrics.jsonl, last.pt (all that is needed to continue), previous.pt (the one before),
    model.pt, result.json.

    Opening it starts the run, continues it, finds it finished, or refuses (UserError) a folder of another configuration.
    All processes must see the same folder; only the first writes.
    """

    def __init__(self, config, device, steps):
        self.config, self.device, self.steps = config, device, steps
        self.folder = Path(config.out)
        self.finished = on_first_process(self._open)
        self.start = 0
        self.told = 0                                   # the signal that a process of the run received
        self._since, self._reached, self._bar, self._order = (time.perf_counter(), 0), None, None, None

    def _open(self):
        mine = json.loads(json.dumps(dataclasses.asdict(self.config)))
        theirs_file = self.folder / "config.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out: {self.folder} is a file; name a folder")
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0     # by torchrun --max-restarts: --fresh is done
        if self.config.fresh and not restarted and theirs_file.exists() and theirs_file.stat().st_size:
            self._take()
            number = next(n for n in range(1, 10_000) if not self.folder.with_name(f"{self.folder.name}.old-{n}").exists())
            self.folder.rename(self.folder.with_name(f"{self.folder.name}.old-{number}"))
            say(f"{self.folder} set aside as {self.folder.name}.old-{number}")
        if not theirs_file.exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._take()
                if not theirs_file.exists():            # nor has another process written it since
                    write_json(theirs_file, mine)
            except OSError as error:
                raise UserError(f"--out: cannot write to {self.folder} ({error.strerror})") from None
        try:
            theirs = dict(json.loads(theirs_file.read_text()).items())
        except (ValueError, AttributeError, RecursionError):    # no JSON, or no object
            raise UserError(f"--out: {theirs_file} is not readable; name another --out, or set this one aside with --fresh")
        if "init_std" in mine:                          # runs older than the flag had its default
            theirs.setdefault("init_std", type(self.config).init_std)
        differ = [f"{name} ({_text(theirs.get(name))}, now {_text(mine.get(name))})" for name in {**theirs, **mine}
                  if name not in NOT_THE_RUN and theirs.get(name) != mine.get(name)]
        if differ:
            raise UserError(f"--out: {self.folder} holds a run with another {', '.join(sorted(differ))}; "
                            f"name another --out, or set this one aside with --fresh")
        finished = (self.folder / "result.json").exists()
        if not finished:
            self._take()
        return finished

    def _take(self):
        inode = self.folder.stat().st_ino               # a folder's name changes when it is set aside
        self._lock = _in_use[inode] = _in_use.get(inode) or Lock(self.folder)

    def restore(self, **parts):
        """Load last.pt, if there is one, into the parts (anything with load_state_dict), and cut the log back to it.

        Returns what save was given as notes, or {}.
        """
        checkpoint = on_first_process(self._newest_intact)
        if not checkpoint:
            on_first_process(self._cut_log, 0)
            return {}
        state = read_checkpoint(checkpoint, "--out")
        for name, part in parts.items():
            if state[name]:                             # a gradient scaler that was off has no state
                part.load_state_dict(state[name])
        self.start = state["step"]
        on_first_process(self._cut_log, self.start)
        say(f"continuing {self.folder} after step {self.start} of {self.steps}")
        return state["notes"]

    def _newest_intact(self):
        """last.pt, or if that is damaged previous.pt, or None if neither is there."""
        damaged = []
        for path in (self.folder / "last.pt", self.folder / "previous.pt"):
            wrong = damage(path) if path.exists() else "is not there"
            if not wrong:
                if damaged:
                    say(f"warning: {damaged[0]}; it is set aside as last.pt.damaged, and {path} is used")
                    os.replace(self.folder / "last.pt", self.folder / "last.pt.damaged")
                return path
            if path.exists():
                damaged.append(f"{path} is damaged ({wrong})")
        if damaged:
            raise UserError(f"--out: {' and '.join(damaged)}; put back a copy of one, or start over with --fresh")
        return None

    def _cut_log(self, step):
        """Drop what was logged after the checkpoint, or half written: those steps come again."""
        log = self.folder / "metrics.jsonl"
        if log.exists():
            lines = []
            for line in log.read_bytes().splitlines(keepends=True):
                try:
                    if json.loads(line)["step"] <= step:
                        lines.append(line.rstrip() + b"\n")
                except (ValueError, KeyError, TypeError, RecursionError):
                    break
            write_atomically(log, lambda file: file.write(b"".join(lines)))

    def batches(self, loader):
        """An iterator over a data.train_loader; --profile shows the time it takes under "data"."""
        self._order = loader.batch_sampler
        return iter(in_profiles("data")(iter(loader).__next__), None)

    def progress(self, label):
        """range over the steps to do, with a progress bar on the first process if that has a terminal."""
        self._bar = tqdm(range(self.start, self.steps), desc=label, initial=self.start, total=self.steps,
                         disable=rank() > 0 or not sys.stderr.isatty(), unit="step", leave=False)
        self._since, profiler = (time.perf_counter(), self.start), None
        for step in self._bar:
            if self.config.profile and step == self.start + 3:
                profiler = profile(acc_events=True)
                with kineto_silenced():
                    profiler.start()
                began = time.perf_counter()
            yield step
            if profiler and step == min(self.start + 7, self.steps - 1):
                seconds = time.perf_counter() - began
                with kineto_silenced():
                    profiler.stop()
                say(where_time_goes(profiler, seconds))
                profiler = None

    @in_profiles("communication")
    def exchange(self, step, values, unreadable=()):
        """The one all-reduce of a step. Returns the means over processes of values (a vector; its first is the loss) as
        floats, and the names of unreadable images of all processes. Learns whether any process was told to stop.

        Where the mean loss is not finite, all processes stop together: UserError, before the step changes any weight.
        """
        flags = [float(_signal == signal.SIGTERM or _orphaned()), float(_signal == signal.SIGINT), float(len(unreadable))]
        vector = all_sum(torch.cat([values.detach().double() / world_size(),
                                    torch.tensor(flags, dtype=torch.float64, device=self.device)]))
        *means, terminated, interrupted, bad = vector.tolist()
        self._reached = time.perf_counter()
        self.told = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
        if not math.isfinite(means[0]):
            last = self.folder / "last.pt"
            samples = [index for part in self._order.of_step(step - 1) for _, index in part] if self._order else []
            places = [f"rank {r} (samples {', '.join(map(str, some[:16]))}{' ...' if len(some) > 16 else ''})"
                      for r, (finite, some) in enumerate(from_all((math.isfinite(float(values[0])), samples))) if not finite]
            raise UserError(f"step {step}: the loss is {means[0]}, on {' and '.join(places)}; "
                            f"{f'{last} is the checkpoint before it' if last.exists() else 'there was no checkpoint before it'}; "
                            f"try a lower --lr, or --precision bf16 or fp32", status=1)
        if bad:
            unreadable = [name for names in from_all(list(unreadable)) for name in names]
        return means, list(unreadable)

    def log(self, step, **values):
        """Append one line to metrics.jsonl at every --log-every'th step, the first and the last, or where more is to say.

        step counts finished steps, from 1. values: numbers, loss and lr among them, or tensors of one, which are read only now:
        reading them at each step would make the GPU wait for the CPU, and the CPU for the GPU.
        """
        now, (then, before) = self._reached, self._since
        evaluated = any(name.startswith("val_") for name in values)
        if rank() > 0 or not (step % self.config.log_every == 0 or step in (1, self.steps) or evaluated):
            return
        values = {name: float(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        values["images_per_second"] = round((step - before) * self.config.batch_size / (now - then), 1)
        self._since = (time.perf_counter() if evaluated else now, step)                # evaluating is not training
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}        # JSON has no inf
        with one_line_if_disk_fails("metrics.jsonl", self.folder, "the same command continues from the last checkpoint"):
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {values['loss']:.3f}")
        if step % max(1, self.steps // 10) < self.config.log_every or evaluated:
            say(f"step {step}/{self.steps}  {in_words(values)}")

    def end_of_step(self, step, **parts):
        """Write last.pt if it is time, or if any process was told to stop; in that case, leave as the signal says."""
        if self.told or step % self.config.save_every == 0 or step == self.steps:
            self.save(step, **parts)
        if self.told:
            say(f"{self.told.name}: stopped after step {step} of {self.steps}; the same command continues")
            if dist.is_initialized():
                dist.barrier()
            signal.signal(self.told, signal.SIG_DFL)
            os.kill(os.getpid(), self.told)

    def save(self, step, *, notes=None, **parts):
        """last.pt, from the parts' state_dicts; the one before it becomes previous.pt. UserError where that cannot be written."""
        if rank() == 0:
            state = {"step": step, "notes": notes or {}, **{name: part.state_dict() for name, part in parts.items()}}
            last = self.folder / "last.pt"
            then = f"{last}, of an earlier step, is as it was" if last.exists() else "there was none before it"
            broken = [name for name, tensor in state.get("model", {}).items() if not tensor.isfinite().all()]
            if broken:
                raise UserError(f"step {step}: {broken[0]} of the model is not finite, and no checkpoint is written; {then}", status=1)
            with one_line_if_disk_fails(f"the checkpoint of step {step}", self.folder, then, size_of(state)):
                write_atomically(last, lambda file: save_sealed(state, file), keep=self.folder / "previous.pt")

    def finish(self, model, config, **result):
        """model.pt (weights and the model's config, what --init and --tokenizer take) and result.json: the run is finished."""
        if rank() == 0:
            kept = {"model": model.state_dict(), "config": config, "kind": type(model).__name__}
            with one_line_if_disk_fails("model.pt or result.json", self.folder, "the same command writes them again", size_of(kept)):
                write_atomically(self.folder / "model.pt", lambda file: torch.save(kept, file))
                write_json(self.folder / "result.json", result)
        if dist.is_initialized():
            dist.barrier()                              # the others may read model.pt next
