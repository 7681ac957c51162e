"""Train the tiny LinGen from scratch on moving shapes, by the paper's recipe.

    python train_tiny.py                                          writes runs/tiny.pt and pictures
    python train_tiny.py --set tesa=False --out runs/no-tesa.pt   the same with a part taken out
    python train_tiny.py --evaluate runs/tiny.pt                  judges the clips of a checkpoint

Still pictures come first, then longer and longer clips (progressive training), always with some
pictures among them (hybrid training). The loss is that of flow matching.

b clips; t (b,) the time of the flow: 0 noise, 1 data. Clips are (b, 3, frames, height, width).
"""

import argparse
import ast
import collections
import contextlib
import copy
import io
import itertools
import math
import os
import signal
import sys
import time
from pathlib import Path

import sample as sampler  # first: it says what to install where torch is missing
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import lingen
from sample import sample_captions
from toy import judge, preview, shapes

Stage = collections.namedtuple("Stage", "frames batch share")  # frames of a clip, share of steps
# Each stage goes on with the weights of the one before. Tokens of a step: 1152, 1728, 2304.
STAGES = (Stage(1, 32, 0.1), Stage(4, 24, 0.1), Stage(16, 8, 0.8))
STEPS = 6000
RATE = 3e-3  # learning rate
PICTURES_EVERY = 8  # hybrid training: every eighth step is on pictures
NO_CAPTION = 0.05  # share of empty captions, for classifier-free guidance
LONG = dict(steps=200, shift=16.0)  # sampling beyond 16 frames: stretches have to agree
CLAMP = 0.4  # the smallest 1 - t in the loss, or late times would dominate


def stage_at(step, steps, frames=None):
    """The stage whose clips a step trains on; frames: lengths of clips to take in turn instead."""
    if step % PICTURES_EVERY == 0:
        return STAGES[0]
    if frames:
        length = frames[(step - step // PICTURES_EVERY) % len(frames)]
        return Stage(length, max(1, 128 // length), 1 / len(frames))  # 128 frames, or one clip
    ends = itertools.accumulate(stage.share for stage in STAGES)
    return next(stage for stage, end in zip(STAGES, ends) if step < round(end * steps))


def draw_times(n, frames, generator):
    """Times (n,) to train at: logit-normal (SD3), noisier for long clips; a fifth is uniform."""
    logit = -1.5 - 0.5 * math.log(frames / 16) + 1.2 * torch.randn(n, generator=generator)
    uniform, chance = torch.rand(2, n, generator=generator)
    return torch.where(chance < 0.2, uniform, torch.sigmoid(logit))


def training_batch(step, steps, seed, frames=None):
    """The random data of a step, from its arguments alone: clips, text (b, n), t, noise."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    stage = stage_at(step, steps, frames)
    clips, captions, _ = shapes.make_batch(stage.batch, stage.frames, generator)
    text = sampler.encode(captions, shapes.WORDS)
    text[torch.rand(len(text), generator=generator) < NO_CAPTION] = 0
    t = draw_times(len(clips), stage.frames, generator)
    return clips, text, t, torch.randn(clips.shape, generator=generator)


def velocity_error(out, clips, t, noise, predicts):
    """Mean squared error of the velocity, for a prediction `out` at (1 - t) noise + t clips.

    The velocity is (clips - x_t) / (1 - t), so its error is that of clips over 1 - t, but bounded.
    """
    if predicts == "velocity":
        return (out - (clips - noise)).square().mean()
    left = (1 - t).clamp(min=CLAMP).view(-1, 1, 1, 1, 1)
    return ((out - clips) / left).square().mean()


def flow_matching_loss(model, clips, text, t, noise):
    """The loss of a LinGen on clips and noise (b, c, frames, h, w), text, t (b,): a scalar."""
    at = t.view(-1, 1, 1, 1, 1)
    out = model((1 - at) * noise + at * clips, t, text)
    config = getattr(model, "module", model).config  # under DistributedDataParallel: its module
    return velocity_error(out, clips, t, noise, config.predicts)


class Run:
    """The state of a training run. A checkpoint holds all of it: on a CPU, resume is exact.

    average: a model with the running mean of the weights (EMA), from which one samples.
    losses: for each step (frames, loss, loss of an all-black clip).
    """

    def __init__(self, config, settings, device, weights=None):  # weights to begin with
        torch.manual_seed(settings["seed"])
        self.settings, self.device, self.step, self.losses = settings, device, 0, []
        self.asked_to_stop = self.stop = 0.0  # a signal came: here (1), to any process (> 0)
        self.model = lingen.LinGen(config).to(device)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        matrices, others = [], []  # Muon, for the matrices that act on tokens
        for name, p in self.model.named_parameters():
            on_tokens = name.startswith(("blocks", "patch")) and "modulation" not in name
            (matrices if on_tokens and p.dim() == 2 else others).append(p)
        self.optimizers = [
            torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        # torchrun: each process takes its rows of a batch, and gradients are averaged.
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ["RANK"]) if self.world > 1 else 0
        self.wrapped = DistributedDataParallel(self.model) if self.world > 1 else self.model

    def advance(self, batch=None):  # or the recipe's own
        """One step -> its loss. FloatingPointError, before weights change, if it is not finite."""
        steps, seed, frames = map(self.settings.get, ("steps", "seed", "frames"))
        batch = batch or training_batch(self.step, steps, seed, frames)
        clips, text, t, noise = (part[self.rank :: self.world].to(self.device) for part in batch)
        self.model.zero_grad()
        loss = flow_matching_loss(self.wrapped, clips, text, t, noise)
        loss.backward()
        black = velocity_error(-1, clips, t, noise, "clean")  # the loss of an all-black clip
        numbers = torch.stack([loss.detach(), black, black.new_tensor(self.asked_to_stop)])
        if self.world > 1:  # all processes stop at the same step
            distributed.all_reduce(numbers)
        loss, black, self.stop = (numbers / self.world).tolist()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        if not math.isfinite(loss + norm):
            place = self.first_bad_module(noise.lerp(clips, t.view(-1, 1, 1, 1, 1)), text, t)
            raise FloatingPointError(f"step {self.step}: {place} not finite; try a lower --rate")
        # Learning rate: 50 steps of warm-up, a plateau, and a line down to 0 over the last 40 %.
        rate = min(1.0, (self.step + 1) / 50, (steps - self.step) / (0.4 * steps))
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate * self.settings["rate"]
            optimizer.step()
        keep = min(0.998, (self.step + 1) / (self.step + 10))  # smaller at first
        for mean, weight in zip(self.average.parameters(), self.model.parameters()):
            mean.lerp_(weight.detach(), 1 - keep)
        self.losses.append((clips.shape[2], loss, black))
        self.step += 1
        return loss

    def first_bad_module(self, clips, text, t):
        """The first module, in the order of the computation, whose output is not finite."""
        names, bad = {module: name for name, module in self.model.named_modules()}, []

        def look(module, inputs, out):
            if not out.isfinite().all():
                bad.append(names[module])

        with torch.no_grad(), nn.modules.module.register_module_forward_hook(look):
            self.model(clips, t, text)
        return bad[0] if bad else "the gradient"

    def state(self):
        """A checkpoint: what sample.py needs, and under "training" what a resume needs."""
        backend = "auto" if callable(self.model.config.backend) else self.model.config.backend
        frames = self.settings.get("frames") or [stage.frames for stage in STAGES]
        trained = {"frames": sorted({1, *frames}), "height": [shapes.SIZE], "width": [shapes.SIZE]}
        training = {"settings": self.settings, "step": self.step, "losses": self.losses}
        training["model"] = self.model.state_dict()
        training["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        return {
            "format": sampler.FORMAT,
            "config": {**vars(self.model.config), "backend": backend},  # no function can be saved
            "weights": self.average.state_dict(),
            "vocabulary": shapes.WORDS,
            "sampling": vars(sampler.Settings(**(LONG if max(frames) > 16 else {}))),
            "trained": trained,
            "training": training,
        }

    def restore(self, checkpoint):
        """Go on where a checkpoint stopped. Raises ValueError for one of another run."""
        saved = checkpoint.get("training")
        if not saved:
            raise ValueError("the file of --out holds no training state")
        theirs = saved["settings"] | checkpoint["config"]
        if saved["step"] == theirs["steps"] < self.settings["steps"]:  # a finished run goes on;
            theirs["steps"] = self.settings["steps"]  # rate and stages follow the new number
        for name, value in {**self.settings, **self.state()["config"]}.items():
            if theirs.get(name) != value:
                raise ValueError(f"the run in --out has {name} {theirs.get(name)}, not {value}")
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        self.average.load_state_dict(checkpoint["weights"])
        self.step, self.losses = saved["step"], saved["losses"]

    def save(self, out, variant):
        """Write the checkpoint, and beside it eight sampled clips and the loss curve."""
        write_checkpoint(out, self.state())
        settings = vars(sampler.Settings(frames=(self.settings.get("frames") or [16])[0], steps=24))
        clips = sample_captions(self.average, preview.CAPTIONS, shapes.WORDS, settings)
        title = f"{variant}, step {self.step}"
        page = preview.side_by_side(list(map(sampler.to_frames, clips)), preview.CAPTIONS, title)
        sampler.write_clip(out.with_suffix(".gif"), page)
        sampler.replace_file(out.with_suffix(".png"), preview.loss_curve(self.losses, title))


def write_checkpoint(path, state):
    """Save a dict of tensors and numbers atomically."""
    torch.save(state, buffer := io.BytesIO())
    sampler.replace_file(path, buffer.getvalue())


def train(args):
    """Train to the last step (returns 0), or to Ctrl-C or SIGTERM (saves, returns 130)."""
    out, world = Path(args.out), int(os.environ.get("WORLD_SIZE", 1))
    if out.exists() != args.resume:
        how = "is missing: omit --resume" if args.resume else "exists: give other --out or --resume"
        raise ValueError(f"{out} {how}")
    device = sampler.choose_device(args.device)
    if world > 1:  # torchrun
        odd = args.frames or any(stage.batch % world for stage in STAGES)
        if str(device) not in ("cpu", "cuda") or odd:
            raise ValueError(f"{world} processes share batches on cpu or cuda, without --frames")
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group()
    for path in (out, Path(args.publish or out)):  # an error before the work
        path.parent.mkdir(parents=True, exist_ok=True)
    sampler.Settings(renoise=args.renoise)  # its limits
    settings = {name: getattr(args, name) for name in ("steps", "seed", "rate", "frames")}
    config = lingen.preset("tiny", **dict(args.set))
    start = sampler.load_model(args.init, **vars(config))[0].state_dict() if args.init else None
    run = Run(config, settings, device, start)
    if args.resume:
        run.restore(sampler.load_checkpoint(out))
    variant = ", ".join(f"{name}={value}" for name, value in args.set) or "LinGen"

    def stop_after_step(number, frame):
        run.asked_to_stop = 1.0
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

    signal.signal(signal.SIGINT, stop_after_step)
    signal.signal(signal.SIGTERM, stop_after_step)
    saved = time.monotonic()
    with tqdm(total=args.steps, initial=run.step, unit="step", disable=run.rank > 0 or None) as bar:
        while run.step < args.steps and not run.stop:
            loss = run.advance()
            bar.set_postfix_str(f"{run.losses[-1][0]} frames, loss {loss:.3f}", refresh=False)
            bar.update()
            if bar.disable and run.rank == 0 and run.step % 100 == 0:  # no terminal
                print(f"step {run.step} of {args.steps}, loss {loss:.3f}", flush=True)
            if time.monotonic() - saved > args.save_every and run.rank == 0:
                run.save(out, variant)
                saved = time.monotonic()
    if run.rank:
        return 0
    run.save(out, variant)
    if run.step < args.steps:
        print(f"stopped at step {run.step} of {args.steps}; go on with --resume", file=sys.stderr)
        return 130
    print(f"wrote {out}, {out.with_suffix('.gif')} and {out.with_suffix('.png')}")
    _, losses, black = zip(*run.losses[-(run.step // 10 + 1) :])  # the last tenth
    if run.step >= 100 and sum(losses) > sum(black) and run.model.config.predicts == "clean":
        raise FloatingPointError("the training diverged: worse than all-black clips; lower --rate")
    if args.publish:
        state = {**run.state(), "training": None}
        state["weights"] = {name: value.half() for name, value in state["weights"].items()}
        state["sampling"]["renoise"] = args.renoise
        write_checkpoint(args.publish, state)
    return 0


def evaluate(path, n, seed, device):
    """Sample n clips each of seen and of held-out captions; print what the judge says."""
    model, saved = sampler.load_model(path, device)
    for name in ("seen", "held out"):
        specs = shapes.random_specs(n, torch.Generator().manual_seed(seed), name == "held out")
        captions = [shapes.caption(spec) for spec in specs]
        settings = {**saved["sampling"], "seed": seed, "progress": True}
        clips = sample_captions(model, captions, saved["vocabulary"], settings)
        print(f"{name:9} {judge.report(judge.judge(clips, specs))}", flush=True)


def setting(text):
    """NAME=VALUE of --set -> (name, value), of the type that the field has."""
    name, _, value = text.partition("=")
    fields = dict(vars(lingen.preset("tiny")))
    del fields["channels"], fields["vocab_size"]  # the toy sets them
    with contextlib.suppress(ValueError, SyntaxError):  # a word, as zigzag, stays one
        value = ast.literal_eval(value)
    wrong = name not in fields or type(value) is not type(fields[name])
    if wrong or type(value) is tuple and [type(size) for size in value] != 3 * [int]:
        known = ", ".join(f"{key}={fields[key]!r}" for key in ({name} & fields.keys() or fields))
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE, as in {known}")
    return name, value


def main():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Train a tiny LinGen.", formatter_class=formatter)
    add = parser.add_argument
    add("--out", default="runs/tiny.pt", help="the checkpoint; pictures are written beside it")
    add("--steps", type=int, default=STEPS, help="training steps; the default takes 46 minutes")
    add("--seed", type=int, default=0, help="random seed of weights and data")
    add("--rate", type=float, default=RATE, help="learning rate")
    add("--init", type=Path, metavar="CHECKPOINT", help="begin with its weights, not random ones")
    add("--frames", type=int, nargs="+", help="of clips, in turn, in place of the three stages")
    add("--set", type=setting, action="append", default=[], metavar="NAME=VALUE",
        help="field of LinGenConfig, e.g. tesa=False or scan=zigzag; may be repeated")  # fmt: skip
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save-every", type=float, default=60, metavar="SECONDS", help="between checkpoints")
    add("--publish", metavar="FILE", help="at the end, also write float16 weights for sample.py")
    add("--renoise", type=float, default=1.0, help="of sample.py, stored by --publish")
    add("--device", help="an accelerator if there is one, else cpu")
    add("--evaluate", metavar="CHECKPOINT", help="judge clips of this checkpoint, and stop")
    add("--captions", type=int, default=100, help="with --evaluate: how many of each kind")
    args = parser.parse_args()
    if min(args.steps, args.captions, *(args.frames or ())) < 1 or not args.out.endswith(".pt"):
        parser.error("--steps, --captions and --frames are at least 1; --out ends in .pt")
    if args.evaluate is not None:
        return evaluate(args.evaluate, args.captions, args.seed, sampler.choose_device(args.device))
    return train(args)


if __name__ == "__main__":
    sampler.run_command("train_tiny.py", main)
