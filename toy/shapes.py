"""The toy world: one flat shape that moves over a black torus, and its caption.

    "a red circle moving up-left"       6 colours x 4 shapes x 8 directions

What leaves on the right comes back on the left, so a motion can go on for ever. All shapes move
one pixel a frame along each axis of their direction. A tenth of the combinations is held out.

A *spec* is int64 (b, 3): the indices of colour, shape and direction, or -1 for one that the caption
leaves out. Places and steps are (x, y) in pixels, y pointing down. Clips are (b, 3, frames, h, w).
"""

import math

import torch

SIZE = 24  # pixels, the width and the height of the world
RADIUS = 5.0  # pixels, about half of what a shape spans

COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "magenta": (1, 0, 1),
    "cyan": (0, 1, 1),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-right": (1, -1),
    "up-left": (-1, -1),
    "down-right": (1, 1),
    "down-left": (-1, 1),
}
# The words that a model of this world knows, by kind. "shape" stands for a shape left open.
WORDS = {
    "colour": list(COLOURS),
    "shape": [*SHAPES, "shape"],
    "direction": list(DIRECTIONS),
    "other": ["a", "moving"],
}
RGB = torch.tensor(list(COLOURS.values()), dtype=torch.float32)  # (6, 3)
STEPS = torch.tensor(list(DIRECTIONS.values()))  # (8, 2)


def held_out(specs):
    """Which full specs are kept from training: (..., 3) -> bool (...).

    19 of the 192 combinations. Where all four shapes are trained, every pair (red circle, red going
    left, circle going left) occurs; in a held-out caption only the combination of three is new.
    """
    colour, shape, direction = specs.unbind(-1)
    return (colour + 2 * shape + 3 * direction) % 10 == 4


def random_specs(n, generator, held_out_only=False, n_shapes=4):
    """Draw n full specs (n, 3): from the held-out combinations, or from all the others.

    n_shapes: the first so many of SHAPES; 1 leaves circles.
    """
    every = torch.cartesian_prod(*(torch.arange(size) for size in (6, n_shapes, 8)))
    allowed = every[held_out(every) == held_out_only]
    return allowed[torch.randint(len(allowed), (n,), generator=generator)]


def caption(spec, still=False):
    """Spec (3,) -> its caption; a still picture has no words of motion."""
    colour, shape, direction = spec.tolist()
    words = ["a"]
    if colour >= 0:
        words.append(list(COLOURS)[colour])
    words.append(SHAPES[shape] if shape >= 0 else "shape")
    if direction >= 0 and not still:
        words += ["moving", list(DIRECTIONS)[direction]]
    return " ".join(words)


def parse_caption(text):
    """The spec (3,) of a caption; -1 for what it does not name."""
    spec = [-1, -1, -1]
    for word in text.lower().split():
        for i, names in enumerate((list(COLOURS), SHAPES, list(DIRECTIONS))):
            if word in names:
                spec[i] = names.index(word)
    return torch.tensor(spec)


def wrap(offset, size=SIZE):
    """The shortest way around the torus: offsets brought into [-size/2, size/2)."""
    return (offset + size / 2) % size - size / 2


def draw_shapes(centre, size=SIZE):
    """All four shapes at each centre: (n, 2) -> coverage (n, 4, size, size) in [0, 1].

    Coverage falls from 1 to 0 over one pixel across the outline, by the signed distance to it. So
    edges are smooth, and a centre need not be a whole pixel. The factors make areas comparable.
    """
    axis = torch.arange(size)
    x = wrap(axis - centre[:, :1], size)[:, None, :]  # (n, 1, w)
    y = wrap(axis - centre[:, 1:], size)[:, :, None]  # (n, h, 1)
    ax, ay = x.abs(), y.abs()
    circle = (x * x + y * y).sqrt() - RADIUS
    square = torch.maximum(ax, ay) - 0.95 * RADIUS
    triangle = torch.maximum(y, math.sqrt(0.75) * ax - y / 2) - 0.7 * RADIUS
    upright = torch.maximum(ax - 0.4 * RADIUS, ay - 1.2 * RADIUS)
    across = torch.maximum(ax - 1.2 * RADIUS, ay - 0.4 * RADIUS)
    cross = torch.minimum(upright, across)
    distance = torch.stack([circle.expand_as(cross), square, triangle, cross], 1)
    return (0.5 - distance).clamp(0, 1)


def move(clips, direction, sign=1):
    """Move frame f of clips (b, c, frames, h, w) by sign * f steps of its direction (b,)."""
    b, _, frames, height, width = clips.shape
    clip, frame = torch.arange(b).view(-1, 1, 1, 1), torch.arange(frames).view(1, -1, 1, 1)
    x, y = (sign * frame * STEPS[direction][:, None, None]).split(1, 3)  # (b, frames, 1, 1) each
    rows = (torch.arange(height)[:, None] - y) % height  # (b, frames, h, 1)
    columns = (torch.arange(width) - x) % width  # (b, frames, 1, w)
    return clips[clip, :, frame, rows, columns].movedim(4, 1)


def render(specs, starts, frames, size=SIZE):
    """Draw clips: full specs (b, 3), starts (b, 2) -> (b, 3, frames, size, size) in [-1, 1]."""
    b = len(specs)
    colour, shape, direction = specs.unbind(-1)
    first = draw_shapes(starts, size)[torch.arange(b), shape]  # (b, h, w)
    # Steps are whole pixels, so every later frame is the first one rolled.
    cover = move(first[:, None, None].expand(-1, -1, frames, -1, -1), direction)
    return 2 * RGB[colour].view(b, 3, 1, 1, 1) * cover - 1


def make_batch(n, frames, generator, size=SIZE, n_shapes=4):
    """n clips with captions: float32 (n, 3, frames, size, size), list of n str, specs (n, 3).

    One frame is a still picture. All randomness comes from the (CPU) generator.
    """
    specs = random_specs(n, generator, n_shapes=n_shapes)
    starts = size * torch.rand(n, 2, generator=generator)
    clips = render(specs, starts, frames, size)
    return clips, [caption(spec, still=frames == 1) for spec in specs], specs
