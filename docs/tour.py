# %% [markdown]
# # LinGen in five stops
#
# The five stops of [tour.md](tour.md) with their pictures, on a CPU in about five minutes. This
# notebook defines no algorithm: it calls the six files. `docs/tour.py` is its source.

# %%
# On Colab, or anywhere else without the repository: set its address here.
REPOSITORY = ""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

if REPOSITORY and not Path("lingen").exists():
    subprocess.run(["git", "clone", REPOSITORY, "lingen"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", "lingen/requirements.txt"])
here = [p for p in (Path("lingen"), Path(), Path("..")) if (p / "tesa.py").exists()]
assert here, "start in the folder of tesa.py or in docs/, or set REPOSITORY"
here = here[0].resolve()
sys.path.insert(0, str(here))

import torch
from IPython.display import Image, display

import lingen
import mamba2_ref
import sample
import scan
import tesa
import train_tiny
from toy import judge, preview, shapes

torch.manual_seed(0)
steps = int(os.environ.get("TOUR_STEPS", 250))  # of the training at stop 5


def show(clips, captions, title):
    """Every second frame of clips (b, 3, frames, h, w), side by side, moving."""
    frames = [sample.to_frames(clip)[::2] for clip in clips]
    page = preview.side_by_side(frames, captions, title, columns=2, scale=3)
    path = Path(tempfile.mkdtemp(), "clips.gif")
    sample.write_clip(path, page, fps=6)
    display(Image(data=path.read_bytes()))


# %% [markdown]
# ## 1. A clip as a sequence: `scan.py`
#
# Mamba reads a sequence, a clip is a grid. Each order keeps the neighbours along one axis together
# and separates the others. Rotary Major Scan uses four orders in turn, one per layer.

# %%
display(Image(filename=here / "assets" / "scan_orders.png"))
grid = (4, 8, 8)
for order in scan.SCANS:
    place = scan.places(order, grid)
    apart = [int(place.diff(dim=axis).abs().double().mean()) for axis in range(3)]
    print(f"{order:16} neighbours in time, height, width are {apart} places apart")

# %% [markdown]
# **Change it:** take a longer grid, `(64, 8, 8)`. Which orders get worse? (The temporal ones.)
#
# ## 2. A sequence with a memory: `mamba2_ref.py`
#
# A recurrence, a masked attention matrix, and chunks: three forms of one function.

# %%
x, B, C = torch.randn(1, 300, 4, 16), torch.randn(1, 300, 1, 16), torch.randn(1, 300, 1, 16)
dt, A = torch.rand(1, 300, 4), -torch.rand(4)
truth = mamba2_ref.ssd_recurrent(*(t.double() for t in (x, dt, A, B, C)))
for form in (mamba2_ref.ssd_quadratic, mamba2_ref.ssd_chunked_plain, mamba2_ref.ssd_chunked):
    error = (form(x, dt, A, B, C) - truth).norm() / truth.norm()
    print(f"{form.__name__:18} float32, RMS error over RMS: {error:.1e}")
display(Image(filename=here / "assets" / "mamba2_maps.png"))

# %% [markdown]
# **Change it:** multiply `A` by 100. Do the forms still agree? A token sees back some
# ln 2 / (dt |A|) tokens: how many are left?
#
# ## 3. What a scan separates: `tesa.py`
#
# Attention in small windows, shifted by half a window in every second layer. Tokens of one number
# share a window; only equality counts.

# %%
display(Image(filename=here / "assets" / "tesa_windows.png"))
print(tesa.windows((1, 6, 6), (1, 3, 3), (0, 0, 0))[0])
print(tesa.windows((1, 6, 6), (1, 3, 3), (0, 1, 1))[0])

# %% [markdown]
# **Change it:** a shift of 2. Which tokens share a window now, and did not before?
#
# ## 4. The block: `lingen.py`
#
# MATE is the sum of a bidirectional Mamba2 branch and the windows. The rest is a DiT.

# %%
display(Image(filename=here / "assets" / "lingen_block.png"))
for mixer in ("mate", "attention"):
    model = lingen.LinGen(lingen.preset("tiny", mixer=mixer))
    print(f"{mixer:10} {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# **Change it:** `lingen.preset("tiny", tesa=False)`. Where did the parameters go?
#
# ## 5. From noise to a clip, and back to the loss: `sample.py`, `train_tiny.py`
#
# The shipped checkpoint, in 50 steps and in 4. The judge reads the clips back from their pixels.

# %%
model, checkpoint = sample.load_model(here / "assets" / "tiny.pt", backend="torch")
captions = [
    "a red circle moving right",
    "a yellow triangle moving up-left",
]
specs = torch.stack([shapes.parse_caption(caption) for caption in captions])
for n in (50, 4):
    settings = {**checkpoint["sampling"], "steps": n}
    clips = sample.sample_captions(model, captions, checkpoint["vocabulary"], settings)
    show(clips, captions, f"{n} steps")
    print(judge.report(judge.judge(clips, specs)))

# %% [markdown]
# A jump of 24 pixels means: in some frame no shape was found.
#
# **Change it:** add `"renoise": 0.0` beside `"steps"`: Euler's method on the flow. Then train a
# model from scratch, for two minutes. The loss falls, and coloured blobs appear; some clips are
# still black. (`python train_tiny.py` takes 46 minutes.)

# %%
run = train_tiny.Run(lingen.preset("tiny"), dict(steps=steps, seed=0, rate=train_tiny.RATE), "cpu")
for _ in range(steps):
    run.advance()
display(Image(data=preview.loss_curve(run.losses, f"{steps} steps")))
print(f"mean loss of the last 50 steps: {sum(loss for _, loss, _ in run.losses[-50:]) / 50:.3f}")
clips = sample.sample_captions(run.average, captions, shapes.WORDS, checkpoint["sampling"])
show(clips, captions, f"after {steps} steps")

# %% [markdown]
# **Change it:** `lingen.preset("tiny", ma=False)` in the last cell, and compare the losses.
