"""scan.py against plain enumeration: every order walked by nested loops, and the formulas of its header."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import scan

SHAPES = [(3, 5, 7), (1, 1, 1), (1, 4, 6), (5, 1, 3), (2, 3, 1), (1, 1, 4), (4, 8, 8), (2, 2, 2)]
ORDERS = [*scan.SCANS, "zigzag"]


def walk(order, shape):
    """The tokens (t, y, x) in the order of the sequence, by nested loops."""
    t, h, w = map(range, shape)
    if order == "spatial-row":
        return [(f, y, x) for f in t for y in h for x in w]
    if order == "spatial-column":
        return [(f, y, x) for f in t for x in w for y in h]
    if order == "temporal-row":
        return [(f, y, x) for y in h for x in w for f in t]
    if order == "temporal-column":
        return [(f, y, x) for x in w for y in h for f in t]
    tokens, down, right = [], True, True
    for f in t:
        for y in h if down else reversed(h):
            tokens += [(f, y, x) for x in (w if right else reversed(w))]
            right = not right
        down = not down
    return tokens


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_the_loops_and_come_back(order, shape):
    grid = torch.randn(2, *shape, 3)
    seq = scan.to_sequence(grid, order)
    assert seq.shape == (2, shape[0] * shape[1] * shape[2], 3)
    for place, (t, y, x) in enumerate(walk(order, shape)):
        assert torch.equal(seq[:, place], grid[:, t, y, x])
    assert torch.equal(scan.to_grid(seq, order, shape), grid)


def test_index_formulas_of_the_header():
    T, H, W = shape = (3, 5, 7)
    formulas = (
        lambda t, y, x: t * H * W + y * W + x,
        lambda t, y, x: t * H * W + x * H + y,
        lambda t, y, x: (y * W + x) * T + t,
        lambda t, y, x: (x * H + y) * T + t,
    )
    for order, place in zip(scan.SCANS, formulas, strict=True):
        places = scan.places(order, shape)
        for t, y, x in walk("spatial-row", shape):
            assert places[t, y, x] == place(t, y, x)


def test_layer_numbers_count_modulo_four():
    grid = torch.randn(1, 3, 5, 7, 2)
    for layer in range(9):
        seq = scan.to_sequence(grid, layer)
        assert torch.equal(seq, scan.to_sequence(grid, scan.SCANS[layer % 4]))
        assert torch.equal(scan.to_grid(seq, layer, (3, 5, 7)), grid)


def test_spatial_row_is_a_view_and_no_order_of_four_gathers():
    grid = torch.randn(2, 3, 5, 7, 4)
    seq = scan.to_sequence(grid, "spatial-row")
    assert seq.data_ptr() == grid.data_ptr()
    assert scan.to_grid(seq, "spatial-row", (3, 5, 7)).data_ptr() == grid.data_ptr()
    for order in scan.SCANS:  # the inverse of a permutation of axes is free: only strides change
        seq = scan.to_sequence(grid, order)
        assert scan.to_grid(seq, order, (3, 5, 7)).data_ptr() == seq.data_ptr()


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_travel_with_their_tokens(order):
    grid = torch.randn(2, 3, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 60, 2, dtype=torch.float64)
    (scan.to_sequence(grid, order) * weight).sum().backward()
    assert torch.equal(grid.grad, scan.to_grid(weight, order, (3, 4, 5)))
    seq = weight.clone().requires_grad_()
    (scan.to_grid(seq, order, (3, 4, 5)) * grid.detach()).sum().backward()
    assert torch.equal(seq.grad, scan.to_sequence(grid.detach(), order))


def test_zigzag_steps_only_to_neighbours():
    for t in range(1, 5):
        for h in range(1, 6):
            for w in range(1, 6):
                tokens = torch.tensor(walk("spatial-row", (t, h, w))).view(1, t, h, w, 3)
                seq = scan.to_sequence(tokens, "zigzag")[0]
                assert torch.all(seq.diff(dim=0).abs().sum(1) == 1), (t, h, w)
                assert len({tuple(token) for token in seq.tolist()}) == t * h * w


def test_zigzag_table_made_while_sampling_serves_training():
    scan.zigzag_table.cache_clear()
    with torch.inference_mode():
        scan.to_sequence(torch.randn(1, 2, 3, 5, 1), "zigzag")
    grid = torch.randn(1, 2, 3, 5, 1, requires_grad=True)
    scan.to_sequence(grid, "zigzag").sum().backward()
    assert torch.equal(grid.grad, torch.ones_like(grid))


def test_other_devices_and_dtypes():
    for order in ORDERS:
        assert scan.to_sequence(torch.empty(2, 3, 4, 5, 6, device="meta"), order).device.type == "meta"
        assert scan.to_sequence(torch.ones(1, 2, 2, 2, 1, dtype=torch.int64), order).dtype == torch.int64


def test_distances_by_enumeration():
    shape = (3, 4, 5)
    best = {}
    for order in ORDERS:
        place = {token: i for i, token in enumerate(walk(order, shape))}
        for axis, got in enumerate(scan.distances(order, shape)):
            want = []
            for token in walk("spatial-row", shape):
                other = tuple(n + (i == axis) for i, n in enumerate(token))
                if other in place:
                    want.append(abs(place[token] - place[other]))
                    if order in scan.SCANS[:4]:
                        best[token, axis] = min(want[-1], best.get((token, axis), 10**9))
            assert got.tolist() == want
    rms = [[n for (_, a), n in best.items() if a == axis] for axis in range(3)]
    assert [d.tolist() for d in scan.distances("rms", shape)] == rms
    assert all(n == 1 for axis in rms for n in axis)  # each axis is the fast one in some layer


@pytest.mark.parametrize(
    "order, error, words",
    [
        ("spatial-rows", ValueError, "did you mean 'spatial-row'.*temporal-column.* and zigzag"),
        ("", ValueError, "spatial-row"),
        (-1, ValueError, "count from 0"),
        (True, TypeError, "True"),
        (1.0, TypeError, "1.0"),
        (None, TypeError, "None"),
    ],
)
def test_bad_orders(order, error, words):
    with pytest.raises(error, match=words):
        scan.to_sequence(torch.ones(1, 2, 2, 2, 1), order)
    with pytest.raises(error, match=words):
        scan.to_grid(torch.ones(1, 8, 1), order, (2, 2, 2))


def test_bad_shapes():
    for shape in [(2, 2, 2, 2), (1, 1, 2, 2, 2, 2), (1, 0, 2, 2, 3)]:
        with pytest.raises(ValueError, match="expected"):
            scan.to_sequence(torch.ones(shape), 0)
    with pytest.raises(ValueError, match="expected"):
        scan.to_grid(torch.ones(1, 2, 2, 2), 0, (2, 2, 2))
    for shape in [(2, 2, 3), (8,), (2, 4), (-2, -2, 2), (2.0, 2, 2), (1, 2, 2, 2)]:
        for order in (0, "zigzag"):
            with pytest.raises(ValueError, match="does not hold the 8 tokens"):
                scan.to_grid(torch.ones(1, 8, 1), order, shape)


def run(*arguments, folder):
    return subprocess.run([sys.executable, Path(scan.__file__), *arguments], cwd=folder, capture_output=True, text=True)


def test_script(tmp_path):
    done = run("--grid", "2", "3", "5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "RMS, best of four layers" in done.stdout and "100 %" in done.stdout
    with Image.open(tmp_path / "scan_orders.png") as img:
        assert img.width <= 1100 and len(img.getcolors(1 << 20)) > 10
    assert run("--grid", "1", "1", "1", folder=tmp_path).returncode == 0


def test_script_refuses_with_one_message(tmp_path):
    for bad in ("--grid 0 1 1", "--grid 2 x 1", "--within 0", "--grid 999999 9999 9"):
        done = run(*bad.split(), folder=tmp_path)
        assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr
    for out in ("no/such/folder.png", "orders.nonsense"):
        done = run("--out", out, folder=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr and out in done.stderr
    assert not list(tmp_path.iterdir())
