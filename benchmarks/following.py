"""What TESA learns: does a head look where the shape goes?

    python benchmarks/following.py                      the shipped checkpoint, seconds
    python benchmarks/following.py runs/tiny.pt         one that you have trained

Four frames after a token the toy's shapes stand one or two tokens further, whole tokens, along the caption's direction. So a
shape's token has one place in each other moment that shows the very same part of it, noisy in another way: three tokens
of the 256 in the window of a clip of 16 frames. For each head: how much of the attention of the tokens that hold the
shape falls on these three; by chance, 1.2 %. The clips stand at the time when places become certain, train_tiny.SETTLED.
A head that looks along the motion keeps the moments of a clip together: without one, shapes jump where two tokens meet in time.
Where TESA's positions drift as the caption says (`LinGen.drift`), a second table holds each head's drift against the truth.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import sample  # noqa: E402
import tesa  # noqa: E402
import train_tiny  # noqa: E402
from benchmarks import common, pictures  # noqa: E402


TWO = "a red circle moving slowly right and a blue square moving quickly up"


def look(model, clips, text, t):
    """What TESA attends to, a list over layers of (b, heads, 256, 256): rows ask, columns are looked at."""
    maps, attend = [], tesa.attend

    def record(q, k, v, mask=None):
        maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return attend(q, k, v, mask)
    try:
        tesa.attend = record
        with torch.no_grad():
            model(clips, torch.full((len(clips),), t), text)
    finally:
        tesa.attend = attend
    return maps


def on_the_way(steps, grid):
    """Which token shows at another moment what this one shows: steps (b, 2), (x, y) in tokens -> bool (b, m, m)."""
    t, y, x = torch.cartesian_prod(*(torch.arange(size) for size in grid)).T                     # (m,) each
    later, moved = t[None] - t[:, None], steps.long()[:, :, None, None]                           # (m, m), (b, 2, 1, 1)
    right = (x[None] - x[:, None] - later * moved[:, 0]) % grid[2] == 0
    down = (y[None] - y[:, None] - later * moved[:, 1]) % grid[1] == 0
    return right & down & (later != 0)


def measure(model, n, seed):
    """n clips; how much of the attention follows them, per cent (depth, heads); where layers look, as `look` says; which tokens hold a shape (n, 256)."""
    generator, patch = torch.Generator().manual_seed(seed), model.config.patch
    clips, captions, specs = train_tiny.make_batch(n, 16, generator, speeds=True)
    noise, t = torch.randn(clips.shape, generator=generator), torch.sigmoid(torch.tensor(train_tiny.SETTLED)).item()
    maps = look(model, (1 - t) * noise + t * clips, sample.encode(captions, model.vocabulary), t)
    holds = F.max_pool3d(clips.amax(1, keepdim=True), patch, patch)[:, 0] > 0                     # (n, t, h, w)
    along = on_the_way(train_tiny.STEPS[specs[:, 0, 2], specs[:, 0, 3]], holds.shape[1:])         # (n, m, m)
    holds = holds.flatten(1)
    shares = torch.stack([100 * (layer * along[:, None]).sum(-1).mT[holds].mean(0) for layer in maps])
    return clips, shares, maps, holds


def meant(model, caption):
    """How TESA's positions drift by a caption: of each head (y, x), in tokens a step."""
    with torch.no_grad():
        return model.drift(*model.read(sample.encode([caption], model.vocabulary)))[0].tolist()        # (heads, 2)


def draw(clip, seen, asking, patch, scale=4):
    """The middle frames of a clip's tokens, above; below, where the token framed in white looks: seen (256,), brighter for more."""
    t, h, w = (size // p for size, p in zip(clip.shape[1:], patch))
    frames = sample.to_frames(clip)[patch[0] // 2 :: patch[0]].repeat(scale, 1).repeat(scale, 2)   # (t, H, W, 3)
    light = (seen / seen.max()).view(t, h, w).numpy().repeat(scale * patch[1], 1).repeat(scale * patch[2], 2)[..., None]
    below = 0.3 * frames + (255 - 0.3 * frames) * light
    moment, y, x = np.unravel_index(asking, (t, h, w))
    own = below[moment, scale * patch[1] * y :, scale * patch[2] * x :][: scale * patch[1], : scale * patch[2]]
    own[[0, 1, -2, -1]] = own[:, [0, 1, -2, -1]] = 255
    return sample.sheet(np.concatenate([frames, below.astype(np.uint8)]), columns=t, gap=6)


def main():
    parser, args, model = common.of_checkpoint(__doc__, "following", 64, "the picture: where the head that looks along most looks")
    if model.config.mixer != "mate" or not model.config.tesa:
        parser.error(f"{args.checkpoint} is a model without TESA")
    clips, shares, maps, holds = measure(model, args.captions, args.seed)
    table = common.Table(args.out)
    for layer, heads in enumerate(shares.tolist()):
        table.add(layer=layer, **{f"head {i}": f"{share:.1f}" for i, share in enumerate(heads)})
    table.wrote()
    if model.motion is not None:
        print(f"\nwhich drift the words mean, rows and columns of tokens per step of {model.config.patch[0]} frames:")
        say = lambda heads: "heads " + ", ".join(f"({y:5.2f}, {x:5.2f})" for y, x in heads)
        for way, direction in enumerate(train_tiny.DIRECTIONS):
            for fast, speed in enumerate(train_tiny.SPEEDS):
                caption, (x, y) = train_tiny.caption(torch.tensor([[0, 0, way, fast, 0]]), plain=True), train_tiny.STEPS[way, fast].tolist()
                print(f"{speed + ' ' + direction:20} truth ({y:2}, {x:2})   {say(meant(model, caption))}")
        print(f"{TWO}:\n{'':37}{say(meant(model, TWO))}")
    layer, head = divmod(int(shares.argmax()), shares.shape[1])
    shape = holds[0].nonzero()[:, 0]                                                             # the first clip's tokens
    asking = int(shape[len(shape) // 3])
    pictures.save(draw(clips[0], maps[layer][0, head, asking], asking, model.config.patch), args.plot)


if __name__ == "__main__":
    common.run(main, "following.py")
