from itertools import pairwise, product

import pytest
import torch

from nnunet_ssl.blocks.mixing import (
    block_mask,
    box_mask,
    cell_means,
    grid_shape,
    halves,
    mix,
    mix_halves,
    random_order,
    shuffle_cells,
)

# patch, cells asked for per axis, grid that gives every cell at least 8 voxels
GRIDS = [
    ((112, 112, 80), 4, (4, 4, 4)),
    ((19, 23, 31), 4, (2, 2, 3)),
    ((37, 50, 64), 4, (4, 4, 4)),
    ((20, 256, 33), 5, (2, 5, 4)),
    ((1, 40, 40), 4, (1, 4, 4)),
    ((7, 16, 33), 4, (1, 2, 4)),
    ((64, 8, 15), 3, (3, 1, 1)),
    ((35, 61), 4, (4, 4)),
    ((9, 127), 7, (1, 7)),
]
PATCHES = [(19, 23, 31), (35, 61)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def edges(size, count):
    return [round(i * size / count) for i in range(count + 1)]


def cell_values(mask, grid):
    """The one value of every cell, (B, cells); fails where a cell has both values."""
    bounds = [list(pairwise(edges(size, count))) for size, count in zip(mask.shape[2:], grid, strict=True)]
    values = []
    for box in product(*bounds):
        cell = mask[(slice(None), 0, *(slice(*bound) for bound in box))].flatten(1)
        assert torch.equal(cell.all(1), cell.any(1)), box
        values.append(cell[:, 0])
    return torch.stack(values, 1)


def tagged(source, patch, batch_size=3):
    """An image with two channels (source, voxel) and a target that holds both in one number."""
    voxels = torch.arange(batch_size * torch.Size(patch).numel()).view(batch_size, 1, *patch)
    image = torch.cat([torch.full_like(voxels, source), voxels], 1).float()
    return image, (1000 * source + voxels % 1000).int()


@pytest.mark.parametrize(("patch", "cells", "grid"), GRIDS)
def test_the_grid_has_the_cells_asked_for_where_each_keeps_eight_voxels(patch, cells, grid):
    assert grid_shape(patch, cells) == grid


@pytest.mark.parametrize("size", range(1, 8))
def test_an_axis_of_fewer_than_eight_voxels_has_one_cell(size):
    assert grid_shape((size, 8, 16), 4) == (1, 1, 2)
    mask = block_mask(5, (size, 32, 32), generator=generator())
    assert mask.shape == (5, 1, size, 32, 32)
    assert torch.equal(mask, mask[:, :, :1].expand_as(mask))


@pytest.mark.parametrize(("patch", "cells", "grid"), GRIDS)
def test_masks_are_boolean_with_a_channel_axis(patch, cells, grid):
    mask = block_mask(3, patch, cells=cells, generator=generator())
    assert mask.dtype == torch.bool
    assert mask.shape == (3, 1, *patch)
    assert mask.device.type == "cpu"


@pytest.mark.parametrize(("patch", "cells", "grid"), GRIDS)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_every_mask_is_constant_in_a_cell_and_has_the_same_number_of_zero_cells(patch, cells, grid, ratio):
    values = cell_values(block_mask(3, patch, cells=cells, ratio=ratio, generator=generator()), grid)
    total = values.shape[1]
    expected = min(max(round(ratio * total), 1), total - 1)
    assert (~values).sum(1).tolist() == [expected] * 3


@pytest.mark.parametrize(("patch", "cells", "grid"), GRIDS)
def test_masks_change_at_every_cell_edge_and_nowhere_else(patch, cells, grid):
    mask = block_mask(16, patch, cells=cells, generator=generator())
    for axis, (size, count) in enumerate(zip(patch, grid, strict=True), start=2):
        changes = mask.narrow(axis, 1, size - 1) != mask.narrow(axis, 0, size - 1)
        where = changes.movedim(axis, 0).flatten(1).any(1).nonzero().flatten() + 1
        assert where.tolist() == edges(size, count)[1:-1]


@pytest.mark.parametrize(("patch", "cells", "grid"), GRIDS)
def test_every_cell_covers_its_share_of_the_axis_up_to_rounding(patch, cells, grid):
    for size, count in zip(patch, grid, strict=True):
        widths = [upper - lower for lower, upper in pairwise(edges(size, count))]
        assert sum(widths) == size
        assert all(abs(width - size / count) < 1 for width in widths)
        assert all(width >= min(size, 8) for width in widths)


def test_four_cells_on_the_papers_patch_give_half_of_64_blocks_of_28_x_28_x_20():
    mask = block_mask(6, (112, 112, 80), cells=4, ratio=0.5, generator=generator())
    blocks = mask.view(6, 4, 28, 4, 28, 4, 20).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
    assert torch.equal(blocks.all(-1), blocks.any(-1))
    assert (~blocks.any(-1)).flatten(1).sum(1).tolist() == [32] * 6
    assert (~mask).flatten(1).sum(1).tolist() == [112 * 112 * 80 // 2] * 6


@pytest.mark.parametrize("patch", PATCHES)
def test_every_mask_has_both_values_even_with_an_extreme_ratio(patch):
    for ratio, rare in ((0.001, False), (0.999, True)):
        mask = block_mask(8, patch, ratio=ratio, generator=generator())
        grid = grid_shape(patch, 4)
        assert (cell_values(mask, grid) == rare).sum(1).tolist() == [1] * 8


@pytest.mark.parametrize("patch", [*PATCHES, (5, 6, 7)])
def test_ratio_0_keeps_the_first_image_everywhere_and_ratio_1_nowhere(patch):
    assert block_mask(3, patch, ratio=0).all()
    assert not block_mask(3, patch, ratio=1).any()


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_a_grid_of_one_cell_rounds_the_ratio_to_all_or_nothing(ratio):
    mask = block_mask(3, (7, 7, 7), ratio=ratio)
    assert mask.all() if round(ratio) == 0 else not mask.any()


@pytest.mark.parametrize("patch", [(32, 32, 32), (64, 64)])
def test_samples_of_a_batch_get_different_masks(patch):
    mask = block_mask(16, patch, generator=generator())
    assert len({sample.numpy().tobytes() for sample in mask}) == 16


def test_no_samples_give_an_empty_mask():
    mask = block_mask(0, (19, 23, 31))
    assert mask.shape == (0, 1, 19, 23, 31)
    assert mask.dtype == torch.bool


def test_a_generator_decides_the_masks_and_the_global_one_is_the_default():
    first = block_mask(4, (32, 32), generator=generator(1))
    torch.manual_seed(5)
    assert torch.equal(first, block_mask(4, (32, 32), generator=generator(1)))
    assert not torch.equal(first, block_mask(4, (32, 32), generator=generator(2)))
    from_global = block_mask(4, (32, 32))
    torch.manual_seed(5)
    assert torch.equal(from_global, block_mask(4, (32, 32)))
    assert not torch.equal(from_global, block_mask(4, (32, 32)))


def test_every_cell_and_every_pair_of_cells_is_equally_likely():
    draws, total = 6000, 16
    zeros = (~cell_values(block_mask(draws, (32, 32), generator=generator()), (4, 4))).double()
    together = zeros.T @ zeros / draws
    pair = 8 / 16 * 7 / 15  # both among the 8 of 16 that are drawn without replacement
    sigma = (0.25 / draws) ** 0.5
    assert together.diagonal().sub(0.5).abs().max() < 5 * sigma
    assert together[~torch.eye(total, dtype=torch.bool)].sub(pair).abs().max() < 5 * sigma


def test_every_choice_of_zero_cells_is_equally_likely():
    draws = 6000
    values = cell_values(block_mask(draws, (16, 16), generator=generator()), (2, 2))
    counts = torch.bincount((values * torch.tensor([1, 2, 4, 8])).sum(1), minlength=16)
    possible = [code for code in range(16) if code.bit_count() == 2]
    assert counts.sum() == counts[possible].sum()
    assert (counts[possible] - draws / 6).abs().max() < 5 * (draws / 6 * 5 / 6) ** 0.5


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_of_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        block_mask(1, (16, 16), ratio=ratio)


@pytest.mark.parametrize("cells", [0, -1])
def test_less_than_one_cell_per_axis_is_refused(cells):
    with pytest.raises(ValueError, match="at least one cell"):
        block_mask(1, (16, 16), cells=cells)


@pytest.mark.parametrize("patch", PATCHES)
def test_image_and_target_come_from_the_same_source_and_voxel_after_mixing(patch):
    (image_a, target_a), (image_b, target_b) = tagged(1, patch), tagged(2, patch)
    mask = block_mask(3, patch, generator=generator())
    for keep_first, keeps_a in ((mask, mask), (~mask, ~mask)):
        image, target = mix(image_a, image_b, keep_first), mix(target_a, target_b, keep_first)
        assert torch.equal(image[:, :1], torch.where(keeps_a, 1.0, 2.0))
        assert torch.equal(image[:, 1], image_a[:, 1])
        assert torch.equal(target, (1000 * image[:, :1] + image[:, 1:] % 1000).int())
        assert target.dtype == torch.int32


@pytest.mark.parametrize("patch", PATCHES)
def test_a_mask_of_1_keeps_the_first_and_a_mask_of_0_takes_the_second(patch):
    (first, _), (second, _) = tagged(1, patch), tagged(2, patch)
    mask = torch.ones(3, 1, *patch, dtype=torch.bool)
    assert torch.equal(mix(first, second, mask), first)
    assert torch.equal(mix(first, second, ~mask), second)


def test_mixing_an_image_with_itself_changes_nothing():
    x = torch.randn(3, 2, 19, 23, 31, generator=generator())
    assert torch.equal(mix(x, x, block_mask(3, x.shape[2:])), x)


def test_swapped_mixes_restore_both_images():
    first, second = torch.randn(2, 3, 2, 35, 61, generator=generator())
    mask = block_mask(3, (35, 61), generator=generator())
    one, other = mix(first, second, mask), mix(second, first, mask)
    assert not torch.equal(one, first)
    assert torch.equal(mix(one, other, mask), first)
    assert torch.equal(mix(other, one, mask), second)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_a_mask_of_numbers_mixes_like_the_boolean_one(dtype):
    first, second = torch.randn(2, 3, 1, 16, 16, generator=generator())
    mask = block_mask(3, (16, 16), generator=generator())
    assert torch.equal(mix(first, second, mask.to(dtype)), mix(first, second, mask))


def test_mixing_leaves_its_inputs_alone():
    first, second = torch.zeros(2, 1, 16, 16), torch.ones(2, 1, 16, 16)
    mix(first, second, block_mask(2, (16, 16)))
    assert not first.any()
    assert second.all()


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (2, 2, 16, 16), (2, 1, 1, 16), (2, 16, 16)])
def test_tensors_of_different_shapes_are_not_mixed(shape):
    with pytest.raises(ValueError, match="same shape"):
        mix(torch.zeros(2, 1, 16, 16), torch.zeros(shape), block_mask(2, (16, 16)))


def test_nothing_leaks_from_the_source_that_was_not_taken():
    first, mask = torch.randn(2, 1, 16, 16, generator=generator()), block_mask(2, (16, 16), generator=generator())
    broken = torch.where(mask, float("nan"), 1.0)
    assert torch.equal(mix(first, broken, mask), torch.where(mask, first, 1.0))


def test_the_gradient_reaches_only_the_source_that_was_taken():
    first, second = (x.requires_grad_() for x in torch.randn(2, 3, 2, 32, 32, generator=generator()).unbind())
    mask = block_mask(3, (32, 32), generator=generator())
    mix(first, second, mask).sum().backward()
    assert torch.equal(first.grad, mask.expand_as(first).float())
    assert torch.equal(second.grad, (~mask).expand_as(second).float())


@pytest.mark.parametrize(
    ("size", "order"),
    [(1, [0, 0]), (2, [0, 1]), (3, [0, 1, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 2, 3, 4])],
)
def test_halves_follow_each_other_and_share_the_middle_of_an_odd_batch(size, order):
    x = torch.arange(size).view(size, 1, 1, 1).expand(size, 2, 3, 3)
    assert halves(x).shape == (len(order), 2, 3, 3)
    assert halves(x)[:, 0, 0, 0].tolist() == order


@pytest.mark.parametrize("patch", [(12, 17, 20), (9, 30)])
@pytest.mark.parametrize("side", [0.5, 2 / 3, 0.01, 1.0])
def test_a_box_mask_is_zero_in_one_box_inside_the_patch(patch, side):
    mask = box_mask(20, patch, side=side, generator=generator())
    assert mask.dtype == torch.bool
    assert mask.shape == (20, 1, *patch)
    for sample in ~mask[:, 0]:
        voxels = sample.nonzero()
        lower, upper = voxels.amin(0), voxels.amax(0) + 1
        assert (upper - lower).tolist() == [max(1, round(side * size)) for size in patch]
        assert len(voxels) == (upper - lower).prod()  # no holes


def test_every_place_of_the_box_is_as_probable_as_the_others_on_every_axis():
    mask = box_mask(4000, (8, 6), side=0.5, generator=generator())
    starts = torch.stack([(~m[0]).nonzero().amin(0) for m in mask])
    for axis, places in enumerate((5, 4)):  # a box of 4 in 8, of 3 in 6
        counts = starts[:, axis].bincount()
        assert len(counts) == places
        assert (counts / 4000 - 1 / places).abs().max() < 0.03
    together = (starts[:, 0] * 4 + starts[:, 1]).bincount()
    assert (together / 4000 - 1 / 20).abs().max() < 0.015  # the axes are independent


def test_no_box_masks_for_no_samples_and_a_generator_decides():
    assert box_mask(0, (8, 8)).shape == (0, 1, 8, 8)
    first, again, other = (box_mask(4, (20, 20, 20), generator=generator(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("side", [0, -0.5, 1.1])
def test_a_side_outside_of_0_to_1_is_refused(side):
    with pytest.raises(ValueError, match="side"):
        box_mask(1, (8, 8), side=side)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("patch", PATCHES)
def test_halves_are_mixed_from_sources_that_the_mask_names(size, patch):
    (labeled, labels), (unlabeled, pseudo) = (tagged(source, patch, size) for source in (1, 2))
    half = (size + 1) // 2
    kept = block_mask(2 * half, patch, generator=generator())
    image, target = mix_halves(labeled, labels, unlabeled, pseudo, kept)
    assert len(image) == len(target) == 2 * half
    source, voxel = image[:, :1], image[:, 1:]
    assert torch.equal(source == 1, kept)
    assert torch.equal(target, (1000 * source + voxel % 1000).int())  # the same source and voxel
    for half_of, samples in ((0, range(half)), (half, range(size - half, size))):
        for index, sample in enumerate(samples):
            assert torch.equal(voxel[half_of + index], labeled[sample, 1:])


@pytest.mark.parametrize("patch", [*PATCHES, (16, 16, 16), (1, 40, 40), (7, 9)])
def test_shuffled_cells_keep_image_and_target_together_and_come_back(patch):
    (image, target), (other, label) = tagged(1, patch), tagged(2, patch)
    order = random_order(3, patch, cells=4)
    images, targets = shuffle_cells(image, other, order), shuffle_cells(target, label, order)
    for mixed, its in zip(images, targets, strict=True):
        assert torch.equal(1000 * mixed[:, :1].int() + mixed[:, 1:].int() % 1000, its)
    if torch.Size(grid_shape(patch, 4)).numel() > 1:
        assert not torch.equal(images[0], image)
        assert {1, 2} == {int(value) for value in images[0][:, 0].unique()}
    for back, original in zip(shuffle_cells(*images, order.argsort(1)), (image, other), strict=True):
        assert torch.equal(back, original)


def test_a_cell_goes_to_the_place_of_its_order_and_what_remains_stays():
    first, second = torch.arange(34.0).view(1, 1, 2, 17), 100 + torch.arange(34.0).view(1, 1, 2, 17)
    order = torch.tensor([[3, 0, 1, 2]])  # one row of two cells of 8 voxels per image
    a, b = shuffle_cells(first, second, order, cells=2)
    assert torch.equal(a[..., :8], second[..., 8:16])
    assert torch.equal(a[..., 8:16], first[..., :8])
    assert torch.equal(b[..., :8], first[..., 8:16])
    assert torch.equal(b[..., 8:16], second[..., :8])
    assert torch.equal(a[..., 16], first[..., 16])
    assert torch.equal(b[..., 16], second[..., 16])


def test_every_cell_is_as_probable_at_every_place():
    order = random_order(4000, (16, 16, 16), cells=4)
    assert order.shape == (4000, 16)
    for place in range(16):
        assert order[:, place].bincount(minlength=16).min() > 180  # 250 are expected


@pytest.mark.parametrize("patch", [(19, 23, 31), (1, 40, 43), (35, 61)])
def test_the_mean_of_a_cell_moves_with_it(patch):
    first, second = torch.randn(2, 2, 3, *patch)
    order = random_order(2, patch, cells=4)
    before, after = (
        torch.cat([cell_means(x, cells=4) for x in pair], 2)
        for pair in ((first, second), shuffle_cells(first, second, order, cells=4))
    )
    for sample in range(2):
        torch.testing.assert_close(after[sample], before[sample][:, order[sample]])
    sizes = [size // count for size, count in zip(patch, grid_shape(patch, 4), strict=True)]
    corner = first[(..., *(slice(size) for size in sizes))]
    torch.testing.assert_close(cell_means(first)[:, :, 0], corner.flatten(2).mean(2))
