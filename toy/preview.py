"""Pictures of a training run: clips side by side under their captions, and the loss curve."""

import io
import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from toy import shapes

# All directions and shapes, and each colour.
CAPTIONS = [shapes.caption(torch.tensor([i % 6, i % 4, i])) for i in range(8)]
COLOURS = ("#888888", "#d08020", "#2060c0", "#20a060", "#a02080")


def side_by_side(clips, captions, title, columns=4, scale=4):
    """Clips, uint8 (frames, h, w, 3) each -> one such clip, with a title, and captions below."""
    frames, h, w, _ = clips[0].shape
    h, w, line = h * scale + 2, max(w * scale, 182) + 4, 14
    rows = -(-len(clips) // columns)
    pages = []
    for i in range(frames):
        page = Image.new("RGB", (columns * w, line + rows * (h + line)), "#303030")
        draw = ImageDraw.Draw(page)
        draw.text((4, 1), title, fill="white")
        for j, (clip, words) in enumerate(zip(clips, captions)):
            x, y = j % columns * w, line + j // columns * (h + line)
            picture = Image.fromarray(clip[i]).resize(
                (clip.shape[2] * scale, clip.shape[1] * scale), Image.Resampling.NEAREST
            )
            page.paste(picture, (x + (w - picture.width) // 2, y))
            draw.text((x + 4, y + h - 1), words, fill="white")
        pages.append(np.asarray(page))
    return np.stack(pages)


def loss_curve(losses, title, size=(640, 360)):
    """Losses, (frames, loss, ...) a step -> a PNG as bytes: a smoothed curve for each clip length.

    The loss axis is logarithmic. A point is the mean of neighbouring steps; even a run of few
    steps shows a line.
    """
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    left, top, right, bottom = 50, 24, size[0] - 12, size[1] - 30
    draw.rectangle((left, top, right, bottom), outline="#999999")
    draw.text((left, 6), f"{title}: loss (logarithmic) over steps", fill="black")
    draw.text((right - 40, bottom + 8), str(len(losses)), fill="black")
    draw.text((left, bottom + 8), "0", fill="black")
    curves = {}
    for step, (frames, loss, *_) in enumerate(losses):
        curves.setdefault(frames, []).append((step, math.log10(max(loss, 1e-9))))
    lines = {}
    for frames, points in curves.items():
        width = max(1, len(points) // 100)
        groups = [points[i : i + width] for i in range(0, len(points), width)]
        lines[frames] = [tuple(np.mean(group, axis=0)) for group in groups]
    values = [y for line in lines.values() for _, y in line] or [0.0]
    low, high = min(values) - 0.05, max(values) + 0.05
    for mark in np.linspace(low, high, 5):
        y = bottom - (mark - low) / (high - low) * (bottom - top)
        draw.text((4, y - 6), f"{10**mark:.3f}", fill="black")
    for i, (frames, line) in enumerate(sorted(lines.items())):
        colour = COLOURS[i % len(COLOURS)]
        scaled = [
            (
                left + x / max(1, len(losses) - 1) * (right - left),
                bottom - (y - low) / (high - low) * (bottom - top),
            )
            for x, y in line
        ]
        if len(scaled) == 1:
            draw.circle(scaled[0], 3, fill=colour)
        draw.line(scaled, fill=colour, width=2)
        draw.text((right - 90, top + 6 + 14 * i), f"{frames} frames", fill=colour)
    out = io.BytesIO()
    page.save(out, "PNG")
    return out.getvalue()
