"""LinGen: a video diffusion transformer whose cost grows linearly with the number of pixels.

This is the paper's model (LinGen, CVPR 2025, figs. 2 to 5): a DiT (Peebles and Xie 2022, arXiv
2212.09748) in which MATE replaces self-attention. MATE adds the outputs of two branches:

    MA-branch   bidirectional Mamba2 over the flattened grid, for interactions at any distance. The
                order changes from layer to layer (Rotary Major Scan, scan.py); average-pooled
                *review tokens* are read before the clip.
    TE-branch   TEmporal Swin Attention in small windows (tesa.py), for what a 1-D scan separates.

    clip (b, c, frames, height, width) -> patches -> tokens (b, t, h, w, d) -> blocks -> clip

b batch; c channels; t, h, w the grid of tokens; d width; l = t*h*w; r review tokens; n words.
In `LinGen.forward` the argument t (b,) is the time of the flow: 0 noise, 1 data.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mamba2_ref import BidirectionalMamba2
from scan import order_name, to_grid, to_sequence
from tesa import TemporalSwinAttention, rotary, rotate


@dataclasses.dataclass(frozen=True)
class LinGenConfig:
    """All settings; tuples are (t, h, w). ValueError for impossible ones, here or in LinGen."""

    # The clip and its caption.
    channels: int = 3
    patch: tuple = (2, 4, 4)  # pixels (or latents) of one token
    grid: tuple = (0, 6, 6)  # tokens that the position tables cover; 0: none, for any number
    vocab_size: int = 0  # captions are word numbers 1 ... vocab_size, 0 is padding
    text_dim: int = 0  # or captions are embeddings of this width
    predicts: str = "clean"  # the clean clip (x-prediction), or "velocity" = data - noise
    # The transformer.
    d_model: int = 128
    depth: int = 4
    nheads: int = 4  # of all softmax attention
    mlp_ratio: float = 4.0
    # MATE; the paper's ablations take these out one at a time (table 2, figs. 11 and 12).
    mixer: str = "mate"  # or "attention": full self-attention, the DiT
    ma: bool = True  # the MA-branch
    tesa: bool = True  # the TE-branch
    review: bool = True  # review tokens
    scan: str = "rotary"  # Rotary Major Scan; or one order for all layers, or "zigzag"
    pool: tuple = (2, 4, 4)  # tokens averaged into one review token
    window: tuple = (4, 6, 6)  # tokens of one TESA window
    # Mamba2.
    d_state: int = 32
    headdim: int = 32
    expand: float = 1.0
    ngroups: int = 1
    d_conv: int = 4
    chunk_size: int = 32
    backend: object = "auto"  # of the scan: "torch", "mamba_ssm", "auto" or a function

    def __post_init__(self):
        if self.mixer not in ("mate", "attention") or self.predicts not in ("clean", "velocity"):
            raise ValueError(f"unknown: mixer {self.mixer!r} or predicts {self.predicts!r}")
        sizes = (*self.patch, *self.pool, *self.window, self.channels, self.d_model, self.nheads)
        if min(sizes) < 1 or min(*self.grid, self.depth) < 0 or self.d_model % (2 * self.nheads):
            raise ValueError(f"sizes must be at least 1, and 2 * nheads divide d_model: {self}")
        if (self.vocab_size > 0) == (self.text_dim > 0) or not (self.ma or self.tesa):
            raise ValueError("set vocab_size or text_dim, not both; keep ma or tesa")


# Latents of a video autoencoder and embeddings of a text encoder, as in the paper.
LATENT = dict(channels=16, patch=(1, 2, 2), grid=(34, 16, 16), predicts="velocity",
              pool=(4, 4, 4), window=(8, 4, 4), headdim=64, expand=2.0, chunk_size=64)  # fmt: skip
PRESETS = {
    "tiny": dict(vocab_size=21),  # trains on a laptop
    "small": dict(LATENT, text_dim=1024, d_model=768, depth=16, nheads=12, d_state=64),  # a GPU
    # The size of the paper's model. Its widths are not published; these give 4 billion parameters.
    "4b": dict(LATENT, text_dim=4096, d_model=2304, depth=27, nheads=18, d_state=128),
}


def preset(name, **changes):
    """The config of a preset with some fields changed, as in preset("tiny", ma=False)."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; expected {', '.join(PRESETS)}")
    return LinGenConfig(**{**PRESETS[name], **changes})


def review_tokens(grid, pool):
    """Average-pooled copies of the tokens, the overview before the scan. No parameters.

    grid (b, t, h, w, d), pool (t, h, w) -> (b, ceil(t / pool), ceil(h / pool), ceil(w / pool), d).
    A block cut by the edge of the grid is averaged over the tokens it has.
    """
    pool = [min(size, p) for size, p in zip(grid.shape[1:4], pool, strict=True)]
    dtype = torch.promote_types(grid.dtype, torch.float32)  # not all CPUs pool bfloat16
    pooled = F.avg_pool3d(grid.permute(0, 4, 1, 2, 3).to(dtype), pool, ceil_mode=True)
    return pooled.permute(0, 2, 3, 4, 1).to(grid.dtype)


class MATE(nn.Module):
    """MA-branch plus TE-branch (fig. 2): grid (b, t, h, w, d) -> the same shape.

    Each direction first reads review tokens: they stand at both ends. Their outputs are dropped.
    """

    def __init__(self, config, layer=0):
        super().__init__()
        self.order = order_name(layer if config.scan == "rotary" else config.scan)
        self.pool = config.pool if config.review else None
        self.ma = self.tesa = None
        if config.ma:
            names = "d_model d_state d_conv expand headdim ngroups chunk_size backend".split()
            self.ma = BidirectionalMamba2(**{name: getattr(config, name) for name in names})
        if config.tesa:
            shift = tuple(size // 2 if layer % 2 else 0 for size in config.window)
            self.tesa = TemporalSwinAttention(config.d_model, config.nheads, config.window, shift)

    def forward(self, grid, offset=0):
        if self.ma is None:
            return self.tesa(grid, offset)
        tokens = to_sequence(grid, self.order)  # (b, l, d)
        review = tokens[:, :0]  # none
        if self.pool is not None:
            review = to_sequence(review_tokens(grid, self.pool), self.order)  # (b, r, d)
        out = self.ma(torch.cat([review, tokens, review], 1))  # (b, r + l + r, d)
        out = to_grid(out.narrow(1, review.shape[1], tokens.shape[1]), self.order, grid.shape[1:4])
        return out if self.tesa is None else out + self.tesa(grid, offset)


class Attention(nn.Module):
    """Softmax attention of x (b, ..., d) to text (b, n, d), with mask (b, 1, 1, n)."""

    def __init__(self, d_model, nheads):
        super().__init__()
        self.nheads = nheads
        self.q = nn.Linear(d_model, d_model)
        self.kv = nn.Linear(d_model, 2 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x, text, mask=None, rope=None):
        q, kv, heads = self.q(x), self.kv(text), self.nheads
        q = rearrange(q, "b ... (heads e) -> b heads (...) e", heads=heads)
        k, v = rearrange(kv, "b ... (two heads e) -> two b heads (...) e", two=2, heads=heads)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # scores (b, heads, l, n)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class FullAttention(Attention):
    """The DiT's self-attention, which MATE replaces: O(l^2). RoPE runs over the whole grid."""

    def forward(self, grid, offset=0):  # it has no windows
        e = grid.shape[-1] // self.nheads
        rope = rotary(grid.shape[1:4], e, grid.dtype, grid.device, longest=256)
        return super().forward(grid, grid, rope=rope)


def modulate(x, scale, shift):
    """Layer norm of x (b, t, h, w, d), with scale and shift (b, 1, 1, 1, d) from the condition."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Block(nn.Module):
    """MATE (or full attention), cross-attention to the caption, feed-forward; each is added to x.

    adaLN-Zero (DiT): the condition (b, 1, 1, 1, d), from time and caption, sets scale and shift of
    two norms, and two gates, which start at 0. Cross-attention has a plain norm and no gate.
    """

    def __init__(self, config, layer):
        super().__init__()
        d, hidden = config.d_model, int(config.mlp_ratio * config.d_model)
        full = config.mixer == "attention"
        self.mixer = FullAttention(d, config.nheads) if full else MATE(config, layer)
        self.cross = Attention(d, config.nheads)
        self.mlp = nn.Sequential(nn.Linear(d, hidden), nn.GELU("tanh"), nn.Linear(hidden, d))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x, condition, text, mask, offset=0):
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition).chunk(6, -1)
        x = x + gate1 * self.mixer(modulate(x, scale1, shift1), offset)
        x = x + self.cross(F.layer_norm(x, x.shape[-1:]), text, mask)
        return x + gate2 * self.mlp(modulate(x, scale2, shift2))


class LinGen(nn.Module):
    """The denoiser: a noisy clip, its time and its caption -> the clean clip, or the velocity."""

    def __init__(self, config):
        super().__init__()
        self.config, d = config, config.d_model
        per_patch = config.channels * math.prod(config.patch)
        self.patch_in = nn.Linear(per_patch, d)
        # One learnt table per axis, as in Movie Gen (arXiv 2410.13720). Choice: added once, here.
        sizes = zip("thw", config.grid, strict=True)
        tables = {axis: 0.02 * torch.randn(size, d) for axis, size in sizes if size}
        self.positions = nn.ParameterDict(tables)
        self.time = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.null_embedding = nn.Parameter(0.02 * torch.randn(d))  # a first word of every caption
        if config.vocab_size:
            self.words = nn.Embedding(config.vocab_size + 1, d, padding_idx=0)  # no word order
        else:
            self.words = nn.Linear(config.text_dim, d)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))
        self.patch_out = nn.Linear(d, per_patch)
        for name, p in self.named_parameters():  # adaLN-Zero: gates and output start at 0
            if "modulation" in name or "patch_out" in name:
                nn.init.zeros_(p)

    def forward(self, clip, t, text, mask=None, offset=0):
        """A noisy clip -> the clean clip or the velocity, as config.predicts says; the same shape.

        clip (b, channels, frames, height, width): (1 - t) noise + t data. Sizes are multiples of
            the patch; one frame, a still picture, is always allowed. Else ValueError.
        t (b,): the time of each clip, in [0, 1].
        text: word numbers (b, n), 0 for padding; or embeddings (b, n, text_dim).
        mask (b, n): True for a word; by default where its number is not 0, or for all embeddings.
        offset: tokens of time by which all TESA windows begin later (sample.py moves them).
        """
        config, (pt, ph, pw), still = self.config, self.config.patch, clip.shape[2] == 1
        if still:  # a picture is repeated to fill its patch, and the output is averaged
            clip = clip.expand(-1, -1, pt, -1, -1)
        if any(size % p for size, p in zip(clip.shape[2:], config.patch)):
            raise ValueError(f"frames, height, width of the clip are {tuple(clip.shape[2:])}; "
                             f"expected multiples of the patch {config.patch}, or 1 frame")
        pattern = "b c (t pt) (h ph) (w pw) -> b t h w (pt ph pw c)"
        x = self.patch_in(rearrange(clip, pattern, pt=pt, ph=ph, pw=pw))  # (b, t, h, w, d)
        for i, axis in enumerate("thw", 1):
            if axis in self.positions:
                table = position_table(self.positions[axis], x.shape[i])
                x = x + table.view([-1] + [1] * (3 - i) + [x.shape[-1]])  # axis t: (t, 1, 1, d)
        if mask is None:
            mask = text > 0 if config.vocab_size else text.new_ones(text.shape[:2]).bool()
        null = self.null_embedding.expand(len(text), 1, -1)
        text = torch.cat([null, self.words(text)], 1)  # (b, 1 + n, d): softmax always has a key
        mask = F.pad(mask.bool(), (1, 0), value=True)  # (b, 1 + n)
        # Choice: the mean of null_embedding and words is added to the time embedding, so that the
        # caption reaches every modulated norm. Movie Gen has cross-attention alone.
        mean = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (b, d)
        condition = self.time(time_embedding(t).to(x.dtype)) + mean
        condition = condition[:, None, None, None]  # (b, 1, 1, 1, d)
        for block in self.blocks:
            x = block(x, condition, text, mask[:, None, None], offset)
        scale, shift = self.modulation(condition).chunk(2, -1)
        pattern = "b t h w (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
        out = rearrange(self.patch_out(modulate(x, scale, shift)), pattern, pt=pt, ph=ph, pw=pw)
        return out.mean(2, keepdim=True) if still else out


def position_table(table, size):
    """The first `size` entries of a table (entries, d), or all of them interpolated to `size`."""
    if size <= len(table):
        return table[:size]
    return F.interpolate(table.mT[None], size=size, mode="linear", align_corners=True)[0].mT


def time_embedding(t):
    """t (b,) in [0, 1] -> (b, 256): cosines and sines, wavelengths from 2 pi / 1000 to about 60."""
    exponents = torch.arange(128, device=t.device, dtype=torch.float32) / 128
    angles = 1000 * t.float()[:, None] * 10000**-exponents
    return torch.cat([angles.cos(), angles.sin()], -1)


if __name__ == "__main__":
    print("tiny, 24 x 24 pixels: GFLOPs of the matrix products in a forward pass")
    print(f"{'frames':>6} {'tokens':>7} {'LinGen':>7} {'DiT':>7}")
    for frames in (16, 64, 272, 1088):
        flops = []
        for mixer in ("mate", "attention"):
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                model = LinGen(preset("tiny", mixer=mixer, backend="torch"))
                model(torch.empty(1, 3, frames, 24, 24), torch.empty(1), torch.ones(1, 5).long())
            flops.append(counter.get_total_flops() / 1e9)
        print(f"{frames:6} {frames // 2 * 36:7,} {flops[0]:7,.1f} {flops[1]:7,.1f}")
