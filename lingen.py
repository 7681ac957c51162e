"""LinGen: a video diffusion transformer whose cost grows linearly with the number of pixels.

What this file teaches (LinGen, CVPR 2025, figs. 2 to 5): a DiT block in which self-attention is replaced by
MATE, two linear-cost branches on the same tokens, their outputs added:

    MA-branch   a bidirectional Mamba2 over the flattened grid: short to long range. Its order turns from layer to
                layer (Rotary Major Scan, scan.py), and pooled *review tokens* show it the whole clip beforehand.
    TE-branch   TEmporal Swin Attention in small windows (tesa.py): what a one-dimensional scan tears apart.

    clip (b, c, T, H, W) -> patches -> tokens (b, t, h, w, d) -> depth x block -> patches -> clip

    block:   x = x + gate * MATE(modulated norm(x))
             x = x + cross-attention(norm(x), caption)
             x = x + gate * feed-forward(modulated norm(x))
             The timestep and the caption's mean word give scale and shift of the two modulated norms, and the gates.

    b batch   c channels   t, h, w the grid of tokens   d width d_model   l = t h w length   n words in the caption
    t, as an argument (b,): the time of the flow, 0 noise, 1 data
    (in the attentions' patterns n is the heads, p the width of one, and l words or tokens)

Read in this order: `review_tokens`, `MATE`, `Block`, `LinGen`. `LinGenConfig` can take each part out, or put full
self-attention in the place of MATE: with mixer="attention" the same file is the DiT that the paper compares with.
"""
import argparse
import dataclasses
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from mamba2_ref import BACKENDS, BidirectionalMamba2, Mamba2
from scan import SCANS, to_grid, to_sequence
from tesa import TemporalSwinAttention, attend


MOST = 2**17        # of anything: far more than any model has, and a slip of the finger is refused before memory is asked for


@dataclasses.dataclass(frozen=True)
class LinGenConfig:
    """Everything that makes one LinGen differ from another. Sizes in time, height and width are (t, h, w) tuples.

    Raises ValueError at once for a combination that cannot be built.
    """

    # The clip and its caption
    channels: int = 3
    patch: tuple = (4, 4, 4)            # pixels (or latents) of one token
    grid: tuple = (4, 8, 8)             # entries of the position tables, in tokens; 0: this axis has no table
    vocab_size: int = 0                 # captions are word numbers 1 ... vocab_size; 0: they are embeddings instead
    text_dim: int = 0                   # width of those embeddings
    text_length: int = 64               # words at most
    predicts: str = "clean"             # the clip behind the noise ("clean"; "pixels" if bounded), or "velocity" = data - noise
    # The transformer
    d_model: int = 128
    depth: int = 4
    nheads: int = 4                     # of all softmax attention: windows, caption, and full
    mlp_ratio: float = 4.0
    # MATE and its parts; the paper argues by taking them out one at a time (table 2, figs. 11 and 12)
    mixer: str = "mate"                 # or "attention": full self-attention, the DiT
    ma: bool = True                     # the MA-branch
    tesa: bool = True                   # the TE-branch
    review: bool = True                 # review tokens
    scan: str = "rotary"                # the order turns with the layer; or one name of scan.SCANS, or "zigzag"
    pool: tuple = (2, 4, 4)             # tokens under one review token
    window: tuple = (4, 4, 4)           # tokens of one TESA window
    torus: bool = False                 # rows and columns go around, as in the toy world: so do TESA's positions, where a window covers the axis
    travel: bool = False                # TESA's positions drift as the caption says: see `LinGen.drift`
    # Mamba2
    d_state: int = 32
    headdim: int = 32
    expand: float = 1.0
    ngroups: int = 1
    d_conv: int = 4
    chunk_size: int = 32
    backend: str = "auto"               # "torch", "mamba_ssm" or "auto": see mamba2_ref.choose_backend

    def __post_init__(self):
        check_config(self)      # at the end of this file

    def order(self, layer):
        """The scan order of a layer: Rotary Major Scan takes l mod 4 (fig. 4)."""
        return SCANS[layer % 4] if self.scan == "rotary" else self.scan

    def shift(self, layer):
        """TESA's shift: half a window in every second layer (fig. 5)."""
        return tuple(size // 2 for size in self.window) if layer % 2 else (0, 0, 0)


PRESETS = {
    # Trains on a laptop's CPU: see train_tiny.py. No position tables: the scan and the windows know who is next to whom,
    # what is true of one moment and one place of the toy world, a torus, is true of all, and a clip may then be as long
    # as one likes. The window holds a whole clip of 16 frames: only in longer ones do windows and shifts appear. Full
    # attention knows no neighbours: with mixer="attention" give it tables, as grid=(16, 8, 8).
    "tiny": dict(grid=(0, 0, 0), window=(4, 8, 8), torus=True, travel=True, predicts="pixels"),
    # For one consumer GPU.
    "small": dict(channels=16, patch=(1, 2, 2), grid=(34, 16, 16), d_model=768, depth=16, nheads=12, d_state=64, headdim=64,
                  expand=2.0, text_dim=1024, text_length=256, window=(8, 4, 4), pool=(4, 4, 4), predicts="velocity", chunk_size=64),
    # The size of the paper's model. Its exact widths are not published; these give 4 billion parameters.
    "4b": dict(channels=16, patch=(1, 2, 2), grid=(34, 16, 16), d_model=2304, depth=28, nheads=18, d_state=128, headdim=64,
               expand=2.0, text_dim=4096, text_length=256, window=(8, 4, 4), pool=(4, 4, 4), predicts="velocity", chunk_size=128),
}


def preset(name, **changes):
    """The LinGenConfig of a preset, with some fields changed: preset("tiny", vocab_size=50, mixer="attention")."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
    return LinGenConfig(**{**PRESETS[name], **changes})


# --- MATE ------------------------------------------------------------------------------------------------------


def review_tokens(grid, pool):
    """Average-pooled copies of the tokens, the overview that is read before the scan proper. No parameters.

    grid (b, t, h, w, d), pool (t, h, w) or one number -> (b, ceil(t / pool_t), ceil(h / pool_h), ceil(w / pool_w), d).
    A block that the grid's edge cuts is averaged over the tokens it has. Raises ValueError for what is no grid or no pool.
    """
    pool = (pool,) * 3 if isinstance(pool, int) else tuple(pool)
    if not isinstance(grid, torch.Tensor) or grid.dim() != 5 or 0 in grid.shape or not grid.is_floating_point():
        raise ValueError(f"expected a grid (b, t, h, w, d) of floating-point numbers, got {_what(grid)}")
    if len(pool) != 3 or any(not isinstance(p, int) or p < 1 for p in pool):
        raise ValueError(f"expected a pool of three whole numbers of at least 1, got {pool!r:.60}")
    pool = tuple(min(size, p) for size, p in zip(grid.shape[1:4], pool))
    if any(size % p for size, p in zip(grid.shape[1:4], pool)):
        pooled = F.avg_pool3d(grid.permute(0, 4, 1, 2, 3), pool, ceil_mode=True, count_include_pad=False)
        return pooled.permute(0, 2, 3, 4, 1)
    b, t, h, w, d = grid.shape
    return grid.reshape(b, t // pool[0], pool[0], h // pool[1], pool[1], w // pool[2], pool[2], d).mean((2, 4, 6))


class MATE(nn.Module):
    """MA-branch plus TE-branch (fig. 2): grid (b, t, h, w, d) -> (b, t, h, w, d). drift: of TESA's positions, (b, nheads, 2).

    Review tokens stand at *both* ends of the sequence. The scan from the left reads the front ones before the first
    real token, the scan from the right the rear ones; the others it reads last, when they do no harm and are dropped.
    """

    def __init__(self, config, layer=0):
        super().__init__()
        self.order, self.pool = config.order(layer), config.pool if config.review else None
        self.ma = self.tesa = None
        if config.ma:
            self.ma = BidirectionalMamba2(config.d_model, config.d_state, config.d_conv, config.expand, config.headdim,
                                          config.ngroups, chunk_size=config.chunk_size, backend=config.backend)
        if config.tesa:
            self.tesa = TemporalSwinAttention(config.d_model, config.nheads, config.window, config.shift(layer), config.torus, config.travel)

    def forward(self, grid, drift=None):
        out = 0 if self.tesa is None else self.tesa(grid, drift)
        if self.ma is None:
            return out
        tokens = to_sequence(grid, self.order)                                  # (b, l, d)
        first, shape = 0, grid.shape[1:4]
        if self.pool is not None:
            review = to_sequence(review_tokens(grid, self.pool), self.order)    # (b, l', d), in the order of the scan
            tokens = torch.cat([review, tokens, review], 1)                     # (b, l' + l + l', d)
            first = review.shape[1]
        tokens = self.ma(tokens)[:, first : first + math.prod(shape)]
        return out + to_grid(tokens, self.order, shape)


class FullAttention(nn.Module):
    """Softmax attention of every token to every token, the DiT's mixer, which MATE replaces: O(l^2)."""

    def __init__(self, d_model, nheads):
        super().__init__()
        self.nheads = nheads
        self.qkv, self.proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, grid, drift=None):    # which only TESA heeds
        q, k, v = rearrange(self.qkv(grid), "b t h w (three n p) -> three b n (t h w) p", three=3, n=self.nheads)
        out = rearrange(attend(q, k, v), "b n l p -> b l (n p)")
        return self.proj(out).view(grid.shape)


# --- The block ---------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Every token asks the words of the caption: x (b, l, d), text (b, n, d), mask (b, n), True where a word stands."""

    def __init__(self, d_model, nheads):
        super().__init__()
        self.nheads = nheads
        self.q, self.kv, self.proj = nn.Linear(d_model, d_model), nn.Linear(d_model, 2 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x, text, mask):
        q = rearrange(self.q(x), "b l (n p) -> b n l p", n=self.nheads)
        k, v = rearrange(self.kv(text), "b l (two n p) -> two b n l p", two=2, n=self.nheads)
        out = attend(q, k, v, mask[:, None, None, :])
        return self.proj(rearrange(out, "b n l p -> b l (n p)"))


def modulate(x, scale, shift):
    """Layer norm without weights of its own; scale and shift (b, d), made from timestep and caption, take their place."""
    x = F.layer_norm(x, x.shape[-1:])
    spread = (-1,) + (1,) * (x.dim() - 2) + x.shape[-1:]
    return torch.addcmul(shift.view(spread), x, 1 + scale.view(spread))


class Block(nn.Module):
    """One block of the transformer: MATE (or full attention), the caption, the feed-forward. See the file's header."""

    def __init__(self, config, layer):
        super().__init__()
        d = config.d_model
        self.mixer = MATE(config, layer) if config.mixer == "mate" else FullAttention(d, config.nheads)
        self.cross = CrossAttention(d, config.nheads)
        hidden = int(config.mlp_ratio * d)
        self.mlp = nn.Sequential(nn.Linear(d, hidden), nn.GELU("tanh"), nn.Linear(hidden, d))
        # Both gates begin at 0: at first a block only adds what the caption says, and a deep stack starts as a shallow one.
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, x, condition, text, mask, drift=None):
        b, t, h, w, d = x.shape
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition).chunk(6, -1)      # (b, d) each
        x = torch.addcmul(x, gate1.view(b, 1, 1, 1, d), self.mixer(modulate(x, scale1, shift1), drift))
        x = x.view(b, t * h * w, d)
        x = x + self.cross(F.layer_norm(x, (d,)), text, mask)
        x = torch.addcmul(x, gate2.view(b, 1, d), self.mlp(modulate(x, scale2, shift2)))
        return x.view(b, t, h, w, d)


# --- The whole denoiser ----------------------------------------------------------------------------------------


class LinGen(nn.Module):
    """The denoiser: a noisy clip, its time and its caption -> the clean clip or the velocity (config.predicts)."""

    def __init__(self, config):
        super().__init__()
        if not isinstance(config, LinGenConfig):
            raise TypeError(f"LinGen takes a LinGenConfig, got {type(config).__name__}; see lingen.preset")
        self.config, d = config, config.d_model
        per_patch = config.channels * math.prod(config.patch)
        self.patch_in = nn.Linear(per_patch, d)
        # One learnable table per axis, added (factorised positions, as in Movie Gen).
        self.positions = nn.ParameterList(nn.Parameter(0.02 * torch.randn(size, d)) for size in config.grid)
        self.time = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.nothing = nn.Parameter(0.02 * torch.randn(d))      # stands before every caption, and alone for an empty one
        if config.vocab_size:
            # Choice: the toy's captions are read by one layer of our own; a large model takes the embeddings of a frozen text
            # encoder instead. Which colour goes with which motion is a matter of nearness: Mamba2, whose state fades from
            # word to word, weighs near words more, and needs no table of places.
            self.words = nn.Embedding(config.vocab_size + 1, d, padding_idx=0)
            self.reader = Mamba2(d, config.d_state, config.d_conv, config.expand, config.headdim, config.ngroups,
                                 chunk_size=config.chunk_size, backend=config.backend)
            self.reader_mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU("tanh"), nn.Linear(2 * d, d))
        else:
            self.words = nn.Linear(config.text_dim, d)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))
        self.patch_out = nn.Linear(d, per_patch)
        self.motion = nn.Linear(d, 3 * config.nheads) if config.travel and config.tesa and config.mixer == "mate" else None
        for layer in (self.modulation[1], self.patch_out, self.motion):     # at first the network says 0 of every clip, and nothing moves
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, clip, t, text):
        """Args:
            clip (b, channels, frames, height, width), floating point: data at t = 1, noise at t = 0, and
                (1 - t) noise + t data between. frames: a multiple of the patch, or 1 (a still image).
            t (b,): the time of each clip, in [0, 1].
            text: word numbers (b, n), integer, 0 behind the last word (all 0: the empty caption of guidance); or,
                with config.text_dim, embeddings (b, n, text_dim).
        Returns a clip-shaped tensor: the clean clip ("clean", or within [-1, 1] "pixels") or the velocity, as
        config.predicts says.
        Raises ValueError where something does not fit.
        """
        check_inputs(self, clip, t, text)
        still = clip.shape[2] == 1 and self.config.patch[0] > 1
        if still:                                               # an image fills its patch as a clip that stands still
            clip = clip.expand(-1, -1, self.config.patch[0], -1, -1)
        pt, ph, pw = self.config.patch
        x = self.patch_in(rearrange(clip, "b c (t pt) (h ph) (w pw) -> b t h w (pt ph pw c)", pt=pt, ph=ph, pw=pw))
        for axis, table in enumerate(self.positions, 1):
            if len(table):                                      # no entries: this axis has no table, see the preset "tiny"
                x = x + position_table(table, x.shape[axis]).view([-1 if k == axis else 1 for k in range(4)] + [x.shape[-1]])
        text, mask = self.read(text)                            # (b, 1 + n, d), (b, 1 + n)
        # Choice: the mean of the caption's words joins the timestep's embedding. Movie Gen gives the caption by
        # cross-attention only; with the mean, what holds for the whole clip (its colour) is learnt much sooner.
        condition = self.time(time_embedding(t).to(x.dtype)) + (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (b, d)
        drift = None if self.motion is None else self.drift(text, mask)
        for block in self.blocks:
            x = block(x, condition, text, mask, drift)
        x = self.patch_out(modulate(x, *self.modulation(condition).chunk(2, -1)))
        out = rearrange(x, "b t h w (pt ph pw c) -> b c (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw)
        if still:
            out, clip = out.mean(2, keepdim=True), clip[:, :, :1]
        return pixels(out, clip, t) if self.config.predicts == "pixels" else out

    def read(self, text):
        """Caption -> its words (b, 1 + n, d), the learnt "nothing" first, and the mask (b, 1 + n) of those that stand."""
        words = self.words(text)                                                                            # (b, n, d)
        mask = text > 0 if self.config.vocab_size else text.new_ones(text.shape[:2], dtype=torch.bool)
        words = torch.cat([self.nothing.expand(len(text), 1, -1), words], 1)
        mask = F.pad(mask, (1, 0), value=True)
        if self.config.vocab_size:                              # causal: the padding behind a caption cannot change its words
            words = words + self.reader(F.layer_norm(words, words.shape[-1:]))
            words = words + self.reader_mlp(F.layer_norm(words, words.shape[-1:]))
        return words, mask

    def drift(self, text, mask):
        """How TESA's positions drift, by the caption: words (b, 1 + n, d), mask (b, 1 + n) -> (b, nheads, 2).

        Choice. Every word says how much it should be heard and which drift it means, in tokens along h and w per step along t,
        once for each head; softmax makes one drift of them. All layers share it, so that all learn it together: with
        "moving left" the heads follow whatever moves left, and of two objects each can have heads of its own.
        """
        heard, meant = self.motion(F.layer_norm(text, text.shape[-1:])).unflatten(-1, (-1, 3)).split([1, 2], -1)    # (b, 1 + n, heads, 1), (b, 1 + n, heads, 2)
        return (heard.masked_fill(~mask[..., None, None], -math.inf).softmax(1) * meant).sum(1)


def pixels(out, clip, t):
    """The clean clip of pixels between -1 and 1: what the network says of each, and, when little noise is left, the pixel itself.

    out and clip x (b, c, frames, h, w), t (b,) -> tanh(out + atanh(0.97 k x)), like out.

    Choice. tanh makes flat colours flat. At t = 1 the noisy pixel is the clean one, and the network need not copy it: it
    answers 0, and tanh(atanh(0.97 x)) is nearly x. Earlier the pixel is one of two witnesses: a soft edge's brightness
    follows from the shape's place, which all pixels of all frames tell far better than the one noisy pixel. So a pixel is
    trusted by Wiener's rule, which weighs two witnesses by their certainty: k = e^2 / (s^2 + e^2), s = (1 - t) / t the noise of x / t, e = 0.1 the error of the network, so that at
    t = 0.9 both count about the same. (x and not x / t is weighed: near t = 1, where k counts, they are nearly the same.
    0.97 and the clamp keep atanh finite, also where noise takes x beyond 1.)
    """
    at = t.view(-1, 1, 1, 1, 1).to(out.dtype)
    error = (0.1 * at) ** 2                                     # e^2, and below s^2, both times t^2: t may be 0
    own = 0.97 * error / ((1 - at) ** 2 + error) * clip
    return torch.tanh(out + torch.atanh(own.clamp(-0.98, 0.98)))


def position_table(table, size):
    """Read a table (entries, d) at another size. Choice: a shorter grid reads the first entries; a longer one stretches
    the whole table over itself, so that all places move (the paper reads tables by interpolation)."""
    if size <= len(table):
        return table[:size]
    return F.interpolate(table.mT[None], size=size, mode="linear", align_corners=True)[0].mT


def time_embedding(t):
    """t (b,) in [0, 1] -> (b, 256): sines and cosines of wavelengths from 2 pi / 1000 to about 60."""
    frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device, dtype=torch.float32))
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


# --- Errors that say what came in and what was expected ---------------------------------------------------------


def check_config(c):
    """ValueError for the first field of a LinGenConfig that cannot be right; lists become tuples."""
    for name, least in (("patch", 1), ("grid", 0), ("pool", 1), ("window", 1)):
        value = getattr(c, name)
        if not isinstance(value, (tuple, list)) or len(value) != 3 or any(type(v) is not int or not least <= v <= MOST for v in value):
            raise ValueError(f"{name} must be three whole numbers (t, h, w) from {least} to {MOST}, got {value!r:.60}")
        object.__setattr__(c, name, tuple(value))
    for name in ("channels", "text_length", "d_model", "depth", "nheads", "d_state", "headdim", "ngroups", "d_conv", "chunk_size", "vocab_size", "text_dim"):
        value, least = getattr(c, name), 0 if name in ("vocab_size", "text_dim") else 1
        if type(value) is not int or not least <= value <= MOST:
            raise ValueError(f"{name} must be a whole number from {least} to {MOST}, got {value!r:.60}")
    for name in ("mlp_ratio", "expand"):
        if type(getattr(c, name)) not in (int, float) or not 0 < getattr(c, name) <= 1000:
            raise ValueError(f"{name} must be a number above 0, 1000 at most, got {getattr(c, name)!r:.60}")
    for name in ("ma", "tesa", "review", "torus", "travel"):
        if type(getattr(c, name)) is not bool:
            raise ValueError(f"{name} must be True or False, got {getattr(c, name)!r:.60}")
    choices = {"predicts": ("clean", "pixels", "velocity"), "mixer": ("mate", "attention"), "scan": ("rotary", "zigzag", *SCANS),
               "backend": BACKENDS}
    for name, allowed in choices.items():
        if getattr(c, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(c, name)!r:.60}")
    if c.d_model % c.nheads:
        raise ValueError(f"d_model must be a multiple of nheads, got d_model={c.d_model}, nheads={c.nheads}")
    if not c.mlp_ratio * c.d_model >= 1 or not c.expand * c.d_model >= 1 or int(c.expand * c.d_model) % c.headdim:
        raise ValueError("mlp_ratio and expand must be positive, and expand * d_model a multiple of headdim: got "
                         f"mlp_ratio={c.mlp_ratio}, expand={c.expand}, d_model={c.d_model}, headdim={c.headdim}")
    if int(c.expand * c.d_model) // c.headdim % c.ngroups:
        raise ValueError(f"ngroups must divide the heads of Mamba2, expand * d_model / headdim: got ngroups={c.ngroups}")
    if (c.vocab_size > 0) == (c.text_dim > 0):
        raise ValueError("captions are either words (vocab_size > 0) or embeddings (text_dim > 0): "
                         f"got vocab_size={c.vocab_size}, text_dim={c.text_dim}")
    if c.mixer == "mate" and not (c.ma or c.tesa):
        raise ValueError("MATE without both of its branches mixes nothing: keep ma or tesa")


def check_inputs(model, clip, t, text):
    """ValueError where clip, t and text do not fit each other or the model: see LinGen.forward."""
    c, weight = model.config, model.patch_in.weight
    if not isinstance(clip, torch.Tensor) or clip.dim() != 5 or clip.shape[1] != c.channels or not clip.is_floating_point() or 0 in clip.shape:
        raise ValueError(f"clip must be floating point (batch, {c.channels}, frames, height, width), got {_what(clip)}")
    autocast = clip.device.type != "meta" and torch.is_autocast_enabled(clip.device.type)
    if clip.dtype != weight.dtype and not autocast:
        raise ValueError(f"clip is {clip.dtype}, the model's weights are {weight.dtype}: convert one with .to(...), or use torch.autocast")
    for name, size, p in zip(("frames", "height", "width"), clip.shape[2:], c.patch):
        if size % p and not (name == "frames" and size == 1):
            raise ValueError(f"{name}={size} must be a multiple of the patch ({p}){' or 1, a still image' if name == 'frames' else ''}: "
                             f"take {f'{size // p * p} or ' if size > p else ''}{(size // p + 1) * p}")
    if not isinstance(t, torch.Tensor) or t.shape != clip.shape[:1] or not t.is_floating_point():
        raise ValueError(f"t must be floating point, one time per clip ({len(clip)},), got {_what(t)}")
    if not isinstance(text, torch.Tensor) or not clip.device == t.device == text.device == weight.device:
        raise ValueError(f"clip, t, text and the model must be tensors on one device, got {_what(clip)}, {_what(t)}, {_what(text)}, and the model on {weight.device}")
    if c.vocab_size:
        if text.dim() != 2 or len(text) != len(clip) or text.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"text must be word numbers ({len(clip)}, n), int64 or int32, got {_what(text)}")
        if text.device.type == "cpu" and text.numel() and not 0 <= text.min() <= text.max() <= c.vocab_size:
            raise ValueError(f"word numbers must lie in 0 ... {c.vocab_size}, got {text.min()} to {text.max()}")
    elif text.dim() != 3 or len(text) != len(clip) or text.shape[2] != c.text_dim or not text.is_floating_point():
        raise ValueError(f"text must be embeddings ({len(clip)}, n, {c.text_dim}), got {_what(text)}")
    if text.shape[1] > c.text_length:
        raise ValueError(f"the caption has {text.shape[1]} words, this model reads {c.text_length} at most")


def _what(x):
    """What came in, for a message: (2, 3) torch.float32 on cpu, or the type of what is no tensor."""
    return f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__


# --- The demonstration: what flows through a block, and what it costs ---------------------------------------


def describe(config, frames, height, width, words=8):
    """One row per part of the model: (name, shape that leaves it, parameters, multiply-adds per clip), on the meta device.

    Multiply-adds are those of matrix products, as torch counts them; the scan's own are among them.
    """
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        model = LinGen(dataclasses.replace(config, backend="torch"))
        clip, t = torch.empty(1, config.channels, frames, height, width), torch.empty(1)
        text = torch.zeros(1, words, dtype=torch.long) if config.vocab_size else torch.empty(1, words, config.text_dim)
    first, shapes = model.blocks[0], {}
    mate = config.mixer == "mate"
    parts = {"patch_in": model.patch_in, "block 0": first,
             **({"  MA-branch": first.mixer.ma, "  TE-branch": first.mixer.tesa} if mate else {"  full attention": first.mixer}),
             "  cross-attention": first.cross, "  feed-forward": first.mlp, "  modulation": first.modulation, "patch_out": model.patch_out}
    parts = {name: part for name, part in parts.items() if part is not None}
    for name, part in parts.items():
        part.register_forward_hook(lambda part, inputs, out, name=name: shapes.update({name: tuple(out.shape)}))
    with FlopCounterMode(display=False) as counter:
        out = model(clip, t, text)
    flops, paths = counter.get_flop_counts(), {part: f"LinGen.{path}" for path, part in model.named_modules()}
    count = lambda module: sum(p.numel() for p in module.parameters())
    rows = [(name, shapes[name], count(part), sum(flops[paths[part]].values()) // 2) for name, part in parts.items()]
    return rows + [(f"whole model ({config.depth} blocks)", tuple(out.shape), count(model), counter.get_total_flops() // 2)]


def main():
    from benchmarks import pictures
    pictures.end_with_the_reader()
    parser = argparse.ArgumentParser(description="The shapes that flow through LinGen, its parameters and its operations, part by part (fig. 2).")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--mixer", choices=("mate", "attention"), default="mate", help="attention: the DiT that the paper compares with")
    parser.add_argument("--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"),
                        help="of the clip, in the model's pixels or latents (default: what its position tables are made for, or 4 x 8 x 8 tokens)")
    parser.add_argument("--out", default="lingen_block.png", help="the picture of the block (default lingen_block.png)")
    args = parser.parse_args()
    config = preset(args.preset, mixer=args.mixer, **({"vocab_size": 40} if args.preset == "tiny" else {}))
    size = args.size or [p * (g or some) for p, g, some in zip(config.patch, config.grid, (4, 8, 8))]
    if not 1 <= min(size) <= max(size) <= 10**5:
        parser.error(f"--size {' '.join(map(str, size))}: 1 to 100000 along an axis")
    pictures.check_out(parser, args.out)
    try:
        rows = describe(config, *size)
    except ValueError as error:
        parser.error(str(error))
    print(f"preset {args.preset}, {args.mixer}: clip of {' x '.join(map(str, size))}, patches of {' x '.join(map(str, config.patch))}\n")
    print(f"{'part':26} {'shape':26} {'parameters':>14} {'million multiply-adds':>24}")
    for name, shape, parameters, products in rows:
        print(f"{name:26} {str(shape):26} {parameters:>14,} {products / 1e6:>24,.1f}")
    pictures.save(pictures.lingen_block(), args.out)


if __name__ == "__main__":
    main()
