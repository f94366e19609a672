"""How a script starts: its flags, its processes, and one-line messages for wrong input.

    parser = make_parser(__file__, __doc__)                     # the flags that all training scripts share
    parser.add_argument("--mask-ratio", type=fraction, ...)     # those of this script
    args = parse(parser, PRESETS)                               # defaults < preset < command line
    start(parse_args, train)                                    # train(args, device) in each process
"""
import argparse
import ctypes
import dataclasses
import functools
import math
import os
import re
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


class UserError(ValueError):
    """A wrong flag or file. Its message is one line that names it and says what would be accepted."""


# ---- Flags ----

def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float from low to high."""
    def convert(argument):
        value = kind(argument)
        if not low <= value <= high or value == math.inf:
            expected = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {expected}, got {argument}")
        return value
    convert.__name__ = kind.__name__                                   # for argparse's "invalid int value"
    return convert


def text(value):
    """An argparse type: a string that is not empty, such as a path."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


positive_int, nonnegative_int = number(int, 1), number(int, 0)
positive, nonnegative, fraction = number(float, 1e-12), number(float, 0), number(float, 0, 1)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults in its help. Only local rank 0 prints errors."""

    class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            if action.default is None:                                 # no "(default: None)"
                return action.help
            return super()._get_help_string(action)

    def error(self, message):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(2)
        if message.startswith("unrecognized") and self.epilog:
            message += f" ({self.epilog})"
        super().error(message)


def make_parser(script, description, epilog=None):
    """A parser with the flags of all training scripts, for a script's __file__ and __doc__.

    epilog: a last line of the help, also shown after an unknown flag.
    """
    parser = Parser(prog=Path(script).name, usage="%(prog)s [flags]", allow_abbrev=False,
                    description=(description or "").split("\n\n")[0],    # python -OO: none
                    epilog=epilog, formatter_class=Parser.HelpFormatter)
    add = parser.add_argument
    add("--data", type=text, default="shapes",
        help="shapes, fashion-mnist, cifar10, cifar100, or a folder of images")
    add("--data-root", type=text, default="data", help="folder with the files of the named data sets")
    add("--download", action="store_true", help="let torchvision fetch the files of the named data sets")
    add("--out", type=text, help="folder of this run, continued if it exists (default: runs/<script>-<data>)")
    add("--fresh", action="store_true", help="rename an existing --out and start over")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive_int, help="optimizer steps, instead of --epochs")
    length.add_argument("--epochs", type=positive, help="passes over the training images")
    add("--batch-size", type=positive_int, help="images per step, summed over all processes")
    add("--accumulate", type=positive_int, default=1,
        help="compute each batch in this many parts, to save memory")
    add("--lr", type=positive, help="peak learning rate; the default is scaled with the batch size")
    add("--min-lr", type=nonnegative, help="final learning rate; the default is scaled with the batch size")
    add("--warmup", type=fraction, help="fraction of the steps over which the learning rate rises")
    add("--weight-decay", type=nonnegative, default=0.05, help="weight decay of AdamW")
    add("--clip-grad", type=nonnegative, default=0.0, help="largest norm of the gradient, 0 = no clipping")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="seed of every random draw")
    add("--workers", type=nonnegative_int, help="loader processes per rank (default: 8 on a GPU, 0 on a CPU)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
        help="auto: bf16 where the hardware has it, otherwise fp16 on a GPU and fp32 on a CPU")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--log-every", type=positive_int, default=10, help="steps between two lines of metrics.jsonl")
    add("--save-every", type=positive_int, default=1000, help="steps between two checkpoints")
    add("--eval-every", type=positive_int, default=10_000, help="steps between two evaluations")
    return parser


def add_image_flags(parser):
    """Flags for the images that a model takes: fields of vit.ViTConfig."""
    add = parser.add_argument
    add("--image-size", type=positive_int, help="pixels per side of the transformer's images")
    add("--pixel-mean", type=float, nargs=3, help="mean of red, green, blue; released 22K checkpoints: 0.5")
    add("--pixel-std", type=float, nargs=3, help="standard deviation; released 22K checkpoints: 0.5")


def add_model_flags(parser, defaults):
    """Flags for the sizes and variants of the backbone: fields of vit.ViTConfig. defaults: a ViTConfig."""
    add_image_flags(parser)
    parser.set_defaults(**dataclasses.asdict(defaults))
    add = parser.add_argument
    add("--patch-size", type=positive_int, help="pixels per side of a patch; must divide the image size")
    add("--dim", type=positive_int, help="width D: 768 base, 1024 large (sec. 2.2)")
    add("--depth", type=positive_int, help="blocks L: 12 base, 24 large")
    add("--heads", type=positive_int, help="attention heads: 12 base, 16 large; must divide the width")
    add("--mlp-ratio", type=positive, help="hidden width of the FFN / D")
    add("--position", choices=["absolute", "relative", "shared_relative"],
        help="paper: absolute; released code: shared_relative, and relative in fine-tuning")
    add("--layer-scale", type=nonnegative, help="initial gamma, 0 = none (paper); released: 0.1, large 1e-5")
    add("--drop-path", type=fraction, help="stochastic depth; its rate rises from 0 to this over the blocks")
    add("--init-std", type=positive,
        help="std of the backbone's initial weights (sec. 2.5); small D: 0.02 sqrt(768 / D)")
    add("--checkpoint-blocks", action="store_true",
        help="recompute blocks in the backward pass, to save memory")


def add_finetuning_flags(parser, defaults):
    """Flags of the scripts that fine-tune a checkpoint, and those of the model."""
    add_model_flags(parser, defaults)
    parser.set_defaults(image_size=None)                               # that of the checkpoint
    add = parser.add_argument
    add("--init", type=text, help="model.pt or a released checkpoint; none: from scratch (default: the "
        "model.pt that pretrain.py wrote for the same --data)")
    add("--eval", action="store_true", help="only evaluate --init (default: <out>/model.pt)")
    add("--validate", type=positive_int,
        help="hold out this many training images, and evaluate on them instead")
    add("--layer-decay", type=number(float, 1e-6, 1), default=0.65,
        help="learning rate of a layer / that of the next layer")


def config_from_flags(Config, args):
    """Config(**fields), a dataclass, from the flags of the same names that are not None.

    The ValueError("field: must be ...") of a wrong value becomes a UserError("--field: must be ...").
    """
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items()}
    names = [field.name for field in dataclasses.fields(Config) if flags.get(field.name) is not None]
    try:
        return Config(**{name: flags[name] for name in names})
    except ValueError as error:
        field, _, problem = str(error).partition(": ")
        raise UserError(f"--{field.replace('_', '-')}: {problem}") from None


def parse(parser, presets, argv=None):
    """Parse the command line. The values of a preset replace defaults, and given flags replace the preset's.

    presets: name -> {flag: value}, with base_lr, the learning rate at a batch of base_batch images.
    Returns the namespace; its `given` lists the flags that the command line names.
    """
    parser.add_argument("--preset", choices=list(presets), help="values of flags, shown by --help --preset X")
    early = Parser(prog=parser.prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--data")
    known, _ = early.parse_known_args(argv)
    name = known.preset or ("base" if known.data else "demo")          # the paper's recipe for your own data
    preset = presets.get(name, {})                                     # parse_args refuses a wrong name
    parser.set_defaults(**preset, preset=name, lr=preset.get("base_lr"))    # --help shows it
    args = parser.parse_args(argv)
    # Parse again into a namespace where every flag is None already. argparse sets defaults only for missing
    # attributes, so what is not None was given on the command line.
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args)))))
    args.given = [flag for flag, value in given.items() if value is not None]
    if "steps" in args.given:
        args.epochs = None
    if "epochs" in args.given:
        args.steps = None
    scale = args.batch_size / args.base_batch
    if "lr" not in args.given:
        args.lr = args.base_lr * scale
    if "min_lr" not in args.given:
        args.min_lr *= scale
    args.out = args.out or f"runs/{Path(parser.prog).stem}-{Path(args.data).resolve().name}"
    parts = world_size() * args.accumulate
    if args.batch_size % parts and not getattr(args, "eval", False):
        possible = math.ceil(args.batch_size / parts) * parts
        parser.error(f"--batch-size: must be a multiple of {world_size()} processes x {args.accumulate} "
                     f"parts, such as {possible}, got {args.batch_size}")
    return args


# ---- Processes ----

def rank():
    """Rank of this process among all processes; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """Number of processes on all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def say(line):
    """Print on the first process, above its progress bar."""
    if rank() == 0:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def scalars(report):
    """The entries of a report that are single numbers."""
    return {name: value for name, value in report.items() if isinstance(value, (int, float))}


def format_metrics(report):
    """The numbers of a report on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in scalars(report).items())


def start(parse_args, train):
    """The main() of a training script: parse the flags, join the other processes, train(args, device)."""
    with one_line_errors():
        check_environment()
        args = parse_args()
        train(args, join_processes(args.device, args.precision))
        if dist.is_initialized():
            dist.destroy_process_group()    # not after an error: it would wait for the other processes


def check_environment():
    """Raise UserError if RANK and WORLD_SIZE are not those of a process that torchrun started."""
    values = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
        raise UserError("RANK={} and WORLD_SIZE={} in the environment: a rank must be from 0 to WORLD_SIZE - "
                        "1, as torchrun sets them".format(*values))


class Output:
    """A stream that cannot stop a run: closed, a pipe whose reader went away, a file on a full disk."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")                  # None if it was closed at the start

    def write(self, text):
        self.call(self.stream.write, text)

    def flush(self):
        self.call(self.stream.flush)

    def call(self, method, *args):
        try:
            method(*args)
        except (OSError, ValueError):
            with suppress(OSError):
                self.stream.close()                                    # Python would flush it at its exit

    def __getattr__(self, name):
        return getattr(self.stream, name)


KNOWN_ERRORS = {    # RuntimeErrors of PyTorch: a part of the message -> the line to print
    "DataLoader worker (pid": "--workers: a loader process was killed, perhaps for lack of memory; use fewer",
    "No working C++ compiler": "--compile: this machine has no C++ compiler; install g++ or clang",
    "Cannot find a working triton": "--compile: PyTorch's Triton is not installed, or does not know this GPU"}


@contextmanager
def one_line_errors():
    """Print wrong input and failures of the machine as one line. Exit with 2 for UserError, otherwise 1."""
    with suppress(AttributeError):                                     # a file name may not be valid UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
        try:
            yield
        except (UserError, OSError, FloatingPointError) as error:
            message = str(error).strip() or type(error).__name__
            line = re.sub(r"^[\w.]*Error: ", "", message.splitlines()[-1])    # of a loader's traceback
            exit_with(line, wrong_input=isinstance(error, UserError))
        except RuntimeError as error:
            lines = [line for part, line in KNOWN_ERRORS.items() if part in str(error)]
            if not lines:
                raise
            exit_with(lines[0])
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)


def exit_with(line, wrong_input=False):
    """Print an error and exit. All processes find the same wrong input; one of them prints it."""
    if not wrong_input or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2 if wrong_input else 1)


def join_processes(device, precision):
    """Set up the device of this process and join the others that torchrun started.

    device, precision: the values of --device and --precision. Returns a torch.device. Raises UserError if
    this machine has fewer GPUs than processes.
    """
    torch.set_flush_denormal(True)    # on some CPUs arithmetic on denormal numbers is many times slower
    keep_freed_memory()
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cpu" or (device == "auto" and gpus == 0):
        device, group = torch.device("cpu"), dict(backend="gloo")
    elif gpus < processes:
        raise UserError(f"--device: found {gpus} GPUs for {processes} processes; use --device cpu")
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        group = dict(backend="nccl", device_id=device)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if world_size() > 1:
        dist.init_process_group(**group)
    return device


def keep_freed_memory():
    """Let glibc keep large blocks for the next step. Otherwise Linux clears new pages each time."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                              # from malloc.h
    with suppress(OSError, AttributeError):                            # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)                                         # no separate mappings for large blocks
        mallopt(M_TRIM_THRESHOLD, -1)                                  # the heap never shrinks


@functools.cache
def choose_dtype(precision, device_type):
    """The dtype of matrix products for a --precision. On a CPU, auto takes bf16 only with AMX."""
    if precision == "auto" and device_type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        cpu = Path("/proc/cpuinfo")
        precision = "bf16" if cpu.exists() and "amx_bf16" in cpu.read_text() else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def autocast(precision, device):
    """torch.autocast for a --precision; it does nothing with fp32."""
    dtype = choose_dtype(precision, device.type)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def on_first_process(function):
    """Call function() on rank 0 only. All processes return its result, or raise its UserError or OSError."""
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


def all_gather(value):
    """The values of all processes, in the order of their ranks: any objects, with tensors on the CPU."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class Means:
    """Means of named numbers over batches and processes, weighted by counts such as the size of a batch."""

    def __init__(self):
        self.count, self.sums = 0, {}

    def add(self, count, **means):
        """Add the means of `count` things: scalar tensors, or tensors whose shape never changes."""
        self.count = self.count + count
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0) + count * mean.double()

    def compute(self):
        """name -> mean over everything that was added in all processes: a float, or a nested list."""
        sums = {"count": self.count, **self.sums}
        totals = {}
        for part in all_gather({name: torch.as_tensor(value).cpu() for name, value in sums.items()}):
            for name, value in part.items():                           # a process may have had no batch
                totals[name] = totals.get(name, 0) + value
        count = totals.pop("count")
        return {name: (total / count).tolist() for name, total in totals.items()}
