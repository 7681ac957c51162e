"""The pictures of the six files and the toy, all in one look, so that the files can keep to their lessons.

    python benchmarks/pictures.py            makes them all again, in assets/

One palette, that of Okabe and Ito, which the colour-blind can read; where colour says something, so does a shape, a width
or a shade, for those who print in grey. One size of letters, a white ground. Each of the six files draws its own picture
when it is run, by the function of its name here. Drawn by Pillow, without matplotlib.
"""
import argparse
import io
import math
import os
import signal
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

BLUE, ORANGE, GREEN, RED, SKY, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
INK, GREY, PALE, WHITE = "#222222", "#BBBBBB", "#EEEEEE", "#FFFFFF"
LETTERS = 14


def tint(colour, share):
    """A colour mixed with white: share 1 is the colour itself, 0 is white."""
    return "#" + "".join(f"{round(255 + share * (int(colour[i : i + 2], 16) - 255)):02X}" for i in (1, 3, 5))


class Page:
    """A white page to draw on, in pixels of the finished picture. It is drawn three times larger and shrunk at the end, each
    pixel the mean of nine: lines and letters come out smooth, and pixels of a clip stay what they are."""

    larger = 3

    def __init__(self, wide, high):
        self.page = Image.new("RGB", (self.larger * wide, self.larger * high), WHITE)
        self.pen, self.font = ImageDraw.Draw(self.page), ImageFont.load_default(size=LETTERS * self.larger)

    def text(self, x, y, words, anchor="la", **how):
        self.pen.text((self.larger * x, self.larger * y), words, INK, self.font, anchor, spacing=6 * self.larger, **how)

    def line(self, points, colour=INK, width=2.0):
        self.pen.line([self.larger * n for point in points for n in point], colour, round(self.larger * width), joint="curve")

    def arrow(self, *points):
        self.line(points)
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        self.shape([(x + a * dx + c * dy, y + a * dy + c * dx) for a, c in ((0, 0), (-9, 5), (-9, -5))], INK)

    def shape(self, corners, fill, outline=None):
        self.pen.polygon([(self.larger * x, self.larger * y) for x, y in corners], fill, outline, self.larger)

    def box(self, x, y, wide, high, fill=None, outline=None, width=1, round_by=0):
        corners = [self.larger * n for n in (x, y, x + wide, y + high)]
        self.pen.rounded_rectangle(corners, round_by * self.larger, fill, outline, round(width * self.larger))

    def dot(self, x, y, radius, fill, outline=None):
        self.pen.ellipse([self.larger * n for n in (x - radius, y - radius, x + radius, y + radius)], fill, outline, self.larger)

    def pixels(self, picture, x, y, wide, high):
        """Paste a small picture (a frame, a matrix), its pixels as squares."""
        self.page.paste(picture.resize((self.larger * wide, self.larger * high), Image.Resampling.NEAREST), (self.larger * x, self.larger * y))

    def done(self):
        return self.page.reduce(self.larger)


# ---- what the demonstrations of the files share -----------------------------------------------------------------


def end_with_the_reader():
    """`| head` ends a demonstration as it ends other tools, without a word."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def check_out(parser, out, option="--out"):
    """End with the parser's error, before any work, where the picture that an option names could not be written."""
    if not out.endswith(".png") or os.path.isdir(out) or not os.path.isdir(os.path.dirname(out) or "."):
        parser.error(f"{option} {out}: expected the name of a .png in a folder that exists")


def write(picture, path):
    """The picture as PNG at `path`, whole or not at all. OSError where it cannot be written."""
    from sample import replace_file
    out = io.BytesIO()
    picture.save(out, "PNG")
    replace_file(path, out.getvalue())


def save(picture, out):
    """`write`, and say so; where it fails, a message and exit code 1."""
    try:
        write(picture, out)
    except OSError as error:
        sys.exit(f"cannot write {out}: {error}")
    print(f"\nwrote {out}")


# ---- scan.py --------------------------------------------------------------------------------------------------


def scan_orders(shape):
    """Fig. 4: the walk of each order through a small grid (t, h, w), the frames standing one behind another."""
    from scan import SCANS, places
    t, h, w = shape
    dt, dx, dy = 108, (20, -9), 36                              # one step along t, x, y on the page
    wide, high = dt * (t - 1) + dx[0] * (w - 1), dy * (h - 1) - dx[1] * (w - 1)
    cell = (max(wide + 100, 330), high + 100)
    page = Page(cell[0] * 2, cell[1] * 3)
    steps_apart = lambda a, b: sum(abs(i - j) for i, j in zip(a, b))

    def end(at, last):                                          # the first token is a disc, the last one a square
        page.box(at[0] - 6, at[1] - 6, 12, 12, RED) if last else page.dot(*at, 6, GREEN)

    for number, order in enumerate((*SCANS, "zigzag")):
        left, top = cell[0] * (number % 2) + 50, cell[1] * (number // 2)
        spot = lambda f, y, x: (left + dt * f + dx[0] * x, top + 62 - dx[1] * (w - 1) + dx[1] * x + dy * y)  # noqa: B023
        page.text(left - 22, top + 12, order + (f": layers {number}, {number + 4}, ..." if number < 4 else ""))
        for f in range(t):                                      # the frames, as tilted sheets
            corners = ((-0.5, -0.5), (-0.5, w - 0.5), (h - 0.5, w - 0.5), (h - 0.5, -0.5))
            page.shape([spot(f, y, x) for y, x in corners], tint(INK, 0.06), GREY)
        walk = [(i // (h * w), i // w % h, i % w) for i in places(order, shape).flatten().argsort().tolist()]
        steps = sorted(zip(walk, walk[1:]), key=lambda ab: -steps_apart(*ab))       # jumps first, so that steps lie on top
        for a, b in steps:
            jump = steps_apart(a, b) > 1
            page.line([spot(*a), spot(*b)], ORANGE if jump else BLUE, 1 if jump else 2.6)
        for token in walk:
            page.dot(*spot(*token), 2.6, BLUE)
        end(spot(*walk[0]), last=False)
        end(spot(*walk[-1]), last=True)
    left, top = cell[0] + 30, 2 * cell[1] + 40
    page.line([(left, top), (left + 28, top)], BLUE, 2.6)
    page.line([(left, top + 26), (left + 28, top + 26)], ORANGE, 1)
    end((left + 14, top + 52), last=False)
    end((left + 14, top + 78), last=True)
    for row, words in enumerate(("step to a neighbour in the grid", "jump", "first token", "last token")):
        page.text(left + 42, top + 26 * row, words, "lm")
    page.text(left, top + 112, "t: sheet to sheet;  y: down;  x: along a sheet", "lm")
    return page.done()


# ---- mamba2_ref.py --------------------------------------------------------------------------------------------


def attention_maps(l=48, seed=0):
    """(L, one direction, both): the decay matrix of one head and the maps by which x turns into y, each (l, l).

    The maps are read off the scan itself: column j is the answer to an impulse at token j.
    """
    from mamba2_ref import segment_sums, ssd_bidirectional, ssd_chunked
    make = torch.Generator().manual_seed(seed)
    dt, A = 0.02 + 0.3 * torch.rand(1, l, 1, generator=make), -torch.ones(1)
    B = 0.5 + torch.rand(1, l, 1, 8, generator=make)                # answers and questions that vary from token to token
    C = 0.5 + torch.rand(1, l, 1, 8, generator=make)
    impulses = torch.eye(l)[None, :, None]                          # (1, l, 1, p = l): one impulse per channel
    one, both = (scan(impulses, dt, A, B, C)[0, :, 0] for scan in (ssd_chunked, ssd_bidirectional))
    return segment_sums((dt * A)[0, :, 0]).exp(), one, both


def mamba2_maps():
    """Fig. 3: what one head remembers, what it reads from one side, and from both. The rows are the tokens that read."""
    side, gap = 320, 24
    page = Page(gap + 3 * (side + gap), side + 84)
    titles = ("L: what one head has not forgotten", "one direction: L o C B^T", "both directions")
    for k, (values, title) in enumerate(zip(attention_maps(), titles)):
        left = gap + k * (side + gap)
        shade = (values / values.max()).clamp(0, 1).pow(0.6)[..., None]             # the power lifts what is faint
        blue = torch.tensor([int(BLUE[i : i + 2], 16) for i in (1, 3, 5)])
        page.text(left, 14, title)
        page.pixels(Image.fromarray((255 + shade * (blue - 255)).byte().numpy()), left, 40, side, side)
        page.box(left, 40, side, side, outline=INK)
    page.text(gap, side + 52, "row: the token that reads     column: the token that is read     white 0, blue the largest")
    return page.done()


# ---- tesa.py --------------------------------------------------------------------------------------------------


def tesa_windows(shape, window, shift):
    """Fig. 5: windows of an even and of an odd layer, the roll, how far a token is heard, and one window's mask."""
    from tesa import fit, spread, window_mask, windows
    fitted, by = fit(shape, window, shift)
    full = [-(-size // win) * win for size, win in zip(shape, fitted)]              # with the padding
    cell = max(2, min(20, (1040 // min(full[0], 8) - 14) // full[2]))
    step, tall, side = cell * full[2] + 14, cell * full[1] + 62, 256
    page = Page(1060, 4 * tall + side + 70)

    def frames(row, title, colours, number, times, parts=None):
        """Frames (t, h, w) in colours; a heavy line where number changes, a thin one where parts does."""
        page.text(20, 14 + tall * row, title)
        t, h, w = colours.shape
        for f in range(min(t, 8)):
            left, up = 20 + step * f, 40 + tall * row
            for y, x in torch.cartesian_prod(torch.arange(h), torch.arange(w)).tolist():
                page.box(left + cell * x, up + cell * y, cell, cell, palette[colours[f, y, x]], WHITE, 0.4)
            for border, heavy in ((parts, 0.7), (number, 2)):
                for y, x in torch.cartesian_prod(torch.arange(h), torch.arange(w)).tolist() if border is not None else ():
                    at = left + cell * x, up + cell * y
                    if x and border[f, y, x] != border[f, y, x - 1]:
                        page.line([at, (at[0], at[1] + cell)], INK, heavy)
                    if y and border[f, y, x] != border[f, y - 1, x]:
                        page.line([at, (at[0] + cell, at[1])], INK, heavy)
            page.box(left, up, cell * w, cell * h, outline=INK, width=2)
            page.text(left + cell * w / 2, up + cell * h + 4, f"t = {times[f]}" if times[f] < shape[0] else "padding", "ma")

    def paint(number):      # windows that touch along an axis, also around the ends, get different colours
        kt, kh, kw = (n.unique(return_inverse=True)[1] for n in (number[:, 0, 0], number[0, :, 0], number[0, 0, :]))
        return (5 * kt[:, None, None] + 2 * kh[:, None] + kw) % 6

    def rolled(number, fill):
        padding = [n for size, whole in zip(shape[::-1], full[::-1]) for n in (0, whole - size)]
        return F.pad(number, padding, value=fill).roll([-n for n in by], (0, 1, 2))

    # Six light colours for windows; white to blue for how far a token is heard; grey for the padding.
    palette = [tint(c, 0.5) for c in (BLUE, ORANGE, GREEN, RED, SKY, PINK)] + [tint(BLUE, s) for s in (0, 0.16, 0.35, 0.64, 1)] + [PALE]
    even, odd, times = windows(shape, window, (0, 0, 0)), windows(shape, window, shift), list(range(full[0]))
    frames(0, f"even layer: windows of {' x '.join(map(str, fitted))} tokens", paint(even), even, times)
    frames(1, f"odd layer: shifted by {by}", paint(odd), odd, times)
    frames(2, "odd layer as computed: rolled, so that broken windows share whole ones; the mask keeps apart what a thin line parts",
           rolled(paint(odd), 11), windows(full, fitted, (0, 0, 0)), times[by[0] :] + times[: by[0]], rolled(odd, -1))
    after = sum(spread(shape, [even, odd, even, odd]))          # 4: heard after the first layer; 0: not after four
    frames(3, "has heard of the middle token after 1 layer (darkest), 2, 3, 4 layers, or not yet (white)", after.long() + 6, after, times)

    mask, m, top = window_mask(shape, window, shift, torch.device("cpu")), even.flatten().bincount()[0], 14 + 4 * tall
    mask = torch.ones(m, m, dtype=torch.bool) if mask is None else mask[-1]
    tile = Image.new("RGB", mask.shape, WHITE)
    tile.paste(BLUE, mask=Image.fromarray(mask.numpy().astype("uint8") * 255))
    page.text(20, top, f"mask of the last window of an odd layer: {m} x {m} tokens, counted along t, y, x (x fastest)")
    page.pixels(tile, 20, top + 26, side, side)
    page.box(20, top + 26, side, side, outline=INK)
    page.text(side + 50, top + 26, "Row: the token that asks.  Column: the token it asks.\n"
              "Blue: may attend (padding only to itself).  White: may not.\n\n"
              "The window is broken along each axis that is shifted;\nonly tokens of one part above belong together.")
    return page.done()


# ---- lingen.py ------------------------------------------------------------------------------------------------


def lingen_block():
    """Fig. 2: the block, and MATE inside it."""
    page = Page(900, 430)

    def box(x, y, wide, high, words, fill):
        page.box(x, y, wide, high, fill, INK, round_by=8)
        page.text(x + wide / 2, y + high / 2, words, "mm", align="center")

    def plus(x, y):
        page.dot(x, y, 9, WHITE, INK)
        page.line([(x - 4.5, y), (x + 4.5, y)], INK, 1.3)
        page.line([(x, y - 4.5), (x, y + 4.5)], INK, 1.3)

    page.text(20, 20, "one block of LinGen", "lm")
    page.arrow((40, 40), (40, 415))
    for y, words, fill in ((50, "norm, modulated by time\nMATE\ngate", tint(BLUE, 0.25)), (170, "norm\ncross-attention\nto the caption", PALE),
                           (290, "norm, modulated by time\nfeed-forward\ngate", PALE)):
        box(70, y, 230, 76, words, fill)
        page.arrow((40, y + 38), (70, y + 38))
        page.arrow((300, y + 38), (330, y + 38), (330, y + 98), (50, y + 98))
        plus(40, y + 98)
    orange, green = tint(ORANGE, 0.25), tint(GREEN, 0.25)
    page.text(390, 20, "MATE: two branches of linear cost, added", "lm")
    page.text(390, 48, "MA-branch: short to long range", "lm")
    box(390, 66, 150, 66, "flatten the grid:\nRotary Major Scan\n(order = layer mod 4)", orange)
    box(565, 66, 150, 66, "review tokens in\nfront and behind\n(pooled overview)", orange)
    box(740, 66, 140, 66, "Mamba2 from the\nleft + Mamba2\nfrom the right", orange)
    page.arrow((540, 99), (565, 99))
    page.arrow((715, 99), (740, 99))
    page.text(390, 178, "TE-branch: near in space, medium in time", "lm")
    box(390, 196, 150, 66, "cut into windows,\nshifted in every\nsecond layer", green)
    box(565, 196, 315, 66, "softmax attention inside each window (TESA)", green)
    page.arrow((540, 229), (565, 229))
    page.arrow((810, 132), (810, 160), (895, 160), (895, 320), (660, 320))
    page.arrow((650, 262), (650, 311))
    page.arrow((641, 320), (560, 320))
    plus(650, 320)
    page.text(550, 320, "back to the grid (t, h, w)", "rm")
    page.text(390, 366, "Take a part out or swap it by one field of LinGenConfig:", "lm")
    page.text(390, 388, "mixer, ma, tesa, review, scan, window, pool, backend", "lm")
    return page.done()


# ---- sample.py and train_tiny.py ------------------------------------------------------------------------------


def emerging(snapshots, scale=2):
    """A clip emerging from noise: one row for each (label, frames (t, h, w, 3) uint8)."""
    t, h, w, _ = snapshots[0][1].shape
    labels = 16 + max(math.ceil(ImageFont.load_default(size=LETTERS).getlength(label)) for label, _ in snapshots)
    h, w = h * scale, w * scale
    high = max(h, 20) + 4
    page = Page(labels + t * (w + 4) + 4, high * len(snapshots) + 12)
    for row, (label, frames) in enumerate(snapshots):
        page.text(6, 8 + row * high + h / 2, label, "lm")
        for column, frame in enumerate(frames):
            page.pixels(Image.fromarray(frame), labels + column * (w + 4), 8 + row * high, w, h)
    return page.done()


def examples():
    """The data of the toy: for each of eight clips six of its frames, and its caption."""
    from sample import to_frames
    from train_tiny import make_batch
    clips, captions, _ = make_batch(5, 16, torch.Generator().manual_seed(3), speeds=True)
    pairs, pair_captions, _ = make_batch(3, 16, torch.Generator().manual_seed(5), objects=2, speeds=True)
    page = Page(1060, 8 * 76 + 14)
    for row, (clip, words) in enumerate(zip([*clips, *pairs], captions + pair_captions)):
        for column, frame in enumerate(to_frames(clip)[::3]):
            page.pixels(Image.fromarray(frame), 14 + 72 * column, 12 + 76 * row, 64, 64)
        page.text(460, 44 + 76 * row, textwrap.fill(words, 72), "lm")
    return page.done()


def eight_clips(model, path, sampling, objects=1, scale=None):
    """A clip of eight captions that were held out from training, side by side, as the model draws them."""
    import sample
    from train_tiny import VOCABULARY, caption, random_specs
    captions = [caption(s, plain=True) for s in random_specs(8, torch.Generator().manual_seed(1), objects, held_out_only=True)]
    clips = sample.sample(model, sample.encode(captions, VOCABULARY), (16, 32, 32), **sample.steps_for(sampling))
    clips = F.pad(clips, (1, 1, 1, 1), value=0.2).view(2, 4, 3, 16, 34, 34)                  # a thin frame around each
    clips = clips.permute(2, 3, 0, 4, 1, 5).reshape(3, 16, 68, 136)                          # two rows of four
    sample.write_clip(path, sample.to_frames(clips), fps=sampling["fps"], scale=scale, settings={"captions": captions})


def main():
    parser = argparse.ArgumentParser(description="Makes the pictures of the README again.")
    parser.add_argument("--checkpoint", default=str(ROOT / "assets" / "tiny.pt"), help="whose clips hero.gif and emerging.png show")
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="an existing folder (default assets/)")
    args = parser.parse_args()
    if not args.out.is_dir():
        parser.error(f"--out {args.out} is not an existing folder")
    import sample
    model, checkpoint = sample.load_model(args.checkpoint)
    for name, picture in (("scan_orders", scan_orders((4, 4, 4))), ("mamba2_maps", mamba2_maps()), ("lingen_block", lingen_block()),
                          ("tesa_windows", tesa_windows((8, 8, 8), (4, 4, 4), (2, 2, 2))), ("examples", examples())):
        write(picture, args.out / f"{name}.png")
    eight_clips(model, args.out / "hero.gif", checkpoint["sampling"], checkpoint.get("training", {}).get("objects", 1), scale=5)
    with tempfile.TemporaryDirectory() as folder:
        code = sample.main(["a red circle moving right", "--checkpoint", args.checkpoint, "--out", f"{folder}/clip.gif",
                            "--emerge", str(args.out / "emerging.png")])
    if code == 0:
        print(f"wrote six pictures and hero.gif in {args.out}")
    return code


if __name__ == "__main__":
    from benchmarks import common
    common.run(main, "pictures.py")
