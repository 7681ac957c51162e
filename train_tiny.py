"""Train the tiny LinGen from nothing: a toy world, LinGen's progressive recipe, and the loop.

    python train_tiny.py                            trains, saves runs/tiny.pt, draws a preview
    python train_tiny.py --evaluate runs/tiny.pt    holds what it learnt against the captions

1. The data.    One or two flat shapes on a black *torus*: who leaves on the right comes back on the left. So
                "moving left" stays true for a whole minute, and second 60 looks just like second 1.
2. The recipe.  Flow matching; pictures (clips of one frame) first, then short clips, then longer ones with some of
                the shorter mixed in; in the second half also the model's own predictions; two optimisers.
3. The loop.    A step, a checkpoint that no kill can tear, and the way back from it.

How a clip is held against its caption, by reading its pixels, stands in benchmarks/judge.py.

Letters: b clips, k objects in a clip, t frames (as a number from 0 to 1, the time of the flow), h = w = size
pixels. Places and steps are (x, y) in pixels, y pointing down; pixel i covers [i - 1/2, i + 1/2]. Specs are int64
(b, k, 5): per object the indices of colour, shape, direction, speed and size in the tables below.
"""

import contextlib
import dataclasses
import datetime
import io
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed, nn
from tqdm import tqdm

import lingen
import sample

# ---- 1. The data ---------------------------------------------------------------------------------

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1),
           "yellow": (1, 1, 0), "magenta": (1, 0, 1), "cyan": (0, 1, 1)}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), "up-right": (1, -1),
              "up-left": (-1, -1), "down-right": (1, 1), "down-left": (-1, 1)}
SPEEDS = {"slowly": 1, "quickly": 2}     # whole pixels per frame on each moving axis: frames are rolls
SIZES = {"small": 5.0, "large": 8.0}     # pixels, about half of what the shape spans
ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "direction": tuple(DIRECTIONS),
              "speed": tuple(SPEEDS), "size": tuple(SIZES)}      # in the order of a spec's five columns
SYNONYMS = {"small": ("small", "little", "tiny"), "large": ("large", "big"),
            "slowly": ("slowly", "slow"), "quickly": ("quickly", "fast")}
VERBS = ("moving", "going", "drifting", "sliding")
VOCABULARY = tuple(sorted({"a", "and", "to", "the", "right", "left", "up", "down", *COLOURS, *SHAPES,
                           *VERBS, *(word for group in SYNONYMS.values() for word in group)}))

RGB = torch.tensor(list(COLOURS.values()), dtype=torch.float32)                            # (6, 3)
HALF = torch.tensor(list(SIZES.values()))                                                  # (2,)
STEPS = torch.tensor([[(dx * v, dy * v) for v in SPEEDS.values()]
                      for dx, dy in DIRECTIONS.values()])                                  # (8, 2, 2)


def held_out(specs):
    """Which combinations of colour, shape and direction are kept from training.

    specs: int64 (..., 5). Returns bool (...). True for 19 of the 192 combinations, a tenth, spread so
    that every *pair* (red circle, circle going left, red going left) is met in training: what is new
    in a held-out caption is only that the three come together.
    """
    colour, shape, direction = specs[..., 0], specs[..., 1], specs[..., 2]
    return (colour + 2 * shape + 3 * direction) % 10 == 4


def random_specs(n, generator, objects=1, held_out_only=False, practice=False):
    """Draw n specs: int64 (n, objects, 5). Two objects differ in colour and are both small.

    held_out_only: every object from the held-out combinations; else every object from the others. practice: as training
    draws them, what is hard more often (PRACTICE, SMALL); else all alike.
    """
    if objects not in (1, 2):
        raise ValueError(f"objects is {objects!r}; a clip holds 1 or 2 objects: ask for one of these")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n is {n!r}; ask for at least 1 clip")
    triples = torch.cartesian_prod(torch.arange(6), torch.arange(4), torch.arange(8))      # (192, 3)
    triples = triples[held_out(triples) == held_out_only]                                  # (m, 3)
    tickets = PRACTICE[triples[:, 1]] if practice else torch.ones(len(triples))            # (m,)
    taken = torch.zeros(n, len(triples))
    picks = []
    for _ in range(objects):    # a lottery among the triples: the best of w draws of u is u^(1/w); colours that are taken cannot win
        luck = torch.rand(n, len(triples), generator=generator) ** (1 / tickets)
        picks.append(triples[(luck - taken).argmax(1)])
        taken = taken + (triples[:, 0] == picks[-1][:, :1])
    speed_size = torch.randint(2, (n, objects, 2), generator=generator)
    if practice:
        speed_size[..., 1] = torch.rand(n, objects, generator=generator) > SMALL
    if objects == 2:
        speed_size[..., 1] = 0                       # two large ones would have no room to miss each other
    return torch.cat([torch.stack(picks, 1), speed_size], -1)                              # (n, k, 5)


def check_specs(specs, axes):
    """ValueError for what is no spec of so many axes, see the top of the file."""
    if (not isinstance(specs, torch.Tensor) or specs.dim() != axes or specs.shape[-1] != 5 or specs.dtype != torch.int64
            or ((specs < 0) | (specs >= torch.tensor([len(table) for table in ATTRIBUTES.values()]))).any()):
        raise ValueError(f"specs {tuple(getattr(specs, 'shape', ()))} came in; expected int64 ({'b, ' * (axes == 3)}k, 5), each an index into its table in ATTRIBUTES")


def wrap(offset, size):
    """The shortest way round the torus: offsets brought into [-size/2, size/2)."""
    return (offset + size / 2) % size - size / 2


def draw_shapes(half, centre, size):
    """All four shapes at the same place: half (n,), centre (n, 2) -> coverage (n, 4, size, size).

    Coverage is the part of the pixel that lies inside, 0 to 1, from the signed distance to the outline:
    this makes edges smooth and places real numbers. The factors give the shapes comparable areas.
    """
    axis = torch.arange(size)
    x = wrap(axis - centre[:, :1], size)[:, None, :]                                       # (n, 1, w)
    y = wrap(axis - centre[:, 1:], size)[:, :, None]                                       # (n, h, 1)
    r, ax, ay = half[:, None, None], x.abs(), y.abs()
    circle = (x * x + y * y).sqrt() - r
    square = torch.maximum(ax, ay) - 0.95 * r
    triangle = torch.maximum(y, math.sqrt(0.75) * ax - y / 2) - 0.7 * r      # 0.7 r: the incircle
    cross = torch.minimum(torch.maximum(ax - 1.2 * r, ay - 0.4 * r),
                          torch.maximum(ay - 1.2 * r, ax - 0.4 * r))
    return (0.5 - torch.stack([circle, square, triangle, cross], 1)).clamp(0, 1)           # (n, 4, h, w)


def random_starts(specs, frames, generator, size=32):
    """Places in frame 0: float32 (b, k, 2). The first object anywhere; a second stands half the torus from it in the middle of the clip.

    Half of its width, its height or both: what keeps the two farthest apart, given how they move. So they stand to each
    other as the parts of one shape do. Were the second also put anywhere, the sampler would choose both places near the noise,
    before it can be seen that two ways cross, and where objects meet it must know which lies on top. A clip as long as the
    world's period has no middle (`sample.sample` begins it anywhere): there the moment is drawn.
    """
    b, k, _ = specs.shape
    starts = torch.rand(b, 1, 2, generator=generator) * size                               # (b, 1, 2)
    if k == 1:
        return starts
    step = STEPS[specs[..., 2], specs[..., 3]]                                             # (b, k, 2)
    middle = torch.full((b, 1), (frames - 1) / 2) if frames < size else torch.randint(size, (b, 1), generator=generator)
    t = torch.arange(min(frames, size)) - middle         # whole-pixel steps: after `size` frames all repeats; (b, t)
    drift = t[..., None] * (step[:, 1:] - step[:, :1])                                     # (b, t, 2)
    half = torch.tensor([[size, size], [size, 0], [0, size]]) / 2                          # (3, 2)
    gap = wrap(half[:, None] + drift[:, None], size).norm(dim=-1).amin(-1)                 # (b, 3): the least over time
    return torch.cat([starts, (starts + (half[gap.argmax(1)] + drift[:, 0])[:, None]) % size], 1)  # (b, k, 2)


def roll(pictures, moved):
    """Move each picture round the torus: pictures (n, t, size, size) by moved (n, t, 2), whole pixels."""
    (n, t, size, _), axis = pictures.shape, torch.arange(pictures.shape[-1])
    x, y = ((axis - m[..., None].long()) % size for m in moved.unbind(-1))                 # (n, t, size) each
    return pictures[torch.arange(n)[:, None, None, None], torch.arange(t)[:, None, None], y[..., None], x[:, :, None]]


def render(specs, starts, frames, size=32):
    """Draw clips: specs int64 (b, k, 5), starts float (b, k, 2) -> float32 (b, 3, frames, size, size).

    Values in [-1, 1], background -1. Where objects meet, the first lies on top.
    """
    check_specs(specs, 3)
    if not isinstance(starts, torch.Tensor) or starts.shape != (*specs.shape[:2], 2) or not starts.isfinite().all():
        raise ValueError(f"starts {tuple(getattr(starts, 'shape', ()))} came in; expected {(*specs.shape[:2], 2)}, finite")
    if frames < 1 or size < 24:
        raise ValueError(f"frames={frames}, size={size}: need at least 1 frame, and 24 pixels for large shapes")
    b, k, _ = specs.shape
    colour, shape, direction, speed, big = specs.reshape(b * k, 5).unbind(-1)
    first = draw_shapes(HALF[big], starts.reshape(b * k, 2), size)[torch.arange(b * k), shape]
    # Steps are whole pixels, so every later frame is the first one rolled: gathered, not drawn again.
    moved = torch.arange(frames)[:, None] * STEPS[direction, speed][:, None]               # (bk, t, 2)
    cover = roll(first[:, None].expand(-1, frames, -1, -1), moved)                         # (bk, t, h, w)
    cover = cover.view(b, k, 1, frames, size, size)
    paint = (2 * RGB[colour] - 1).view(b, k, 3, 1, 1, 1)
    clip = torch.tensor(-1.0)
    for i in reversed(range(k)):
        clip = torch.lerp(clip, paint[:, i], cover[:, i])
    return clip                                                                            # (b, 3, t, h, w)


def caption(specs, generator=None, still=False, plain=False, speeds=False):
    """Say in words what specs, int64 (k, 5), shows. Returns a str.

    still: a picture, no words of motion. plain: the one canonical wording, everything named ("a small
    red circle moving slowly left"). Otherwise the generator picks the words; size and speed are each
    left out three times in ten, and then anything goes: "a red circle moving right". speeds: every speed is named.
    """
    check_specs(specs, 2)

    def pick(*options):
        return options[0] if plain else options[int(torch.randint(len(options), (1,), generator=generator))]

    phrases = []
    for colour, shape, direction, speed, size in specs.tolist():
        size, speed = tuple(SIZES)[size], tuple(SPEEDS)[speed]
        say_size, say_speed = pick(*[True] * 7, *[False] * 3), pick(*[True] * 7, *[False] * 3) or speeds
        noun = f"{tuple(COLOURS)[colour]} {SHAPES[shape]}"
        noun = f"{pick(*SYNONYMS[size])} {noun}" if say_size else noun
        if still:
            phrases.append(f"a {noun}")
            continue
        way, verb = tuple(DIRECTIONS)[direction], pick(*VERBS)
        if "-" in way:
            up, left = way.split("-")
            way = pick(way, f"{up} and {left}", f"{up} and to the {left}")
        elif way in ("left", "right"):
            way = pick(way, f"to the {way}")
        adverb, adjective = {"slowly": (("slowly",), "slow"), "quickly": (("quickly", "fast"), "fast")}[speed]
        motion = pick(f"{verb} {pick(*adverb)} {way}", f"{verb} {way} {pick(*adverb)}", None)
        if not say_speed:
            phrases.append(f"a {noun} {verb} {way}")
        else:
            phrases.append(f"a {noun} {motion}" if motion else f"a {adjective} {noun} {verb} {way}")
    return " and ".join(phrases)


def make_batch(n, frames, generator, size=32, objects=1, held_out_only=False, speeds=False, practice=False):
    """n clips with captions: float32 (n, 3, frames, size, size), list of n str, specs int64 (n, objects, 5).

    One frame is a still image, captioned without motion. held_out_only and practice as in `random_specs`, speeds as in
    `caption`. All chance comes from the (CPU) generator.
    """
    specs = random_specs(n, generator, objects, held_out_only, practice)
    clips = render(specs, random_starts(specs, frames, generator, size), frames, size)
    return clips, [caption(s, generator, still=frames == 1, speeds=speeds) for s in specs], specs


# ---- 2. The recipe -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the progressive recipe: `share` of all steps on clips of `frames` frames, `batch` at a time, of a world of `size` pixels."""

    frames: int
    batch: int
    share: float
    size: int = 32


# LinGen's recipe in small: pictures first, then short clips, then longer ones, low resolution before high, each stage starting
# from the last. Low resolution is a smaller world here: shapes as large as ever, with less black around them, so that a step
# shows nearly twice as many. Every stage costs about the same per step, since fewer tokens come in larger batches.
STAGES = (Stage(1, 112, 0.04, 24), Stage(4, 84, 0.10, 24), Stage(16, 28, 0.40, 24), Stage(16, 16, 0.30), Stage(64, 4, 0.10), Stage(256, 1, 0.06))
IMAGES_EVERY = 8        # hybrid training: in the video stages every eighth step is a step on pictures
LONG_EVERY = 2          # in the stages of long clips the odd steps show 16 frames: trained on long clips only, the model forgets the short ones
ONE_EVERY = 3           # with --objects 2, every third step shows one object, the others two
ANY_TIME = 0.25         # share of clips whose time is drawn evenly from 0 to 1: see `draw_times`
OWN_FROM = 0.5          # share of the steps after which the model is also shown its own predictions: see `rehearse`
SETTLED = -1.7          # logit of the time (16 frames) from which on a shape's place is certain: only later times are rehearsed
OWN = 0.75              # share of the clips at those times that are rehearsed
PRACTICE = torch.tensor([1.0, 1.0, 1.5, 3.0])    # how often training draws each of SHAPES, in proportion: the corners of a cross come right last
SMALL = 0.65            # share of small ones among them: an edge that is off by as much counts for more
DROP = 0.05             # share of captions taken away, for guidance needs a model without caption

PERIOD = 32             # frames after which this world, whole-pixel steps on a torus of 32 pixels, is what it was; and the noise of
                        # long clips (in training a part of it) with it, see `sample.white_noise`: or far-off seconds would each choose a place of their own

# What a checkpoint asks of sample.py: these are the defaults that `python sample.py` falls back to.
SAMPLING = {"frames": 16, "height": 32, "width": 32, "fps": 16, "steps": 48, "guidance": 1.0, "schedule": "shifted", "shift": 8.0,
            "fresh": 1.0, "period": PERIOD, "views": 2, "choices": [list(SYNONYMS[speed]) for speed in SPEEDS]}


def stage_at(step, steps, shortest=1):
    """The stage that a step belongs to, of those whose clips have at least `shortest` frames: they divide the steps by their shares."""
    stages, done = [stage for stage in STAGES if stage.frames >= shortest], 0.0
    if not stages:
        raise ValueError(f"no stage has clips of {shortest} frames or more; the longest has {max(stage.frames for stage in STAGES)}")
    whole = sum(stage.share for stage in stages)
    for stage in stages:
        done += stage.share / whole
        if step < round(done * steps):
            break
    return stage


def shown_at(step, steps, shortest=1):
    """The stage whose clips a step shows: its own, or an earlier one that is mixed in."""
    stage = stage_at(step, steps, shortest)
    if stage.frames > 16 and step % LONG_EVERY:
        stage = [shorter for shorter in STAGES if shorter.frames <= 16][-1]
    return STAGES[0] if stage.frames > 1 and step % IMAGES_EVERY == 0 else stage


def nearer_to_noise(logit, frames):
    """The logit of a time, given for clips of 16 frames, moved to clips of `frames` frames: see `draw_times`."""
    return logit - 0.5 * math.log(min(frames, PERIOD or frames) / 16)


def draw_times(n, frames, generator):
    """Times t (n,) in (0, 1) to train at: logit-normal, as Movie Gen, but nearer to the noise, and the nearer the longer.

    Flat shapes in big patches stay readable through a lot of noise: one sees *where* a shape is as soon as the
    noise, averaged over all its pixels in all frames, falls below it. All that is hard to learn lies before that
    moment, and four times the frames halve the noise of the average: the mean of logit t moves by -ln(2) for them, up
    to PERIOD frames, after which the sampler's noise repeats and there is no more to average.
    But a quarter of the times are drawn evenly, or the last steps of the sampler, which draw the edges, are never practised.
    """
    t = torch.sigmoid(nearer_to_noise(-2.0, frames) + 1.2 * torch.randn(n, generator=generator))
    anywhere = torch.rand(2, n, generator=generator)
    return torch.where(anywhere[0] < ANY_TIME, anywhere[1], t)


def training_batch(step, steps, seed, objects=1, shortest=1):
    """Everything random in a step, made from (seed, step) alone: whoever resumes at a step sees the same data.

    Returns clips (b, 3, frames, size, size), text (b, n), t (b,), noise like clips; and for `rehearse` earlier times (b,), 0
    where there is nothing to rehearse, and the noise of those, like clips.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    stage = shown_at(step, steps, shortest)
    several = objects if objects == 1 or step % ONE_EVERY else 1
    n, size = stage.batch, stage.size
    if several > 1:             # two could not keep their distance in a small world: as many tokens of a large one
        n, size = max(1, n * size**2 // 32**2), 32
    clips, captions, _ = make_batch(n, stage.frames, generator, size, several, speeds=True, practice=True)      # speeds: as `sample.complete` does
    text = sample.encode(captions, VOCABULARY)                                              # (b, n)
    text[torch.rand(len(text), generator=generator) < DROP] = 0
    t, noise = draw_times(len(clips), stage.frames, generator), sample.white_noise(clips.shape, generator, PERIOD)
    if 0 < PERIOD < stage.frames:
        # Here only a part of the noise repeats, any part. Where all did, far-off seconds would know nothing that a second does not see
        # itself, and the model would not learn to heed them; then a trifle is enough for two seconds to settle on different places.
        single = torch.rand(len(clips), 1, 1, 1, 1, generator=generator)
        noise = (1 - single).sqrt() * noise + single.sqrt() * sample.white_noise(clips.shape, generator)
    settled = torch.sigmoid(torch.tensor(nearer_to_noise(SETTLED, stage.frames)))
    chance, when = torch.rand(2, len(clips), generator=generator)
    own = (t > settled) & (chance < OWN) & (step >= OWN_FROM * steps)
    earlier = torch.where(own, settled + when * (t - settled), 0.0)
    return clips, text, t, noise, earlier, sample.white_noise(clips.shape, generator, PERIOD)


@torch.no_grad()
def rehearse(model, clips, text, earlier, noise):
    """The clips as the sampler meets them: where earlier > 0, what the model makes of the clip at that time.

    clips and noise (b, 3, frames, h, w), text (b, n), earlier (b,) -> like clips. The noise is not that of the step itself.

    A sampler feeds the model its own predictions, and no training clip has their faults: a shape that jumps where two
    tokens meet in time, an edge that frays. Asked for the clip behind its own prediction, the model learns to mend them
    (the remedy for what is called exposure bias). Only from the time SETTLED on: before it a prediction is a blur of all
    the places where the shape may be, and to be true to that would mean never to decide.
    """
    own = earlier > 0
    if own.any():
        at = earlier[own].view(-1, 1, 1, 1, 1)
        predicted = model((1 - at) * noise[own] + at * clips[own], earlier[own], text[own])
        clips = clips.clone()
        clips[own] = predicted.to(clips.dtype)
    return clips


def flow_matching_loss(model, clips, text, t, noise, shown=None):
    """How far the predicted clean clip at x_t = (1 - t) noise + t clip is from the clip, both in [-1, 1].

    shown: what stands in x_t in the place of the clip, see `rehearse`.

    Choice: the network predicts the clip, and the sampler takes the velocity from it, (clip - x_t) / (1 - t). Each
    target gives the other, but the clip is flat and bounded where the velocity is mostly noise to be copied.
    And the distance is the cross-entropy, with brightness from 0 to 1 (`lingen.pixels` keeps the prediction in these
    bounds) read as a probability. Like the squared error it is least at the mean of all clips that x_t may come from,
    which is what flow matching needs. But it minds a black pixel that is a bit grey, as in the path that a shape has
    just left, where the squared error hardly does.

    Clips count in proportion to their time (of clips of 16 frames; longer ones see as much at an earlier time, see `draw_times`),
    4 t, about 1 on average: near the noise the loss is large whatever one learns, and would drown what the edges ask for.
    """
    at = t.view(-1, 1, 1, 1, 1)
    brightness = (1 + model((1 - at) * noise + at * (clips if shown is None else shown), t, text)) / 2
    if brightness.isnan().any():        # of which the cross-entropy would complain in its own words; see Run.advance
        return brightness.mean()
    weight = 4 * torch.sigmoid(torch.logit(at) - nearer_to_noise(0.0, clips.shape[2]))
    return (weight * F.binary_cross_entropy(brightness, (1 + clips) / 2, reduction="none")).mean()


class Muon(torch.optim.Muon):
    """torch's Muon, which makes a matrix's step orthogonal: the directions that the gradients seldom show learn as fast as the others.

    torch does so in bfloat16 and one matrix after the other: on a CPU without units for bfloat16 that alone took longer than
    all the rest of a step. Here it is float32, and all matrices of one shape at once: the same formula, many times as fast.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            keep, (a, b, c) = group["momentum"], group["ns_coefficients"]
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), same in shapes.items():
                for p in same:
                    self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 1 - keep)
                x = torch.stack([p.grad.lerp(self.state[p]["momentum_buffer"], keep) for p in same])     # Nesterov's look ahead
                x = x.mT if rows > columns else x                       # (n, small, large)
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):                      # Newton-Schulz: drives every singular value towards 1
                    gram = x @ x.mT                                     # (n, small, small)
                    x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
                x = x.mT if rows > columns else x
                for p, direction in zip(same, x):                       # as long as a step of AdamW would be
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=0.2 * max(rows, columns) ** 0.5 * group["lr"])


def make_optimizers(model, rate):
    """Muon for the matrices inside the blocks, AdamW for everything else (embeddings, biases, norms, modulation)."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inside = name.startswith("blocks") and p.dim() == 2 and "modulation" not in name
        (matrices if inside else rest).append(p)
    return [Muon(matrices, lr=rate, weight_decay=0.01), torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(step, steps, rate):
    """50 steps of warm-up, a plateau, and a straight way down to 0 over the last 40 %."""
    return rate * min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))


# ---- 3. The loop ---------------------------------------------------------------------------------


class Run:
    """Everything that changes during training, and nothing else: what a checkpoint must hold to go on exactly.

    The data need no state, since each step makes its own (see `training_batch`), and the model draws no random
    numbers after its initialisation. `average` is the running mean of the weights, steadier than the last step's: it
    is what one samples from.
    """

    def __init__(self, config, settings, device):
        torch.manual_seed(settings["seed"])
        self.settings, self.device, self.step, self.losses = {"shortest": 1, **settings}, device, 0, []
        self.model = lingen.LinGen(config).to(device)
        self.average = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        self.optimizers = make_optimizers(self.model, settings["rate"])

    def state(self):
        """A checkpoint: what sample.py needs (the average is what it samples from), and under "training" all the rest."""
        return {"format": sample.FORMAT, "config": dataclasses.asdict(self.model.config), "vocabulary": list(VOCABULARY),
                "weights": self.average, "sampling": SAMPLING,
                "training": {**self.settings, "step": self.step, "losses": self.losses, "model": self.model.state_dict(),
                             "optimizers": [o.state_dict() for o in self.optimizers]}}

    def restore(self, checkpoint):
        saved = checkpoint.get("training")
        saved = {"shortest": 1, **saved} if isinstance(saved, dict) else {}
        if saved.get("step") == saved.get("steps", 0) < self.settings["steps"]:     # a finished run may be made longer
            saved = {**saved, "steps": self.settings["steps"]}
        differs = [f"{name}: {saved.get(name)!r} there, {value!r} here" for name, value in self.settings.items() if saved.get(name) != value]
        if "model" not in saved or "optimizers" not in saved:
            raise ValueError("it was published for sampling, without what training needs; resume from the file that train_tiny.py wrote")
        if differs or checkpoint["config"] != dataclasses.asdict(self.model.config) or checkpoint["vocabulary"] != list(VOCABULARY):
            raise ValueError(f"it is of another run ({'; '.join(differs) or 'another model or vocabulary'}): give the same settings, or another --out")
        try:
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            for name, p in self.average.items():
                p.copy_(checkpoint["weights"][name])
            self.step, self.losses = int(saved["step"]), list(saved["losses"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"it does not fit this model and its optimizers ({error!r:.200}); take another checkpoint, or begin anew with another --out") from None

    def loss(self, clips, text, t, noise, earlier, before):
        """The loss on a step's data, see `training_batch`."""
        return flow_matching_loss(self.model, clips, text, t, noise, rehearse(self.model, clips, text, earlier, before))

    def take(self, path):
        """Begin with the weights of this checkpoint, a published one too, instead of at random; all else begins anew."""
        model, checkpoint = sample.load_model(path, self.device)
        if model.config != self.model.config or checkpoint["vocabulary"] != list(VOCABULARY):
            raise ValueError(f"--weights {sample.show(path)} is of another model or vocabulary than is trained here; name one that fits, or begin without")
        self.model.load_state_dict(model.state_dict())
        self.average = {name: p.detach().clone() for name, p in self.model.state_dict().items()}

    def advance(self, rank=0, world=1):
        """One step: data, loss, gradients, both optimisers, the average. Returns the loss of the whole batch."""
        steps = self.settings["steps"]
        batch = training_batch(self.step, steps, self.settings["seed"], self.settings["objects"], self.settings["shortest"])
        share = len(batch[0][rank::world]) / len(batch[0])              # of several processes, each takes its rows
        if share:
            loss = share * self.loss(*(part[rank::world].to(self.device) for part in batch))
        else:                                                           # more processes than clips: zeros, which the others' sums await
            loss = 0 * sum(p.sum() for p in self.model.parameters())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, steps, self.settings["rate"])
            optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        if world > 1:
            grads = [loss] + [p.grad for p in self.model.parameters() if p.grad is not None]
            everything = torch.cat([grad.flatten() for grad in grads])
            distributed.all_reduce(everything)                          # one sum for all: the loss, then the gradients
            for grad, total in zip(grads, everything.split([grad.numel() for grad in grads])):
                grad.copy_(total.view_as(grad))
        value = loss.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        if not math.isfinite(value + norm):                             # before it can touch a weight
            raise FloatingPointError(f"step {self.step}: the loss is {value}, the gradient's norm {norm}; first seen in "
                                     f"{self.first_bad_module(batch)}; begin anew with a lower --rate")
        for optimizer in self.optimizers:
            optimizer.step()
        # The average forgets its beginning: its memory grows with the steps, up to 500 of them.
        keep = min(0.998, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(list(self.average.values()), list(self.model.state_dict().values()), 1 - keep)
        self.step += 1
        self.losses.append((batch[0].shape[2], round(value, 6)))
        return value

    def averaged(self):
        """The model with the average of the weights: what a checkpoint samples from."""
        model = lingen.LinGen(self.model.config).to(self.device)
        model.load_state_dict(self.average)
        return model.eval()

    def first_bad_module(self, batch):
        """The first module, in the order of the computation, whose output is not finite for this batch."""
        bad, hooks = [], []
        for name, module in self.model.named_modules():
            def look(module, inputs, out, name=name):
                if isinstance(out, torch.Tensor) and not out.isfinite().all():
                    bad.append(name or "the output")
            hooks.append(module.register_forward_hook(look))
        with torch.no_grad():
            self.loss(*(part.to(self.device) for part in batch))
        for hook in hooks:
            hook.remove()
        return bad[0] if bad else "the backward pass"


def save(path, state):
    """Write a checkpoint so that a kill at any moment leaves either the old file or the new one, whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    sample.replace_file(path, buffer.getvalue())


def publish(*paths):
    """Cut training checkpoints, all paths but the last, down to what sampling needs, weights in float16, with today's SAMPLING: a few MB that one can ship.

    Of several, the mean of the weights: a run that goes on from another's, to learn something else, forgets a part; halfway between both
    lies what can nearly as much of either as each alone (Wortsman et al. 2022, model soups, arXiv 2203.05482).
    """
    *sources, target = paths
    if len(sources) > 1 and Path(target).resolve() in [Path(source).resolve() for source in sources]:
        raise ValueError(f"{sample.show(target)} would be made of itself, and lost; name another file for the mean")
    *others, checkpoint = [sample.load_checkpoint(source) for source in sources]
    for source, other in zip(sources, others):
        if any(other[key] != checkpoint[key] for key in ("config", "vocabulary")) or other["weights"].keys() != checkpoint["weights"].keys():
            raise ValueError(f"{sample.show(source)} is of another model or vocabulary than {sample.show(sources[-1])}: there is no mean of both")
    if os.path.isfile(target) and "optimizers" in sample.load_checkpoint(target).get("training", {}):
        raise FileExistsError(f"{sample.show(target)} is a run that can be resumed, and would be lost; name another file")
    training = {name: value for name, value in checkpoint.get("training", {}).items() if name not in ("model", "optimizers", "losses")}
    if others:
        training["mean_of"] = [each["sha256"] for each in (*others, checkpoint)]
    weights = {name: sum((other["weights"][name].float() for other in others), p.float()).div(len(sources)).half() for name, p in checkpoint["weights"].items()}
    save(target, {**{key: checkpoint[key] for key in ("format", "config", "vocabulary")}, "sampling": SAMPLING, "weights": weights, "training": training})


class Listener:
    """stderr, that may have no reader any more (a closed terminal, a pipe cut off): then nothing is said, and training goes on."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        with contextlib.suppress(OSError, AttributeError):              # AttributeError: there never was one
            self.file.write(text)

    def flush(self):
        with contextlib.suppress(OSError, AttributeError):
            self.file.flush()

    def isatty(self):
        return bool(self.file) and self.file.isatty()


def say(message):
    print(f"\ntrain_tiny.py: {message}", file=sys.stderr)


def begin(args):
    """All that can be wrong with a call comes out here, before the first step. Returns run, out, rank, world."""
    world = int(os.environ.get("WORLD_SIZE", 1))                        # torchrun sets it, and RANK
    rank = int(os.environ.get("RANK", 0)) if world > 1 else 0
    out = Path(args.out)
    if out.suffix.lower() == ".gif":
        raise ValueError(f"--out {sample.show(out)} is the checkpoint; the preview beside it ends in .gif, so choose another ending, as .pt")
    if out.is_dir():
        raise IsADirectoryError(f"--out {sample.show(out)} is a folder; name the file in it, as tiny.pt")
    if out.exists() and not args.resume:
        raise FileExistsError(f"{sample.show(out)} exists; go on with it by --resume, or name another file with --out")
    if args.resume and args.weights:
        raise ValueError("--weights is for a run that begins, --resume goes on with one that has its weights: leave out one of them")
    checkpoint = sample.load_checkpoint(out) if args.resume else None
    if world > 1:
        if world > max(stage.batch for stage in STAGES):
            raise ValueError(f"{world} processes, but no batch of more than {max(stage.batch for stage in STAGES)} clips: start no more than that")
        cuda = torch.cuda.is_available() and args.device in (None, "cuda")
        device = sample.choose_device(f"cuda:{os.environ.get('LOCAL_RANK', rank)}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=120))
    else:
        device = sample.choose_device(args.device)
    torch.set_float32_matmul_precision("medium")    # products of float32 may round to bfloat16, where the CPU or GPU has it
    settings = {name: getattr(args, name) for name in ("steps", "seed", "objects", "rate", "shortest")}
    run = Run(lingen.preset("tiny", vocab_size=len(VOCABULARY)), settings, device)
    if checkpoint:
        try:
            run.restore(checkpoint)
        except ValueError as error:
            raise ValueError(f"{sample.show(out)}: {error}") from None
    elif args.weights:
        run.take(args.weights)
    if rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        sample.try_place(out)
    return run, out, rank, world


def train(args, run, out, rank, world):
    """Step, save, and show at the end what came of it. Returns the exit code."""
    stop = []       # Ctrl-C waits for the end of the step: half a step would be saved under a wrong number. A second one does not wait
    kept = run.step if args.resume else None

    def ask(number, frame):
        if stop:
            raise KeyboardInterrupt(f"stopped at once; {whole()}")
        stop.append(number)

    def whole():
        return f"the checkpoint of step {kept} is whole: go on with it by --resume" if kept is not None else "nothing had been saved yet"

    def stopping():             # several processes must agree, or one would wait for gradients that never come
        if world == 1:
            return bool(stop)
        flag = torch.tensor([float(len(stop))], device=run.device)
        distributed.all_reduce(flag)
        return flag.item() > 0

    def keep():
        nonlocal kept
        if rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)               # who tidied it away did not mean us
            save(out, run.state())
            kept = run.step

    asking = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]      # Windows has fewer
    before = {number: signal.signal(number, ask) for number in asking if signal.getsignal(number) != signal.SIG_IGN}   # nohup
    saved = time.monotonic()
    bar = tqdm(total=args.steps, initial=run.step, unit="step", disable=rank > 0, mininterval=0.5 if sys.stderr.isatty() else 30)
    try:
        while run.step < args.steps and not stopping():
            loss = run.advance(rank, world)
            frames = run.losses[-1][0]
            bar.set_postfix_str(f"{frames} frame{'s' * (frames > 1)}, loss {loss:.4f}", refresh=False)
            bar.update()
            if time.monotonic() - saved > args.save_every:
                try:
                    keep()
                except OSError as error:    # to stop would lose what was learnt since the last save; to go on loses nothing if room is made
                    say(f"step {run.step} could not be saved ({sample.plain(error)}). Training goes on and tries again in {args.save_every:.0f} s; {whole()}")
                saved = time.monotonic()
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}, and another --out; " + ("nothing had been saved yet" if kept is None else f"the checkpoint of step {kept} stays as it was")) from None
    except (MemoryError, RuntimeError) as error:
        if sample.out_of_memory(error):
            stage = shown_at(run.step, args.steps, args.shortest)
            smaller = "half of `batch` in STAGES takes half of it, two processes (torchrun) share it" if stage.batch > 1 else "leave out the last of STAGES"
            raise MemoryError(f"out of memory at step {run.step}, on {stage.batch} clip{'s' * (stage.batch > 1)} of {stage.frames} frames{sample.asked(error)}: {smaller}; "
                              f"or close other programs, or try --device cpu; {whole()}") from None
        if world == 1:
            raise
        raise ChildProcessError(f"step {run.step}: another process of this run has ended, or cannot be reached ({error!s:.200}); {whole()}, in all processes") from None
    finally:
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if world > 1:
        distributed.destroy_process_group()
    try:
        keep()
    except OSError as error:
        raise OSError(f"step {run.step} could not be saved ({sample.plain(error)}); {whole()}") from None
    if stop or run.step < args.steps:
        say(f"stopped at step {run.step} of {args.steps}; go on with the same command and --resume{' in the place of --weights' if args.weights else ''}")
        return 128 + (stop or [signal.SIGINT])[0]
    if rank == 0:
        print(f"wrote {out}")
        preview(run, out.with_suffix(".gif"))
        print(f"wrote {out.with_suffix('.gif')}")
    return 0


def preview(run, path):
    """A clip of eight captions side by side, as the average draws them now."""
    from benchmarks import pictures
    pictures.eight_clips(run.averaged(), path, SAMPLING, run.settings["objects"])


def main(argv=None):
    parser = sample.Parser(prog="train_tiny.py", description="Train the tiny LinGen on moving shapes, from nothing, on whatever this machine has.",
                           epilog="A stopped run goes on with --resume, bit for bit as if it had never stopped (on the same machine, with the same version of the code, as many threads and processes). Several processes: torchrun "
                                  "--nproc_per_node=2 train_tiny.py ...")
    add = parser.add_argument
    add("--out", default="runs/tiny.pt", help="the checkpoint (default runs/tiny.pt); a preview is written beside it")
    add("--resume", action="store_true", help="go on with the run in --out; a finished one goes on if --steps is larger")
    add("--weights", metavar="CHECKPOINT", help="begin with the weights of this one instead of at random (with another --seed, or it sees the same data again)")
    add("--steps", type=int, default=2200, help="of all stages together (default 2200: 15 to 40 minutes on two or one CPU cores)")
    add("--seed", type=int, default=0, help="of the weights and the data")
    add("--objects", type=int, choices=(1, 2), default=1, help="2: the second level, clips with two objects among those with one")
    add("--shortest", type=int, choices=sorted({stage.frames for stage in STAGES}), default=1,
        help="leave out the stages of clips with fewer frames, to go on from --weights that know them; 64 still mixes in pictures and clips of 16 frames (default 1: all stages)")
    add("--rate", type=float, default=2e-3, help="learning rate of both optimisers (default 0.002)")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--save-every", type=float, default=60, metavar="SECONDS", help="time between checkpoints (default 60)")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--evaluate", metavar="CHECKPOINT", help="do not train: sample clips and hold them against their captions")
    add("--captions", type=int, default=100, help="how many, with --evaluate (default 100)")
    add("--frames", type=int, default=16, help="per clip, with --evaluate (default 16)")
    add("--guidance", type=float, help="of the sampler, with --evaluate (default: the checkpoint's; other than 1 takes twice the time)")
    add("--views", type=int, help="of the sampler, with --evaluate: places from which each step asks (default: the checkpoint's, 2)")
    instead("--publish", nargs="+", metavar="FILE", help="do not train: FROM TO cuts a checkpoint down to what sampling needs, FROM FROM TO makes one of the mean of their weights")
    instead("--examples", metavar="FILE.png", help="do not train: draw examples of the data with their captions")
    wrong = 2
    try:
        args = parser.parse_args(argv)
        for name, low, high in (("steps", 1, 10**7), ("seed", 0, 2**31 - 1), ("captions", 1, 10**5), ("frames", 1, 4096), ("rate", 1e-8, 1.0), ("save_every", 0, 1e9)):
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected {low} to {high}")
        if args.evaluate:
            from benchmarks.judge import evaluate
            model, checkpoint = sample.load_model(args.evaluate, sample.choose_device(args.device))
            asked = {name: getattr(args, name) for name in ("guidance", "views") if getattr(args, name) is not None}
            sample.check(asked)
            checkpoint["sampling"] |= asked
            sample.check_shape(model.config, args.frames, 32, 32)
            wrong = 1
            evaluate(model, checkpoint, args.captions, args.frames, args.objects, args.seed)
        elif args.publish:
            if len(args.publish) < 2:
                raise ValueError("--publish expects 2 arguments, FROM and TO, or more: FROM FROM TO")
            sample.try_place(args.publish[-1])
            publish(*args.publish)
            print(f"wrote {args.publish[-1]}, {os.path.getsize(args.publish[-1]) / 1e6:.1f} MB")
        elif args.examples:
            if not args.examples.lower().endswith(".png"):
                raise ValueError(f"--examples writes .png, not {sample.show(args.examples)}")
            sample.try_place(args.examples)
            wrong = 1
            from benchmarks import pictures
            pictures.write(pictures.examples(), args.examples)
            print(f"wrote {args.examples}")
        else:
            with contextlib.redirect_stderr(Listener(sys.stderr)):
                run = begin(args)
                wrong = 1
                return train(args, *run)
        return 0
    except KeyboardInterrupt as stop:
        print(f"\ntrain_tiny.py: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as error:
        return sample.complain("train_tiny.py", error, wrong)


if __name__ == "__main__":
    sample.command("train_tiny.py", main)
