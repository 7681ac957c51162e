"""From a caption to a clip: a trained flow, followed from noise to data.

    python sample.py "a red circle moving right" --out clip.gif

Flow matching (Lipman et al. 2022, arXiv 2210.02747) joins noise and data by straight paths,
x_t = (1 - t) noise + t data, whose velocity is data - noise. The model predicts the mean clean clip
x1 at (x_t, t, caption), or the mean velocity (x1 - x_t) / (1 - t). Sampling starts from noise at
t = 0 and takes finite steps to t = 1.

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
import re
import sys
import time
import zipfile
from pathlib import Path

try:
    import numpy as np
    import torch
    from einops import rearrange
    from PIL import Image
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Run: python -m pip install -r requirements.txt")

import lingen
import mamba2_ref

FORMAT = "lingen-tiny-2"
ENDINGS = (".gif", ".webp", ".png", ".npy")
SCHEDULES = ("uniform", "linear-quadratic", "shifted")
SOLVER = ("steps", "guidance", "schedule", "shift", "renoise")  # Settings that `sample` takes


@dataclasses.dataclass
class Settings:
    """How clips are sampled. A checkpoint holds its own; the command line overrides them."""

    frames: int = 16
    height: int = 24
    width: int = 24
    fps: float = 16.0
    steps: int = 50
    guidance: float = 1.0
    schedule: str = "shifted"
    shift: float = 8.0
    renoise: float = 1.0
    seed: int = 0

    def __post_init__(self):
        most = {"steps": 1000, "fps": 100, "guidance": 100, "renoise": 1, "seed": 2**32 - 1}
        for name, value in vars(self).items():
            low = 0 if name in ("guidance", "renoise", "seed") else 1
            if name != "schedule" and not low <= value <= most.get(name, 4096):
                raise ValueError(f"{name} is {value}; expected {low} to {most.get(name, 4096)}")


def encode(captions, vocabulary):
    """Captions -> word numbers (b, n), int64, padded with 0.

    vocabulary: words by kind, as {"colour": ["red", ...], ...}; they are numbered from 1.
    Raises ValueError for an empty caption, an unknown word, or two words of a kind (not "other").
    """
    number = {word: i for i, word in enumerate(sum(vocabulary.values(), []), 1)}
    rows = []
    for caption in captions:
        words = re.findall(r"[^\s.,;:!?\"']+", caption.lower())
        if not words:
            raise ValueError('the caption is empty; try "a red circle moving right"')
        for word in [word for word in words if word not in number]:
            near = difflib.get_close_matches(word, number, n=1, cutoff=0.75)
            known = "; ".join(f"{kind}: {', '.join(vocabulary[kind])}" for kind in vocabulary)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {known}"
            raise ValueError(f"the model does not know the word {word!r}; {hint}")
        for kind in set(vocabulary) - {"other"}:
            named = [word for word in words if word in vocabulary[kind]]
            if len(named) > 1:
                raise ValueError(f"the model shows one object, but {named} each name a {kind}")
        rows.append(torch.tensor([number[word] for word in words]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def times(steps, schedule="uniform", shift=1.0):
    """Where the steps begin and end: (steps + 1,) float32, from 0 (noise) to 1 (data).

    Paths curve most near the noise, so two schedules begin with small steps. Half the steps of
    "linear-quadratic" are 1/1000 (Movie Gen, arXiv 2410.13720). "shifted" is
    u / (u + shift (1 - u)) for uniform u (SD3, arXiv 2403.03206).
    """
    i = torch.arange(steps + 1, dtype=torch.float64)
    u = i / steps
    if schedule == "linear-quadratic":
        half = steps // 2
        u = i / 1000 + (1 - steps / 1000) * ((i - half).clamp(min=0) / (steps - half)) ** 2
    elif schedule == "shifted":
        u = u / (u + shift * (1 - u))
    elif schedule != "uniform":
        raise ValueError(f"schedule is {schedule!r}; expected {', '.join(SCHEDULES)}")
    return u.float()


def sample(model, text, shape, *, mask=None, steps=50, guidance=1.0, schedule="uniform", shift=1.0,
           renoise=0.0, seed=0, progress=False, callback=None):  # fmt: skip
    """Sample clips: (b, channels, frames, height, width), float32, on the model's device.

    text and mask: as LinGen.forward takes them. shape: (frames, height, width).
    guidance: classifier-free guidance scale (Ho and Salimans 2022, arXiv 2207.12598); 1 means none.
    renoise r: the noise of the next step is sqrt(1 - r^2) old + r new. 0 is the Euler step of the
        flow; 1 draws new noise at every step.
    callback(t, x1): called with each prediction of the clean clip.
    Clip i draws its noise from seed + i on the CPU: it depends on neither batch nor device.
    Raises FloatingPointError if the result is not finite.
    """
    weight, b = next(model.parameters()), len(text)
    text = text.to(weight.device)
    if mask is None:
        mask = text > 0 if text.dim() == 2 else text.new_ones(text.shape[:2])
    mask = mask.to(weight.device, torch.bool)
    generators = [torch.Generator().manual_seed((seed + i) % 2**32) for i in range(b)]

    def draw_noise():
        noise = [torch.randn(model.config.channels, *shape, generator=g) for g in generators]
        return torch.stack(noise).to(weight.device)

    def predict(x, t, mask):  # the mean clean clip
        out = model(x.to(weight.dtype), x.new_full((b,), t), text, mask).float()
        return out if model.config.predicts == "clean" else x + (1 - t) * out

    def denoise(x, t):
        if guidance == 1:
            return predict(x, t, mask)
        without = predict(x, t, torch.zeros_like(mask))
        return without + guidance * (predict(x, t, mask) - without)

    ts = times(steps, schedule, shift).tolist()
    x = draw_noise()
    with torch.inference_mode():
        bar = tqdm(ts[:-1], disable=None if progress else True, leave=False, unit="step")
        for t, t_next in zip(bar, ts[1:]):
            x1 = denoise(x, t)  # the clean clip
            x0 = (x - t * x1) / (1 - t)  # the noise that goes with it
            if renoise and t_next < 1:
                x0 = math.sqrt(1 - renoise**2) * x0 + renoise * draw_noise()
            x = (1 - t_next) * x0 + t_next * x1
            if callback:
                callback(t, x1)
    if not x.isfinite().all():
        raise FloatingPointError("the clip is not finite; try another checkpoint or less guidance")
    return x.clamp(-1, 1) if model.config.channels == 3 else x  # latents have no bounds


def sample_captions(model, captions, vocabulary, settings, **options):
    """One clip for each caption, by a dict of Settings: (b, 3, frames, h, w), on the CPU."""
    shape = (settings["frames"], settings["height"], settings["width"])
    options |= {name: settings[name] for name in (*SOLVER, "seed")}
    return sample(model, encode(captions, vocabulary), shape, **options).cpu()


def load_checkpoint(path):
    """A checkpoint, a dict of plain tensors and numbers, read without running code in it.

    Raises OSError where it cannot be read, ValueError for any other kind of file.
    """
    data = Path(path).read_bytes()
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        broken = zipfile.ZipFile(io.BytesIO(data)).testzip()  # torch looks at no checksums
        if broken or checkpoint["format"] != FORMAT:
            raise ValueError
    except Exception:  # a damaged file fails in many ways
        raise ValueError(f"{path} is damaged, or no checkpoint of this train_tiny.py") from None
    return {**checkpoint, "sha256": hashlib.sha256(data).hexdigest()}


def load_model(path, device="cpu", backend=None):
    """A checkpoint -> (model in float32 and eval mode, checkpoint). backend replaces the config's.

    Raises what `load_checkpoint` raises, and ValueError where weights do not fit the config.
    """
    checkpoint = load_checkpoint(path)
    try:
        config = lingen.LinGenConfig(**checkpoint["config"])
        config = dataclasses.replace(config, backend=backend or config.backend)
        weights = {name: value.float() for name, value in checkpoint["weights"].items()}
        if config.depth > len(weights):
            raise ValueError(f"its config has {config.depth} blocks")
        with torch.device("meta"):  # takes no memory before the weights are known to fit
            model = lingen.LinGen(config)
        model.load_state_dict(weights, assign=True)
        if not all(value.isfinite().all() for value in weights.values()):
            raise ValueError("its weights are not finite")
        Settings(**checkpoint["sampling"])
    except Exception as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit its own config: {message:.200}") from None
    return model.eval().to(device), checkpoint


def to_frames(clip):
    """A clip (3, frames, h, w) in [-1, 1] -> uint8 array (frames, h, w, 3)."""
    pixels = ((clip.float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return pixels.permute(1, 2, 3, 0).numpy().astype(np.uint8)


def contact_sheet(frames, columns=8):
    """Frames (n, h, w, 3) side by side, row after row; of more than 64, evenly chosen ones."""
    frames = frames[np.linspace(0, len(frames) - 1, min(len(frames), 64)).round().astype(int)]
    columns = min(columns, len(frames))
    margins = ((0, -len(frames) % columns), (1, 1), (1, 1), (0, 0))
    frames = np.pad(frames, margins, constant_values=255)
    return rearrange(frames, "(r c) h w d -> (r h) (c w) d", c=columns)


def write_clip(path, frames, fps=16.0, settings=None):
    """Write uint8 frames (n, h, w, 3) as the ending says: .gif, .webp, .png (contact sheet), .npy.

    Pictures are enlarged to about 256 pixels, 128 on a sheet. settings go into the file as JSON,
    except in .npy. The file appears whole or not at all. ValueError for another ending.
    """
    ending, out, note = Path(path).suffix.lower(), io.BytesIO(), json.dumps(settings or {})
    if ending not in ENDINGS:
        raise ValueError(f"{path} ends in {ending!r}; expected {', '.join(ENDINGS)}")
    if ending == ".npy":
        np.save(out, frames)
        return replace_file(path, out.getvalue())
    scale = max(1, round((128 if ending == ".png" else 256) / max(frames.shape[1:3])))
    large = frames.repeat(scale, 1).repeat(scale, 2)
    if ending == ".png":
        large = contact_sheet(large)[None]
    first, *rest = [Image.fromarray(frame) for frame in large]
    # Ends of frames are rounded to ticks. Rounding the lengths would add up errors.
    tick = 10 if ending == ".gif" else 1  # milliseconds
    ends = [round(i * 1000 / fps / tick) * tick for i in range(len(frames) + 1)]
    options = dict(append_images=rest, loop=0, duration=[b - a for a, b in zip(ends, ends[1:])])
    exif = Image.Exif()
    exif[0x010E] = note  # the tag ImageDescription
    if ending == ".png":
        first.save(out, "PNG", exif=exif)
    elif ending == ".webp":
        first.save(out, "WEBP", save_all=True, lossless=True, exif=exif, **options)
    else:
        first.save(out, "GIF", save_all=True, comment=note.encode(), **options)
    replace_file(path, out.getvalue())


def replace_file(path, data):
    """Put data at path in one move: a kill leaves the old file or the new one, whole."""
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
    """The named device, else cuda, else mps, else cpu. ValueError for one that is not here."""
    if name is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except Exception:  # each kind of device has its own way of not being there
        raise ValueError(f"the device {name!r} is not available here; try --device cpu") from None


def run_command(name, command):
    """Run a command and exit; an expected error becomes one line, and exit code 1 or 2."""
    try:
        try:
            code = command()
        finally:
            sys.stdout.flush()  # here, where it is noticed that the reader has gone
        sys.exit(code)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, ArithmeticError, ImportError, MemoryError, RuntimeError) as error:
        code, message = 2 if isinstance(error, ValueError) else 1, " ".join(str(error).split())
        memory = isinstance(error, MemoryError) or re.search("(out of|allocate) memory", message)
        if isinstance(error, RuntimeError) and not memory:
            raise  # a fault of ours: show where
        if memory:
            message = f"out of memory; ask for a smaller clip or batch ({message:.200})"
    print(f"{name}: error: {message}", file=sys.stderr)
    sys.exit(code)


def output_paths(out, captions):
    """Where each clip goes: the file --out, or for several captions files in the folder --out."""
    if len(captions) == 1 and out.suffix:
        return [out]
    folder, ending = (out.with_suffix(""), out.suffix) if out.suffix else (out, ".gif")
    names = [re.sub(r"\W+", "-", caption)[:60] for caption in captions]
    return [folder / f"{i:03d}-{name}{ending}" for i, name in enumerate(names)]


def main():
    parser = argparse.ArgumentParser(description="Make clips from captions.",
                                     epilog="Other settings come from the checkpoint.")  # fmt: skip
    add = parser.add_argument
    add("captions", nargs="*", metavar="CAPTION", help='as in "a red circle moving right"')
    add("--out", type=Path, default="clip.gif", help=f"{' '.join(ENDINGS)}, or a folder")
    add("--checkpoint", default=Path(__file__).parent / "assets" / "tiny.pt")
    for field in dataclasses.fields(Settings):
        choices = SCHEDULES if field.name == "schedule" else None
        add(f"--{field.name}", type=field.type, choices=choices, default=argparse.SUPPRESS)
    add("--device", help="default: cuda, else mps, else cpu")
    add("--backend", choices=mamba2_ref.BACKENDS, help="of the Mamba2 scan")
    add("--read", metavar="CLIP", help="print the settings inside a clip, and stop")
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read_settings(args.read), indent=1))
        return
    if not args.captions:
        parser.error('a caption is missing; try: python sample.py "a red circle moving right"')
    if args.out.suffix.lower() not in ("", *ENDINGS):
        parser.error(f"--out {args.out}: expected a folder, or an ending of {', '.join(ENDINGS)}")
    paths = output_paths(args.out, args.captions)
    torch.set_float32_matmul_precision("medium")  # products may use bfloat16 where it is fast
    model, checkpoint = load_model(args.checkpoint, choose_device(args.device), args.backend)
    given = {name: value for name, value in vars(args).items() if name in checkpoint["sampling"]}
    settings = dataclasses.asdict(Settings(**{**checkpoint["sampling"], **given}))
    for name, known in checkpoint["trained"].items():
        if settings[name] not in known:
            print(f"warning: {name} is {settings[name]}, the model was trained with "
                  f"{', '.join(map(str, known))}; quality may suffer", file=sys.stderr)  # fmt: skip
    vocabulary = checkpoint["vocabulary"]
    encode(args.captions, vocabulary)  # a wrong caption is an error before anything is written
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for i, (caption, path) in enumerate(zip(args.captions, paths)):
        begun, seed = time.monotonic(), (settings["seed"] + i) % 2**32
        mine = {**settings, "seed": seed}
        clip = sample_captions(model, [caption], vocabulary, mine, progress=True)
        note = {**mine, "caption": caption, "checkpoint": checkpoint["sha256"]}
        write_clip(path, to_frames(clip[0]), settings["fps"], note)
        print(f"wrote {path}: {caption!r}, seed {seed}, {time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    run_command("sample.py", main)
