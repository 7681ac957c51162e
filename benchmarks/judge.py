"""The judge of clips: reads colour, shape, size, direction and speed back from the pixels, without a network.

    python train_tiny.py --evaluate assets/tiny.pt

A clip is right if *every frame* is: the attributes that the caption names, one connected piece per object and
nothing else, a steady size, form and step, and the ideal picture overlapped by 0.85. Where two objects touch or cover
each other, only both together are held against the ideal, and how they move must still be right. The judge knows the renderer
of the toy world, hence the ideal picture. Letters and tables as in train_tiny.py.
"""
import math
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

import sample
from train_tiny import ATTRIBUTES, HALF, RGB, SHAPES, STEPS, SYNONYMS, draw_shapes, make_batch, roll, wrap


def parse(text):
    """What a caption names: a list with one dict per object, attribute -> name, None where unnamed.

    Words outside VOCABULARY are passed over. ValueError where an object lacks colour or shape, names two
    of a kind, or two objects share a colour.
    """
    found = []
    for part in sample.objects(text):
        said = set(part.split())
        way = "-".join(w for w in ("up", "down", "left", "right") if w in said)            # "up left" -> "up-left"
        thing = {}
        for attribute, names in ATTRIBUTES.items():
            if attribute == "direction":
                hits, unclear = [way] if way else [], way and way not in names
            else:
                hits = [name for name in names if said & set(SYNONYMS.get(name, (name,)))]
                unclear = len(hits) > 1
            if unclear:
                raise ValueError(f"the caption {text!a:.60} names {' and '.join(hits)} for one object; expected one "
                                 f"{attribute} each: a second object begins with \"and a\"")
            if not hits and attribute in ("colour", "shape"):
                raise ValueError(f"the caption {text!a:.60} names no {attribute} in {part.strip()!a:.60}; add one of "
                                 f"{', '.join(names)}")
            thing[attribute] = hits[0] if hits else None
        found.append(thing)
    if len(found) > 2 or len({thing["colour"] for thing in found}) < len(found):
        raise ValueError(f"the caption {text!a:.60} names {len(found)} objects coloured "
                         f"{', '.join(thing['colour'] for thing in found):.60}; expected one, or two of different colours")
    return found


OVERLAP = 0.85        # soft intersection over union with the ideal shape
AREA = 0.15           # a frame's area may differ by this part from the clip's median
STRAY = 0.25          # brighter than this (black 0, full 1) is something, and belongs to some object
STEP = 0.5            # pixels that a single step may differ from the object's usual (median) step
PACE = 0.25           # pixels that the usual step may miss the caption's by


def soft(brightness):
    """Calls everything under 0.1 black and over 0.9 full: a network's black is never quite black."""
    return ((brightness - 0.1) / 0.8).clamp(0, 1)


def locate(mask):
    """Centre of mass on the torus: mask (t, h, w) -> (t, 2) as (x, y).

    The circular mean finds roughly where the mass is but is biased for a triangle; around that place
    the torus can be cut open and the ordinary mean taken, which is exact as long as no part lies half the torus from the middle.
    """
    size = mask.shape[-1]
    axis, centre = torch.arange(size), []
    for m in (mask.sum(1), mask.sum(2)):                                                   # (t, size) each
        angle = axis * (2 * math.pi / size)
        rough = torch.atan2(m @ angle.sin(), m @ angle.cos()) * (size / (2 * math.pi))     # (t,)
        around = wrap(axis - rough[:, None], size)                                         # (t, size)
        centre.append(rough + (m * around).sum(1) / m.sum(1).clamp(min=1e-6))
    return torch.stack(centre, 1) % size                                                   # (t, 2)


def count_pieces(bright, most):
    """Connected pieces on the torus: bool (t, h, w) -> int64 (t,), counting to most + 1.

    From some pixel a flood spreads to touching pixels, also diagonally, one ring of a 3x3 max-pool at a
    time; what it reached is one piece. Lone single pixels are forgiven, two that touch are a piece.
    """
    def around(x):                                                                         # (t, h + 2, w + 2)
        return F.pad(x[:, None], (1, 1, 1, 1), mode="circular")[:, 0]

    left, pieces = bright.float(), torch.zeros(len(bright), dtype=torch.long)
    left = left * (F.avg_pool2d(around(left), 3, 1) > 1.5 / 9)
    for _ in range(most):
        pieces += left.any(2).any(1)
        flood = F.one_hot(left.flatten(1).argmax(1), left[0].numel()).view_as(left) * left
        while True:
            grown = F.max_pool2d(around(flood), 3, 1) * left
            if torch.equal(grown, flood):
                break
            flood = grown
        left = left - flood
    return pieces + left.any(2).any(1)


def match(tint, rest, centre):
    """Overlap with the 2 x 4 ideals of both sizes and all shapes, at centre (t, 2): returns (t, 8).

    tint is what has the object's colour, rest everything that no other object accounts for, both
    (t, h, w). Only the right colour can be in the intersection; all of rest is in the union.
    """
    t, _, size = tint.shape
    scores = []
    for half in HALF:
        ideal = soft(draw_shapes(half.expand(t), centre, size))                            # (t, 4, h, w)
        both = torch.minimum(ideal, tint[:, None]).sum((2, 3))
        scores.append(both / torch.maximum(ideal, rest[:, None]).sum((2, 3)))
    return torch.cat(scores, 1)                                                            # (t, 8)


def hidden_frames(tint, centre, pieces):
    """Two objects: the frames in which they touch or cover each other, and where both then must be.

    tint (2, t, h, w), centre (2, t, 2), pieces (t,) -> hidden (t,), centre with these frames filled in,
    and tint as it would be if the last frames before had just moved on.
    Half an object has neither form nor centre, so a hidden frame is excused from both. But only if the
    motion seen in the other frames makes the two touch there: whoever just vanishes is not excused.
    """
    size, t = tint.shape[-1], torch.arange(len(pieces))
    apart = (pieces == 2) & (tint.sum((2, 3)) > 4).all(0)                                  # (t,)
    seen = apart.nonzero()[:, 0]                                                           # (j,)
    if len(seen) < 2:
        return torch.zeros_like(apart), centre, tint     # no motion known: nothing is excused
    # The velocity of the table that explains best how each came from one of these frames to the next.
    table, moved = STEPS.view(16, 1, 2), centre[:, None, seen].diff(dim=2)                 # (2, 1, j-1, 2)
    miss = wrap(moved - table * seen.diff()[:, None], size).abs().sum(3).mean(2)           # (2, 16)
    last = torch.where(apart, t, seen[0]).cummax(0).values                                 # (t,)
    moved = table[miss.argmin(1)] * (t - last)[:, None]                                    # (2, t, 2)
    ghost = roll(tint[:, last], moved)                                                     # (2, t, h, w)
    wide = F.max_pool2d(F.pad(ghost, (1, 1, 1, 1), mode="circular"), 3, 1)                 # 1 pixel wider
    hidden = ~apart & ((wide[0] > 0.1) & (wide[1] > 0.1)).flatten(1).any(1)
    return hidden, torch.where(hidden[:, None], centre[:, last] + moved, centre), ghost


def read_object(p, tint, rest, centre, clear):
    """Everything about one object, frame by frame: a dict of (t,) tensors, and three numbers.

    p (3, t, h, w) is the clip as brightness, tint and rest as in `match`, centre (t, 2), clear (t,) the
    frames in which nothing hides it. Attributes are indices into their tables, -1 for nothing clear.
    """
    size, area = tint.shape[-1], tint.sum((1, 2))                                          # (t,)
    found = area > 4
    scores = match(tint, rest, centre)                                                     # (t, 8)
    # A ragged rim pulls the centre of mass off the best place by a fraction of a pixel: there, look around.
    doubt = clear & found & (scores.amax(1) < 0.9)
    if doubt.any():
        around = torch.cartesian_prod(*[torch.tensor([-0.4, 0.0, 0.4])] * 2)               # (9, 2)
        scores[doubt] = torch.stack([match(tint[doubt], rest[doubt], centre[doubt] + a) for a in around]).amax(0)
    overlap, best = scores.max(1)                                                          # (t,) size * shapes + shape
    # A step belongs to the frame that it leads to; frame 0 borrows the first. It reads as the velocity that it rounds to,
    # or as none, if that is not in the table or the usual step is too far from it.
    step = wrap(centre.diff(dim=0), size) if len(centre) > 1 else torch.zeros(1, 2)
    step = torch.cat([step[:1], step])[:len(centre)]                                       # (t, 2)
    pace = step.median(0).values                                                           # (2,)
    near = (pace - STEPS.view(16, 2)).abs() <= PACE                                        # (16, 2)
    hit = ((step.round()[:, None] == STEPS.view(16, 2)) & near).all(2)                     # (t, 16)
    velocity = torch.where(hit.any(1), hit.float().argmax(1), -1)
    some = clear if clear.any() else ~clear              # never clear: refused elsewhere, but do not crash here
    steady = (area / area[some].median().clamp(min=1e-6) - 1).abs() < AREA
    steady = (steady & (best == best[some].mode().values)) | ~clear
    steady &= ((step - pace).abs() <= STEP).all(1)
    # Flicker: undo the motion by a roll, so that a perfect clip does not change at all.
    back = torch.roll(tint[1:], tuple(-int(v) for v in pace.flip(0).round()), (1, 2))      # (t-1, h, w)
    change = (back - tint[:-1]).abs().sum((1, 2))[clear[1:] & clear[:-1]]
    paint = (p * tint).sum((2, 3)) / area.clamp(min=1e-6)                                  # (3, t)
    return {"shape": torch.where(found, best % len(SHAPES), -1), "size": torch.where(found, best // len(SHAPES), -1),
            "direction": torch.where(velocity < 0, -1, velocity // 2),
            "speed": torch.where(velocity < 0, -1, velocity % 2), "overlap": overlap, "steady": steady,
            "area_drift": float(area[some].std(correction=0) / area[some].mean().clamp(min=1e-6)),
            "colour_drift": float(paint[:, some].std(1, correction=0).amax()),
            "flicker": float(change.mean() / area[some].mean().clamp(min=1e-6)) if len(change) else 0.0}


def judge(clips, captions):
    """Hold clips against their captions.

    clips: float (b, 3, t, size, size) in [-1, 1] with a list of b captions, or (3, t, size, size) with
    one str. Returns a list of b records, or one. A record is a dict:
      ok            everything below holds in every frame
      colour_ok, shape_ok, size_ok, direction_ok, speed_ok   None where the caption names none; the last two also for t = 1
      one_object    as many connected pieces as objects, and nothing else
      steady        size, form and step stay the same
      finite        no NaN and no infinity
      overlap_ok    overlap, the least over the frames, is at least 0.85
      area_drift, colour_drift   standard deviation over time: of the area (relative), of the mean colour
      flicker       what changes from frame to frame once the motion is undone, relative to the area
      good          bool (t,): which frames pass; good.view(-1, 16).all(1) says so for each second
      why           str: what failed, in which frame first, and what was there instead
    ValueError if the shapes do not fit, or a caption names no colour or shape.
    """
    if isinstance(captions, str):
        return judge(clips[None], [captions])[0]
    if not isinstance(clips, torch.Tensor) or not clips.is_floating_point() or clips.is_meta:
        raise ValueError(f"clips came in as {getattr(clips, 'dtype', type(clips).__name__)}; expected a tensor of floating-point numbers")
    if clips.dim() != 5 or clips.shape[1] != 3 or clips.shape[3] != clips.shape[4] or clips.shape[4] < 32 or 0 in clips.shape or len(clips) != len(captions):
        raise ValueError(f"clips {tuple(clips.shape)} with {len(captions)} captions came in; expected "
                         "(b, 3, t, size, size) of at least 32 pixels, with b captions")
    return [judge_one(clip.detach().float().cpu(), text) for clip, text in zip(clips, captions, strict=True)]


def judge_one(clip, text):
    wanted, (_, t, _, _) = parse(text), clip.shape
    k = len(wanted)
    p = ((clip.nan_to_num(-1) + 1) / 2).clamp(0, 1)                                         # (3, t, h, w)
    light = p.amax(0)                                                                      # (t, h, w)
    # A pixel has a colour as far as that colour's channels are on and the others off: white has none.
    tints = soft(torch.stack([(p[on].amin(0) - p[~on].amax(0)).clamp(0, 1) for on in RGB.bool()]))
    mass = tints.sum((2, 3))                                                               # (6, t)
    # Which mask is whose: a named colour that is there keeps its object, another takes what is left over.
    names = [ATTRIBUTES["colour"].index(thing["colour"]) for thing in wanted]
    there = mass.sum(1).topk(k).indices.tolist()
    spare = [colour for colour in there if colour not in names]
    own = [colour if colour in there else spare.pop() for colour in names]
    tint = tints[own]                                                                      # (k, t, h, w)
    pieces = count_pieces(light > STRAY, k)                                                # (t,)
    centre, hidden = torch.stack([locate(m) for m in tint]), torch.zeros(t, dtype=torch.bool)
    ghost = tint
    if k == 2:
        hidden, centre, ghost = hidden_frames(tint, centre, pieces)

    objects = []
    for i in range(k):
        rest = (soft(light) - (tint.sum(0) - tint[i])).clamp(0)
        seen = read_object(p, tint[i], rest, centre[i], ~hidden)
        # Per frame: is this one of the k colours that cover most?
        visible = (mass.topk(k, dim=0).indices == own[i]).any(0) & (mass[own[i]] > 4)
        objects.append(seen | {"colour": torch.where(visible, own[i], -1)})

    tests = {}                                                                             # name -> bool (t,)
    for a, table in ATTRIBUTES.items():
        motion, pairs = a in ("direction", "speed"), zip(wanted, objects, strict=True)
        right = [(seen[a] == table.index(thing[a])) | (hidden if not motion else False)
                 for thing, seen in pairs if thing[a] and not (motion and t == 1)]
        if right:
            tests[f"{a}_ok"] = torch.stack(right).all(0)
    # A hidden frame is held against both objects at once, whichever lies on top.
    both, lit = ghost.amax(0), soft(light)
    both = torch.minimum(both, lit).sum((1, 2)) / torch.maximum(both, lit).sum((1, 2)).clamp(min=1e-6)
    overlap = torch.where(hidden, both, torch.stack([seen["overlap"] for seen in objects]).amin(0))
    tests |= {"one_object": (pieces == k) | hidden & (pieces == 1),
              "steady": torch.stack([seen["steady"] for seen in objects]).all(0),
              "finite": clip.isfinite().all(0).flatten(1).all(1), "overlap_ok": overlap >= OVERLAP}
    good, why = torch.stack(list(tests.values())).all(0), []
    for name, passed in tests.items():
        if not passed.all():
            f, a = int(passed.int().argmin()), name.removesuffix("_ok")                    # the first bad frame
            found = {"one_object": f"{pieces[f]} pieces", "overlap": f"{overlap[f]:.2f}", "finite": "NaN",
                     "steady": "jumps, swells or changes form"}
            found = found.get(a) or " and ".join((*ATTRIBUTES[a], "nothing clear")[s[a][f]] for s in objects)
            why.append(f"{a}: {found} in frame {f}")
    return {**{f"{a}_ok": None for a in ATTRIBUTES}, **{name: bool(v.all()) for name, v in tests.items()},
            **{n: max(s[n] for s in objects) for n in ("area_drift", "colour_drift", "flicker")},
            "overlap": float(overlap.amin()), "good": good, "ok": bool(good.all()), "why": "; ".join(why)}


def wilson(right, n):
    """95 % interval of a proportion, for any n > 0: stays inside [0, 1], also at 0 % and 100 %."""
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"{right} right of {n}: expected 0 to n of n > 0")
    z, share = 1.96, right / n
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - width) / (1 + z * z / n)), min(1.0, (middle + width) / (1 + z * z / n))


def summary(records):
    """Records of `judge` -> dict: "n", the share right per test (over the clips it applies to; None if it
    applies to none), "joint" with its 95 % Wilson interval "low" and "high", means of the other numbers.
    """
    if not records or not all(isinstance(record, dict) and "ok" in record for record in records):
        raise ValueError("no records came in; expected at least one from judge(clips, captions)")
    result, n = {"n": len(records)}, len(records)
    for name in (*(f"{a}_ok" for a in ATTRIBUTES), "one_object", "steady", "finite", "overlap_ok",
                 "overlap", "area_drift", "colour_drift", "flicker"):
        values = [float(r[name]) for r in records if r[name] is not None]
        result[name] = sum(values) / len(values) if values else None
    right = sum(r["ok"] for r in records)
    result["joint"], (result["low"], result["high"]) = right / n, wilson(right, n)
    return result


# ---- a whole checkpoint ------------------------------------------------------------------------------


def seed_of(clip, seed):
    """What clip number `clip` draws its noise from: no noise twice among the first 10,007 of a seed."""
    return (10_007 * seed + clip) % 2**32


def clips_for(model, captions, frames, options, seed):
    """Sample clips for captions, a few at a time so that memory stays small: yields clips (m, 3, frames, 32, 32) with their m captions."""
    step = max(1, 256 // frames)
    for i in tqdm(range(0, len(captions), step), unit=f" x {step} clips", disable=not sys.stderr.isatty(), leave=False):
        part = captions[i : i + step]
        text = sample.encode(part, model.vocabulary)
        yield sample.sample(model, text, (frames, 32, 32), seed=seed_of(i, seed), **options).cpu(), part


def score(model, n, frames, options, objects=1, held_out_only=False, seed=0):
    """n captions of the toy's own wording, drawn afresh, sampled and judged: (records, summary). What `sample.complete` adds is judged, too."""
    generator = torch.Generator().manual_seed(10_000_019 + seed)
    _, captions, _ = make_batch(n, 1 if frames == 1 else 2, generator, objects=objects, held_out_only=held_out_only)
    if frames > 1:
        captions = [sample.complete(text, model.choices, seed_of(i, seed)) for i, text in enumerate(captions)]
    records = [record for clips, part in clips_for(model, captions, frames, options, seed) for record in judge(clips, part)]
    return records, summary(records)


def evaluate(model, checkpoint, n=100, frames=16, objects=1, seed=0):
    """Print how right a checkpoint, as `sample.load_model` returns it, is: captions of combinations seen in training,
    and of those held out of it."""
    torch.set_float32_matmul_precision("medium")
    options = sample.steps_for(checkpoint["sampling"])
    results = [score(model, n, frames, options, objects, held, seed) for held in (False, True)]
    seen, new = (result for _, result in results)
    print(f"{n} captions each, {frames} frames, {objects} object{'s' * (objects > 1)}, {options['steps']} steps of {options.get('views', 1)} view{'s' * (options.get('views', 1) > 1)}, guidance {options['guidance']}\n")
    print(f"{'':24}{'seen in training':>20}{'held out':>20}")
    percent = lambda value: "-" if value is None else f"{100 * value:.1f} %"
    for name in (*(f"{a}_ok" for a in ATTRIBUTES), "one_object", "steady", "overlap_ok"):
        print(f"{name.removesuffix('_ok').replace('_', ' '):24}{percent(seen[name]):>20}{percent(new[name]):>20}")
    print(f"{'all right':24}{percent(seen['joint']):>20}{percent(new['joint']):>20}")
    interval = lambda r: f"{100 * r['low']:.1f} to {100 * r['high']:.1f} %"
    print(f"{'  95 % interval':24}{interval(seen):>20}{interval(new):>20}")
    for name in ("overlap", "area_drift", "colour_drift", "flicker"):
        print(f"{name.replace('_', ' '):24}{seen[name]:>20.3f}{new[name]:>20.3f}")
    wrong = [record["why"] for records, _ in results for record in records if not record["ok"]]
    if wrong:
        print("\nthe first that were wrong:", *wrong[:5], sep="\n  ")
