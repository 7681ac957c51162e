"""Draws the pictures of the README and of docs/ into assets/.

    python docs/figures.py                                   all of them
    python docs/figures.py tesa_windows --out windows.png    one of them, elsewhere
    python docs/figures.py hero --checkpoint runs/tiny.pt    clips of another checkpoint

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. Where a colour
carries a meaning, so does a shape, a width or a shade, for prints in grey.
"""

import argparse
import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image, ImageDraw, ImageFont

import mamba2_ref
import sample as sampler
import scan
import tesa
from toy import preview, shapes

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK = "#56B4E9", "#CC79A7"
INK, GREY, PALE, WHITE = "#222222", "#BBBBBB", "#EEEEEE", "#FFFFFF"


def tint(colour, share):
    """A colour mixed with white: share 1 is the colour itself, 0 is white."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 + share * (channel - 255)):02X}" for channel in channels)


class Page:
    """A white page, measured in pixels of the finished picture.

    It is drawn three times larger and reduced at the end, so that lines and letters are smooth.
    """

    scale = 3

    def __init__(self, width, height):
        self.image = Image.new("RGB", (self.scale * width, self.scale * height), WHITE)
        self.pen = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(size=14 * self.scale)

    def at(self, *numbers):
        return [self.scale * number for number in numbers]

    def text(self, x, y, words, anchor="la", align="left"):
        spacing = 6 * self.scale
        self.pen.text(self.at(x, y), words, INK, self.font, anchor, spacing=spacing, align=align)

    def line(self, points, colour=INK, width=2.0):
        flat = [number for point in points for number in point]
        self.pen.line(self.at(*flat), colour, round(self.scale * width), joint="curve")

    def arrow(self, *points):
        """A line along the points, with a head at the last one. Its last part is straight."""
        self.line(points)
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        head = [(x + a * dx + c * dy, y + a * dy + c * dx) for a, c in ((0, 0), (-9, 5), (-9, -5))]
        self.polygon(head, INK)

    def polygon(self, corners, fill, outline=None):
        self.pen.polygon([tuple(self.at(x, y)) for x, y in corners], fill, outline, self.scale)

    def box(self, x, y, width, height, fill=None, outline=None, line=1.0, radius=0):
        corners = self.at(x, y, x + width, y + height)
        line = round(line * self.scale)
        self.pen.rounded_rectangle(corners, radius * self.scale, fill, outline, line)

    def label(self, x, y, width, height, words, fill):
        self.box(x, y, width, height, fill, INK, radius=8)
        self.text(x + width / 2, y + height / 2, words, "mm", align="center")

    def dot(self, x, y, radius, fill, outline=None):
        corners = self.at(x - radius, y - radius, x + radius, y + radius)
        self.pen.ellipse(corners, fill, outline, self.scale)

    def plus(self, x, y):
        self.dot(x, y, 9, WHITE, INK)
        self.line([(x - 4.5, y), (x + 4.5, y)], INK, 1.3)
        self.line([(x, y - 4.5), (x, y + 4.5)], INK, 1.3)

    def pixels(self, array, x, y, width, height):
        """Paste a small picture, uint8 (h, w, 3), with its pixels as squares."""
        picture = Image.fromarray(array)
        size = tuple(self.at(width, height))
        self.image.paste(picture.resize(size, Image.Resampling.NEAREST), tuple(self.at(x, y)))

    def png(self):
        out = io.BytesIO()
        self.image.reduce(self.scale).save(out, "PNG", optimize=True)
        return out.getvalue()


# ---------------------------------------------------------------- scan.py


def scan_orders(args):
    """The path of each order through a grid of 4 x 4 x 4 tokens (fig. 4 of the paper)."""
    shape = t, h, w = 4, 4, 4
    frame, along_x, along_y = 108, (20, -9), 36  # one step along t, x and y, on the page
    width, height = 446, 230
    page = Page(2 * width, 3 * height)

    def spot(left, top, f, y, x):
        return left + frame * f + along_x[0] * x, top + 50 + along_x[1] * (x - w + 1) + along_y * y

    def end(x, y, last):
        if last:
            page.box(x - 6, y - 6, 12, 12, RED)
        else:
            page.dot(x, y, 6, GREEN)

    for number, order in enumerate((*scan.SCANS, "zigzag")):
        left, top = width * (number % 2) + 40, height * (number // 2)
        layers = f": layers {number}, {number + 4}, ..." if number < 4 else ": not LinGen's"
        page.text(left - 20, top + 12, order + layers)
        for f in range(t):
            corners = [(-0.5, -0.5), (-0.5, w - 0.5), (h - 0.5, w - 0.5), (h - 0.5, -0.5)]
            sheet = [spot(left, top, f, y, x) for y, x in corners]
            page.polygon(sheet, tint(INK, 0.06), GREY)
        walk = scan.places(order, shape).flatten().argsort()
        walk = torch.stack(torch.unravel_index(walk, shape), 1).tolist()
        pairs = list(zip(walk, walk[1:]))
        far = [sum(abs(i - j) for i, j in zip(a, b)) > 1 for a, b in pairs]
        for jumps in (True, False):  # jumps first, so that steps lie on top
            for (a, b), jump in zip(pairs, far):
                if jump == jumps:
                    ends = [spot(left, top, *a), spot(left, top, *b)]
                    page.line(ends, ORANGE if jump else BLUE, 1 if jump else 2.6)
        for token in walk:
            page.dot(*spot(left, top, *token), 2.6, BLUE)
        end(*spot(left, top, *walk[0]), last=False)
        end(*spot(left, top, *walk[-1]), last=True)
    left, top = width + 40, 2 * height + 40
    page.line([(left, top), (left + 28, top)], BLUE, 2.6)
    page.line([(left, top + 26), (left + 28, top + 26)], ORANGE, 1)
    end(left + 14, top + 52, last=False)
    end(left + 14, top + 78, last=True)
    words = ("step to a neighbour in the grid", "jump", "first token", "last token")
    for row, line in enumerate(words):
        page.text(left + 42, top + 26 * row, line, "lm")
    page.text(left, top + 116, "t: sheet to sheet    y: down    x: along a sheet", "lm")
    return page.png()


# ---------------------------------------------------------------- mamba2_ref.py


def attention_maps(l=48):
    """(L, one direction, both directions): how x becomes y in one head, (l, l) each.

    The maps are read off the scan itself: column j is the response to an impulse at token j.
    """
    generator = torch.Generator().manual_seed(0)
    dt, A = 0.02 + 0.3 * torch.rand(1, l, 1, generator=generator), -torch.ones(1)
    B, C = 0.5 + torch.rand(2, 1, l, 1, 8, generator=generator)
    impulses = torch.eye(l)[None, :, None]  # (1, l, 1, p = l): one impulse per channel
    one = mamba2_ref.ssd_chunked(impulses, dt, A, B, C)[0, :, 0]
    both = mamba2_ref.ssd_bidirectional(impulses, dt, A, B, C)[0, :, 0]
    return mamba2_ref.segment_sums((dt * A)[0, :, 0]).exp(), one, both


def mamba2_maps(args):
    """The decay matrix L of one head, and its maps in one direction and in both (fig. 3)."""
    side, gap = 280, 20
    page = Page(gap + 3 * (side + gap), side + 74)
    titles = ("L: what the state still holds", "one direction: L o C B^T", "both directions")
    blue = torch.tensor([int(BLUE[i : i + 2], 16) for i in (1, 3, 5)])
    for i, (values, title) in enumerate(zip(attention_maps(), titles)):
        left = gap + i * (side + gap)
        shade = (values / values.max()).clamp(0, 1).pow(0.6)[..., None]  # lifts what is faint
        page.text(left, 12, title)
        page.pixels((255 + shade * (blue - 255)).byte().numpy(), left, 38, side, side)
        page.box(left, 38, side, side, outline=INK)
    words = "row: the token that reads    column: the token that is read    blue: large, white: 0"
    page.text(gap, side + 48, words)
    return page.png()


# ---------------------------------------------------------------- tesa.py


def window_colours(number):
    """Numbers of windows (t, h, w) -> colours 0 ... 5 that differ between touching windows."""
    lines = (number[:, 0, 0], number[0, :, 0], number[0, 0, :])
    t, h, w = (line.unique(return_inverse=True)[1] for line in lines)
    return (5 * t[:, None, None] + 2 * h[:, None] + w) % 6


def receptive_field(shape, numbers):
    """After how many layers each token has received something from the middle one: (t, h, w)."""
    reached, layers = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int64)
    reached[tuple(size // 2 for size in shape)] = True
    for number in numbers:
        reached = torch.isin(number, number[reached])
        layers += ~reached
    return layers  # 0: after the first layer


def tesa_windows(args):
    """Windows of even and odd layers, the roll, the mask and the receptive field (fig. 5)."""
    shape, window, shift = (8, 6, 6), (4, 3, 3), (2, 1, 1)
    even, odd = tesa.windows(shape, window, (0, 0, 0)), tesa.windows(shape, window, shift)
    back = [-by for by in shift]
    rolled, colours = odd.roll(back, (0, 1, 2)), window_colours(odd).roll(back, (0, 1, 2))
    cell, left, step, tall = 15, 20, 108, 156
    page = Page(left + 8 * step + 6, 4 * tall + 200)
    palette = [tint(c, 0.5) for c in (BLUE, ORANGE, GREEN, RED, SKY, PINK)]
    blues = [tint(BLUE, share) for share in (1, 0.6, 0.3, 0.12, 0)]

    def border(number, x0, y0, width):
        for y, x in torch.cartesian_prod(*(torch.arange(size) for size in number.shape)).tolist():
            px, py = x0 + cell * x, y0 + cell * y
            if x and number[y, x] != number[y, x - 1]:
                page.line([(px, py), (px, py + cell)], INK, width)
            if y and number[y, x] != number[y - 1, x]:
                page.line([(px, py), (px + cell, py)], INK, width)

    def frames(row, title, fills, thick, thin=None, first=0):
        """One row of eight frames; a thick line between windows, a thin one inside them."""
        page.text(left, 10 + tall * row, title)
        for f in range(shape[0]):
            x0, y0 = left + step * f, 34 + tall * row
            for y in range(shape[1]):
                for x in range(shape[2]):
                    box = x0 + cell * x, y0 + cell * y, cell, cell
                    page.box(*box, fills[f][y][x], WHITE, 0.4)
            if thin is not None:
                border(thin[f], x0, y0, 0.8)
            border(thick[f], x0, y0, 2.2)
            page.box(x0, y0, cell * shape[2], cell * shape[1], outline=INK, line=1.5)
            name = f"t = {(f + first) % shape[0]}"
            page.text(x0 + cell * shape[2] / 2, y0 + cell * shape[1] + 4, name, "ma")

    def paint(colours, palette):
        return [[[palette[c] for c in row] for row in frame] for frame in colours.tolist()]

    frames(0, f"even layer: windows of {window} tokens", paint(window_colours(even), palette), even)
    frames(1, f"odd layer: windows shifted by {shift}", paint(window_colours(odd), palette), odd)
    title = "odd layer as computed: rolled by the shift. The mask separates the parts of a window"
    frames(2, title, paint(colours, palette), even, rolled, first=shift[0])
    field = receptive_field(shape, [even, odd, even, odd])
    title = "received something from the middle token: after 1 layer (darkest), 2, 3, 4"
    frames(3, title, paint(field, blues), torch.zeros(shape))

    mask, top, side = tesa.window_mask(shape, window, shift)[-1], 10 + 4 * tall, 144
    tile = torch.where(mask[..., None], torch.tensor([0, 114, 178]), 255).byte().numpy()
    words = f"mask of the last window of an odd layer: {len(mask)} x {len(mask)} tokens"
    page.text(left, top, words)
    page.pixels(tile, left, top + 28, side, side)
    page.box(left, top + 28, side, side, outline=INK)
    words = (
        "row: the token that asks, column: the token it asks\n"
        "blue: may attend, white: may not\n\n"
        "The last window is cut along each axis. Tokens attend\n"
        "only within one part of it, up to the thin lines above."
    )
    page.text(left + side + 30, top + 30, words)
    return page.png()


# ---------------------------------------------------------------- lingen.py


def lingen_block(args):
    """The block, and MATE inside it (fig. 2)."""
    page = Page(900, 400)
    orange, green = tint(ORANGE, 0.25), tint(GREEN, 0.25)
    page.text(20, 20, "one block", "lm")
    page.arrow((40, 40), (40, 392))
    parts = (
        (46, "norm with scale and shift\nMATE\ngate", tint(BLUE, 0.25)),
        (162, "norm\ncross-attention\nto the caption", PALE),
        (278, "norm with scale and shift\nfeed-forward\ngate", PALE),
    )
    for y, words, fill in parts:
        page.label(70, y, 230, 76, words, fill)
        page.arrow((40, y + 38), (70, y + 38))
        page.line([(300, y + 38), (320, y + 38), (320, y + 96), (40, y + 96)])
        page.plus(40, y + 96)
    x = 380
    page.text(x, 20, "MATE: two branches of linear cost, added", "lm")
    page.text(x, 56, "MA-branch: short to long range", "lm")
    page.label(x, 74, 150, 70, "flatten the grid by\nRotary Major Scan\n(layer mod 4)", orange)
    page.label(x + 175, 74, 150, 70, "review tokens at\nboth ends of\nthe sequence", orange)
    page.label(x + 350, 74, 140, 70, "Mamba2\nin both\ndirections", orange)
    page.arrow((x + 150, 109), (x + 175, 109))
    page.arrow((x + 325, 109), (x + 350, 109))
    page.text(x, 196, "TE-branch: near in space, medium range in time", "lm")
    page.label(x, 214, 150, 70, "cut into windows,\nshifted in every\nsecond layer", green)
    page.label(x + 175, 214, 150, 70, "softmax attention\ninside each window", green)
    page.arrow((x + 150, 249), (x + 175, 249))
    page.arrow((x + 420, 144), (x + 420, 321))
    page.line([(x + 325, 249), (x + 370, 249), (x + 370, 330)])
    page.arrow((x + 370, 330), (x + 411, 330))
    page.plus(x + 420, 330)
    page.text(x + 436, 330, "MATE", "lm")
    return page.png()


# ---------------------------------------------------------------- the toy


def examples(args):
    """Six clips of the toy world, six frames of each, and their captions."""
    clips, captions, _ = shapes.make_batch(6, 16, torch.Generator().manual_seed(3))
    page = Page(760, 6 * 78 + 12)
    for row, (clip, words) in enumerate(zip(clips, captions)):
        top = 10 + 78 * row
        for column, frame in enumerate(sampler.to_frames(clip)[::3]):
            page.pixels(frame, 12 + 80 * column, top, 72, 72)
        page.text(504, top + 36, words, "lm")
    return page.png()


def sample_clips(args, captions, **options):
    model, checkpoint = sampler.load_model(args.checkpoint)
    settings = {**checkpoint["sampling"], "progress": True, **options}
    clips = sampler.sample_captions(model, captions, checkpoint["vocabulary"], settings)
    return [sampler.to_frames(clip) for clip in clips]


def hero(args):
    """Eight sampled clips side by side; training never saw these combinations."""
    specs = shapes.random_specs(64, torch.Generator().manual_seed(2), held_out_only=True)
    captions = list(dict.fromkeys(shapes.caption(spec) for spec in specs))[:8]
    clips = sample_clips(args, captions)
    title = "sampled by the tiny LinGen, by captions of combinations that training never showed"
    return preview.side_by_side(clips, captions, title, scale=7)


def emerging(args):
    """The predicted clean clip at some of the sampler's steps, from noise to data."""
    caption, predicted = "a red circle moving right", []
    look = lambda t, x1: predicted.append((t, x1[0]))
    last = sample_clips(args, [caption], callback=look)[0]
    chosen = [round(i) for i in torch.linspace(0, (len(predicted) - 1) ** 0.5, 8).square().tolist()]
    rows = [(f"step {i}, t = {predicted[i][0]:.3f}", predicted[i][1]) for i in chosen]
    rows = [(label, sampler.to_frames(clip)) for label, clip in rows]
    rows.append(("the clip", last))
    page = Page(140 + 52 * len(last[::2]), 54 * len(rows) + 30)
    page.text(10, 14, "the clean clip as predicted at each step, every second frame", "lm")
    for row, (label, frames) in enumerate(rows):
        top = 28 + 54 * row
        page.text(10, top + 24, label, "lm")
        for column, frame in enumerate(frames[::2]):
            page.pixels(frame, 136 + 52 * column, top, 48, 48)
    return page.png()


def uses(args):
    """What is given (in a frame, or outside a box) and what the sampler makes of it."""
    model, checkpoint = sampler.load_model(args.checkpoint)
    circle, square = "a red circle moving right", "a blue square moving right"
    edit = dict(strength=0.5, guidance=2.0, renoise=1.0)
    frames = torch.arange(28)[:, None, None].expand(-1, 24, 24)
    inside = torch.zeros(24, 24, dtype=torch.bool)
    inside[6:18, 6:18] = True
    rows = [
        ("--image", circle, 16, frames < 1, {}),
        ("--extend", circle, 24, frames < 16, {}),
        ("--extend --before", circle, 24, frames >= 8, {}),
        ("--extend --loop", circle, 28, (frames < 4) | (frames >= 24), {}),
        ("--inpaint --box 6,6,18,18", circle, 16, ~inside.expand(28, -1, -1), {}),
        ("--edit --guidance 2 --renoise 1", square, 16, None, edit),
    ]
    page = Page(220 + 40 * 14, 46 * len(rows) + 30)
    title = "every second frame; outlined frames are given; the outlined box is resampled"
    page.text(10, 14, title, "lm")
    for row, (name, caption, n, given, options) in enumerate(rows):
        known = shapes.render(shapes.parse_caption(circle)[None], torch.tensor([[4.0, 12.0]]), n)
        mask = None if given is None else given[None, :n].float()
        settings = {**checkpoint["sampling"], "frames": n}
        settings |= dict(known=known, mask=mask)
        clips = sampler.sample_captions(
            model, [caption], checkpoint["vocabulary"], settings, **options
        )
        page.text(10, 46 * (row + 1), f"{name}\n{caption}", "lm")
        for column, i in enumerate(range(0, n, 2)):
            x, y = 216 + 40 * column, 46 * row + 28
            page.pixels(sampler.to_frames(clips[0])[i], x, y, 36, 36)
            if given is not None and given[i].any():
                edge = (9, 9, 18, 18) if not given[i].all() else (0, 0, 36, 36)
                page.box(x + edge[0], y + edge[1], *edge[2:], outline=ORANGE, line=1.5)
    return page.png()


def minute(args):
    """A clip of a minute in one picture: each column of pixels is a frame, seen from above."""
    caption = "a red circle moving right"
    clip = sample_clips(args, [caption], frames=1088)[0]
    above = clip.max(1).transpose(1, 0, 2)  # (x, frames, colour)
    page = Page(920, 4 * 84 + 34)
    title = f"{caption}: 68 seconds in one pass; each column is a frame seen from above"
    page.text(10, 14, title, "lm")
    for row in range(4):  # 17 seconds of 16 frames each
        page.text(10, 84 * row + 66, f"{17 * row} s", "lm")
        page.pixels(above[:, 272 * row :][:, :272], 60, 84 * row + 30, 816, 72)
    return page.png()


PICTURES = {
    "scan_orders": scan_orders,
    "mamba2_maps": mamba2_maps,
    "tesa_windows": tesa_windows,
    "lingen_block": lingen_block,
    "examples": examples,
    "hero": hero,
    "emerging": emerging,
    "uses": uses,
    "minute": minute,
}


def main():
    parser = argparse.ArgumentParser(description="Draw the pictures of the README and of docs/.")
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; default: all")
    add("--out", type=Path, help="a file, for one picture; default: assets/")
    add("--checkpoint", default=ROOT / "assets" / "tiny.pt", help="of the clips")
    args = parser.parse_args()
    names = args.names or list(PICTURES)
    if set(names) - set(PICTURES) or args.out and len(names) > 1:
        parser.error(f"expected names of {', '.join(PICTURES)}, and --out with one name only")
    for name in names:
        drawn = PICTURES[name](args)
        path = args.out or ROOT / "assets" / (f"{name}.gif" if name == "hero" else f"{name}.png")
        if name == "hero":
            sampler.write_clip(path, drawn)
        else:
            sampler.replace_file(path, drawn)
        print(f"wrote {path}")


if __name__ == "__main__":
    sampler.run_command("figures.py", main)
