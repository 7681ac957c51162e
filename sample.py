"""From a caption to a clip: Euler steps along a learnt flow, guidance, and a file that one can watch.

    python sample.py "a red circle moving right" --out clip.gif

Flow matching ties noise to data by straight lines, x_t = (1 - t)*noise + t*data, so that along each line
the velocity is data - noise. The model has learnt the mean velocity at (x_t, t, caption), or the mean clip,
which says the same: velocity = (clip - x_t) / (1 - t). Sampling follows it from t = 0 (noise) to t = 1 (a clip)
in finite steps, and may draw the noise that is left afresh at each of them (`fresh`). In order of explanation:

    words, complete, encode    caption -> numbers of words                    (b, n) int64
    times                      where the steps stop                           (steps + 1,)
    sample                     the steps themselves                           (b, c, t, h, w) in [-1, 1]
    load_checkpoint, load_model
    to_frames, write_clip, read_settings                                      (frames, height, width, 3) uint8
    main                       the command line

Symbols: b clips, n words, c channels, t frames (and, as a number from 0 to 1, the time of the flow).
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

try:
    import resource  # for the peak of memory; Unix only
except ImportError:
    resource = None

# torch (and lingen, which needs it) takes seconds to import. A mistyped option should not wait for that, so
# the functions below that need it import it themselves.

FORMAT = "lingen-tiny-1"
KEYS = {"config": dict, "vocabulary": list, "weights": dict, "sampling": dict}  # what a checkpoint must hold
ENDINGS = (".gif", ".webp", ".png", ".npy")
SCHEDULES = ("uniform", "linear-quadratic", "shifted")
# The seed ends at 32 bits because torch's generator on the CPU reads no more: seed + 2**32 would be the same
# noise under another name. Movie Gen's schedule imitates 1000 steps, so more than that are never of use.
LIMITS = {"frames": (int, 1, 4096), "height": (int, 1, 4096), "width": (int, 1, 4096), "steps": (int, 1, 1000),
          "fresh": (float, 0, 1), "period": (int, 0, 4096), "seed": (int, 0, 2**32 - 1), "scale": (int, 1, 64), "fps": (float, 1, 100), "shift": (float, 1, 100),
          "guidance": (float, 0, 100), "views": (int, 1, 64)}


# What to do about what the system says.
ADVICE = (({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}, "make room there, or take another place"),
          ({errno.EACCES, errno.EPERM, errno.EROFS}, "take a place that you may read and write"),
          ({errno.ENOENT}, "check the name, and make its folder first"),
          ({errno.EISDIR}, "name a file in it"),
          ({errno.ENOTDIR, errno.EEXIST}, "a file stands where a folder should be: take another name"),
          ({errno.ENAMETOOLONG}, "take a shorter name"),
          ({errno.EIO}, "the disk may be failing, or gone: take another"))


# ---- captions ---------------------------------------------------------------------------------------------

def words(caption: str) -> list[str]:
    """Lower-case words of a caption; spaces, hyphens and plain punctuation only separate ("up-left": up, left).

    Raises ValueError for an empty caption and for characters that no plain caption has (control characters,
    marks that turn the direction of writing, symbols), since dropping them unseen would change the meaning.
    """
    if not isinstance(caption, str):
        raise ValueError(f"a caption is a string, not {type(caption).__name__}: {caption!a:.60}")
    caption = caption.lower()  # first, since it can make marks of its own, as of a capital I with a dot
    odd = re.search(r"[^\w\s.,;:!?'\"()/-]|[_\x0b\x0c\x1c-\x1f\x85\u2028\u2029]", caption)  # the last count as spaces, too
    if odd:
        raise ValueError(f"the caption {caption!a:.60} holds the character {odd[0]!a}; write plain words")
    found = re.findall(r"\w+", caption)
    if not found:
        raise ValueError(f"the caption {caption!a:.60} is empty; write a few words, as in \"a red circle moving right\"")
    return found


def objects(caption: str) -> list[str]:
    """The caption's parts, one for each object: "and a" begins another, while "up and to the left" stays in one piece."""
    return re.split(r" and (?=a\b)", " ".join(words(caption)))


def complete(caption: str, choices: list[list[str]], seed: int = 0) -> str:
    """The caption, with one of `choices` drawn by the seed for every object that names none.

    choices: what a checkpoint's sampling defaults say, words of one meaning in each list, as [["slowly", "slow"], ["quickly", "fast"]]. The
    first of the list that is drawn is put behind the object: "... and a blue square moving up" -> "... and a blue square moving up slowly".

    The clips of a caption that leaves something open are a mixture, and to draw from a mixture one may first draw the part. Left to
    the flow, that choice falls among the first, half-blind steps, at once with all that depends on it: the places of two objects, and in a
    long clip each window makes it for itself, so that an object is slow in one second and quick in another.
    Raises ValueError as `words` does.
    """
    things = objects(caption)
    if not choices:
        return caption
    draw, said = random.Random(seed), {word for same in choices for word in same}
    # of `random` only random() is promised to be the same in every version of Python
    drawn = [choices[int(draw.random() * len(choices))][0] for _ in things]
    return " and ".join(thing if said & set(thing.split()) else f"{thing} {word}" for thing, word in zip(things, drawn))


def encode(captions: list[str], vocabulary: list[str], limit: int = 64):
    """Captions as numbers of words, (b, n) int64: word i of the vocabulary has number i + 1; 0 pads the rest.

    Raises ValueError for a word that the vocabulary lacks and for a caption of more than `limit` words.
    """
    import torch
    if isinstance(captions, (str, bytes)) or isinstance(vocabulary, (str, bytes)) or not all(isinstance(word, str) for word in vocabulary):
        raise TypeError("captions and vocabulary are lists of strings; write encode([caption], vocabulary)")
    number = {word: i + 1 for i, word in enumerate(vocabulary)}
    rows = [words(caption) for caption in captions]
    if not rows:
        raise ValueError("no caption came in; give at least one")
    for row in rows:
        if len(row) > limit:
            raise ValueError(f"a caption has {len(row)} words, the model reads {limit}; shorten it")
        for word in row:
            if word not in number:
                near = difflib.get_close_matches(word[:40], vocabulary, n=1, cutoff=0.5)
                raise ValueError(f"the model does not know the word {word!a:.40}"
                                 + (f"; did you mean {near[0]!a}?" if near else ";")
                                 + f" It knows: {', '.join(map(str, vocabulary)):.2000}")
    longest = max(map(len, rows))
    return torch.tensor([[number[word] for word in row] + [0] * (longest - len(row)) for row in rows])  # (b, n)


# ---- the sampler ------------------------------------------------------------------------------------------

def times(steps: int, schedule: str = "uniform", shift: float = 1.0):
    """The times at which the Euler steps begin and end, (steps + 1,) float32, rising from 0 (noise) to 1 (clip).

    An Euler step is exact where the path is straight. The paths bend near the noise, where the model still
    has to decide what goes where; towards the data little but detail is left. So the better schedules
    take small steps first and large ones later:

    "uniform"           i / steps.
    "linear-quadratic"  Movie Gen (arXiv 2410.13720): the first half of the steps are the first steps of a
                        uniform schedule of 1000, the second half grows quadratically to 1. In one formula, with
                        k steps in the second half: i/1000 + (1 - steps/1000) * (max(0, i - (steps - k)) / k)**2,
                        which is the only parabola that leaves the line without a kink and ends at 1.
    "shifted"           u / (u + shift*(1 - u)) for uniform u, shift >= 1. Near the noise it divides u by shift.
                        A model trained on times drawn more often near the noise is asked there more often too.

    Raises ValueError for another schedule, for steps outside 1 to 1000, and for shift below 1.
    """
    import torch
    check({"steps": steps, "shift": shift})
    i = torch.arange(steps + 1, dtype=torch.float64)
    u = i / steps
    if schedule == "linear-quadratic":
        k = steps - steps // 2
        u = i / 1000 + (1 - steps / 1000) * ((i - (steps - k)).clamp(min=0) / k) ** 2
    elif schedule == "shifted":
        u = u / (u + shift * (1 - u))
    elif schedule != "uniform":
        raise ValueError(f"schedule is {schedule!a:.60}; choose one of {', '.join(SCHEDULES)}")
    return u.float()                                                                  # (steps + 1,)


def white_noise(shape, generator, period: int = 0):
    """Normal noise (..., t, h, w); with period > 0 frame i has the same as frame i + period.

    That is how far-off frames of a long clip come to agree. The noise decides where a shape begins, and where each stretch
    of a film has its own, each begins on its own: shapes jump from one to the next. (Noise that frames share is known from
    PYoCo, arXiv 2305.10474, and FreeNoise, arXiv 2310.15169.) It suits a world that itself repeats after `period` frames.
    """
    import torch
    frames = shape[-3]
    own = torch.randn(*shape[:-3], min(frames, period or frames), *shape[-2:], generator=generator)
    return own if own.shape[-3] == frames else own[..., torch.arange(frames) % period, :, :]


def steps_for(sampling: dict) -> dict:
    """The arguments of `sample` that say how to step, from a checkpoint's sampling defaults."""
    return {name: sampling[name] for name in ("steps", "guidance", "schedule", "shift", "fresh", "period", "views") if name in sampling}


def sample(model, text, shape, *, steps=50, guidance=1.0, schedule="uniform", shift=1.0, fresh=0.0, period=0, views=1, seed=0,
           progress=False, callback=None):
    """Clips for captions: (b, channels, frames, height, width) float32 in [-1, 1], on the model's device.

    text: (b, n) int64 from `encode`; shape: (frames, height, width); callback(step, x1), if given, sees before
    each step 0, 1, ... the clean clip that the model predicts at that time, shaped as the result.
    steps, schedule, shift: as in `times`. guidance: how many times what the caption adds to the prediction is counted;
    1 takes the model as it is, everything else asks it twice per step.
    Clip i draws its noise from seed + i, on the CPU: a clip does not depend on its neighbours in the batch, and
    every device has the same noise.

    fresh: how much of the noise still in the clip each step replaces by new noise; 0 is Euler's step. Along Euler's
    path the first, half-blind steps decide, and what they get wrong stays wrong. New noise lets the network decide
    again, and small faults that no training clip has (a shape half a pixel off from one token to the next) are drowned
    by it and drawn anew. With s = (1 - t) / t before the step and s' after it, fresh = sqrt(1 - (s' / s)^2) is the step
    of DDPM (Ho et al. 2020); up to there the clips stay as varied as the data, beyond they become more alike: 1 draws
    them to what is likeliest.
    period: frames after which the noise repeats, see `white_noise`; 0: never.
    views: from how many places each step asks a model of a torus (config.torus), itself being elsewhere at every step. A clip that
    is rolled around is as good a clip, and the best answer rolls with it; but the borders of patches and of the scan, where mistakes are
    made, fall elsewhere. So mistakes do not add up over the steps, and the mean of several answers misses by less than one: of what
    depends on the place, all but its mean is gone. Each view takes the time of a step.
    If that torus is `period` pixels wide, and half a period is in whole patches, a world of whole-pixel steps is back where it was after `period` frames: time is a ring
    as well. Clips of a period or more are then made in whole periods, rolled along time, too, before each question, and cut
    to length in the end. Otherwise the borders between tokens, which hold several frames, would always fall on the same
    frames, and shapes jumped there. And the model is shown half a period more on either side, or the moments at both ends, which have
    neighbours on one side only, would be told less than all others, and put the shape elsewhere. Each step takes the time of one period more.
    Raises ValueError for wrong arguments, FloatingPointError if the result holds NaN or infinity.
    """
    import torch
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type(model).__name__}; load_model makes one from a checkpoint")
    check({"seed": seed, "guidance": guidance, "steps": steps, "shift": shift, "fresh": fresh, "period": period, "views": views})
    check_shape(model.config, *shape)
    if not torch.is_tensor(text) or text.ndim != 2 or text.dtype != torch.int64 or not text.shape[0]:
        raise ValueError(f"text is {getattr(text, 'dtype', type(text))} {list(getattr(text, 'shape', []))}; "
                         "it must be (b, n) int64, as encode returns it")
    most = model.config.vocab_size
    if most and text.numel() and not 0 <= text.min() <= text.max() <= most:  # a GPU would only say that it failed
        raise ValueError(f"text holds the word numbers {text.min()} to {text.max()}; the model knows 0 to {most}")
    device = next(model.parameters()).device
    ts, b = times(steps, schedule, shift).tolist(), len(text)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(b)]
    (frames, *size), torus = shape, model.config.torus
    ring = whole_periods(model.config, shape, period)
    rounds, more = (ring, period // 2) if ring else (frames, 0)

    def noise():
        return torch.stack([white_noise((model.config.channels, rounds, *size), g, period) for g in generators]).to(device)

    # Where each step stands in space and time: the same for all clips, whatever their seeds.
    generator = torch.Generator().manual_seed(0)
    views = views if torus else 1                                                    # elsewhere all views would be one
    places = torch.randint(size[0] * size[1], (steps, views, 2), generator=generator) * torus
    moments = torch.randint(rounds, (steps, views, 1), generator=generator) * (ring > 0)
    places = torch.cat([moments, places], 2).tolist()                                # (steps, views, 3)

    def ask(x, t, text, step):
        answers = []
        for place in places[step]:
            seen = x.roll(place, (2, 3, 4))                                          # (b, c, t, h, w)
            if ring:                                                                 # all of it, and some of it twice
                seen = torch.cat([seen[:, :, -more:], seen, seen[:, :, :more]], 2)
            out = model(seen, torch.full((len(x),), t, device=device), text)[:, :, more:more + rounds]
            answers.append(out.roll([-moved for moved in place], (2, 3, 4)))         # (b, c, t, h, w)
        return sum(answers) / views

    x = noise()                                                                      # (b, c, t, h, w)
    text = text.to(device)                                                           # (b, n)
    if guidance != 1:  # an all-zero row is the empty caption
        text = torch.cat([text, torch.zeros_like(text)])                             # (2b, n)

    with torch.inference_mode():
        for step in tqdm(range(steps), disable=not progress, file=sys.stderr, unit="step", leave=False):
            t, later = ts[step], ts[step + 1]
            if guidance == 1:
                out = ask(x, t, text, step)
            else:
                # Classifier-free guidance: what the caption adds to the prediction, exaggerated. Both predictions
                # come from one doubled batch. Velocity and clean clip are affine in each other at fixed
                # (x_t, t), so guiding the one guides the other; whichever the model predicts will do.
                out = ask(torch.cat([x, x]), t, text, step)                          # (2b, c, t, h, w)
                with_caption, without = out.chunk(2)
                out = without + guidance * (with_caption - without)                  # (b, c, t, h, w)
            x1 = x + (1 - t) * out if model.config.predicts == "velocity" else out
            if callback is not None:
                callback(step, x1[:, :, :frames])
            x0 = (x - t * x1) / (1 - t)  # the noise that goes with x1; the last step starts before t = 1
            if fresh and later < 1:
                x0 = math.sqrt(1 - fresh * fresh) * x0 + fresh * noise()
            x = (1 - later) * x0 + later * x1  # fresh = 0: the same as x + (later - t) * velocity, velocity = x1 - x0
    if not torch.isfinite(x).all():  # before the clamp, which would hide infinities
        raise FloatingPointError("the sampled clip holds NaN or infinity; the weights may be those of a training "
                                 "run that diverged: take an earlier checkpoint, or a lower --guidance")
    return x[:, :, :frames].clamp(-1, 1)


def whole_periods(config, shape, period: int) -> int:
    """The frames that are made of a clip of shape (frames, height, width) where time is a ring, see `sample`; 0 where it is none.

    The model is shown one period more than that: half of one on either side."""
    frames, *size = shape
    ring = config.torus and frames >= period == math.lcm(*size) and period % (2 * config.patch[0]) == 0
    return -(-frames // period) * period if ring else 0


def check(settings: dict) -> None:
    """ValueError for the first of `settings` outside its LIMITS; those that have none are left alone."""
    for name, value in settings.items():
        if name in LIMITS:
            kind, low, high = LIMITS[name]
            right = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
            if not right or not low <= value <= high:  # NaN fails every comparison, so it ends here too
                whole = "a whole number" if kind is int else "a number"
                raise ValueError(f"{name} is {value!a:.60}; it must be {whole} from {low} to {high}")


def check_shape(config, frames: int, height: int, width: int) -> None:
    """ValueError where the patches do not tile (frames, height, width). One frame is a still image, always allowed."""
    check({"frames": frames, "height": height, "width": width})
    for name, size, patch in zip(("frames", "height", "width"), (frames, height, width), config.patch):
        if size % patch and not (name == "frames" and size == 1):
            raise ValueError(f"{name} is {size}, which patches of {patch} do not fill; take {size + patch - size % patch}"
                             + (", or 1 for a still image" if name == "frames" else ""))


# ---- checkpoints ------------------------------------------------------------------------------------------

def load_checkpoint(path) -> dict:
    """A checkpoint's dict: format, config, vocabulary, weights, sampling (and more, from training), and sha256.

    Nothing in the file is executed (weights_only). Raises OSError where it cannot be opened, and ValueError where it is
    damaged, holds code, or comes from elsewhere.
    """
    import torch
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"the checkpoint {show(path)} is a folder; name the file inside it")
    digest = hashlib.sha256()
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may never end
            raise OSError(errno.EINVAL, "not a file")
        file = open(path, "rb")
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise OSError(f"cannot read the checkpoint {show(path)} ({getattr(error, 'strerror', error)}); "
                      "train one with train_tiny.py, or name another file") from None
    with file:
        try:
            # torch.load does not look at the checksums of the archive that it reads: a flipped bit in a weight would
            # go unnoticed. zipfile does. Nothing in a checkpoint is compressed: what is, might unpack to any size.
            file.seek(0)
            archive = zipfile.ZipFile(file)
            if any(record.compress_type for record in archive.infolist()) or archive.testzip():
                raise zipfile.BadZipFile
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive can fail in any way at all, but only that archive is to blame
            what = ("holds Python objects or code, which is never run" if "eights only load failed" in str(error) else
                    "is no whole checkpoint: truncated, damaged or another kind of file")
            raise ValueError(f"{show(path)} {what}; copy or download it again, or take another") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{show(path)} is not in the format {FORMAT!r}: it is of another program or version; take one "
                         "that this train_tiny.py wrote")
    for key, kind in KEYS.items():
        if not isinstance(checkpoint.get(key), kind):
            raise ValueError(f"{show(path)} lacks {key!r}; take one that this train_tiny.py wrote")
    return {**checkpoint, "sha256": digest.hexdigest()}


def load_model(path, device="cpu", backend=None):
    """(model in float32 and eval mode on `device`, with model.vocabulary and, for `complete`, model.choices; checkpoint). `backend` overrules the config's.

    Raises what `load_checkpoint` raises, and ValueError where the weights do not fit the config.
    """
    import torch
    import lingen
    checkpoint = load_checkpoint(path)
    try:
        config = lingen.LinGenConfig(**checkpoint["config"])
        strange = [name for name, value in checkpoint["weights"].items()
                   if value.layout != torch.strided or value.is_meta or not value.is_floating_point() or not value.isfinite().all()]
        if strange:
            raise ValueError(f"{strange[0]!a:.60} holds NaN or infinity, or is no plain tensor of real numbers")
        # A config that does not belong to these weights must cost no memory: any model has more parameters than this.
        d, inner = config.d_model, (int(config.expand * config.d_model) + 2 * config.ngroups * config.d_state) * (config.ma and config.mixer == "mate")
        least = d * (config.channels * math.prod(config.patch) + sum(config.grid) + config.vocab_size + config.text_dim
                     + config.depth * (d + int(config.mlp_ratio * d) + inner))
        held = sum(value.numel() for value in checkpoint["weights"].values())
        if held < least:
            raise ValueError(f"{held:,} weights, where it has over {least:,}")
        if backend is not None:
            config = dataclasses.replace(config, backend=backend)
        model = lingen.LinGen(config)
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        got = {name: tuple(value.shape) for name, value in checkpoint["weights"].items()}
        wrong = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
        if wrong:
            raise ValueError(f"{len(wrong)} weights do not fit it, first {wrong[0]!a:.60}: "
                             f"shape {got.get(wrong[0])}, expected {wanted.get(wrong[0])}")
        if len(checkpoint["vocabulary"]) != config.vocab_size or not all(isinstance(w, str) for w in checkpoint["vocabulary"]):
            raise ValueError(f"the vocabulary is not a list of {config.vocab_size} words")
        check(checkpoint["sampling"])
        choices = checkpoint["sampling"].get("choices", [])
        if not isinstance(choices, list) or not all(isinstance(same, list) and same and set(same) <= set(checkpoint["vocabulary"]) for same in choices):
            raise ValueError(f"the choices {choices!a:.60} are not lists of words that the vocabulary holds")
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{show(path)} does not fit its own config: {error}; take one that this train_tiny.py "
                         "wrote") from None
    model.load_state_dict(checkpoint["weights"])  # float16 in the file becomes the float32 of the model
    model.vocabulary, model.choices = checkpoint["vocabulary"], choices
    return model.eval().to(device), checkpoint


# ---- writing ----------------------------------------------------------------------------------------------

def to_frames(clip) -> np.ndarray:
    """One clip (3, t, h, w) in [-1, 1] as pictures, (t, h, w, 3) uint8. Raises ValueError for other shapes."""
    import torch
    if not torch.is_tensor(clip) or clip.ndim != 4 or clip.shape[0] != 3 or clip.is_complex() or clip.is_meta:
        raise ValueError(f"the clip is {type(clip).__name__} {list(getattr(clip, 'shape', []))}; "
                         "pictures are made of a tensor (3, frames, height, width)")
    return ((clip.float().cpu() + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 3, 0).numpy().astype(np.uint8)


def evenly(n: int, most: int) -> np.ndarray:
    """At most `most` of the numbers 0 ... n - 1, evenly spread, the first and the last among them."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int)


def sheet(frames: np.ndarray, most: int = 64, columns: int = 8, gap: int = 2) -> Image.Image:
    """Frames (t, h, w, 3) uint8 side by side on white, row after row; of more than `most`, evenly chosen ones."""
    frames = frames[evenly(len(frames), most)]
    n, h, w, _ = frames.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    page = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        page[y:y + h, x:x + w] = frame
    return Image.fromarray(page)


def enlargement(ending: str, frames: int, height: int, width: int, scale: int | None = None) -> int:
    """How many times a clip's pixels are enlarged in a file: `scale`, or what suits. ValueError where no file can hold it."""
    check({"scale": 1 if scale is None else scale})
    scale = scale or max(1, round((128 if ending == ".png" else 256) / max(height, width)))
    side = max(height, width) * scale * (min(8, frames) if ending == ".png" else 1)  # a contact sheet is up to 8 x 8 frames
    if side > 16383 and ending != ".npy":  # WebP's limit; a GIF or a sheet beyond it would fill the memory
        raise ValueError(f"the picture would be {side} pixels high or wide; a smaller scale or size keeps it under 16384")
    return scale


def write_clip(path, frames: np.ndarray, *, fps: float = 16, scale: int | None = None, settings: dict | None = None):
    """Write (t, h, w, 3) uint8 as .gif, .webp (lossless), .png (contact sheet) or .npy, as the ending of `path` says.

    Small pictures are enlarged `scale` times (default: to about 256 pixels, 128 on a sheet), each pixel a square;
    .npy keeps the very values. `settings` go into the file as JSON, for `read_settings`; .npy has no place for them.
    The file appears whole or not at all. Raises ValueError for other frames or endings, OSError from the disk.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"the ending of {show(path)} is {ending!a}; choose one of {' '.join(ENDINGS)}")
    if not isinstance(frames, np.ndarray) or frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames are {getattr(frames, 'dtype', type(frames).__name__)} {list(getattr(frames, 'shape', []))}; "
                         "expected an array, uint8 (t, h, w, 3)")
    scale = enlargement(ending, *frames.shape[:3], scale)
    check({"fps": fps})
    out, note = io.BytesIO(), json.dumps(settings or {}, ensure_ascii=True)
    # A frame ends at a whole tick of the format's clock. Rounding the end of each frame, not its length,
    # keeps the errors from adding up: 16 frames at 16 fps last one second though 6.25 ticks do not exist.
    tick = 10 if ending == ".gif" else 1                                              # milliseconds
    ends = [round(i * 1000 / fps / tick) * tick for i in range(len(frames) + 1)]
    size = (frames.shape[2] * scale, frames.shape[1] * scale)
    options = {"save_all": True, "duration": [b - a for a, b in zip(ends, ends[1:])], "loop": 0}
    if ending == ".npy":
        np.save(out, frames)
    elif ending == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("lingen", note)
        sheet(frames.repeat(scale, 1).repeat(scale, 2)).save(out, "PNG", pnginfo=info)
    elif ending == ".gif":
        # One palette for the whole clip: a palette per frame would flicker. The method that covers the range of
        # colours comes first, since a small shape has few pixels but matters most.
        pixels = frames.reshape(-1, 1, 3)
        pixels = pixels[::len(pixels) >> 16 | 1]  # a sample of all frames is enough, and an odd step meets all columns
        palette = Image.fromarray(pixels).quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1)
        first, *rest = (Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
                        .resize(size, Image.Resampling.NEAREST) for frame in frames)
        first.save(out, "GIF", append_images=rest, comment=note.encode("ascii"), optimize=False, **options)
    else:
        exif = Image.Exif()
        exif[0x010E] = note                                                           # ImageDescription
        first, *rest = (Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames)
        first.save(out, "WEBP", append_images=rest, exif=exif, lossless=True, **options)
    replace_file(path, out.getvalue())


def part_of(path) -> Path:
    """Where a file grows before it moves to `path`: in the same folder, since only there is a move one step."""
    return Path(path).with_name(f".{Path(path).name[:50]}.part")  # 50: 200 bytes in any script, where names may have 255


def try_place(path) -> None:
    """OSError where no file could be written, found out by beginning one: no question to the system is as sure."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{show(path.parent)} is not an existing folder; make it first")
    try:
        part_of(path).touch()
        part_of(path).unlink()
    except OSError as error:
        raise type(error)(error.errno, f"{error.strerror}, so nothing can be written", str(path)) from None


def replace_file(path, data: bytes) -> None:
    """Put `data` at `path` in one move: a reader, a crash or Ctrl-C finds the old file or the new one, never half."""
    path, part = Path(path), part_of(path)
    try:
        with open(part, "wb") as file:  # what an earlier kill has left is overwritten
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:  # Ctrl-C too
        part.unlink(missing_ok=True)
        raise


def read_settings(path) -> dict:
    """What `write_clip` noted in a .gif, .webp or .png: caption, seed, checkpoint, settings. ValueError if nothing."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"expected the name of a file, got {type(path).__name__}")
    try:
        if not Path(path).is_dir() and not Path(path).is_file():  # nothing, or a pipe, which might never end
            raise FileNotFoundError
        with Image.open(path) as image:
            note = image.info.get("lingen") or image.info.get("comment") or image.getexif().get(0x010E)
            note = json.loads(note)
        if not isinstance(note, dict):
            raise ValueError
        return note
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {show(path)}") from None
    except PermissionError as error:
        raise PermissionError(f"cannot read {show(path)}: {error.strerror}") from None
    except Exception:  # not a picture, a broken one, or somebody else's comment: the answer is the same
        raise ValueError(f"{show(path)} holds no settings of sample.py; .gif, .webp and .png written by it do") from None


# ---- command line -----------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, from `main`, as for all other wrong calls
        raise ValueError(message)


def parse(argv):
    """Everything about a call that can be judged without torch. Raises ValueError or OSError."""
    parser = Parser(prog="sample.py", allow_abbrev=False, description="Make clips from captions.",
                    epilog="What is not given comes from the checkpoint.")
    add = parser.add_argument
    add("captions", nargs="*", metavar="CAPTION", help='as in "a red circle moving right"; several need --out FOLDER')
    add("--captions", dest="file", help="a text file (UTF-8) with one caption a line")
    add("--out", help="clip.gif, .webp, .png (contact sheet) or .npy (uint8, frames x height x width x 3, no settings inside); or a folder")
    for name in ("frames", "height", "width", "fps", "steps", "guidance", "fresh", "seed", "scale"):
        kind, low, high = LIMITS[name]
        add(f"--{name}", type=kind, help=f"{low} to {high}" + "; the shipped checkpoint has learnt 32 only" * (name in ("height", "width")))
    add("--period", type=int, help="frames after which the noise repeats, 0: never; the toy's world repeats after as many frames as it is wide in pixels, "
        "and clips of a period or more are made in whole periods, then cut")
    add("--views", type=int, help="the mean of so many answers makes a step, each from another place of the toy's torus (1 to 64): 1 halves the time of the "
        "shipped checkpoint's 2, more helps little")
    add("--schedule", choices=SCHEDULES)
    add("--checkpoint", default=Path(__file__).parent / "assets" / "tiny.pt")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--backend", choices=("auto", "torch", "mamba_ssm"))
    add("--emerge", metavar="FILE.png", help="also draw how the clip emerges from noise")
    add("--read", metavar="CLIP", help="print the settings inside a clip, and stop")
    args = parser.parse_args(argv)
    if args.read:
        return args
    check({name: value for name, value in vars(args).items() if value is not None})
    if args.file is not None:
        try:
            with open(args.file, encoding="utf-8-sig") as file:
                text = file.read(10**6 + 1)  # a device might never end
        except OSError as error:
            raise OSError(f"cannot read {show(args.file)}: {error.strerror}") from None
        except ValueError:
            raise ValueError(f"{show(args.file)} is not text in UTF-8; write one caption a line") from None
        if len(text) > 10**6:
            raise ValueError(f"{show(args.file)} holds more than a million characters; split it")
        args.captions += [line for line in text.split("\n") if line.strip()]
    if not args.captions:
        raise ValueError('no caption; write one, as in: python sample.py "a red circle moving right"')
    found = [words(caption) for caption in args.captions]

    several = len(args.captions) > 1
    out = args.out or ("." if several else "clip.gif")
    folder = several or out.endswith(("/", os.sep)) or os.path.isdir(out)
    args.paths = [Path(out)]
    if folder:
        args.paths = [Path(out, f"{i:03d}-{'-'.join(row)[:60]}.gif") for i, row in enumerate(found)]
    if args.emerge and several:
        raise ValueError("--emerge draws one clip; give one caption")
    if args.emerge and Path(args.emerge).suffix.lower() != ".png":
        raise ValueError(f"--emerge writes .png, not {show(args.emerge)}")
    for path in args.paths[:1] + ([Path(args.emerge)] if args.emerge else []):
        if path.suffix.lower() not in ENDINGS:
            raise ValueError(f"the ending of {show(path)} is {path.suffix!a}; choose one of {' '.join(ENDINGS)}")
        if "\0" in str(path):
            raise ValueError(f"{show(path)} holds a NUL character; choose another name")
        try_place(path)
    if args.emerge and Path(args.emerge).resolve() == args.paths[0].resolve():
        raise ValueError(f"--emerge and --out are both {show(args.emerge)}; name two files")
    return args


def choose_device(name=None):
    """The device of that name; without one: cuda, else mps, else cpu. Raises ValueError for one that is not there."""
    import torch
    name = name if name is not None else ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if torch.device(name).type not in ("cpu", "cuda", "mps"):
            raise ValueError
        torch.zeros(1, device=name)
    except Exception:  # each kind of device has its own way of not being there
        raise ValueError(f"the device {name!a:.60} is not to be had here; leave out --device, or try cpu") from None
    return torch.device(name)


def prepare(args):
    """(model, checkpoint, settings, texts): all that can be wrong with a call is found here, before any sampling."""
    import torch
    device = choose_device(args.device)
    torch.set_float32_matmul_precision("medium")  # as in training: products may round to bfloat16 where the hardware has it
    model, checkpoint = load_model(args.checkpoint, device, args.backend)
    settings = {"frames": 16, "height": 64, "width": 64, "fps": 16, "steps": 50, "guidance": 1.0, "fresh": 0.0, "period": 0,
                "views": 1, "seed": 0, "schedule": "uniform", "shift": 1.0}
    for source in (checkpoint["sampling"], vars(args)):  # the later overrules the earlier
        settings |= {name: source[name] for name in settings if source.get(name) is not None}
    check_shape(model.config, settings["frames"], settings["height"], settings["width"])
    times(settings["steps"], settings["schedule"], settings["shift"])
    if model.config.channels != 3:
        raise ValueError(f"the model makes {model.config.channels} channels; pictures are made of 3")
    shape = tuple(settings[name] for name in ("frames", "height", "width"))
    enlargement(args.paths[0].suffix.lower(), *shape, args.scale)
    limit = model.config.text_length
    texts = [encode([c], checkpoint["vocabulary"], limit) for c in args.captions]    # so that errors speak of what was asked
    if settings["frames"] > 1:
        told = [complete(caption, model.choices, (settings["seed"] + i) % 2**32) for i, caption in enumerate(args.captions)]
        args.captions = [new if len(words(new)) <= limit else old for new, old in zip(told, args.captions)]
        texts = [encode([c], checkpoint["vocabulary"], limit) for c in args.captions]
    # A computer that runs out of memory may end the process without a word, so what cannot fit is refused here.
    if shortage := lacks_memory(model.config, shape, settings, device, least=True):
        raise ValueError(shortage)
    with torch.inference_mode():  # the smallest still image: a backend that is not there says so here
        model(torch.zeros(1, 3, 1, *model.config.patch[1:], device=device), torch.zeros(1, device=device), texts[0].to(device))
    return model, checkpoint, settings, texts


def run(args, model, checkpoint, settings, texts):
    """Sample and write one clip after the other: each is what it would be alone, and memory stays that of one."""
    import torch
    began = time.monotonic()
    shape = tuple(settings[name] for name in ("frames", "height", "width"))
    euler = steps_for(settings)
    ts, snapshots = times(settings["steps"], settings["schedule"], settings["shift"]).tolist(), []
    shown, columns = evenly(settings["steps"], 7), evenly(shape[0], 8)

    def keep(step, x1):
        if step in shown:
            snapshots.append((f"step {step + 1}, t = {ts[step]:.2f}", to_frames(x1[0])[columns]))

    for i, (caption, text, path) in enumerate(zip(args.captions, texts, args.paths)):
        seed = (settings["seed"] + i) % 2**32
        try:
            clip = sample(model, text, shape, seed=seed, progress=True, callback=keep if args.emerge else None, **euler)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise MemoryError(f"out of memory{asked(error)}: {lacks_memory(model.config, shape, settings, model.nothing.device)}") from None
        note = {**settings, "caption": caption, "seed": seed, "checkpoint": checkpoint["sha256"],
                "format": FORMAT, "torch": torch.__version__, "device": str(clip.device), "backend": model.config.backend}
        write_clip(path, to_frames(clip[0]), fps=settings["fps"], scale=args.scale, settings=note)
        print(f"wrote {show(path)}: {caption!a}, seed {seed}")
    if args.emerge:
        from benchmarks import pictures
        pictures.write(pictures.emerging(snapshots, max(1, 96 // max(shape[1:]))), args.emerge)
        print(f"wrote {show(args.emerge)}")
    peak = "not measured on this system"
    if clip.is_cuda:
        peak = f"{torch.cuda.max_memory_allocated(clip.device) / 2**20:.0f} MiB on the GPU"
    elif resource:
        unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, others KiB
        peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB"
    print(f"{time.monotonic() - began:.1f} s, peak memory {peak}")


def lacks_memory(config, shape, settings, device, least=False) -> str:
    """How much memory a clip of this shape needs and how much smaller it would have to be; with `least`, "" if it may fit.

    A forward pass holds some 30 float32 numbers per token and feature at once (measured), surely 16. Guidance doubles it.
    """
    import torch
    guidance = settings["guidance"]
    ring = whole_periods(config, shape, settings["period"])
    shape = (ring + settings["period"] if ring else shape[0], *shape[1:])       # what the model is shown
    need = math.prod(-(-size // p) for size, p in zip(shape, config.patch)) * config.d_model * 4 * (16 if least else 30) * (1 if guidance == 1 else 2)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if torch.device(device).type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
    if least and need <= have:
        return ""
    needs = f"{need / 2**30:.1f} GiB" if need > 2**28 else f"{need / 2**20:.2g} MiB"
    return (f"this clip needs {'at least' if least else 'about'} {needs} of memory, of {have / 2**30:.1f} GiB in all; choose --frames, --height and --width whose "
            f"product is {max(2, math.ceil(need / have))} times smaller{'' if guidance == 1 else ', or --guidance 1, which halves it'}, or close other programs")


def out_of_memory(error: BaseException) -> bool:
    """Did the memory run out? Every device says it in words of its own."""
    return (isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
            or bool(re.search("out of memory|not enough memory|t allocate memory", str(error))))


def asked(error: BaseException) -> str:
    """What torch says of how much it wanted, and how much was free: " (9 GiB asked for, 1 GiB free)", or ""."""
    wanted, free = re.search(r"ried to allocate ([\d.]+) ?(\w+)", str(error)), re.search(r"of which ([\d.]+ \w+) is free", str(error))
    if not wanted:
        return ""
    size = f"{int(wanted[1]) / 2**30:.2g} GiB" if wanted[2] == "bytes" and wanted[1].isdigit() else f"{wanted[1]} {wanted[2]}"
    return f" ({size} more asked for{f', {free[1]} free' if free else ''})"


def show(path) -> str:
    """A path or caption that any terminal can print."""
    return ascii(str(path))


def main(argv=None) -> int:
    """The command; returns its exit code: 0, 1 failed on the way, 2 wrong call, 130 interrupted, 141 nobody reads on."""
    wrong = 2
    try:
        args = parse(argv)
        if args.read:
            print(json.dumps(read_settings(args.read), indent=1))
            return 0
        prepared = prepare(args)
        wrong = 1
        run(args, *prepared)
        return 0
    except KeyboardInterrupt:
        print("sample.py: interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except Exception as error:
        return complain("sample.py", error, wrong)


def complain(program: str, error: Exception, code: int) -> int:
    """Say in one line what went wrong and return the exit code: classrooms get a sentence, not a traceback."""
    if isinstance(error, BrokenPipeError):  # who read our output has gone, as `| head` does: nobody is left to be told
        return 128 + 13  # what a shell reports for SIGPIPE
    message = str(error)
    if out_of_memory(error):
        message = message if isinstance(error, MemoryError) and message else (
            f"out of memory{asked(error)}; ask for less (half of --frames, or of --height and --width, to begin), or close other programs")
    elif isinstance(error, OSError) and error.strerror:
        message = plain(error)
    elif not isinstance(error, (ValueError, OSError, FloatingPointError)):  # not a user's mistake but one in the code: say where
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {message} ({os.path.basename(place.filename)}, line {place.lineno})"
    message = re.sub("[^ -~]", lambda odd: ascii(odd[0])[1:-1], " ".join(message.split()))  # no terminal may be steered by a file
    with contextlib.suppress(OSError):  # nobody may be listening
        print(f"{program}: error: {message[:3000]}", file=sys.stderr)
    return code


def plain(error: OSError) -> str:
    """What the system said, about which file, and what to do."""
    advice = next((words for numbers, words in ADVICE if error.errno in numbers), "try another place")
    return f"{error.strerror}{f': {show(error.filename)}' if error.filename else ''}; {advice}"


def command(program: str, main) -> None:
    """End the process with main()'s exit code, once all that it printed is out: only then is it known to have arrived."""
    try:
        try:
            code = main()
        except SystemExit as end:  # --help
            code = end.code
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        code = complain(program, error, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end, and would say it again
    sys.exit(code)


if __name__ == "__main__":
    command("sample.py", main)
