"""From a caption to a clip: a trained flow, followed from noise to data.

    python sample.py "a red circle moving right" --out clip.gif

Flow matching (Lipman et al. 2022, arXiv 2210.02747) joins noise and data by straight paths,
x_t = (1 - t) noise + t data, whose velocity is data - noise. The model predicts the mean clean clip
x1 at (x_t, t, caption), or the mean velocity (x1 - x_t) / (1 - t). Sampling goes from t = 0 to 1.
Where pixels are given (a first frame, a clip to go on with) they replace the prediction.

b clips; n words; c channels; t the time of the flow. Clips are (b, c, frames, height, width).
"""

import argparse
import dataclasses
import difflib
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, get_args

try:
    import numpy as np
    import torch
    from einops import rearrange
    from PIL import Image, ImageSequence
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Run: python -m pip install -r requirements.txt")

import lingen
import mamba2_ref

FORMAT = "lingen-tiny-2"
ENDINGS = (".gif", ".webp", ".png", ".npy")


@dataclasses.dataclass
class Settings:
    """How clips are sampled. A checkpoint holds its own; the command line overrides them."""

    frames: Annotated[int, "1, or a multiple of the patch's frames", 1, 4096] = 16
    height: Annotated[int, "pixels, a multiple of the patch's", 1, 4096] = 24
    width: Annotated[int, "the same", 1, 4096] = 24
    fps: Annotated[float, "frames a second, in the file", 1, 100] = 16.0
    steps: Annotated[int, "steps from noise to clip: more are slower", 1, 1000] = 50
    guidance: Annotated[float, "classifier-free guidance; 1 is none", 0, 100] = 1.0
    schedule: Annotated[str, "of the steps: uniform, linear-quadratic or shifted"] = "shifted"
    shift: Annotated[float, "of shifted steps: more of them near the noise", 1, 4096] = 8.0
    renoise: Annotated[float, "weight of fresh noise at each step; 0 is Euler's method", 0, 1] = 1.0
    slide: Annotated[int, "tokens of time by which TESA windows move at each step", 0, 9] = 1
    seed: Annotated[int, "of the first clip; the next ones count on"] = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            limits, value = get_args(field.type)[2:], getattr(self, field.name)
            if limits and not limits[0] <= value <= limits[1]:
                raise ValueError(f"{field.name} is {value}; expected {limits[0]} to {limits[1]}")


def encode(captions, vocabulary, seed=None):
    """Captions -> word numbers (b, n), int64, padded with 0.

    vocabulary: words by kind, as {"colour": ["red", ...], ...}; they are numbered from 1.
    seed: to complete captions (Movie Gen has a language model for that). For each kind that caption
        i leaves open ("a red shape"), a word is drawn from seed + i; words of "other" are added.
    Raises ValueError for an empty caption, an unknown word, or two words of a kind (not "other").
    """
    number = {word: i for i, word in enumerate(sum(vocabulary.values(), []), 1)}
    rows = []
    for i, caption in enumerate(captions):
        words = re.findall(r"[^\s.,;:!?\"']+", caption.lower())
        if not words:
            raise ValueError('the caption is empty; try "a red circle moving right"')
        for word in words:
            if word not in number:
                near = difflib.get_close_matches(word, number, n=1, cutoff=0.75)
                known = "; ".join(f"{kind}: {', '.join(vocabulary[kind])}" for kind in vocabulary)
                hint = f"did you mean {near[0]!r}?" if near else f"it knows {known}"
                raise ValueError(f"the model does not know the word {word!r}; {hint}")
        for kind, known in vocabulary.items():
            named = [word for word in words if word in known]
            if kind != "other" and len(named) > 1:
                raise ValueError(f"the model shows one object, but {named} each name a {kind}")
            if seed is not None and kind == "other":
                words += [word for word in known if word not in words]
            elif seed is not None and named in ([], [kind]):  # "shape" leaves the shape open
                drawn = random.Random(f"{kind} {seed + i}").choice([w for w in known if w != kind])
                words = [word for word in words if word != kind] + [drawn]
        rows.append(torch.tensor([number[word] for word in words]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def times(steps, schedule="uniform", shift=1.0):
    """Where the steps begin and end: (steps + 1,) float32, from 0 (noise) to 1 (data).

    The sampler's paths curve most near the noise, so two schedules begin with small steps. In
    "linear-quadratic" half of the steps are 1/1000 (Movie Gen, arXiv 2410.13720). "shifted" is
    u / (u + shift (1 - u)) for uniform u (SD3, arXiv 2403.03206, where t = 1 is noise).
    """
    i, half = torch.arange(steps + 1, dtype=torch.float64), steps // 2
    u = i / steps
    if schedule == "linear-quadratic":
        u = i / 1000 + (1 - steps / 1000) * ((i - half).clamp(min=0) / (steps - half)) ** 2
    elif schedule == "shifted":
        u = u / (u + shift * (1 - u))
    elif schedule != "uniform":
        raise ValueError(f"schedule is {schedule!r}; expected uniform, linear-quadratic, shifted")
    return u.float()


@torch.no_grad()
def sample(model, text, shape, *, text_mask=None, known=None, mask=None, strength=1.0, steps=50,
           guidance=1.0, schedule="uniform", shift=1.0, renoise=0.0, slide=0, seed=0,
           progress=False, callback=lambda t, x1: None):  # fmt: skip
    """Sample clips: (b, channels, frames, height, width), float32, on the model's device.

    text and text_mask: as LinGen.forward takes them. shape: (frames, height, width).
    known (b or 1, channels, *shape), mask (b or 1, *shape): a clip, and 1 where it is given. There
        it replaces each prediction. The rest is corrected by the gradient of the error made there:
        reconstruction guidance (Video Diffusion Models, arXiv 2204.03458; choice: step size 1).
    strength S: begins with `known`, noised to the time 1 - S (SDEdit, arXiv 2108.01073).
    guidance: classifier-free guidance scale (Ho and Salimans 2022, arXiv 2207.12598); 1 means none.
    renoise r: the next step's noise is sqrt(1 - r^2) old + r new; 0 is Euler's method on the flow.
    slide: tokens of time by which TESA windows move at each step; they end as in training (choice).
    callback(t, x1): called with each prediction of the clean clip.
    Clip i draws its noise on the CPU from seed + i, so that it depends on neither batch nor device.
    Raises FloatingPointError if the result is not finite, ValueError for a wrong shape of known.
    """
    weight, b = next(model.parameters()), len(text)
    text = text.to(weight.device)
    text_mask = None if text_mask is None else text_mask.to(weight.device, torch.bool)
    whole = (model.config.channels, *shape)
    for name, value, size in (("known", known, whole), ("mask", mask, whole[1:])):
        if value is not None and value.shape[1:] != size:
            raise ValueError(f"{name} is {tuple(value.shape)}; expected (b, *{size})")
    if not 0 <= strength <= 1 or known is None and (mask is not None or strength < 1):
        raise ValueError(f"strength is {strength}; expected 0 to 1, and known if below 1 or masked")
    known = None if known is None else known.to(weight.device, torch.float32)
    given = None if mask is None else mask[:, None].to(weight.device) > 0
    no_words = torch.zeros(text.shape[:2], dtype=torch.bool, device=weight.device)
    generators = [torch.Generator().manual_seed((seed + i) % 2**32) for i in range(b)]

    def draw_noise():
        return torch.stack([torch.randn(whole, generator=g) for g in generators]).to(weight.device)

    def denoise(x, t, words, **windows):  # words: which to heed -> the mean clean clip
        out = model(x.to(weight.dtype), x.new_full((b,), t), text, words, **windows).float()
        return out if model.config.predicts == "clean" else x + (1 - t) * out

    x, start = draw_noise(), 1 - strength
    ts = [start, *(t for t in times(steps, schedule, shift).tolist() if t > start)]
    x = x if known is None else x.lerp(known, start)
    bar = tqdm(ts[:-1], disable=None if progress else True, leave=False, unit="step")
    for i, (t, t_next) in enumerate(zip(bar, ts[1:]), 2 - len(ts)):  # i ends at 0
        windows = {"offset": i * slide} if slide else {}  # models without windows need not take it
        with torch.set_grad_enabled(given is not None):
            x.requires_grad_(given is not None)
            x1 = denoise(x, t, text_mask, **windows)
            if guidance != 1:  # from the clip of no caption towards this one, and beyond
                x1 = denoise(x, t, no_words, **windows).lerp(x1, guidance)
            if given is not None:
                wrong = (x1 - known).square().where(given, 0).sum()
                x1 = x1 - torch.autograd.grad(wrong, x)[0]  # a gradient step of size 1
                x1 = torch.where(given, known, x1).detach()
        x0 = (x - t * x1) / (1 - t)  # the noise that goes with it
        if renoise and t_next < 1:
            x0 = math.sqrt(1 - renoise**2) * x0 + renoise * draw_noise()
        x = (1 - t_next) * x0 + t_next * x1  # with the old x0: Euler's step
        callback(t, x1)
    if not x.isfinite().all():
        raise FloatingPointError("the clip is not finite; try another checkpoint or less guidance")
    return x.clamp(-1, 1) if model.config.channels == 3 else x  # latents have no bounds


def sample_windows(model, text, shape, *, known, mask, window, seed=0, **options):
    """`sample` by windows of so many frames, half given, half new; backwards if frame 0 is new."""
    clip, mask = known.expand(len(text), -1, -1, -1, -1).clone(), mask.clone()
    while missing := [i for i in range(shape[0]) if not mask[:, i].all()]:
        start = missing[0] - window // 2 if missing[0] else missing[-1] + 1 - (window + 1) // 2
        start = max(0, min(start, shape[0] - window))
        part = slice(start, start + window)
        options |= dict(known=clip[:, :, part], mask=mask[:, part], seed=seed + start)
        clip[:, :, part] = sample(model, text, clip[:, :, part].shape[2:], **options)
        mask[:, part] = 1
    return clip


def sample_captions(model, captions, vocabulary, settings, **options):
    """Clips (b, 3, frames, h, w) on the CPU, 16 at a time; settings: Settings(...) as a dict."""
    options = {**settings, **options}
    *shape, seed, _ = [options.pop(key) for key in ("frames", "height", "width", "seed", "fps")]
    parts = enumerate(encode(captions, vocabulary, seed).split(16))
    make = sample_windows if "window" in options else sample
    clips = [make(model, part, shape, seed=seed + 16 * i, **options).cpu() for i, part in parts]
    return torch.cat(clips)


def load_checkpoint(path):
    """A checkpoint as a dict, read without running code. ValueError for any other kind of file."""
    data = Path(path).read_bytes()
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError
    except Exception:  # a damaged file fails in many ways
        raise ValueError(f"{path} is damaged or not a checkpoint of this train_tiny.py") from None
    return {**checkpoint, "sha256": hashlib.sha256(data).hexdigest()}


def load_model(path, device="cpu", **changes):  # fields of the config
    """A checkpoint -> (float32 model in eval mode, checkpoint). ValueError if they do not fit."""
    saved = load_checkpoint(path)
    try:
        saved["sampling"] = vars(Settings(**saved["sampling"]))  # adds newer fields
        with torch.device("meta"):  # takes no memory before the weights are known to fit
            model = lingen.LinGen(lingen.LinGenConfig(**saved["config"] | changes))
        model.load_state_dict(saved["weights"], assign=True)
    except Exception as error:
        raise ValueError(f"cannot build the model of {path}: {error}") from None
    return model.to(device, torch.float32).eval(), saved


def to_frames(clip):
    """A clip (3, frames, h, w) in [-1, 1] -> uint8 array (frames, h, w, 3)."""
    pixels = ((clip.float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return rearrange(pixels, "c frames h w -> frames h w c").numpy().astype(np.uint8)


def write_clip(path, frames, fps=16.0, settings=None):
    """Write uint8 frames (n, h, w, 3) as the ending says: .gif, .webp, .png (APNG) or .npy.

    Small pictures are enlarged to about 256 pixels. All but .npy hold settings; .gif is not exact.
    """
    ending, out, note = Path(path).suffix.lower(), io.BytesIO(), json.dumps(settings or {})
    if ending == ".npy":
        np.save(out, frames)
        return replace_file(path, out.getvalue())
    scale = max(1, round(256 / max(frames.shape[1:3])))
    first, *rest = [Image.fromarray(frame) for frame in frames.repeat(scale, 1).repeat(scale, 2)]
    tick = 10 if ending == ".gif" else 1  # ms; rounded lengths would add up errors, ends do not
    ends = [round(i * 1000 / fps / tick) * tick for i in range(len(frames) + 1)]
    exif = Image.Exif()
    exif[0x010E] = note  # the tag ImageDescription; a .gif has a comment
    first.save(out, ending[1:], save_all=True, append_images=rest, loop=0, lossless=True,
               duration=np.diff(ends).tolist(), exif=exif, comment=note.encode())  # fmt: skip
    replace_file(path, out.getvalue())


def read_frames(path, height, width):
    """A clip or picture of a file -> (3, frames, height, width) in [-1, 1], resized if need be."""
    data = io.BytesIO(Path(path).read_bytes())
    try:
        if Path(path).suffix.lower() == ".npy":
            frames = [Image.fromarray(frame) for frame in np.load(data)]
        else:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(data))]
        pixels = np.stack([frame.resize((width, height), Image.Resampling.BOX) for frame in frames])
        clip = rearrange(torch.from_numpy(pixels) / 127.5 - 1, "frames h w c -> c frames h w", c=3)
    except Exception:  # a damaged file fails in many ways
        raise ValueError(f"{path} is not a picture or clip, or damaged") from None
    if frames[0].width * height != width * frames[0].height:
        print(f"note: {path}, {frames[0].size}, is stretched to {width, height}", file=sys.stderr)
    return clip


def box(text):
    """The four numbers of --box -> the index of its pixels in (frames, h, w)."""
    x0, y0, x1, y1 = map(int, text.split(","))
    return ..., slice(y0, y1), slice(x0, x1)


def given_part(args, settings):
    """The options of `sample` for a given clip or a part; may change settings["frames"]."""
    if not (path := args.image or args.extend or args.inpaint or args.edit):
        return {}
    clip = read_frames(path, settings["height"], settings["width"])[:, : 1 if args.image else None]
    if args.edit:
        settings["frames"] = clip.shape[1]
        return dict(known=clip[None], strength=args.strength)
    mask = torch.ones_like(clip[0])  # (frames, h, w): 1 is given, 0 is made
    if args.inpaint:
        settings["frames"] = len(mask)
        if args.box:
            mask[args.box] = 0
        if args.mask:  # in the file white is resampled
            mask *= read_frames(args.mask, *mask.shape[1:])[:, :1].mean(0) < 0
        if mask.all() or not mask.any():
            raise ValueError("--mask or --box must select a part of the clip, but not all of it")
    else:  # a loop repeats the clip at its end, which main cuts off
        if settings["frames"] <= len(mask):
            raise ValueError(f"{path} gives {len(mask)} frames; --frames has to be more")
        made = clip.new_zeros(3, settings["frames"] - len(mask), *mask.shape[1:])
        parts = [made, clip] if args.before else [clip, made] + [clip] * args.loop
        mask = torch.cat([torch.full_like(part[0], part is clip) for part in parts])  # 1: given
        clip = torch.cat(parts, 1)
    return dict(known=clip[None], mask=mask[None], frames=len(mask))


def replace_file(path, data):
    """Write data atomically: a kill leaves the old file or the new one, whole."""
    part = Path(path).with_name(f".{Path(path).name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_settings(path):
    """The settings inside a .gif, .webp or .png that `write_clip` wrote. ValueError if none."""
    try:
        with Image.open(path) as image:
            return dict(json.loads(image.info.get("comment") or image.getexif().get(0x010E)))
    except (TypeError, ValueError, SyntaxError, Image.UnidentifiedImageError):
        raise ValueError(f"{path} holds no settings; a .gif, .webp or .png of ours does") from None


def choose_device(name=None):
    """The named device, else the accelerator that is here, else the CPU. ValueError if absent."""
    name = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except Exception:  # each kind of device has its own way of not being there
        raise ValueError(f"the device '{name}' is not available here; try --device cpu") from None


def run_command(name, command):
    """Run a command and exit; an expected error becomes one line, and exit code 1, 2 or 130."""
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the process without a word
    try:
        sys.exit(command())
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        code, message = 2 if isinstance(error, ValueError) else 1, str(error)
    except (MemoryError, RuntimeError) as error:
        if not re.search("MemoryError|out of memory|allocate memory", repr(error)):
            raise  # a fault of ours: show where
        code, message = 1, f"out of memory; ask for a smaller clip or batch ({error})"
    print(f"{name}: error: {' '.join(message.split())[:500]}", file=sys.stderr)
    sys.exit(code)


def main():
    parser = argparse.ArgumentParser(description="Make clips; the checkpoint holds the defaults.")
    add = parser.add_argument
    add("captions", nargs="*", metavar="CAPTION", help='as in "a red circle moving right"')
    add("--out", type=Path, default="clip.gif", help=f"{' '.join(ENDINGS)} (replaced), or a folder")
    add("--checkpoint", default=Path(__file__).parent / "assets" / "tiny.pt")
    for field in dataclasses.fields(Settings):
        kind, about = get_args(field.type)[:2]
        about = f"{about} (usually {field.default})"
        add(f"--{field.name}", type=kind, default=argparse.SUPPRESS, help=about)
    uses = parser.add_mutually_exclusive_group()
    uses.add_argument("--image", metavar="FILE", help="the first frame is given")
    uses.add_argument("--extend", metavar="CLIP", help="the clip goes on, to --frames in all")
    uses.add_argument("--inpaint", metavar="CLIP", help="a part of it is resampled")
    uses.add_argument("--edit", metavar="CLIP", help="sampling begins with it, noised")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--before", action="store_true", help="with --extend: new frames come first")
    end.add_argument("--loop", action="store_true", help="with --extend: a cycle (toy: 24 frames)")
    add("--mask", metavar="FILE", help="with --inpaint: white in its first frame is resampled")
    add("--box", type=box, metavar="X0,Y0,X1,Y1", help="with --inpaint: resample inside this box")
    add("--strength", type=float, default=0.5, help="with --edit: 0 keeps the clip, 1 ignores it")
    add("--device", help="an accelerator if there is one, else cpu")
    add("--backend", choices=mamba2_ref.BACKENDS, help="of the Mamba2 scan")
    add("--read", metavar="CLIP", help="print the settings inside a clip, and stop")
    args = parser.parse_args()
    if args.read:
        return print(json.dumps(read_settings(args.read), indent=1))
    if len(args.captions) != 1 and not any(" " in caption for caption in args.captions):
        parser.error('expected captions in quotes: python sample.py "a red circle moving right"')
    needs = dict(before="extend", loop="extend", mask="inpaint", box="inpaint", strength="edit")
    for option, use in needs.items():
        if getattr(args, option) != parser.get_default(option) and not getattr(args, use):
            parser.error(f"--{option} goes with --{use}")
    if args.out.suffix.lower() not in ("", *ENDINGS):
        parser.error(f"--out {args.out}: expected a folder, or an ending of {', '.join(ENDINGS)}")
    backend = {"backend": args.backend} if args.backend else {}
    model, saved = load_model(args.checkpoint, choose_device(args.device), **backend)
    vocabulary = saved["vocabulary"]
    settings = {name: getattr(args, name, value) for name, value in saved["sampling"].items()}
    Settings(**settings)  # its limits
    options = given_part(args, settings)
    if "mask" in options and not args.loop:  # a loop needs both its ends at once
        options["window"] = max(saved["trained"]["frames"])
    for name, sizes in saved["trained"].items():
        if settings[name] not in sizes and not (name == "frames" and "window" in options):
            print(f"warning: {name} is {settings[name]}; trained on {sizes}", file=sys.stderr)
    encode(args.captions, vocabulary), times(1, settings["schedule"])  # errors before the work
    for i, caption in enumerate(args.captions):
        path = args.out
        if len(args.captions) > 1 or not path.suffix:  # a folder
            name = f"{i:03d}-" + re.sub(r"\W+", "-", caption)[:60]
            path = path.parent / path.stem / (name + (path.suffix or ".gif"))
        path.parent.mkdir(parents=True, exist_ok=True)  # an error before the work
        clip = sample_captions(model, [caption], vocabulary, settings, **options, progress=True)[0]
        note = {**settings, "caption": caption, "checkpoint": saved["sha256"]}
        note |= {"command": sys.argv[1:]} if options else {}
        write_clip(path, to_frames(clip)[: settings["frames"]], settings["fps"], note)
        print(f"wrote {path}: {caption!r}, seed {settings['seed']}")
        settings["seed"] += 1


if __name__ == "__main__":
    run_command("sample.py", main)
