"""ACDC: a generated tree with the challenge's layout, from the files to a prediction."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2 import paths
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny import nnunet_command, plan
from tiny_trainers import make_trainer, seed

from nnunet_ssl.cli import main
from nnunet_ssl.commands.demo import small_configuration
from nnunet_ssl.commands.preprocess import preprocess_unlabeled
from nnunet_ssl.dataset_conversion import acdc
from nnunet_ssl.dataset_conversion.acdc import (
    TEST_PATIENTS,
    TRAIN_PATIENTS,
    VAL_PATIENTS,
    make_folds,
    read_info,
)
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL

PUBLISHED = {"train": "76d973d20442f6b1", "val": "244cbfed9e62e1e7", "test": "13aa61368f3af0a8"}  # lists of SSL4MIS
SHAPE = (8, 26, 24)  # slices, rows, columns
FRAMES = 6
SPACING = (1.5, 1.25, 5.0)  # mm, columns first
DIRECTION = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
ORIGIN = (10.0, -20.0, 30.0)
# number: (end-diastolic, end-systolic frame); 38's systole is first, 50's diastole is not
PATIENTS = {99: (1, 4), 38: (5, 2), 50: (2, 6), 100: (1, 3), 28: (1, 4), 85: (1, 5), 11: (1, 3), 13: (1, 2)}


def write(array, file, spacing=SPACING, direction=DIRECTION, origin=ORIGIN):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(file))


def write_patient(folder, number, ed, es, ending=".nii.gz"):
    """A patient as the challenge has it; the 4D header has the time between frames as its fourth spacing."""
    name = f"patient{number:03d}"
    (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(number)
    rings = np.linalg.norm(np.indices(SHAPE)[1:] - np.reshape([13, 12], (2, 1, 1, 1)), axis=0)
    series, labels = [], []
    for frame in range(FRAMES):
        radius = 4 + frame / 3
        label = np.select([rings < radius, rings < radius + 2, rings < radius + 4], [3, 2, 1], 0)
        labels.append(label.astype(np.uint8))
        series.append((100 + 30 * label + 8 * rng.standard_normal(SHAPE)).astype(np.int16))
    for frame in (ed, es):
        write(series[frame - 1], folder / name / f"{name}_frame{frame:02d}{ending}")
        write(labels[frame - 1], folder / name / f"{name}_frame{frame:02d}_gt{ending}")
    identity = tuple(np.eye(4).ravel())
    cine = sitk.JoinSeries([sitk.GetImageFromArray(frame) for frame in series])
    cine.SetSpacing((1.5, 1.25, 1.0, 35.0))
    cine.SetDirection(identity)
    sitk.WriteImage(cine, str(folder / name / f"{name}_4d{ending}"))
    (folder / name / "Info.cfg").write_text(f"ED: {ed}\nES: {es}\nGroup: DCM\nHeight: 184.0\nNbFrame: {FRAMES}\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acdc")
    for number, (ed, es) in PATIENTS.items():
        write_patient(folder / "database" / "training", number, ed, es, ".nii" if number == 50 else ".nii.gz")
    return folder


@pytest.fixture(scope="module")
def dataset(source):
    """Dataset971_ACDC, converted with all cine frames."""
    command = f"convert acdc -i {source} -d 971 --labeled 2 1 --cine-frames all --allow-missing"
    assert main(command.split()) == 0
    return Path(paths.nnUNet_raw) / "Dataset971_ACDC"


def splits():
    return json.loads(
        (Path(paths.nnUNet_preprocessed) / "Dataset971_ACDC" / "splits_final.json").read_text(encoding="utf-8")
    )


def names(folder):
    return {file.name.removesuffix(".nii.gz").removesuffix("_0000") for file in folder.iterdir()}


def test_cases_are_named_by_the_true_frame_numbers_of_info_cfg(dataset):
    train = {f"patient{n:03d}_frame{f:02d}" for n in (99, 38, 50, 100, 28, 85) for f in PATIENTS[n]}
    assert names(dataset / "imagesTr") == names(dataset / "labelsTr") == train
    test = {f"patient{n:03d}_frame{f:02d}" for n in (11, 13) for f in PATIENTS[n]}
    assert names(dataset / "imagesTs") == names(dataset / "labelsTs") == test
    description = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    assert description["labels"] == {"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3}
    assert description["numTraining"] == 12


def test_image_and_label_are_those_of_the_frame(dataset, source):
    for case in names(dataset / "imagesTr"):
        patient = case.partition("_")[0]
        for kind, suffix in (("images", ""), ("labels", "_gt")):
            ending = ".nii" if patient == "patient050" else ".nii.gz"
            original = sitk.ReadImage(str(source / "database/training" / patient / f"{case}{suffix}{ending}"))
            written = next((dataset / f"{kind}Tr").glob(f"{case}*"))
            image = sitk.ReadImage(str(written))
            assert np.array_equal(sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(original))
            assert_geometry(image)


def assert_geometry(image):
    assert image.GetSpacing() == pytest.approx(SPACING)
    assert image.GetDirection() == pytest.approx(DIRECTION)
    assert image.GetOrigin() == pytest.approx(ORIGIN)


def test_cine_frames_are_the_others_with_the_geometry_of_the_3d_files(dataset, source):
    expected = {
        f"patient{n:03d}_frame{f:02d}" for n in (99, 38, 50, 100) for f in range(1, FRAMES + 1) if f not in PATIENTS[n]
    }
    assert names(dataset / "imagesUn") == expected
    series = sitk.GetArrayFromImage(sitk.ReadImage(str(source / "database/training/patient038/patient038_4d.nii.gz")))
    image = sitk.ReadImage(str(dataset / "imagesUn" / "patient038_frame03_0000.nii.gz"))
    assert np.array_equal(sitk.GetArrayViewFromImage(image), series[2])
    assert_geometry(image)


def test_no_frame_of_a_validation_or_test_patient_is_unlabeled(dataset, source):
    """By the voxels, whatever the files are called."""
    forbidden = set()
    for number in (28, 85, 11, 13):
        file = source / f"database/training/patient{number:03d}/patient{number:03d}_4d.nii.gz"
        forbidden |= {digest(frame) for frame in sitk.GetArrayFromImage(sitk.ReadImage(str(file)))}
    unlabeled = {case for fold in splits() for case in fold.get("unlabeled", [])}
    files = [*(dataset / "imagesUn").iterdir(), *(dataset / "imagesTr" / f"{c}_0000.nii.gz" for c in unlabeled)]
    assert len(files) == 4 * (FRAMES - 2) + len(unlabeled)
    seen = {digest(sitk.GetArrayFromImage(sitk.ReadImage(str(file)))) for file in files}
    assert len(seen) == len(files)
    assert not seen & forbidden
    held_out = {digest(sitk.GetArrayFromImage(sitk.ReadImage(str(f)))) for f in (dataset / "imagesTs").iterdir()}
    assert held_out <= forbidden  # the digests do find what is the same


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).astype(np.float32).tobytes()).hexdigest()


def test_folds_split_by_patient(dataset):
    two, one, everything = splits()
    of = {n: [f"patient{n:03d}_frame{f:02d}" for f in sorted(PATIENTS[n])] for n in PATIENTS}
    assert two["train"] == of[99] + of[38]
    assert two["unlabeled"] == of[50] + of[100]
    assert one["train"] == of[99]
    assert one["unlabeled"] == of[38] + of[50] + of[100]
    assert everything["train"] == of[99] + of[38] + of[50] + of[100]
    assert "unlabeled" not in everything
    assert [fold["val"] for fold in splits()] == [of[28] + of[85]] * 3


def test_the_published_split_has_70_10_and_20_patients():
    assert sorted(TRAIN_PATIENTS + VAL_PATIENTS + TEST_PATIENTS) == list(range(1, 101))
    assert (len(TRAIN_PATIENTS), len(VAL_PATIENTS), len(TEST_PATIENTS)) == (70, 10, 20)
    cases = {number: [f"{number}a", f"{number}b"] for number in TRAIN_PATIENTS + VAL_PATIENTS + TEST_PATIENTS}
    folds = make_folds(cases, (7, 3, 14))
    assert [len(fold["train"]) for fold in folds] == [14, 6, 28, 140]
    assert [len(fold.get("unlabeled", [])) for fold in folds] == [126, 134, 112, 0]
    assert all(len(fold["val"]) == 20 for fold in folds)
    assert folds[1]["train"] == ["99a", "99b", "38a", "38b", "50a", "50b"]
    assert folds[0]["train"][6:] == ["100a", "100b", "58a", "58b", "21a", "21b", "49a", "49b"]
    lists = {"train": TRAIN_PATIENTS, "val": VAL_PATIENTS, "test": TEST_PATIENTS}
    assert {name: checksum(patients) for name, patients in lists.items()} == PUBLISHED


def checksum(patients):
    return hashlib.sha256(" ".join(f"{number:03d}" for number in patients).encode()).hexdigest()[:16]


def test_published_folds_have_the_published_numbers_of_slices():
    """68 slices for 3 patients and 136 for 7, as SSL4MIS and its successors count them."""
    root = os.environ.get("ACDC_ROOT")
    if root is None:
        pytest.skip("needs the real data: set ACDC_ROOT to the challenge's folder")
    folder, _ = acdc._root(Path(root))
    patients = acdc._find_patients(folder, False, [*TRAIN_PATIENTS, *VAL_PATIENTS], TEST_PATIENTS, False)
    slices = [
        sum(sitk.ReadImage(image).GetSize()[2] for image, _ in patients[number].frames.values())
        for number in TRAIN_PATIENTS[:7]
    ]
    assert sum(slices[:3]) == 68
    assert sum(slices) == 136


@pytest.mark.parametrize("count", [1, 2, 10])
def test_a_number_of_cine_frames_is_spread_over_the_cycle(source, count):
    command = f"convert acdc -i {source} -d 972 --labeled 1 --cine-frames {count} --allow-missing --overwrite"
    assert main(command.split()) == 0
    found = names(Path(paths.nnUNet_raw) / "Dataset972_ACDC" / "imagesUn")
    per_patient = [sorted(int(n[-2:]) for n in found if n.startswith(f"patient{p:03d}")) for p in (99, 38, 50, 100)]
    assert all(len(frames) == min(count, FRAMES - 2) for frames in per_patient)
    assert all(not set(f) & set(PATIENTS[p]) for f, p in zip(per_patient, (99, 38, 50, 100), strict=True))
    if count == 2:  # of frames 2, 3, 5, 6
        assert per_patient[0] == [3, 6]


def test_a_shifted_4d_file_is_reported(tmp_path, capsys):
    write_patient(tmp_path, 99, 1, 4)
    write_patient(tmp_path, 38, 1, 4)
    write_patient(tmp_path, 28, 1, 4)
    file = tmp_path / "patient038" / "patient038_4d.nii.gz"
    series = sitk.ReadImage(str(file))
    sitk.WriteImage(series[:, :, :, 1:], str(file))
    assert main(f"convert acdc -i {tmp_path} -d 973 --labeled 1 --cine-frames 1 --allow-missing".split()) == 0
    assert "WARNING: in 1 patients the 4D file's annotated frames differ" in capsys.readouterr().out


def test_frames_of_patients_that_became_test_patients_do_not_stay_unlabeled(tmp_path, capsys):
    for number in (99, 38, 50, 28):
        write_patient(tmp_path, number, 1, 4)
    command = f"convert acdc -i {tmp_path} -d 978 --labeled 1 --allow-missing --overwrite"
    assert main([*command.split(), "--cine-frames", "all"]) == 0
    listed = tmp_path / "test.list"
    listed.write_text("patient099_frame01\npatient099_frame04\n")
    assert main([*command.split(), "--test-list", str(listed)]) == 1
    assert "imagesUn has frames of patient099, for validation or testing now." in capsys.readouterr().err
    shutil.rmtree(Path(paths.nnUNet_raw) / "Dataset978_ACDC/imagesUn")
    done = Path(paths.nnUNet_preprocessed) / "Dataset978_ACDC/nnUNetPlans_2d_unlabeled"
    done.mkdir()
    (done / "patient099_frame02.b2nd").touch()
    for cine in ("0", "all"):
        assert main([*command.split(), "--test-list", str(listed), "--cine-frames", cine]) == 1
        assert f"{done} has frames of patient099" in capsys.readouterr().err
    shutil.rmtree(done)
    assert main([*command.split(), "--test-list", str(listed)]) == 0
    listed.write_text("patient001_frame01\n")  # who is not there
    assert main([*command.split(), "--test-list", str(listed)]) == 1
    assert "imagesTs has test scans of an earlier conversion, and this one has none." in capsys.readouterr().err


def broken(tmp_path, kind):
    for number in (99, 38, 28):
        write_patient(tmp_path, number, 1, 4)
    folder = tmp_path / "patient038"
    if kind == "no info":
        (folder / "Info.cfg").unlink()
    elif kind == "no systole":
        (folder / "Info.cfg").write_text("ED: 1\n")
    elif kind == "other frame":
        (folder / "Info.cfg").write_text("ED: 1\nES: 5\n")
    elif kind == "no label":
        (folder / "patient038_frame04_gt.nii.gz").unlink()
    elif kind == "no cine":
        (folder / "patient038_4d.nii.gz").unlink()
    elif kind == "label value":
        write(np.full(SHAPE, 7, np.uint8), folder / "patient038_frame04_gt.nii.gz")
    elif kind == "size":
        write(np.zeros((4, 4, 4), np.int16), folder / "patient038_frame04.nii.gz")
    elif kind == "cut off":
        file = folder / "patient038_frame04.nii.gz"
        file.write_bytes(file.read_bytes()[:-30])
    elif kind == "cine size":
        write(np.zeros(SHAPE, np.int16), folder / "patient038_4d.nii.gz")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no info", "patient038/Info.cfg is missing"),
        ("no systole", "Info.cfg has no line 'ES: NUMBER'"),
        ("other frame", "has no patient038_frame05.nii.gz, which Info.cfg names as ES"),
        ("no label", "has no patient038_frame04_gt.nii.gz"),
        ("no cine", "1 training patients have no patientXXX_4d.nii.gz"),
        ("label value", "patient038_frame04_gt.nii.gz has the labels [7]"),
        ("size", "patient038_frame04_gt.nii.gz: size"),
        ("cut off", "patient038_frame04.nii.gz is cut off or damaged"),
        ("cine size", "patient038_4d.nii.gz: shape (time, z, y, x)"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing_behind(kind, message, tmp_path, capsys):
    broken(tmp_path, kind)
    assert main(f"convert acdc -i {tmp_path} -d 974 --labeled 1 --cine-frames all --allow-missing".split()) == 1
    assert message in capsys.readouterr().err
    left = [*Path(paths.nnUNet_raw).glob("*974*"), *Path(paths.nnUNet_preprocessed).glob("*974*")]
    assert not left
    assert not list(Path(paths.nnUNet_raw).glob(".convert*"))


def test_missing_patients_are_an_error_unless_allowed(source, capsys):
    assert main(f"convert acdc -i {source} -d 975".split()) == 1
    assert "92 of 100 listed patients are not in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("acdc --train-list x", "--train-list is for la, not for acdc"),
        ("la --cine-frames all", "--cine-frames is for acdc, not for la"),
    ],
)
def test_options_of_the_other_dataset_are_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(f"convert {options} -i {tmp_path} -d 975".split())
    assert message in capsys.readouterr().err


# ---- the community's h5 files ----

H5_SLICES = 11  # more than 9: by name, slice 10 comes before slice 2


def write_h5(file, image, label):
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as content:
        content["image"], content["label"] = image, label


@pytest.fixture
def h5(tmp_path):
    """Slices of three training patients, volumes of a validation patient; the voxels tell case and slice."""
    for number in (99, 38, 50):
        for frame in (1, 2):
            for index in range(1, H5_SLICES + 1):
                image = np.full((6, 5), number + frame / 4 + index / 64, np.float16)
                label = np.full((6, 5), index % 4, np.uint8)
                write_h5(tmp_path / f"data/slices/patient{number:03d}_frame0{frame}_slice_{index}.h5", image, label)
    for frame in (1, 2):
        volume = np.arange(90, dtype=np.float16).reshape(3, 6, 5)
        write_h5(tmp_path / f"data/patient028_frame0{frame}.h5", volume, (volume % 4).astype(np.uint8))
    return tmp_path


def convert_h5(folder, number, *options):
    line = ["convert", "acdc", "-i", str(folder), "-d", str(number), "--labeled", "1", "--allow-missing", *options]
    return main(line), Path(paths.nnUNet_raw) / f"Dataset{number}_ACDC"


def test_h5_slices_are_stacked_by_their_numbers(h5, capsys):
    code, raw = convert_h5(h5, 976, "--slice-spacing", "8")
    assert code == 0
    image = sitk.ReadImage(str(raw / "imagesTr" / "patient038_frame02_0000.nii.gz"))
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "labelsTr" / "patient038_frame02.nii.gz")))
    expected = np.float16(38 + 2 / 4 + np.arange(1, H5_SLICES + 1) / 64)
    assert np.array_equal(sitk.GetArrayViewFromImage(image), np.tile(expected[:, None, None], (1, 6, 5)))
    assert np.array_equal(label[:, 0, 0], np.arange(1, H5_SLICES + 1) % 4)
    assert image.GetSpacing() == (1, 1, 8)
    assert names(raw / "imagesTr") == {f"patient{n:03d}_frame0{f}" for n in (99, 38, 50, 28) for f in (1, 2)}
    assert not (raw / "imagesTs").exists()
    assert "spacing 1 x 1 x 8 mm" in json.loads((raw / "dataset.json").read_text(encoding="utf-8"))["description"]
    shown = capsys.readouterr().out
    assert "Reading the h5 files" in shown
    assert "There is no test patient: imagesTs is left out" in shown
    folds = json.loads((Path(paths.nnUNet_preprocessed) / raw.name / "splits_final.json").read_text(encoding="utf-8"))
    assert folds[0]["train"] == ["patient099_frame01", "patient099_frame02"]
    assert folds[0]["val"] == ["patient028_frame01", "patient028_frame02"]


def test_a_test_list_names_the_test_cases_and_the_last_training_patients_become_validation():
    file = Path(paths.nnUNet_raw) / "list.txt"
    file.write_text("".join(f"patient{n:03d}_frame{f:02d}\n" for n in VAL_PATIENTS for f in (1, 2)))
    train, val, test = acdc.choose_patients(file)
    assert (train, val, test) == (TRAIN_PATIENTS[:60], TRAIN_PATIENTS[60:], VAL_PATIENTS)
    file.write_text("patient099_frame01\n99\n")
    with pytest.raises(ValueError, match=r"list.txt: every line must be a case as patient001_frame01, .* '99'"):
        acdc.choose_patients(file)


def harm_h5(folder, kind):
    slices = folder / "data/slices"
    file = slices / "patient038_frame01_slice_3.h5"
    if kind == "missing":
        file.unlink()
    elif kind == "number":
        file.rename(slices / "patient038_frame01_slice_x.h5")
    elif kind == "size":
        write_h5(file, np.zeros((6, 4), np.float16), np.zeros((6, 4), np.uint8))
    elif kind == "label size":
        write_h5(file, np.zeros((6, 5), np.float16), np.zeros((6, 4), np.uint8))
    elif kind == "label":
        write_h5(file, np.zeros((6, 5), np.float16), np.full((6, 5), 7, np.uint8))
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:500])
    elif kind == "keys":
        with h5py.File(file, "a") as content:
            del content["label"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "patient038_frame01_slice_11.h5 is there, but"),
        ("number", "patient038_frame01_slice_x.h5: expected the name patientXXX_frameYY.h5"),
        ("size", "patient038_frame01_slice_3.h5: shape (6, 4), but patient038_frame01_slice_1.h5 has (6, 5)"),
        ("label size", "patient038_frame01_slice_3.h5: the image has the shape (6, 5), its label (6, 4)"),
        ("label", "patient038_frame01_slice_3.h5 has the labels [7]"),
        ("truncated", "patient038_frame01_slice_3.h5 is cut off or no h5 file"),
        ("keys", "patient038_frame01_slice_3.h5 has no label; it holds: image"),
        ("cine", "--cine-frames is for the challenge's files"),
    ],
)
def test_bad_h5_files_are_named_and_leave_nothing_behind(kind, message, h5, capsys):
    harm_h5(h5, kind)
    code, raw = convert_h5(h5, 977, *["--cine-frames", "1"] * (kind == "cine"))
    assert code == 1
    assert message in capsys.readouterr().err
    assert not raw.exists()
    assert not (Path(paths.nnUNet_preprocessed) / raw.name).exists()
    assert not list(raw.parent.glob(".convert*"))


def real_h5_folder():
    folder = Path(os.environ.get("ACDC_H5_ROOT", Path(__file__).parents[3] / "shared" / "data" / "ACDC_half"))
    if not folder.is_dir():
        pytest.skip("needs the community's h5 files: set ACDC_H5_ROOT to their folder")
    return folder


def test_the_communitys_folder_has_the_numbers_of_slices_of_the_literature(capsys):
    folder, h5 = acdc._root(real_h5_folder())
    assert h5
    patients = acdc._find_h5(folder)
    slices = [sum(len(files) for files in patients[number].frames.values()) for number in TRAIN_PATIENTS]
    assert [sum(slices[:number]) for number in (3, 7, 14, 70)] == [68, 136, 256, 1312]
    files = patients[TRAIN_PATIENTS[0]].frames[1]
    label = sitk.GetArrayFromImage(acdc.read_h5_case(files, 5.0)[1])
    for index, file in enumerate(files):
        with h5py.File(file) as content:
            assert np.array_equal(label[index], content["label"][()])


def test_info_cfg_with_spaces_and_without_the_last_newline(tmp_path):
    (tmp_path / "Info.cfg").write_text("ED : 1\r\nES:12\r\nGroup: MINF")
    assert read_info(tmp_path / "Info.cfg") == {"ED": "1", "ES": "12", "Group": "MINF"}


@pytest.mark.slow
def test_a_converted_dataset_trains_in_2d_and_3d_and_predicts(dataset):
    folder = plan(971, ("2d", "3d_fullres"), {"2d": (16, 16), "3d_fullres": (8, 16, 16)}, batch_size=4)
    preprocess_unlabeled("971", ["2d", "3d_fullres"], num_processes=1)
    assert len(splits()) == 3  # nnU-Net has kept them
    for configuration in ("2d", "3d_fullres"):
        seed()
        trainer = make_trainer(nnUNetTrainerM3HL, folder, configuration)
        trainer.run_training()
        assert "Cases: 4 labeled, 20 unlabeled, 4 for validation." in Path(trainer.log_file).read_text(encoding="utf-8")
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
        image = np.random.default_rng(0).standard_normal((1, *SHAPE)).astype(np.float32)
        labels = predictor.predict_single_npy_array(image, {"spacing": [5.0, 1.25, 1.5]})
        assert labels.shape == SHAPE
        assert set(np.unique(labels)) <= {0, 1, 2, 3}


# what a user would have in a folder on nnUNet_extTrainer
TWO_STEPS = """
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL


class nnUNetTrainerTwoSteps(nnUNetTrainerM3HL):
    num_epochs, num_iterations_per_epoch, num_val_iterations_per_epoch = 2, 1, 1
"""


def test_stock_commands_plan_train_and_predict_the_communitys_folder(tmp_path, monkeypatch):
    source = real_h5_folder()
    chosen = [*TRAIN_PATIENTS[:3], *VAL_PATIENTS[:2]]
    for file in source.glob("data/**/patient*.h5"):
        if int(file.name[7:10]) in chosen:
            link = tmp_path / "community" / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    (tmp_path / "test.list").write_text("".join(f"patient{VAL_PATIENTS[0]:03d}_frame0{f}\n" for f in (1, 2)))
    code, raw = convert_h5(tmp_path / "community", 979, "--test-list", str(tmp_path / "test.list"))
    assert code == 0

    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "nnUNetTrainerTwoSteps.py").write_text(TWO_STEPS)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "trainers"))
    plan = "nnUNetv2_plan_and_preprocess -d 979 -c 2d"
    model = "-tr nnUNetTrainerTwoSteps -device cpu"
    predict = (
        f"nnUNetv2_predict -d 979 -c 2d_small -f 0 {model} -i {raw / 'imagesTs'} -o {tmp_path / 'out'} --disable_tta"
    )
    with monkeypatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner takes that many threads
        nnunet_command(*f"{plan} -npfp 1 -np 1".split())
    file = Path(paths.nnUNet_preprocessed) / raw.name / "nnUNetPlans.json"
    plans = json.loads(file.read_text(encoding="utf-8"))
    plans["configurations"]["2d_small"] = small_configuration(plans, (128, 128), (4, 8, 8), 2, base="2d")
    file.write_text(json.dumps(plans), encoding="utf-8")
    output = nnunet_command(*f"nnUNetv2_train 979 2d_small 0 {model}".split())
    assert "4 unlabeled" in output
    nnunet_command(*f"{predict} -npp 0 -nps 0".split())
    for label in sorted((raw / "labelsTs").iterdir()):
        prediction = sitk.ReadImage(str(tmp_path / "out" / label.name))
        assert prediction.GetSize() == sitk.ReadImage(str(label)).GetSize()
        assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= {0, 1, 2, 3}
