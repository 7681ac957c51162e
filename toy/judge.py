"""The judge of the toy world: reads a clip back from its pixels, without a network.

Each frame is compared with every shape at every place; the fit of least squared error counts. A
clip is right if every frame fits its caption closely, shows nothing else, and moves by its step.
"""

import torch
import torch.nn.functional as F

from toy.shapes import RGB, STEPS, draw_shapes, wrap

OVERLAP = 0.85  # least intersection over union with the ideal shape
FOUND = 0.5  # below this overlap a frame shows no shape at all
JUMP = 0.5  # pixels that a step may be off by
STRAY = 0.1  # brightness (0 black, 1 full) that may stand beside the shape, mean of 3x3 pixels
HOLE = 0.2  # coverage that may be missing inside the shape, mean of 3x3 pixels


def soft(brightness):
    """Below 0.1 counts as black and above 0.9 as full: a network's black is never quite black."""
    return ((brightness - 0.1) / 0.8).clamp(0, 1)


def pad(x):
    """One more pixel on each side of the torus: (n, h, w) -> (n, 1, h + 2, w + 2)."""
    return F.pad(x[:, None], (1, 1, 1, 1), mode="circular")


def draw(centre, shape, height, width):
    """One shape at each centre, on a torus that need not be square: (n, 2), (n,) -> (n, h, w)."""
    each = torch.arange(len(centre))
    side = max(height, width)
    whole = centre.floor()
    # Draw in the middle of a square, then read each pixel at its offset from the centre.
    square = draw_shapes(centre - whole + side // 2, side)[each, shape]  # (n, side, side)
    columns = wrap(torch.arange(width) - whole[:, :1], width).long() + side // 2  # (n, w)
    rows = wrap(torch.arange(height) - whole[:, 1:], height).long() + side // 2  # (n, h)
    return square[each[:, None, None], rows[:, :, None], columns[:, None]]


def fit(cover):
    """The shape and place of least squared error: (n, h, w) -> shape (n,), centre (n, 2), ideal.

    |cover - ideal|^2 = |cover|^2 + |ideal|^2 - 2 correlation. The FFT gives the correlation at all
    whole pixels at once, with templates of each shape at each half pixel.
    """
    _, height, width = cover.shape
    half = torch.tensor([0.0, 0.5])
    index = torch.cartesian_prod(torch.arange(4.0), half, half)  # (16, 3): shape, x, y
    templates = draw(index[:, 1:], index[:, 0].long(), height, width)
    spectrum = torch.fft.rfft2(cover)[:, None] * torch.fft.rfft2(templates).conj()
    error = templates.square().sum((1, 2), True) - 2 * torch.fft.irfft2(spectrum, (height, width))
    best, y, x = torch.unravel_index(error.flatten(1).argmin(1), error.shape[1:])
    shape = index[best, 0].long()
    centre = torch.stack([x, y], 1) + index[best, 1:]
    for _ in range(3):  # damped Gauss-Newton
        ideal = draw(centre, shape, height, width)
        slope = torch.stack([ideal.roll(1, axis) - ideal.roll(-1, axis) for axis in (2, 1)], 1)
        slope = slope.flatten(2) / 2  # (n, 2, h * w): by the centre's x and y
        square = slope @ slope.mT + 1e-3 * torch.eye(2)
        step = torch.linalg.solve(square, slope @ (cover - ideal).flatten(1)[..., None])
        centre = centre + step[..., 0].clamp(-0.25, 0.25)
    return shape, centre, draw(centre, shape, height, width)


def read_frames(frames):
    """What frames (n, 3, h, w) show: colour, shape, centre, overlap, and if it is one object."""
    rgb = ((frames.nan_to_num(-1, -1, -1) + 1) / 2).clamp(0, 1)
    # A pixel has a colour as far as its channels are on and the others off. White has none.
    covers = [(rgb[:, on].amin(1) - rgb[:, ~on].amax(1)).clamp(min=0) for on in RGB.bool()]
    covers = torch.stack(covers, 1)  # (n, 6, h, w)
    colour = covers.square().sum((2, 3)).argmax(1)
    cover = covers[torch.arange(len(frames)), colour]
    shape, centre, ideal = fit(cover)
    light = rgb.amax(1)
    both = torch.minimum(soft(ideal), soft(cover)).sum((1, 2))
    overlap = both / torch.maximum(soft(ideal), soft(light)).sum((1, 2))
    overlap = overlap * frames.isfinite().flatten(1).all(1)
    found = overlap >= FOUND
    # A pixel on either side of the outline is left out here: that is what the overlap judges.
    beside = (light - F.max_pool2d(pad(ideal), 3, 1)[:, 0]).clamp(min=0)
    missing = (1 - F.max_pool2d(pad(1 - ideal), 3, 1)[:, 0] - soft(cover)).clamp(min=0)
    stray = F.avg_pool2d(pad(beside), 3, 1).amax((1, 2, 3))
    hole = F.avg_pool2d(pad(missing), 3, 1).amax((1, 2, 3))
    one = found & (stray <= STRAY) & (hole <= HOLE)
    return colour.where(found, -1), shape.where(found, -1), centre, overlap, one


@torch.no_grad()
def judge(clips, specs):
    """Hold clips (b, 3, frames, h, w) in [-1, 1] against specs (b, 3): a dict of (b,) tensors.

    colour, shape     bool: right in every frame; where the spec has -1, the same in every frame
    direction         bool: the mean step is that of the spec; -1: that of any of the eight
    one_object        bool: in every frame one whole shape and nothing else
    overlap           least over the frames: soft intersection over union with the ideal shape
    jump              pixels: the most that a step differs from the step of the direction
    lenient, strict   bool: all of the first four; also overlap >= 0.85 and jump <= 0.5
    right             (b, frames): this frame and the step that leads to it are right
    centre            (b, frames, 2) pixels, NaN where no shape was found
    start             (b, 2): the centre in frame 0

    In a single frame any direction is right. Where no shape is found, everything is wrong.
    """
    b, _, frames, height, width = clips.shape
    specs = specs.cpu()
    flat = clips.float().cpu().transpose(1, 2).flatten(0, 1)
    pieces = [read_frames(piece) for piece in flat.split(max(1, 2**17 // (height * width)))]
    pieces = [torch.cat(piece).unflatten(0, (b, frames)) for piece in zip(*pieces, strict=True)]
    colours, shapes, centre, overlap, one = pieces  # (b, frames), centre (b, frames, 2)
    found = shapes >= 0
    colour = found & (colours == specs[:, :1].where(specs[:, :1] >= 0, colours[:, :1]))
    shape = found & (shapes == specs[:, 1:2].where(specs[:, 1:2] >= 0, shapes[:, :1]))

    size = torch.tensor([width, height])
    steps = wrap(centre.diff(dim=1), size)  # (b, frames - 1, 2)
    pace = steps.sum(1) / max(1, frames - 1)
    far, nearest = (pace[:, None] - STEPS).norm(dim=2).min(1)
    told = specs[:, 2].where(specs[:, 2] >= 0, nearest)
    direction = found & ((nearest == told) & (far <= JUMP) | (frames == 1))[:, None]
    jump = wrap(steps - STEPS[told][:, None], size).norm(dim=2)
    jump = F.pad(jump, (1, 0)).where(found, float(max(height, width)))  # no step leads to frame 0
    right = colour & shape & one & (overlap >= OVERLAP) & (jump <= JUMP)
    checks = {"colour": colour, "shape": shape, "direction": direction, "one_object": one}
    verdict = {name: check.all(1) for name, check in checks.items()}
    verdict["lenient"] = torch.stack(list(verdict.values())).all(0)
    verdict["strict"] = verdict["lenient"] & right.all(1)
    worst = {"overlap": overlap.amin(1), "jump": jump.amax(1)}
    centre = centre % size
    places = {"centre": centre.where(found[..., None], torch.nan), "start": centre[:, 0]}
    return verdict | worst | {"right": right} | places


def seconds(verdict, fps=16):
    """Which seconds are right in every frame: bool (b, seconds)."""
    return torch.stack([second.all(1) for second in verdict["right"].split(fps, 1)], 1)


def interval(right, n):
    """Wilson's 95 % interval of a share, right of n: (low, high)."""
    share = right / n
    part = 1.96**2 / n
    middle = share + part / 2
    width = (part * share * (1 - share) + part**2 / 4) ** 0.5
    return max(0.0, (middle - width) / (1 + part)), min(1.0, (middle + width) / (1 + part))


def summary(verdict):
    """Means over the clips, the interval of the strict share, the share of seconds right."""
    keys = [key for key in verdict if verdict[key].dim() == 1]
    result = {key: verdict[key].double().mean().item() for key in keys}
    low, high = interval(int(verdict["strict"].sum()), len(verdict["strict"]))
    return result | {"low": low, "high": high, "seconds": seconds(verdict).double().mean().item()}


def report(verdict):
    """A verdict as one line of text: shares right, overlap, jump."""
    mean = summary(verdict)
    keys = ("strict", "lenient", "colour", "shape", "direction", "one_object")
    parts = [f"{key} {100 * mean[key]:.1f}" for key in keys]
    within = f"({100 * mean['low']:.0f} to {100 * mean['high']:.0f})"
    return f"% right of {len(verdict['strict'])}: {', '.join(parts)}; strict {within}; " + (
        f"overlap {mean['overlap']:.3f}, jump {verdict['jump'].median():.2f} px"
    )
