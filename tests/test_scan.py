"""scan.py against the index formulas of its header, the zigzag against nested loops."""

import re
import runpy

import pytest
import torch

import scan

SHAPES = [(3, 5, 7), (1, 1, 1), (1, 4, 6), (5, 1, 3), (2, 3, 1), (1, 1, 4), (4, 8, 8), (2, 2, 2)]
ORDERS = ["spatial-row", "spatial-column", "temporal-row", "temporal-column", "zigzag"]


def places(order, shape):
    """The place of each token in the sequence: int64 (t, h, w)."""
    T, H, W = shape
    t, y, x = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    return {
        "zigzag": zigzag(shape),
        "spatial-row": t * H * W + y * W + x,
        "spatial-column": t * H * W + x * H + y,
        "temporal-row": (y * W + x) * T + t,
        "temporal-column": (x * H + y) * T + t,
    }[order]


def zigzag(shape):
    where = torch.empty(shape, dtype=torch.int64)
    place, down, right = 0, True, True
    for f in range(shape[0]):
        for y in range(shape[1]) if down else reversed(range(shape[1])):
            for x in range(shape[2]) if right else reversed(range(shape[2])):
                where[f, y, x] = place
                place += 1
            right = not right
        down = not down
    return where


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", [*ORDERS, *range(9)])
def test_tokens_stand_at_their_places_and_come_back_and_so_do_gradients(order, shape):
    name = ORDERS[order % 4] if isinstance(order, int) else order  # layer numbers count modulo 4
    where = places(name, shape)
    assert torch.equal(scan.places(order, shape), where) and scan.SCANS == tuple(ORDERS[:4])
    grid, change = torch.randn(2, 2, *shape, 3, requires_grad=True)
    seq = scan.to_sequence(grid, order)
    assert torch.equal(seq[:, where.flatten()], grid.flatten(1, 3))
    back = scan.to_grid(seq, order, shape)
    assert torch.equal(back, grid)
    pull = scan.to_sequence(change, order)
    for out, gradient in ((seq, pull), (back, change)):  # gradients go with their tokens
        assert torch.equal(torch.autograd.grad(out, grid, gradient, retain_graph=True)[0], change)


def operations(node):
    """The names of the operations behind a node of autograd, joined."""
    return node.name() + operations(node.next_functions[0][0]) if node.next_functions else ""


@pytest.mark.parametrize("order", ORDERS)
def test_only_the_zigzag_gathers_and_spatial_row_does_not_even_copy(order):
    grid = torch.randn(2, 3, 5, 7, 4, requires_grad=True)
    seq = scan.to_sequence(grid, order)
    back = scan.to_grid(seq, order, (3, 5, 7))
    names = operations(back.grad_fn)
    assert ("Index" in names or "Gather" in names) == (order == "zigzag"), names
    assert (seq.data_ptr() == grid.data_ptr()) == (order == "spatial-row")
    assert (back.data_ptr() == seq.data_ptr()) == (order != "zigzag")  # the way back is a view


def test_the_zigzag_steps_only_to_direct_neighbours():
    for shape in [(t, h, w) for t in range(1, 5) for h in range(1, 6) for w in range(1, 6)]:
        grid = torch.cartesian_prod(*map(torch.arange, shape)).view(1, *shape, 3)
        seq = scan.to_sequence(grid, "zigzag")[0]
        assert torch.all(seq.diff(dim=0).abs().sum(1) == 1), shape
        assert len(seq.unique(dim=0)) == len(seq), shape


def test_unknown_orders_and_shapes_that_do_not_hold_the_tokens_raise():
    for order in ("spatial-rows", "", None, 1.0):
        with pytest.raises(ValueError, match="spatial-row, .*temporal-column or zigzag"):
            scan.to_sequence(torch.ones(1, 2, 2, 2, 1), order)
        with pytest.raises(ValueError, match="spatial-row, .*temporal-column or zigzag"):
            scan.to_grid(torch.ones(1, 8, 1), order, (2, 2, 2))
    for order in ORDERS:
        for shape in ((2, 2, 3), (8,), (2, 4), (1, 2, 2, 2)):
            with pytest.raises(ValueError):
                scan.to_grid(torch.ones(1, 8, 1), order, shape)


def test_the_script_prints_mean_and_largest_distances_between_neighbours(capsys):
    runpy.run_path(scan.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:16].strip(): re.findall(r"[\d.]+", line[16:]) for line in lines}
    for order in ORDERS:
        apart = [places(order, (4, 8, 8)).double().diff(dim=axis).abs() for axis in range(3)]
        assert " ".join(rows[order]) == " ".join(f"{d.mean():.1f} {d.max():.0f}" for d in apart)
    assert rows["rotary, best"] == ["1.0"] * 3  # each axis is the fast one in some layer
