"""A training run: the training step, and the folder that holds the run.

    run = Run(args, device, num_images=len(source))             # opens the folder args.out
    network = run.prepare(model, groups, evaluate=...)          # optimizer, last checkpoint, processes
    for batch in run.batches(views):                            # of the remaining steps
        loss = ...                                              # the forward pass and loss of the script
        run.update(loss)                                        # backward, AdamW, evaluate, log, save
    run.finish(model, config)                                   # model.pt and result.json
"""
import json
import math
import os
import signal
import sys
import textwrap
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate
from tqdm import tqdm

import data
import launch
import run_folder
from launch import UserError, format_metrics, make_parser, parse, rank, say, scalars, world_size
from run_folder import wait_until_visible, write_atomically, write_json

__all__ = ["Run", "UserError", "make_parser", "parse"]    # scripts outside this folder call run.parse


# ---- The training step ----

def seed_step(seed, step):
    """Seed what the model draws (stochastic depth, Gumbel noise, mixup) by (seed, step, rank)."""
    torch.manual_seed(hash((seed, step, rank())))


def cosine(step, total, start, end):
    """Half a cosine from start, at step 0, to end, at step `total` and after it."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1, step / max(1, total))))


def warmup_cosine(step, total, peak, end, warmup_steps):
    """Learning rate: linear to peak over warmup_steps, then half a cosine to end (Tables 12 and 13)."""
    if step < warmup_steps:
        return peak * min(1, (step + 1) / warmup_steps)
    return cosine(step - warmup_steps, total - warmup_steps, peak, min(end, peak))


def parameter_groups(model, weight_decay, layer_decay=1.0):
    """Parameter groups for AdamW, with layer-wise learning-rate decay (Table 13).

    The learning rate of layer l is multiplied by "lr_scale" = layer_decay ** (L + 1 - l). Layer 0 holds the
    embeddings, layers 1 to L the blocks, layer L + 1 the heads and a shared position bias. As in the released
    code, vectors, [S] and E_pos have no weight decay.
    """
    depth, groups = len(model.blocks), {}
    for name, parameter in model.named_parameters():
        layer = depth + 1
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("cls_token", "mask_token", "pos_embed", "patch_embed")):
            layer = 0
        scale = layer_decay ** (depth + 1 - layer)
        decay = 0.0 if parameter.dim() == 1 or name in ("cls_token", "pos_embed") else weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


@torch.no_grad()
def update_average(average, model, decay):
    """Exponential moving average of weights, in place. swa_utils.AveragedModel would wait for the GPU."""
    for mean, new in zip(average.parameters(), model.parameters()):
        mean.lerp_(new, 1 - decay)


def count_steps(args, num_images):
    """(steps of a run, steps per epoch) for num_images training images. An incomplete batch is dropped."""
    steps_per_epoch = num_images // args.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"--batch-size: {args.batch_size} is more than the {num_images} training images")
    return args.steps or max(1, round(args.epochs * steps_per_epoch)), steps_per_epoch


class StopSignal:
    """SIGTERM and SIGINT end a run after the current step, in all processes, once last.pt has been written.
    In order: a process receives the signal, and note_signal stores it. The next all-reduce tells all
    processes. At the end of that step, with last.pt written, exit_by_signal ends each process by a signal.
    After the last step, restore_handlers puts back the previous handlers.
    """

    def __init__(self):
        self.received = 0                                              # the signal, 0 = none
        self.handlers = {number: signal.signal(number, self.note_signal)
                         for number in (signal.SIGTERM, signal.SIGINT)
                         if signal.getsignal(number) != signal.SIG_IGN}    # under nohup, or trap '' INT

    def note_signal(self, number, frame):
        if number == signal.SIGINT and self.received == signal.SIGINT:    # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.received = number

    def exit_by_signal(self, step):
        """End this process by the signal that it received, or by SIGTERM if only others received one."""
        number = self.received or signal.SIGTERM
        say(f"{signal.Signals(number).name}: stopped after step {step}; continue without --fresh")
        if dist.is_initialized():
            dist.barrier()                                             # last.pt is written by rank 0
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def restore_handlers(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.received:                                              # it came after the last all-reduce
            os.kill(os.getpid(), self.received)


class Run:
    """A training run in the folder args.out: it is opened, continued, logged, saved and finished here.

    The folder holds config.json, metrics.jsonl, last.pt (the newest checkpoint), previous.pt (the one before
    it), and at the end model.pt and result.json. Rank 0 writes, all processes read.

    num_images: the number of training images; None for an evaluation without training.
    inputs: what else the run depends on, as run_folder.inputs returns it.
    Raises UserError if the images do not fill a batch, or if the folder holds another run or other files, is
    in use, or is not visible on all machines.

    steps       optimizer steps of the whole run
    step        optimizer steps done so far
    finished    whether the run is already finished; then nothing is left to do
    """

    def __init__(self, args, device, num_images, inputs=None):
        self.args, self.device, self.folder = args, device, Path(args.out)
        self.steps, self.step, self.report = 0, 0, {}
        self.gallery, self.said_where = None, False
        if num_images is not None:
            self.steps, steps_per_epoch = count_steps(args, num_images)
        try:
            self.finished = launch.on_first_process(lambda: self._open_folder(inputs or {}))
        except OSError as error:
            reason = f"{error.filename} cannot be used ({error.strerror})" if error.filename else error
            raise UserError(f"--out: {reason}") from None
        file = self.folder / "config.json"                             # rank 0 wrote it
        seen = launch.all_gather(file.read_bytes() if wait_until_visible(file) else None)
        if len(set(seen)) > 1:
            raise UserError(f"--out: {self.folder} is not the same folder on all machines; name a shared one")
        if self.finished:
            say(f"{self.folder} is finished; --fresh starts over")
            return
        given = [f"{name} {getattr(args, name)}" for name in args.given if name not in ("preset", "out")]
        flags = f"{self.folder}: preset {args.preset}" + (f", with {', '.join(given)}" if given else "")
        say(textwrap.fill(flags, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
        if num_images is not None:
            self._describe_training(self.steps / steps_per_epoch)

    def _describe_training(self, epochs):
        args, scaling = self.args, ""
        if "lr" not in args.given and args.batch_size != args.base_batch:
            scaling = f" = {args.base_lr:g} x batch {args.batch_size} / {args.base_batch}"
        dtype = launch.choose_dtype(args.precision, self.device.type)
        say(f"{self.steps} steps of {args.batch_size} images, {epochs:.3g} epochs; "
            f"peak lr {args.lr:g}{scaling}; {world_size()} x {self.device}, {dtype}")

    def prepare(self, model, groups, *, evaluate, schedule=warmup_cosine, average=None, evaluate_first=False,
                log_prefix="val_", gallery=None):
        """Make the optimizer, load the last checkpoint if there is one, and return the network to train.

        groups          parameter groups for AdamW, each with "lr_scale", the factor of its learning rate
        evaluate        function without arguments that returns a report: {name: number, or anything else}
        schedule        (step, steps, peak, end, warmup_steps) -> learning rate
        average         a copy of the model, for the moving average of its weights with decay args.ema
        evaluate_first  evaluate after the first step, too
        log_prefix      written before the names of a report in metrics.jsonl
        gallery         a plots.Gallery, whose pictures are drawn after each evaluation
        The network is the model, compiled with --compile, and replicated if there are several processes.
        """
        self.model, self.average, self.schedule = model, average, schedule
        self.evaluate, self.evaluate_first, self.log_prefix = evaluate, evaluate_first, log_prefix
        self.gallery = gallery
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        fp16 = launch.choose_dtype(self.args.precision, self.device.type) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.stateful = dict(model=model, optimizer=self.optimizer, scaler=self.scaler)    # kept in last.pt
        if average is not None:
            self.stateful["average"] = average
        if gallery is not None:
            self.stateful["gallery"] = gallery
        self._restore()
        self.network = torch.compile(model) if self.args.compile else model
        if world_size() > 1:
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)    # renamed in 2.14
            self.network = DistributedDataParallel(
                self.network, device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False, gradient_as_bucket_view=True)
        return self.network

    def autocast(self):
        """The context of a forward pass: matrix products in the dtype of --precision."""
        return launch.autocast(self.args.precision, self.device)

    def batches(self, views, collate=default_collate, repeats=1):
        """Yield the batches of the remaining steps, in args.accumulate parts. Call `update` after each part.

        Every step is seeded and has its learning rate set. views, collate, repeats: as for data.train_loader.
        """
        args = self.args
        loader = iter(data.train_loader(views, args, self.device, self.step, self.steps, collate, repeats))
        self.stop = StopSignal()
        self.last_line = self.step, time.perf_counter()                # of the log: its step and time
        for step in tqdm(range(self.step, self.steps), initial=self.step, total=self.steps, leave=False,
                         disable=rank() > 0 or not sys.stderr.isatty()):
            seed_step(args.seed, step)
            self.lr = self.schedule(step, self.steps, args.lr, args.min_lr, args.warmup * self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * group["lr_scale"]
            self.model.train()
            self.sums = 0                                              # of the loss and scores of the parts
            for part in range(args.accumulate):
                self.last_part = part == args.accumulate - 1
                if world_size() > 1:
                    self.network.require_backward_grad_sync = self.last_part    # one exchange of gradients
                yield next(loader)
        self.stop.restore_handlers()

    def update(self, loss, count=1.0, **scores):
        """Add the gradient of one part of a batch; after the last part, step, evaluate, log and save.

        loss: the mean over the part. scores: more scalars for the log; None is left out. Means over parts and
        processes are logged. count: how many things, such as pixels, loss and scores are means over; needed
        if parts differ in it. A step then takes the mean over the things of all parts and processes.
        Raises FloatingPointError if the mean loss is not finite.
        """
        self.scaler.scale(loss * count / self.args.accumulate).backward()
        scores = {name: score for name, score in scores.items() if score is not None}
        values = [loss.new_full((), x) if isinstance(x, float) else x for x in (1.0, loss, *scores.values())]
        self.sums = self.sums + torch.stack(values).detach() * count
        if not self.last_part:
            return
        (count, *means), stop_requested = self._all_reduce(self.sums / self.args.accumulate)
        count = count or 1.0                                           # nothing was counted: the sums are 0
        means = [mean / count for mean in means]
        self.synced_at = time.perf_counter()
        if not math.isfinite(means[0]):
            raise FloatingPointError(f"step {self.step + 1}: the loss is {means[0]}; the last checkpoint is "
                                     "kept; try a lower --lr, or --precision bf16 or fp32")
        grad_norm = self._step_optimizer(count)
        self.step += 1
        last = self.step == self.steps
        due = last or self.step % self.args.eval_every == 0 or (self.step == 1 and self.evaluate_first)
        self.report = self._evaluate() if due else {}
        self._log(dict(zip(["loss", *scores], means)) | {"lr": self.lr, "grad_norm": grad_norm})
        if stop_requested or last or self.step % self.args.save_every == 0:
            self._save()
        if self.report and not last:                                   # finish draws the last ones
            self._draw_gallery()
        if self.report:                                                # does not count as training time
            self.last_line = self.step, time.perf_counter()
        if stop_requested:
            self.stop.exit_by_signal(self.step)

    def _evaluate(self):
        report = self.evaluate()
        if self.gallery is not None and rank() == 0:
            self._attempt("the pictures", lambda: self.gallery.update(self.step, report))
        return report

    def _all_reduce(self, values):
        """Means of a vector over processes, as floats, and whether one of them received a signal to stop."""
        received = values.new_full((1,), float(self.stop.received > 0))
        means = launch.all_sum(torch.cat([values, received])) / world_size()
        *means, received = means.tolist()                              # the only wait for the GPU in a step
        return means, received > 0

    def _step_optimizer(self, count):
        """Divide the gradient by count, clip it to norm args.clip_grad, and step. Returns its norm."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if count != 1 and parameter.grad is not None:
                parameter.grad /= count
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.clip_grad or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:    # a smaller decay at first, so that the first weights are forgotten
            update_average(self.average, self.model, min(self.args.ema, (1 + self.step) / (10 + self.step)))
        return norm

    def _log(self, values):
        """Add a line to metrics.jsonl if one is due: --log-every, first, last, or after an evaluation."""
        step, evaluated = self.step, bool(self.report)
        if rank() > 0 or not (step % self.args.log_every == 0 or step == 1 or evaluated):
            return
        before, start = self.last_line
        self.last_line = step, self.synced_at
        values = {name: float(value) for name, value in values.items()}
        values |= {f"{self.log_prefix}{name}": value for name, value in scalars(self.report).items()}
        images = (step - before) * self.args.batch_size
        values["images_per_second"] = round(images / (self.synced_at - start), 1)
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
        except OSError as error:
            raise OSError(f"{self.folder / 'metrics.jsonl'} could not be written ({error})") from None
        ten_times_a_run = step % max(1, self.steps // 10) < self.args.log_every
        if ten_times_a_run or evaluated:
            say(f"step {step}/{self.steps}  {format_metrics(values)}")

    def finish(self, model, config, **more):
        """Write result.json, and model.pt, which --init and --tokenizer accept: weights, config, class name.

        more: further entries of model.pt. The result is the report of the last evaluation. Returns it.
        """
        report = self.report or self._evaluate()                       # resumed with no steps left
        if rank() == 0:
            kept = {"model": model.state_dict(), "config": config, "kind": type(model).__name__, **more}
            write_atomically(self.folder / "model.pt", lambda file: torch.save(kept, file))
        self.write_result(report)
        self._draw_gallery()
        return report

    def write_result(self, report):
        """Write result.json, after which the run is finished."""
        say(f"held-out images: {format_metrics(report)}")
        if rank() == 0:
            write_json(self.folder / "result.json", report)
        if dist.is_initialized():
            dist.barrier()                                             # the others may read the folder next
        wait_until_visible(self.folder / "result.json")

    def draw(self, name, draw_figure, *inputs):
        """Save the figure draw_figure(*inputs) in the folder. An error is only a warning."""
        def write():
            figure = draw_figure(*inputs)
            write_atomically(self.folder / name, lambda file: figure.savefig(file, format="png"))

        if rank() == 0:
            self._attempt(name, write)

    def _attempt(self, name, draw):
        """Call draw(). An error is only a warning."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                        # such as a glyph missing in the font
                draw()
        except Exception as error:                                     # whatever libraries raise
            say(f"warning: {name} could not be drawn ({type(error).__name__}: {error})")

    def _draw_gallery(self):
        """Draw the pictures of the last evaluation. The first time, say where they are."""
        if self.gallery is None or rank() > 0:
            return
        figures = self.gallery.figures()
        for name, draw_figure in figures.items():
            self.draw(name, draw_figure)
        if not self.said_where:
            say(f"{self.folder} has {' and '.join(figures)}, drawn again after each evaluation")
        self.said_where = True

    # ---- The folder ----

    def _open_folder(self, inputs):
        """Open the folder, and keep it locked. Returns whether the run is finished."""
        finished, self._lock = run_folder.open_folder(self.args, inputs)
        return finished

    def depends_on(self, **inputs):
        """Add inputs (see run_folder.inputs) that are known only now. Raises UserError if they differ."""
        launch.on_first_process(lambda: run_folder.record(self.args, inputs))

    def _save(self):
        """Write last.pt, all that is needed to continue; the one before becomes previous.pt."""
        if rank() > 0:
            return
        log, last = self.folder / "metrics.jsonl", self.folder / "last.pt"
        state = {"step": self.step, "log_size": log.stat().st_size if log.exists() else 0}
        state |= {name: part.state_dict() for name, part in self.stateful.items()}
        for name, tensor in state["model"].items():
            if not tensor.isfinite().all():
                raise FloatingPointError(f"step {self.step}: {name} is not finite; no checkpoint was written")
        write_atomically(last, lambda file: torch.save(state, file), backup=self.folder / "previous.pt")

    def _restore(self):
        """Load the last intact checkpoint, if there is one, and cut the log back to it."""
        log, log_size = self.folder / "metrics.jsonl", 0
        if launch.on_first_process(lambda: run_folder.choose_checkpoint(self.folder)):
            state = torch.load(self.folder / "last.pt", map_location="cpu", weights_only=True)
            for name, part in self.stateful.items():
                if state.get(name):                                    # a scaler that was off has no state
                    part.load_state_dict(state[name])
            self.step, log_size = state["step"], state["log_size"]
            if self.step > self.steps:
                raise UserError(f"--out: {self.folder} holds step {self.step} of a longer run, and this one "
                                f"has {self.steps} steps; name another --out, or start over with --fresh")
            say(f"continuing {self.folder} after step {self.step} of {self.steps}")
        if rank() == 0 and log.exists():
            os.truncate(log, min(log_size, log.stat().st_size))
