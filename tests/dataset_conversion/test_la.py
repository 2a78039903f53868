import builtins
import json

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import la

TRAIN = [f"TRAIN{number:02d}" for number in range(12)]
TEST = ["TEST0", "TEST1"]
SIZE = (7, 6, 5)  # x, y, z: all different, so that swapped axes cannot go unnoticed
SPACING, ORIGIN, DIRECTION = (1.25, 1.5, 2.0), (3.0, -4.0, 5.0), (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def voxels(seed=0):
    """An image and a label of 0/255, both indexed (x, y, z); the label fills x 2..3, y 3..4, z 1..2."""
    image = np.random.RandomState(seed).randint(0, 256, SIZE).astype(np.uint8)
    label = np.zeros(SIZE, np.uint8)
    label[2:4, 3:5, 1:3] = 255
    return image, label


def write_nrrd(file, array, spacing=SPACING, origin=ORIGIN):
    image = sitk.GetImageFromArray(array.transpose())
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(DIRECTION)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, file)


def write_nrrd_case(folder, seed=0):
    image, label = voxels(seed)
    write_nrrd(folder / "lgemri.nrrd", image)
    write_nrrd(folder / "laendo.nrrd", label)


def write_h5_case(folder, seed=0):
    image, label = voxels(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "mri_norm2.h5", "w") as file:
        file["image"] = image.astype(np.float32) / 7
        file["label"] = label // 255


def indexed_xyz(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(file)).transpose()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """nnU-Net's folders, lists of 12 training and 2 test cases, and an empty source folder."""
    for folder in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{folder}", str(tmp_path / folder))
        (tmp_path / folder).mkdir()
    (tmp_path / "source").mkdir()
    (tmp_path / "train.list").write_text("\n".join(TRAIN) + "\n\n")
    (tmp_path / "test.list").write_text("\n".join(TEST))
    return tmp_path


@pytest.fixture
def nrrd(root):
    for seed, case in enumerate(TRAIN + TEST):
        write_nrrd_case(root / "source" / case, seed)
    return root


@pytest.fixture
def h5(root):
    for seed, case in enumerate(TRAIN + TEST):
        write_h5_case(root / "source" / case, seed)
    return root


def convert(root, labeled=(2, 1), **options):
    return la.convert(root / "source", 501, root / "train.list", root / "test.list", labeled, **options)


def nothing_written(root):
    return not any((root / "raw").iterdir()) and not any((root / "preprocessed").iterdir())


def test_published_lists_have_the_published_sizes_and_labeled_cases():
    assert (len(la.TRAIN_CASES), len(la.TEST_CASES)) == (80, 20)
    assert len(set(la.TRAIN_CASES + la.TEST_CASES)) == 100
    assert sorted(la.TRAIN_CASES) == la.TRAIN_CASES
    assert la.TRAIN_CASES[:4] == [
        "06SR5RBREL16DQ6M8LWS",
        "0RZDK210BSMWAA6467LU",
        "1D7CUD1955YZPGK8XHJX",
        "1GU15S0GJ6PFNARO469W",
    ]
    assert (la.TRAIN_CASES[7], la.TRAIN_CASES[15]) == ("38CWS74285MFGZZXR09Z", "5BHTH9RHH3PQT913I59W")


def test_without_lists_the_published_ones_are_converted(root):
    for case in la.TRAIN_CASES + la.TEST_CASES:
        write_nrrd_case(root / "source" / case)
    raw = la.convert(root / "source", 501)
    assert len(list((raw / "imagesTr").iterdir())) == 80
    assert len(list((raw / "imagesTs").iterdir())) == 20
    folds = json.loads((root / "preprocessed" / "Dataset501_LA" / "splits_final.json").read_text(encoding="utf-8"))
    assert [(len(fold["train"]), len(fold.get("unlabeled", []))) for fold in folds] == [
        (8, 64),
        (4, 68),
        (16, 56),
        (80, 0),
    ]
    assert all(fold["val"] == la.TRAIN_CASES[72:] for fold in folds)


def test_nrrd_keeps_voxels_type_and_geometry(nrrd):
    raw = convert(nrrd)
    assert raw == nrrd / "raw" / "Dataset501_LA"
    image, label = voxels(seed=0)
    np.testing.assert_array_equal(indexed_xyz(raw / "imagesTr" / "TRAIN00_0000.nii.gz"), image)
    np.testing.assert_array_equal(indexed_xyz(raw / "labelsTr" / "TRAIN00.nii.gz"), label // 255)
    image, label = voxels(seed=13)
    np.testing.assert_array_equal(indexed_xyz(raw / "imagesTs" / "TEST1_0000.nii.gz"), image)
    np.testing.assert_array_equal(indexed_xyz(raw / "labelsTs" / "TEST1.nii.gz"), label // 255)
    for file in ("imagesTr/TRAIN00_0000.nii.gz", "labelsTr/TRAIN00.nii.gz"):
        written = sitk.ReadImage(raw / file)
        assert written.GetPixelID() == sitk.sitkUInt8
        assert written.GetSize() == SIZE
        np.testing.assert_allclose(written.GetSpacing(), SPACING)
        np.testing.assert_allclose(written.GetOrigin(), ORIGIN)
        np.testing.assert_allclose(written.GetDirection(), DIRECTION)


def test_the_challenges_own_sizes(nrrd):
    sizes = {"TRAIN00": (576, 576, 88), "TEST0": (640, 640, 88)}
    for case, size in sizes.items():
        image, label = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        image[-2, 5, 3], label[100:300, -40:, 30:60] = 200, 255
        write_nrrd(nrrd / "source" / case / "lgemri.nrrd", image, (0.625, 0.625, 0.625))
        write_nrrd(nrrd / "source" / case / "laendo.nrrd", label, (0.625, 0.625, 0.625))
    raw = convert(nrrd)
    for folder, (case, size) in zip(("Tr", "Ts"), sizes.items(), strict=True):
        image = sitk.ReadImage(raw / f"images{folder}" / f"{case}_0000.nii.gz")
        label = sitk.ReadImage(raw / f"labels{folder}" / f"{case}.nii.gz")
        for file in (image, label):
            assert file.GetSize() == size
            np.testing.assert_allclose(file.GetSpacing(), (0.625, 0.625, 0.625), rtol=1e-6)
        assert image[size[0] - 2, 5, 3] == 200
        assert label[299, size[1] - 1, 59] == 1
        assert sitk.GetArrayViewFromImage(label).sum() == 200 * 40 * 30


def test_h5_is_read_as_x_y_z_with_the_challenges_spacing(h5):
    raw = convert(h5)
    image, label = voxels(seed=3)
    written = sitk.ReadImage(raw / "imagesTr" / "TRAIN03_0000.nii.gz")
    assert written.GetSize() == SIZE
    assert written.GetPixelID() == sitk.sitkFloat32
    np.testing.assert_allclose(written.GetSpacing(), (0.625, 0.625, 0.625))
    assert written[6, 2, 4] == np.float32(image[6, 2, 4]) / 7
    np.testing.assert_array_equal(indexed_xyz(raw / "imagesTr" / "TRAIN03_0000.nii.gz"), image.astype(np.float32) / 7)
    np.testing.assert_array_equal(indexed_xyz(raw / "labelsTr" / "TRAIN03.nii.gz"), label // 255)


def test_original_files_win_over_h5_made_from_them(nrrd):
    for case in TRAIN + TEST:
        write_h5_case(nrrd / "source" / case)
    assert sitk.ReadImage(convert(nrrd) / "imagesTr" / "TRAIN00_0000.nii.gz").GetPixelID() == sitk.sitkUInt8


def test_dataset_json_and_files_are_what_nnunet_expects(nrrd):
    raw = convert(nrrd)
    content = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    assert content["channel_names"] == {"0": "MRI"}
    assert content["labels"] == {"background": 0, "left atrium": 1}
    assert (content["numTraining"], content["file_ending"]) == (12, ".nii.gz")
    assert sorted(file.name for file in raw.iterdir()) == [
        "dataset.json",
        "imagesTr",
        "imagesTs",
        "labelsTr",
        "labelsTs",
    ]
    assert sorted(file.name for file in (raw / "labelsTr").iterdir()) == [f"{case}.nii.gz" for case in TRAIN]
    assert [file.name for file in (nrrd / "raw").iterdir()] == ["Dataset501_LA"]


def test_folds_are_first_n_labeled_last_eight_validation_rest_unlabeled(nrrd):
    convert(nrrd, labeled=(2, 1, 3))
    val = ["TRAIN04", "TRAIN05", "TRAIN06", "TRAIN07", "TRAIN08", "TRAIN09", "TRAIN10", "TRAIN11"]
    assert json.loads((nrrd / "preprocessed" / "Dataset501_LA" / "splits_final.json").read_text(encoding="utf-8")) == [
        {"train": ["TRAIN00", "TRAIN01"], "val": val, "unlabeled": ["TRAIN02", "TRAIN03"]},
        {"train": ["TRAIN00"], "val": val, "unlabeled": ["TRAIN01", "TRAIN02", "TRAIN03"]},
        {"train": ["TRAIN00", "TRAIN01", "TRAIN02"], "val": val, "unlabeled": ["TRAIN03"]},
        {"train": TRAIN, "val": val},
    ]


@pytest.mark.parametrize("number", [0, -1, 4, 12, 13])
def test_a_labeled_number_without_unlabeled_cases_is_refused(nrrd, number):
    with pytest.raises(ValueError, match=rf"--labeled {number} is not possible: 12 .* from 1 to 3"):
        convert(nrrd, labeled=(2, number))
    assert nothing_written(nrrd)


def test_too_few_training_cases_are_refused():
    with pytest.raises(ValueError, match="9 training cases are too few"):
        la.make_folds(TRAIN[:9], [])
    assert la.make_folds(TRAIN[:10], [1])[0]["unlabeled"] == ["TRAIN01"]


def test_missing_cases_are_counted_and_named(nrrd):
    for case in ("TRAIN01", "TEST0"):
        for file in (nrrd / "source" / case).iterdir():
            file.unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 14 listed cases .*: TRAIN01, TEST0\. .*--allow-missing"):
        convert(nrrd)
    assert nothing_written(nrrd)


def test_missing_cases_may_be_allowed(nrrd, capsys):
    for file in (nrrd / "source" / "TRAIN01").iterdir():
        file.unlink()
    raw = convert(nrrd, allow_missing=True)
    assert "1 of 14 listed cases are not in" in capsys.readouterr().out
    assert json.loads((raw / "dataset.json").read_text(encoding="utf-8"))["numTraining"] == 11
    folds = json.loads((nrrd / "preprocessed" / "Dataset501_LA" / "splits_final.json").read_text(encoding="utf-8"))
    assert folds[0]["train"] == ["TRAIN00", "TRAIN02"]
    assert "TRAIN01" not in folds[-1]["train"]


def test_missing_cases_count_for_the_labeled_numbers(nrrd):
    for file in (nrrd / "source" / "TRAIN01").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"--labeled 3 is not possible: 11 training cases are available"):
        convert(nrrd, labeled=(3,), allow_missing=True)
    assert nothing_written(nrrd)


def test_a_source_that_does_not_exist_is_named(root):
    (root / "source").rmdir()
    with pytest.raises(FileNotFoundError, match=r"source folder .* does not exist"):
        convert(root, allow_missing=True)


@pytest.mark.parametrize("file", ["lgemri.nrrd", "laendo.nrrd"])
def test_half_a_case_is_an_error_even_where_missing_cases_are_allowed(nrrd, file):
    (nrrd / "source" / "TEST1" / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"TEST1/{file} is missing"):
        convert(nrrd, allow_missing=True)
    assert nothing_written(nrrd)


def test_mixed_layouts_are_refused(nrrd):
    for file in (nrrd / "source" / "TRAIN05").iterdir():
        file.unlink()
    write_h5_case(nrrd / "source" / "TRAIN05")
    with pytest.raises(ValueError, match="mixes"):
        convert(nrrd)
    assert nothing_written(nrrd)


def test_sizes_that_differ_are_refused(nrrd):
    write_nrrd(nrrd / "source" / "TEST1" / "laendo.nrrd", voxels()[1][:, :, :4])
    with pytest.raises(ValueError, match=r"TEST1/laendo.nrrd: the label's size \(7, 6, 4\) is not .*\(7, 6, 5\)"):
        convert(nrrd)
    assert nothing_written(nrrd)


def test_a_label_off_by_rounding_takes_the_images_geometry(nrrd):
    write_nrrd(nrrd / "source" / "TRAIN00" / "laendo.nrrd", voxels()[1], (1.250001, 1.5, 2.0), (3.00001, -4.0, 5.0))
    label = sitk.ReadImage(convert(nrrd) / "labelsTr" / "TRAIN00.nii.gz")
    np.testing.assert_allclose(label.GetSpacing(), SPACING, rtol=1e-7)
    np.testing.assert_allclose(label.GetOrigin(), ORIGIN, rtol=1e-7)


@pytest.mark.parametrize(("spacing", "origin"), [((1.3, 1.5, 2.0), ORIGIN), (SPACING, (3.5, -4.0, 5.0))])
def test_a_label_in_another_place_is_refused(nrrd, spacing, origin):
    write_nrrd(nrrd / "source" / "TRAIN00" / "laendo.nrrd", voxels()[1], spacing, origin)
    with pytest.raises(ValueError, match=r"TRAIN00/laendo.nrrd: spacing, origin or direction differ"):
        convert(nrrd)
    assert nothing_written(nrrd)


@pytest.mark.parametrize("value", [2, 128, 1])
def test_label_values_other_than_two_are_refused(nrrd, value):
    label = voxels()[1]
    label[0, 0, 0] = value  # 1 beside 255 is as wrong as 2
    write_nrrd(nrrd / "source" / "TEST1" / "laendo.nrrd", label)
    with pytest.raises(ValueError, match=rf"TEST1/laendo.nrrd: the label holds \[0, {value}, 255\]"):
        convert(nrrd)
    assert nothing_written(nrrd)


def test_voxels_that_are_not_finite_are_refused(h5):
    with h5py.File(h5 / "source" / "TEST1" / "mri_norm2.h5", "a") as file:
        file["image"][0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"TEST1 has voxels that are not finite"):
        convert(h5)
    assert nothing_written(h5)


def test_h5_without_its_keys_is_refused(h5):
    with h5py.File(h5 / "source" / "TEST1" / "mri_norm2.h5", "a") as file:
        del file["label"]
    with pytest.raises(ValueError, match=r"mri_norm2.h5 has no label; it holds: image"):
        convert(h5)
    assert nothing_written(h5)


def test_h5_needs_h5py_and_nrrd_does_not(h5, monkeypatch):
    real_import = builtins.__import__

    def without_h5py(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError("No module named 'h5py'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_h5py)
    with pytest.raises(ImportError, match=r"pip install h5py"):
        convert(h5)
    assert nothing_written(h5)
    for case in TRAIN + TEST:
        write_nrrd_case(h5 / "source" / case)
    convert(h5)


def test_crop_keeps_the_margin_in_plane_all_slices_and_the_place_in_space(nrrd):
    raw = convert(nrrd, crop_margin=1)
    image, label = voxels(seed=0)
    # label: x 2..3 and y 3..4, so x 1..4 and y 2..5 stay
    np.testing.assert_array_equal(indexed_xyz(raw / "imagesTr" / "TRAIN00_0000.nii.gz"), image[1:5, 2:6])
    np.testing.assert_array_equal(indexed_xyz(raw / "labelsTr" / "TRAIN00.nii.gz"), label[1:5, 2:6] // 255)
    whole = sitk.ReadImage(nrrd / "source" / "TRAIN00" / "lgemri.nrrd")
    cropped = sitk.ReadImage(raw / "imagesTr" / "TRAIN00_0000.nii.gz")
    np.testing.assert_allclose(cropped.GetOrigin(), whole.TransformIndexToPhysicalPoint((1, 2, 0)))
    assert "cropped" in json.loads((raw / "dataset.json").read_text(encoding="utf-8"))["description"]


def test_crop_stops_at_the_border_and_is_off_by_default(nrrd):
    assert indexed_xyz(convert(nrrd, crop_margin=50) / "imagesTr" / "TRAIN00_0000.nii.gz").shape == SIZE
    raw = convert(nrrd, overwrite=True)
    assert indexed_xyz(raw / "imagesTr" / "TRAIN00_0000.nii.gz").shape == SIZE
    assert "cropped" not in json.loads((raw / "dataset.json").read_text(encoding="utf-8"))["description"]


def test_crop_refuses_an_empty_label_and_a_negative_margin(nrrd):
    write_nrrd(nrrd / "source" / "TEST1" / "laendo.nrrd", np.zeros(SIZE, np.uint8))
    with pytest.raises(ValueError, match=r"TEST1: the label is empty"):
        convert(nrrd, crop_margin=1)
    with pytest.raises(ValueError, match=r"--crop-margin -1"):
        convert(nrrd, crop_margin=-1)
    assert nothing_written(nrrd)


def test_a_dataset_that_is_there_is_replaced_only_when_told(nrrd):
    raw = convert(nrrd)
    (raw / "imagesUn").mkdir()
    (raw / "imagesUn" / "mine_0000.nii.gz").touch()
    (raw / "imagesTr" / "stale_0000.nii.gz").touch()
    with pytest.raises(FileExistsError, match=r"Dataset501_LA is not empty.*--overwrite"):
        convert(nrrd)
    assert (raw / "imagesTr" / "stale_0000.nii.gz").exists()
    convert(nrrd, overwrite=True)
    assert not (raw / "imagesTr" / "stale_0000.nii.gz").exists()
    assert (raw / "imagesUn" / "mine_0000.nii.gz").exists()


def test_another_split_is_replaced_only_when_told_and_kept_as_backup(nrrd):
    folder = nrrd / "preprocessed" / "Dataset501_LA"
    folder.mkdir()
    (folder / "splits_final.json").write_text("[]")
    with pytest.raises(FileExistsError, match=r"splits_final\.json.*--overwrite"):
        convert(nrrd)
    assert not any((nrrd / "raw").iterdir())
    convert(nrrd, overwrite=True)
    assert (folder / "splits_final.json.bak").read_text(encoding="utf-8") == "[]"


@pytest.mark.parametrize("folder", ["raw", "preprocessed", "results"])
def test_an_id_that_another_dataset_has_is_refused(nrrd, folder):
    (nrrd / folder / "Dataset501_Heart").mkdir()
    with pytest.raises(FileExistsError, match="501 is taken by Dataset501_Heart"):
        convert(nrrd, overwrite=True)
    assert not (nrrd / "raw" / "Dataset501_LA").exists()


@pytest.mark.parametrize("dataset_id", [0, -3, 1000])
def test_ids_that_nnunet_cannot_read_are_refused(nrrd, dataset_id):
    with pytest.raises(ValueError, match="1 to 999"):
        la.convert(nrrd / "source", dataset_id, nrrd / "train.list", nrrd / "test.list", (1,))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("TRAIN00\nTRAIN01\nTRAIN00\n", r"train\.list names cases more than once: TRAIN00"),
        ("TRAIN00\nTEST0\n", r"In both the training and the test list: TEST0"),
        ("\n\n", r"train\.list names no case"),
    ],
)
def test_lists_with_mistakes_are_refused(nrrd, train, message):
    (nrrd / "train.list").write_text(train)
    with pytest.raises(ValueError, match=message):
        convert(nrrd)
    assert nothing_written(nrrd)


def test_a_list_that_does_not_exist_is_named(nrrd):
    (nrrd / "test.list").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.list does not exist"):
        convert(nrrd)
