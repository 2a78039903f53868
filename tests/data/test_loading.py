import builtins
import errno
import io
import pickle
from collections import Counter
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_ssl.data import loading
from nnunet_ssl.data.augmentation import NEEDS_LABELS, OnDevice, split_transforms
from nnunet_ssl.data.loading import (
    Batch,
    LabeledDataLoader,
    PairedDataLoader,
    UnlabeledDataLoader,
    UnlabeledDataset,
    to_device,
)
from nnunet_ssl.data.preprocessed import find_unlabeled
from nnunet_ssl.training.preflight import check_channels

SHAPE = (18, 20, 22)
PATCH = {2: (16, 12), 3: (8, 16, 12)}
INTENSITY = [
    "GaussianNoiseTransform",
    "GaussianBlurTransform",
    "MultiplicativeBrightnessTransform",
    "ContrastTransform",
    "SimulateLowResolutionTransform",
    "GammaTransform",
    "GammaTransform",
]
views = pytest.mark.parametrize("weak_view", [False, True])
dimensions = pytest.mark.parametrize("dim", [2, 3])


@pytest.fixture(autouse=True)
def seed():
    seed_all(0)


def seed_all(value):
    np.random.seed(value)
    torch.manual_seed(value)


def training_transforms(patch=PATCH[3], *, dummy_2d=False, mask=None, mirror=True, geometry=0.0, intensity=0.0):
    """nnU-Net's training transforms; rotation and scaling, and each of the others, fire with a given probability."""
    transforms = nnUNetTrainer.get_training_transforms(
        patch, (-0.5, 0.5), [[1] * len(patch), [0.5] * len(patch)], tuple(range(len(patch))) if mirror else (),
        dummy_2d, use_mask_for_norm=mask, foreground_labels=[1],
    )  # fmt: skip
    for transform in transforms.transforms:
        if isinstance(transform, SpatialTransform):
            transform.p_rotation = transform.p_scaling = geometry
        elif isinstance(transform, RandomTransform):
            transform.apply_probability = intensity
    return transforms


def numbered(shape=SHAPE, channels=1):
    """An image in which every voxel is its own number, from 1; further channels are shifted by a million."""
    voxels = 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return np.stack([voxels + 1e6 * channel for channel in range(channels)])


def write_case(folder, case, image, *, labels=True):
    """A preprocessed case as nnU-Net stores it; without labels only its image."""
    file = str(folder / case)
    if labels:
        seg = (image[:1] > image[:1].mean()).astype(np.int8)
        locations = {1: np.argwhere(seg)[:50]}
        nnUNetDatasetBlosc2.save_case(image, seg, {"class_locations": locations}, file, image.shape, image.shape)
    else:
        blosc2.asarray(np.ascontiguousarray(image), urlpath=f"{file}.b2nd")


def dataset(folder, images, *, labels=False):
    for case, image in images.items():
        write_case(folder, case, image, labels=labels)
    return UnlabeledDataset({case: folder / f"{case}.b2nd" for case in images})


def unlabeled_loader(data, transforms, *, dim=3, initial=None, batch_size=2, weak_view=True, labels=None):
    manager = LabelManager(labels or {"background": 0, "blob": 1}, None)
    return UnlabeledDataLoader(data, batch_size, initial or PATCH[dim], PATCH[dim], manager, transforms, weak_view)


def crop_loader(patch=PATCH[3], **kwargs):
    """A loader without data, for the augmentation of single crops."""
    manager = LabelManager({"background": 0, "blob": 1}, None)
    return UnlabeledDataLoader(
        UnlabeledDataset({}), 1, patch, patch, manager, training_transforms(patch, **kwargs), True
    )


def paired_loader(folder, *, dim=3, weak_view=False, **kwargs):
    rng = np.random.default_rng(0)
    images = {f"case_{i}": rng.standard_normal((1, *SHAPE)).astype(np.float32) for i in range(3)}
    (folder / "labeled").mkdir()
    (folder / "unlabeled").mkdir()
    dataset(folder / "labeled", images, labels=True)
    transforms = training_transforms(PATCH[dim], **kwargs)
    manager = LabelManager({"background": 0, "blob": 1}, None)
    labeled = nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(folder / "labeled")), 2, PATCH[dim], PATCH[dim], manager, transforms=transforms
    )
    unlabeled = unlabeled_loader(
        dataset(folder / "unlabeled", images), transforms, dim=dim, weak_view=weak_view, batch_size=2
    )
    return PairedDataLoader(labeled, unlabeled)


def names(transforms):
    return [type(getattr(t, "transform", t)).__name__ for t in transforms.transforms]


class Scale(ImageOnlyTransform):
    """An intensity transform that works in place, as some of nnU-Net's do."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def _apply_to_image(self, img, **params):
        return img.mul_(self.factor)


# ---- Batch ----


@pytest.mark.parametrize("deep", [False, True])
def test_labels_of_a_batch_are_the_target_at_full_resolution(deep):
    full, half = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4)
    batch = Batch(image=full, target=[full, half] if deep else full, unlabeled=full)
    assert batch.labels is full
    assert batch.unlabeled_weak is None


# ---- UnlabeledDataset ----


def test_the_dataset_opens_nothing_before_an_image_is_asked_for(tmp_path):
    data = UnlabeledDataset({case: tmp_path / f"{case}.b2nd" for case in ("b", "c", "a")})
    assert data.identifiers == ["a", "b", "c"]
    assert len(data) == 3


def test_the_dataset_reads_the_image_lazily(tmp_path):
    image = numbered(channels=2)
    loaded = dataset(tmp_path, {"a": image}).load_image("a")
    assert isinstance(loaded, blosc2.NDArray)
    assert loaded.shape == (2, *SHAPE)
    np.testing.assert_array_equal(loaded[:], image)


def delete(file):
    file.unlink()


def corrupt(file):
    file.write_bytes(b"not readable")


@pytest.mark.parametrize("damage", [delete, corrupt])
def test_batches_do_not_depend_on_anything_that_knows_labels(tmp_path, damage):
    def batches():
        np.random.seed(3)
        torch.manual_seed(3)
        loader = unlabeled_loader(data, training_transforms(mask=[True], geometry=1, intensity=1))
        return [next(loader) for _ in range(3)]

    data = dataset(tmp_path, {"a": numbered(), "b": -numbered()}, labels=True)
    expected = batches()
    for case in data.identifiers:
        damage(tmp_path / f"{case}_seg.b2nd")
        damage(tmp_path / f"{case}.pkl")
    for before, after in zip(expected, batches(), strict=True):
        assert list(before) == list(after) == ["unlabeled", "unlabeled_weak"]
        assert all(torch.equal(before[name], after[name]) for name in before)


def recording(function, opened):
    def record(*args, **kwargs):
        opened.add(Path(str(args[0] if args else kwargs["urlpath"])).name)
        return function(*args, **kwargs)

    return record


def test_only_the_images_are_ever_opened(tmp_path, monkeypatch):
    data = dataset(tmp_path, {"a": numbered(), "b": numbered()}, labels=True)
    opened = set()
    for module in (builtins, io, blosc2):
        monkeypatch.setattr(module, "open", recording(module.open, opened))
    loader = unlabeled_loader(data, training_transforms(mask=[True]), batch_size=8)
    for _ in range(3):
        next(loader)
    files = {file.name for file in tmp_path.iterdir()}
    assert opened & files == {"a.b2nd", "b.b2nd"}
    nnUNetDatasetBlosc2(str(tmp_path)).load_case("a")  # and whoever reads labels is noticed
    assert opened & files == {"a.b2nd", "b.b2nd", "a_seg.b2nd", "a.pkl"}


@pytest.mark.parametrize(
    ("error", "blamed"),
    [(OSError(errno.EMFILE, "Too many open files"), False), (MemoryError(), False), (RuntimeError("blosc2"), True)],
)
def test_a_file_is_blamed_for_its_own_errors_only(tmp_path, monkeypatch, error, blamed):
    def fail(*_):
        raise error

    pair = paired_loader(tmp_path)
    manager = LabelManager({"background": 0, "blob": 1}, None)
    labeled = LabeledDataLoader(pair.labeled._data, 2, PATCH[3], PATCH[3], label_manager=manager)
    unlabeled = pair.unlabeled._data
    predicted = UnlabeledDataset(unlabeled.files, {"a": tmp_path / "a.pkl"})
    monkeypatch.setattr(unlabeled, "load_image", fail)
    monkeypatch.setattr(labeled._data, "load_case", fail)
    monkeypatch.setattr("nnunet_ssl.data.loading.load_pickle", fail)
    for read in (
        lambda: next(pair.unlabeled),
        lambda: next(labeled),
        lambda: check_channels(unlabeled, 1, Path("dataset.json")),
        lambda: predicted.class_locations("a"),
    ):
        with pytest.raises(type(error)) as raised:
            read()
        assert (raised.value is error) != blamed
        assert ("damaged" in str(raised.value)) == blamed


# ---- split_transforms ----


@pytest.mark.parametrize("dummy_2d", [False, True])
@pytest.mark.parametrize("mask", [None, [False], [True]])
@pytest.mark.parametrize("mirror", [False, True])
def test_every_training_transform_of_nnunet_has_its_place(dummy_2d, mask, mirror):
    transforms = training_transforms(dummy_2d=dummy_2d, mask=mask, mirror=mirror)
    geometry, intensity, masking = split_transforms(transforms)
    spatial = ["Convert3DTo2DTransform", "SpatialTransform", "Convert2DTo3DTransform"]
    assert names(geometry) == (spatial if dummy_2d else spatial[1:2]) + ["MirrorTransform"] * mirror
    assert names(intensity) == INTENSITY
    assert names(masking) == ["MaskImageTransform"] * (mask == [True])
    placed = Counter(id(t) for part in (geometry, intensity, masking) for t in part.transforms)
    assert set(placed.values()) == {1}
    left_out = [t for t in transforms.transforms if id(t) not in placed]
    assert names(ComposeTransforms(left_out)) == ["RemoveLabelTransform", "DownsampleSegForDSTransform"]
    assert all(isinstance(t, NEEDS_LABELS) for t in left_out)


def test_splitting_leaves_the_labeled_streams_transforms_alone():
    transforms = training_transforms(mask=[True])
    before = list(transforms.transforms)
    split_transforms(transforms)
    assert transforms.transforms == before


@pytest.mark.parametrize("wrap", [False, True])
def test_a_transform_that_may_move_voxels_and_is_unknown_is_refused(wrap):
    unknown = TransposeAxesTransform((0, 1, 2))
    transforms = ComposeTransforms([*training_transforms().transforms, RandomTransform(unknown) if wrap else unknown])
    with pytest.raises(NotImplementedError, match="TransposeAxesTransform"):
        split_transforms(transforms)


# ---- views ----


@pytest.mark.parametrize(
    ("patch", "dummy_2d"), [((16, 12), False), ((8, 16, 12), False), ((4, 16, 12), True)], ids=["2d", "3d", "dummy2d"]
)
def test_views_are_equal_when_no_intensity_transform_fires(patch, dummy_2d):
    loader = crop_loader(patch, dummy_2d=dummy_2d, geometry=1)
    crop = torch.from_numpy(numbered(patch, channels=2))
    moved = 0
    for _ in range(6):
        sample = loader.augment(crop.clone())
        assert sample["unlabeled"].shape == crop.shape
        assert torch.equal(sample["unlabeled"], sample["unlabeled_weak"])
        moved += not torch.equal(sample["unlabeled"], crop)
    assert moved == 6


@pytest.mark.parametrize(
    ("patch", "dummy_2d"), [((16, 12), False), ((8, 16, 12), False), ((4, 16, 12), True)], ids=["2d", "3d", "dummy2d"]
)
def test_intensity_changes_the_strong_view_only_and_voxel_by_voxel(patch, dummy_2d):
    loader = crop_loader(patch, dummy_2d=dummy_2d, geometry=1)
    loader.intensity = ComposeTransforms([Scale(3)])
    crop = torch.from_numpy(numbered(patch))
    for _ in range(6):
        sample = loader.augment(crop.clone())
        torch.testing.assert_close(sample["unlabeled"], 3 * sample["unlabeled_weak"])
        assert sample["unlabeled"].any()


@pytest.mark.parametrize("mask", [None, [True, False], [True, True]])
@pytest.mark.parametrize("patch", [(16, 12), (8, 16, 12)], ids=["2d", "3d"])
def test_augmentation_on_the_device_gives_the_same_views(patch, mask):
    for intensity in (0.3, 1.0):
        transforms = training_transforms(patch, mask=mask, geometry=1, intensity=intensity)
        for transform in transforms.transforms:
            if hasattr(getattr(transform, "transform", None), "benchmark"):
                transform.transform.benchmark = False  # two ways of blurring differ by rounding
        data, manager = UnlabeledDataset({}), LabelManager({"background": 0, "blob": 1}, None)
        crop, _ = masked_crop(2, patch)
        for number in range(6):
            found = []
            for strong_view in (True, False):
                loader = UnlabeledDataLoader(data, 1, patch, patch, manager, transforms, True, strong_view)
                seed_all(number)
                sample = {name: view[None] for name, view in loader.augment(crop.clone()).items()}
                if not strong_view:
                    assert "unlabeled" not in sample
                    views = to_device(sample, torch.device("cpu"), True, OnDevice(transforms))
                    sample = {"unlabeled": views.unlabeled, "unlabeled_weak": views.unlabeled_weak}
                found.append(sample)
            for name, view in found[0].items():
                assert torch.equal(view, found[1][name]), name
            assert not torch.equal(found[0]["unlabeled"], found[0]["unlabeled_weak"]) or intensity < 1


@pytest.mark.parametrize("patch", [(16, 12), (8, 16, 12)], ids=["2d", "3d"])
def test_augmentation_on_the_device_waits_for_nothing_there_and_needs_nothing_from_here(patch):
    """A tensor without values: reading one raises, and so do most operations with a tensor that is elsewhere."""
    transforms = training_transforms(patch, mask=[True, False], intensity=1)
    weak, outside = torch.empty(3, 2, *patch, device="meta"), torch.empty(3, 1, *patch, device="meta", dtype=torch.bool)
    for view in OnDevice(transforms)(weak, outside):
        assert view.is_meta
        assert view.shape == weak.shape


def test_augmentation_on_the_device_refuses_transforms_that_make_tensors_on_the_host():
    other = RandomTransform(BrightnessAdditiveTransform(0, 1))
    transforms = ComposeTransforms([*training_transforms().transforms, other])
    with pytest.raises(NotImplementedError, match=r"does not support Brightness.*Unset nnUNet_ssl"):
        OnDevice(transforms)


def test_views_show_the_same_anatomy_when_every_transform_fires():
    loader = crop_loader((16, 16, 16), geometry=1, intensity=1)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, 16, dtype=np.float32)] * 3, indexing="ij")
    for _ in range(6):
        sample = loader.augment(torch.from_numpy(z + 2 * y + 3 * x)[None])
        strong, weak = sample["unlabeled"], sample["unlabeled_weak"]
        assert not torch.allclose(strong, weak, atol=0.05)
        assert np.corrcoef(strong.flatten(), weak.flatten())[0, 1] > 0.8


@dimensions
def test_both_views_are_mirrored_along_the_same_axes(dim):
    patch = PATCH[dim]
    loader = crop_loader(patch)
    loader.intensity = ComposeTransforms([Scale(2)])
    crop = torch.from_numpy(numbered(patch))
    flips = [[axis + 1 for axis in range(dim) if code >> axis & 1] for code in range(2**dim)]
    seen = set()
    for _ in range(60):
        sample = loader.augment(crop.clone())
        (code,) = (c for c, axes in enumerate(flips) if torch.equal(sample["unlabeled_weak"], crop.flip(axes)))
        assert torch.equal(sample["unlabeled"], 2 * crop.flip(flips[code]))
        seen.add(code)
    assert seen == set(range(2**dim))


@pytest.mark.parametrize("transform", INTENSITY[:6])
def test_each_intensity_transform_leaves_the_weak_view_alone(transform):
    loader = crop_loader(intensity=1)
    loader.geometry.transforms.clear()
    keep = [t for t in loader.intensity.transforms if type(t.transform).__name__ == transform][:1]
    loader.intensity = ComposeTransforms(keep)
    crop = torch.randn(1, *PATCH[3])
    changed = 0
    for _ in range(8):
        sample = loader.augment(crop.clone())
        assert torch.equal(sample["unlabeled_weak"], crop)
        changed += not torch.equal(sample["unlabeled"], crop)
    assert changed


@pytest.mark.parametrize("mask", [None, [True]])
@pytest.mark.parametrize("geometry", [0, 1])
def test_the_crop_is_not_changed_in_place(mask, geometry):
    loader = crop_loader(mask=mask, mirror=False, geometry=geometry, intensity=1)
    crop = torch.randn(1, *PATCH[3])
    crop[:, :3] = 5e-4  # close enough to 0 to lie outside
    before = crop.clone()
    for _ in range(4):
        loader.augment(crop)
        assert torch.equal(crop, before)


def masked_crop(channels=1, patch=PATCH[3]):
    """Noise in the middle, 0 in a margin of two voxels; and where the margin is."""
    outside = torch.ones(1, *patch, dtype=torch.bool)
    outside[(slice(None), *[slice(2, -2)] * len(patch))] = False
    return torch.where(outside, 0.0, 1 + torch.rand(channels, *patch)), outside[0]


def test_voxels_outside_of_a_mask_normalised_image_are_0_in_both_views():
    loader = crop_loader(mask=[True, True], mirror=False, intensity=1)
    crop, outside = masked_crop(channels=2)
    sample = loader.augment(crop.clone())
    for view in sample.values():
        assert not view[:, outside].any()
        assert view[:, ~outside].all()
    assert not torch.equal(sample["unlabeled"], sample["unlabeled_weak"])


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_the_outside_follows_the_geometry_of_both_views(dummy_2d):
    loader = crop_loader(mask=[True], dummy_2d=dummy_2d, geometry=1, intensity=1)
    crop, _ = masked_crop()
    shapes = set()
    for _ in range(6):
        sample = loader.augment(crop.clone())
        empty = sample["unlabeled_weak"] == 0
        assert torch.equal(sample["unlabeled"] == 0, empty)
        assert 0 < empty.sum() < empty.numel()
        shapes.add(empty.numpy().tobytes())
    assert len(shapes) == 6


def test_a_voxel_that_is_0_in_one_channel_only_lies_inside():
    loader = crop_loader(mask=[True, True], mirror=False)
    crop, _ = masked_crop(channels=2)
    crop[0, 4, 8, 6] = 0
    for view in loader.augment(crop.clone()).values():
        assert torch.equal(view, crop)


def test_the_outside_is_not_touched_where_no_mask_was_used_for_the_normalisation():
    loader = crop_loader(mirror=False, intensity=1)
    crop, outside = masked_crop()
    sample = loader.augment(crop.clone())
    assert sample["unlabeled"][:, outside].any()
    assert torch.equal(sample["unlabeled_weak"], crop)


def test_the_outside_is_read_off_the_channels_that_were_normalised_with_a_mask():
    # as MR with CT: air is far from 0 in the channel that was normalised without a mask
    loader = crop_loader(mask=[True, False], mirror=False, intensity=1)
    crop, outside = masked_crop(channels=2)
    crop[1, outside] = -3
    sample = loader.augment(crop.clone())
    assert not sample["unlabeled_weak"][0, outside].any()
    assert not sample["unlabeled"][0, outside].any()
    assert sample["unlabeled"][1, outside].any()


# ---- UnlabeledDataLoader ----


@dimensions
@views
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_have_the_patch_that_the_network_sees(tmp_path, dim, weak_view, channels):
    data = dataset(tmp_path, {"a": numbered(channels=channels), "b": numbered(channels=channels)})
    initial = [size + 6 for size in PATCH[dim]]
    transforms = training_transforms(PATCH[dim], geometry=0.5, intensity=0.5)
    loader = unlabeled_loader(data, transforms, dim=dim, initial=initial, batch_size=3, weak_view=weak_view)
    batch = next(loader)
    assert list(batch) == ["unlabeled", "unlabeled_weak"][: 1 + weak_view]
    for view in batch.values():
        assert view.shape == (3, channels, *PATCH[dim])
        assert view.dtype == torch.float32
        assert view.isfinite().all()


@dimensions
def test_a_crop_shows_one_block_of_one_image_in_all_channels(tmp_path, dim):
    images = {"a": numbered(channels=2), "b": -numbered(channels=2)}
    transforms = training_transforms(PATCH[dim], mirror=False)
    batch = next(unlabeled_loader(dataset(tmp_path, images), transforms, dim=dim, batch_size=12))
    size = (1,) * (3 - dim) + PATCH[dim]
    starts, cases = set(), set()
    for crop in batch["unlabeled"].reshape(12, 2, *size).numpy():
        case = "a" if crop[0, 0, 0, 0] > 0 else "b"
        start = np.unravel_index(round(abs(crop[0, 0, 0, 0])) - 1, SHAPE)
        block = tuple(slice(first, first + width) for first, width in zip(start, size, strict=True))
        np.testing.assert_array_equal(crop, images[case][(slice(None), *block)])
        starts.add(start)
        cases.add(case)
    assert len(starts) > 6
    assert cases == {"a", "b"}


def test_crops_reach_every_voxel_of_an_image(tmp_path):
    image = numbered((10, 18, 14))
    loader = unlabeled_loader(dataset(tmp_path, {"a": image}), training_transforms(mirror=False), batch_size=60)
    assert set(next(loader)["unlabeled"].unique().tolist()) == set(image.flatten().tolist())


@dimensions
@views
def test_an_image_smaller_than_the_patch_is_padded_with_zeros(tmp_path, dim, weak_view):
    image = numbered((5, 7, 9))
    transforms = training_transforms(PATCH[dim])
    loader = unlabeled_loader(dataset(tmp_path, {"a": image}), transforms, dim=dim, weak_view=weak_view)
    slices = {tuple(sorted(z.flatten().tolist())) for z in image[0]} if dim == 2 else {tuple(image.flatten().tolist())}
    for _ in range(4):
        for view in next(loader).values():
            assert view.shape == (2, 1, *PATCH[dim])
            for crop in view:
                assert tuple(sorted(crop[crop != 0].tolist())) in slices


def test_the_ignore_label_of_the_labeled_images_does_not_matter(tmp_path):
    labels = {"background": 0, "blob": 1, "ignore": 2}
    loader = unlabeled_loader(dataset(tmp_path, {"a": numbered()}), training_transforms(), labels=labels)
    assert next(loader)["unlabeled"].shape == (2, 1, *PATCH[3])


def test_anisotropic_patches_with_a_mask_work_in_dummy_2d(tmp_path):
    patch = (4, 16, 12)
    crop, _ = masked_crop(channels=2, patch=(12, 24, 24))
    data = dataset(tmp_path, {"a": crop.numpy()})
    manager = LabelManager({"background": 0, "blob": 1}, None)
    transforms = training_transforms(patch, dummy_2d=True, mask=[True, True], geometry=1, intensity=1)
    batch = next(UnlabeledDataLoader(data, 2, (4, 22, 18), patch, manager, transforms, True))
    for view in batch.values():
        assert view.shape == (2, 2, *patch)
    assert torch.equal(batch["unlabeled"] == 0, batch["unlabeled_weak"] == 0)


def test_the_last_crops_of_a_batch_are_centred_on_predicted_foreground(tmp_path):
    patch, voxel = (4, 6, 6), (13, 4, 15)
    cases = {"seen": numbered(), "unseen": numbered()}
    plain = dataset(tmp_path, cases)
    (tmp_path / "seen.pkl").write_bytes(pickle.dumps({"class_locations": {1: np.array([[0, *voxel]])}}))
    data = UnlabeledDataset(plain.files, {"seen": tmp_path / "seen.pkl"})
    manager = LabelManager({"background": 0, "blob": 1}, None)
    transforms = training_transforms(patch, mirror=False)

    def share_that_shows_it(data, case, percent=0.34):
        data.identifiers = [case]
        loader = UnlabeledDataLoader(
            data, 3, patch, patch, manager, transforms, False, oversample_foreground_percent=percent
        )
        crops = torch.stack([next(loader)["unlabeled"] for _ in range(60)])
        return (crops == cases[case][(0, *voxel)]).flatten(2).any(2).float().mean(0)

    first, second, last = share_that_shows_it(data, "seen")
    assert last == 1  # nnU-Net's last third
    assert max(first, second) < 0.3
    for share in (
        share_that_shows_it(data, "unseen"),
        share_that_shows_it(data, "seen", 0),
        share_that_shows_it(plain, "seen"),
    ):
        assert max(share) < 0.3


# ---- PairedDataLoader ----


def assert_paired(batch, dim, weak_view):
    assert set(batch) == {"data", "target", "keys", "unlabeled"} | ({"unlabeled_weak"} if weak_view else set())
    for name in batch.keys() - {"target", "keys"}:
        assert batch[name].shape == (2, 1, *PATCH[dim])
    assert [t.shape for t in batch["target"]] == [(2, 1, *PATCH[dim]), (2, 1, *[size // 2 for size in PATCH[dim]])]
    assert len(batch["keys"]) == 2


@dimensions
@views
def test_a_pair_has_labeled_and_unlabeled_crops(tmp_path, dim, weak_view):
    assert_paired(next(paired_loader(tmp_path, dim=dim, weak_view=weak_view)), dim, weak_view)


def test_a_pair_tells_both_loaders_their_worker(tmp_path):
    loader = paired_loader(tmp_path)
    loader.set_thread_id(3)
    assert loader.thread_id == loader.labeled.thread_id == loader.unlabeled.thread_id == 3
    assert loader.infinite


@dimensions
def test_a_pickled_pair_gives_the_same_batches(tmp_path, dim):
    loader = paired_loader(tmp_path, dim=dim, weak_view=True, mask=[True], geometry=1, intensity=1)
    batches = []
    for copy in (loader, pickle.loads(pickle.dumps(loader))):
        np.random.seed(7)
        torch.manual_seed(7)
        batches.append(next(copy))
    assert_paired(batches[1], dim, weak_view=True)
    for name in ("data", "unlabeled", "unlabeled_weak"):
        assert torch.equal(batches[0][name], batches[1][name])


def test_pairs_come_from_worker_processes(tmp_path):
    loader = paired_loader(tmp_path, weak_view=True, geometry=0.5, intensity=0.5)
    augmenter = NonDetMultiThreadedAugmenter(loader, None, 2, 2, seeds=[1, 2], wait_time=0.002)
    try:
        batches = [next(augmenter) for _ in range(6)]
    finally:
        augmenter._finish()
    for batch in batches:
        assert_paired(batch, 3, weak_view=True)
    assert len({batch["unlabeled"].numpy().tobytes() for batch in batches}) == 6


class TellsItsNumbers(PairedDataLoader):
    def generate_train_batch(self):
        return {"worker": self.thread_id, "drawn": torch.rand(1).item()}


def test_every_worker_draws_other_numbers(tmp_path):
    pair = paired_loader(tmp_path)
    augmenter = NonDetMultiThreadedAugmenter(
        TellsItsNumbers(pair.labeled, pair.unlabeled), None, 2, 1, seeds=None, wait_time=0.002
    )
    first = {}
    try:
        while len(first) < 2:
            item = next(augmenter)
            first.setdefault(item["worker"], item["drawn"])
    finally:
        augmenter._finish()
    assert first[0] != first[1]


def test_a_loader_without_the_other_one_begins_its_workers_too(tmp_path, monkeypatch):
    begun, pair = [], paired_loader(tmp_path)
    monkeypatch.setattr(loading, "begin_worker", lambda: begun.append(1))
    manager = LabelManager({"background": 0, "blob": 1}, None)
    labeled = LabeledDataLoader(pair.labeled._data, 2, PATCH[3], PATCH[3], label_manager=manager)
    for loader in (labeled, pair.unlabeled):
        loader.set_thread_id(0)
    assert len(begun) == 2


# ---- find_unlabeled ----


COMPLETE = ("_seg.b2nd", ".b2nd", ".pkl")


@pytest.fixture
def preprocessed(tmp_path):
    """A preprocessed dataset with the labeled cases a and b, and the unlabeled ones u and v of imagesUn."""
    for folder, cases in (("plans", "ab"), ("plans_unlabeled", "uv")):
        (tmp_path / folder).mkdir()
        for case in cases:
            touch(tmp_path / folder, case, *COMPLETE)
    return tmp_path


def touch(folder, case, *endings):
    for ending in endings:
        (folder / f"{case}{ending}").touch()


def test_unlabeled_cases_come_from_both_sources(preprocessed):
    assert find_unlabeled(preprocessed, "plans", ["b"]) == {
        "b": preprocessed / "plans" / "b.b2nd",
        "u": preprocessed / "plans_unlabeled" / "u.b2nd",
        "v": preprocessed / "plans_unlabeled" / "v.b2nd",
    }


def test_unlabeled_cases_come_from_imagesun_where_the_fold_lists_none(preprocessed):
    assert set(find_unlabeled(preprocessed, "plans", [])) == {"u", "v"}


def test_unlabeled_cases_come_from_the_fold_where_there_is_no_imagesun(preprocessed):
    (preprocessed / "plans").rename(preprocessed / "other")
    assert set(find_unlabeled(preprocessed, "other", ["a", "b"])) == {"a", "b"}


def test_cases_that_the_fold_does_not_list_stay_out(preprocessed):
    assert "a" not in find_unlabeled(preprocessed, "plans", ["b"])


@pytest.mark.parametrize("exists", [False, True])
def test_no_source_gives_no_cases(tmp_path, exists):
    if exists:
        (tmp_path / "plans_unlabeled").mkdir()
    assert find_unlabeled(tmp_path, "plans", []) == {}


def test_cases_of_the_fold_that_are_not_preprocessed_are_named(preprocessed):
    touch(preprocessed / "plans", "seg_only", "_seg.b2nd", ".pkl")
    with pytest.raises(FileNotFoundError, match=r"2 unlabeled cases.*missing, seg_only.*nnUNetv2_preprocess"):
        find_unlabeled(preprocessed, "plans", ["a", "missing", "seg_only"])


def test_cases_of_a_fold_without_preprocessed_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"1 unlabeled case of the fold is not in .*: a"):
        find_unlabeled(tmp_path, "plans", ["a"])


def test_a_case_in_both_sources_is_refused(preprocessed):
    touch(preprocessed / "plans_unlabeled", "b", *COMPLETE)
    with pytest.raises(ValueError, match="unlabeled list: b"):
        find_unlabeled(preprocessed, "plans", ["a", "b"])


@pytest.mark.parametrize("endings", [[".b2nd"], ["_seg.b2nd", ".b2nd"], [".pkl"], ["_seg.b2nd", ".b2nd", ".pkl.tmp"]])
def test_a_half_written_case_is_left_out(preprocessed, endings):
    touch(preprocessed / "plans_unlabeled", "w", *endings)
    assert set(find_unlabeled(preprocessed, "plans", [])) == {"u", "v"}


def test_a_case_whose_name_ends_like_a_segmentation_is_found(preprocessed):
    touch(preprocessed / "plans_unlabeled", "w_seg", *COMPLETE)
    assert set(find_unlabeled(preprocessed, "plans", [])) == {"u", "v", "w_seg"}
