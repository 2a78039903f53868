"""The Automated Cardiac Diagnosis Challenge (ACDC) as an nnU-Net dataset, with its cine frames as unlabeled scans.

Bernard et al., "Deep learning techniques for automatic MRI cardiac multi-structures segmentation and diagnosis", IEEE
TMI 2018, doi:10.1109/TMI.2018.2837502. The 70, 10 and 20 patients for training, validation and testing are those of the
SSL4MIS benchmark and of the semi-supervised literature since.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from nnunetv2 import paths
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from tqdm import tqdm

from nnunet_ssl.data.splits import check_splits, save_splits
from nnunet_ssl.dataset_conversion.h5 import read_h5
from nnunet_ssl.dataset_conversion.staging import read_image, staging, target_folder, write_image
from nnunet_ssl.system.files import read_text

VAL_PATIENTS = [28, 85, 82, 87, 19, 30, 78, 45, 2, 39]
TEST_PATIENTS = [11, 13, 84, 33, 93, 22, 68, 24, 83, 81, 80, 1, 7, 66, 8, 65, 75, 64, 59, 52]
TRAIN_PATIENTS = [  # the order matters: the first 3, 7 or 14 are the labeled ones of the literature
    *[99, 38, 50, 100, 58, 21, 49, 20, 72, 40, 60, 89, 4, 56, 98, 96, 31, 18, 94, 47, 48, 55, 97, 74, 43, 41, 63, 37],
    *[95, 54, 26, 88, 32, 69, 6, 71, 12, 73, 61, 17, 25, 10, 57, 29, 51, 5, 36, 46, 62, 34, 76, 92, 70, 77, 67, 3, 91],
    *[16, 14, 44, 42, 90, 53, 27, 35, 86, 23, 9, 79, 15],
]
LABELS = {"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3}


VAL_WITHOUT_LIST = 10  # training patients that become validation where the test list takes those of the published list
MOVED = (
    "WARNING: in {number} patients the 4D file's annotated frames differ from the 3D files, so the frame numbers of "
    "imagesUn may be shifted: {patients}."
)
H5_NAME = re.compile(r"patient(\d{3})_frame(\d\d)(?:_slice_(\d+))?\.h5")
SLICE_SPACING = 5.0  # mm, of the community's h5 files, which have none


class Patient(NamedTuple):
    """The files of one patient.

    Attributes:
        frames: per annotated frame (diastole, systole) image and label, or the community's h5 files, slice by slice.
        cine: the whole cine series, where there is one.
    """

    frames: dict[int, tuple[Path, ...]]
    cine: Path | None


def convert(
    source: Path,
    dataset_id: int,
    labeled: Sequence[int] = (7, 3, 14),
    cine_frames: int | None = 0,
    allow_missing: bool = False,
    overwrite: bool = False,
    test_list: Path | None = None,
    slice_spacing: float = SLICE_SPACING,
) -> Path:
    """Converts ACDC to `nnUNet_raw/DatasetXXX_ACDC` with one fold per number of labeled patients, and one of all.

    A case is an annotated frame, named by its true number: `patient099_frame09`. A patient's two frames are always on
    the same side of a split. Cine frames go to imagesUn; they come from training patients only, never from those for
    validation or testing.

    Args:
        source: the challenge's folder, or its `training` or `database/training` folder. Per patient a folder with
            `Info.cfg`, `patientXXX_frameNN.nii.gz`, `patientXXX_frameNN_gt.nii.gz` and, for cine frames,
            `patientXXX_4d.nii.gz`; the files may be unpacked (.nii). Or the community's folder of h5 files, whose
            `data/slices` has `patientXXX_frameYY_slice_N.h5` and whose `data` has `patientXXX_frameYY.h5`.
        dataset_id: of the new dataset.
        labeled: patients with labels, one fold per number.
        cine_frames: frames without annotation that are written per training patient, evenly spread over the cycle;
            None: all of them. 0 makes no imagesUn.
        allow_missing: go on when listed patients are not there.
        overwrite: replace an earlier conversion. imagesUn stays as it was where no cine frames are written.
        test_list: a text file with one case a line, in place of the published test patients. Where it takes the
            published validation patients, the last training patients become validation.
        slice_spacing: of h5 files, in mm along the slices; 1 mm in plane. Both are nominal: distances in mm mean
            nothing then.

    Returns:
        The raw dataset's folder. It appears only when every case was converted.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: in words, before the dataset is touched.
    """
    if cine_frames is not None and cine_frames < 0:
        raise ValueError(f"--cine-frames {cine_frames} is negative: give a number of frames per patient, or all.")
    raw = target_folder(dataset_id, "ACDC", overwrite)
    splits = Path(paths.nnUNet_preprocessed) / raw.name / "splits_final.json"
    root, h5 = _root(source)
    train, val, test = choose_patients(test_list)
    patients = _find_patients(root, h5, [*train, *val], test, allow_missing)
    folds = make_folds({n: case_names(n, patient) for n, patient in patients.items()}, labeled, train, val)
    check_splits(splits, folds, overwrite)
    old = [raw / "imagesUn"] if cine_frames == 0 else []  # else it is replaced
    refuse_cine([*old, *splits.parent.glob("*_unlabeled")], [*val, *test])
    if cine_frames != 0:
        require_cine({number: patients[number] for number in train if number in patients}, h5)
    if h5:
        print(f"Reading the h5 files in {root}; their spacing is not known and is set to 1 x 1 x {slice_spacing:g} mm.")
    tested = bool(set(test) & patients.keys())
    if not tested:
        if (raw / "imagesTs").exists():  # what the new conversion does not make stays
            raise ValueError(
                f"{raw / 'imagesTs'} has test scans of an earlier conversion, and this one has none. Remove it and "
                f"labelsTs, or give a --test-list of patients that are there."
            )
        print("There is no test patient: imagesTs is left out. --test-list names other patients as test cases.")

    with staging(raw) as folder:
        make_folders(folder, tested, cine_frames != 0)
        moved = []
        for number, patient in tqdm(patients.items(), desc=raw.name, unit="patient"):
            write_annotated(number, patient, folder, "Ts" if number in test else "Tr", slice_spacing)
            if cine_frames != 0 and number in train:
                same = write_cine(number, patient, cine_frames, folder)
                moved += [] if same else [f"patient{number:03d}"]
        generate_dataset_json(
            str(folder),
            channel_names={0: "MRI"},
            labels=LABELS,
            num_training_cases=len(list((folder / "imagesTr").iterdir())),
            file_ending=".nii.gz",
            dataset_name=raw.name,
            reference="https://www.creatis.insa-lyon.fr/Challenge/acdc",
            license="see the terms of the challenge",
            description="Cine MRI of the heart, end-diastolic and end-systolic frames"
            + f"; from h5 files, nominal spacing 1 x 1 x {slice_spacing:g} mm" * h5,
            converted_by="nnunet-ssl",
        )
    if moved:
        print(MOVED.format(number=len(moved), patients=", ".join(moved[:5])))
    save_splits(splits, folds, overwrite)
    return raw


def make_folders(raw: Path, tested: bool, cine: bool) -> None:
    """Makes the folders of the annotated frames, of those of test patients, and of cine frames."""
    for suffix in ("Tr", *["Ts"] * tested):
        (raw / f"images{suffix}").mkdir()
        (raw / f"labels{suffix}").mkdir()
    if cine:
        (raw / "imagesUn").mkdir()


def refuse_cine(folders: Iterable[Path], patients: Sequence[int]) -> None:
    """Raises ValueError where folders of unlabeled frames, which stay, have some of held-out patients."""
    names = [f"patient{number:03d}" for number in patients]
    for folder in folders:
        there = [name for name in names if any(folder.glob(f"{name}_frame*"))]
        if there:
            raise ValueError(
                f"{folder} has frames of {', '.join(there[:5])}, for validation or testing now. Remove this folder."
            )


def require_cine(patients: dict[int, Patient], h5: bool) -> None:
    """Raises where a patient has no cine series: ValueError for h5 files, else FileNotFoundError with the names."""
    if h5:
        raise ValueError("--cine-frames is for the challenge's files: the h5 files have annotated frames only.")
    without = [f"patient{number:03d}" for number, patient in patients.items() if patient.cine is None]
    if without:
        raise FileNotFoundError(
            f"{len(without)} training patients have no patientXXX_4d.nii.gz, which --cine-frames reads: "
            f"{', '.join(without[:5])}."
        )


def choose_patients(test_list: Path | None) -> tuple[list[int], list[int], list[int]]:
    """Patients for training (in the published order), validation and testing.

    Args:
        test_list: see `convert`; None: the published lists.

    Raises:
        ValueError: a line is no case, or no published training patient is left.
    """
    if test_list is None:
        return TRAIN_PATIENTS, VAL_PATIENTS, TEST_PATIENTS
    lines = [line.strip() for line in read_text(test_list).splitlines() if line.strip()]
    matches = [re.fullmatch(r"patient(\d{3})_frame\d\d", line) for line in lines]
    if not all(matches) or not lines:
        bad = next((line for line, match in zip(lines, matches, strict=True) if not match), "no line")
        raise ValueError(f"{test_list}: every line must be a case as patient001_frame01, but there is {bad!r}.")
    test = list(dict.fromkeys(int(match[1]) for match in matches))
    train = [number for number in TRAIN_PATIENTS if number not in test]
    val = [number for number in VAL_PATIENTS if number not in test]
    if not val:
        train, val = train[:-VAL_WITHOUT_LIST], train[-VAL_WITHOUT_LIST:]
    return train, val, test


def make_folds(
    cases: dict[int, list[str]],
    labeled: Sequence[int],
    train: Sequence[int] = TRAIN_PATIENTS,
    val: Sequence[int] = VAL_PATIENTS,
) -> list[dict[str, list[str]]]:
    """One fold per number of labeled patients (the first n training patients), then one in which all have labels.

    Args:
        cases: patient number to its cases; patients that are not there are left out.
        labeled: numbers of patients.
        train: patients for training, in the order in which they are labeled.
        val: patients for validation.

    Raises:
        ValueError: a number that leaves no unlabeled patient, or there is no validation patient.
    """
    train = [number for number in train if number in cases]
    val_cases = sorted(case for number in val for case in cases.get(number, []))
    if not val_cases:
        raise ValueError(f"None of the {len(val)} validation patients is there.")
    for number in labeled:
        if not 1 <= number < len(train):
            raise ValueError(
                f"--labeled {number} is not possible: {len(train)} training patients are there and at least 1 stays "
                f"unlabeled, so the number must be from 1 to {len(train) - 1}."
            )

    def of(patients):
        return [case for number in patients for case in cases[number]]

    folds = [{"train": of(train[:n]), "val": val_cases, "unlabeled": of(train[n:])} for n in labeled]
    return [*folds, {"train": of(train), "val": val_cases}]


def case_names(number: int, patient: Patient) -> list[str]:
    """`patientXXX_frameNN` of the annotated frames."""
    return [f"patient{number:03d}_frame{frame:02d}" for frame in patient.frames]


def read_info(file: Path) -> dict[str, str]:
    """The lines `key: value` of an Info.cfg."""
    pairs = (line.partition(":") for line in read_text(file).splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def read_h5_case(files: Sequence[Path], slice_spacing: float) -> tuple[sitk.Image, sitk.Image]:
    """An annotated frame from the community's files: one volume, or its slices in order.

    Returns:
        Image in float32, and label in uint8, with spacing 1 in plane.

    Raises:
        ValueError: names a file that is damaged, of another size than the first, or has other labels.
    """
    images, labels = [], []
    for file in files:
        image, label = read_h5(file)
        if image.shape != label.shape or image.ndim != (2 if len(files) > 1 else image.ndim):
            raise ValueError(f"{file}: the image has the shape {image.shape}, its label {label.shape}.")
        if images and image.shape != images[0].shape:
            raise ValueError(f"{file}: shape {image.shape}, but {files[0].name} has {images[0].shape}.")
        _check_labels(label, file)
        images.append(image)
        labels.append(label)
    pair = []
    for arrays, kind in ((images, np.float32), (labels, np.uint8)):
        volume = sitk.GetImageFromArray((np.stack(arrays) if arrays[0].ndim == 2 else arrays[0]).astype(kind))
        volume.SetSpacing((1.0, 1.0, slice_spacing))
        pair.append(volume)
    return pair[0], pair[1]


def _check_labels(array: np.ndarray, file: Path) -> None:
    strange = sorted(set(np.unique(array).tolist()) - set(LABELS.values()))
    if strange:
        raise ValueError(f"{file} has the labels {strange[:5]}; expected {sorted(LABELS.values())}.")


def read_case(image_file: Path, label_file: Path) -> tuple[sitk.Image, sitk.Image]:
    """An annotated frame, as stored, and its label in uint8 with the image's geometry.

    Raises: ValueError naming the file when the two do not fit together.
    """
    image, label = read_image(image_file), read_image(label_file)
    if image.GetDimension() != 3 or image.GetSize() != label.GetSize():
        raise ValueError(f"{label_file}: size {label.GetSize()}, but {image_file.name} has {image.GetSize()}.")
    array = sitk.GetArrayFromImage(label)
    _check_labels(array, label_file)
    clean = sitk.GetImageFromArray(array.astype(np.uint8))
    clean.CopyInformation(image)
    return image, clean


def read_cine(patient: Patient, count: int | None) -> tuple[dict[int, sitk.Image], bool]:
    """Frames of the cine series that have no annotation, with the geometry of the annotated 3D frames.

    The geometry is not read from the 4D file, whose header mixes time into spacing and direction.

    Args:
        patient: with a cine file.
        count: frames, evenly spread over those without annotation; None: all.

    Returns:
        Frame number (from 1) to image, and whether the 4D file has the annotated frames where their numbers say.

    Raises:
        ValueError: the 4D file is not 4D, or its slices are not those of the 3D files.
    """
    series = sitk.GetArrayFromImage(read_image(patient.cine))  # (time, z, y, x)
    annotated = {frame: read_image(files[0]) for frame, files in patient.frames.items()}
    reference = next(iter(annotated.values()))
    shape = reference.GetSize()[::-1]
    if series.ndim != 4 or series.shape[1:] != shape:
        raise ValueError(f"{patient.cine}: shape (time, z, y, x) {series.shape}, but the 3D frames have {shape}.")
    same = all(
        frame <= len(series) and np.array_equal(series[frame - 1], sitk.GetArrayViewFromImage(image))
        for frame, image in annotated.items()
    )
    free = [frame for frame in range(1, len(series) + 1) if frame not in annotated]
    if count is not None and count < len(free):
        free = [free[int((index + 0.5) * len(free) / count)] for index in range(count)]
    frames = {}
    for frame in free:
        frames[frame] = sitk.GetImageFromArray(series[frame - 1])
        frames[frame].CopyInformation(reference)
    return frames, same


def write_annotated(number: int, patient: Patient, folder: Path, suffix: str, slice_spacing: float) -> None:
    """Writes a patient's annotated frames and their labels into the folders imagesTr and labelsTr, or ...Ts."""
    for case, files in zip(case_names(number, patient), patient.frames.values(), strict=True):
        h5 = files[0].suffix == ".h5"
        image, label = read_h5_case(files, slice_spacing) if h5 else read_case(*files)
        write_image(image, folder / f"images{suffix}" / f"{case}_0000.nii.gz")
        write_image(label, folder / f"labels{suffix}" / f"{case}.nii.gz")


def write_cine(number: int, patient: Patient, count: int | None, folder: Path) -> bool:
    """Writes frames without annotation into imagesUn, see `read_cine`; whether the 4D file's numbers are right."""
    frames, same = read_cine(patient, count)
    for frame, image in frames.items():
        write_image(image, folder / "imagesUn" / f"patient{number:03d}_frame{frame:02d}_0000.nii.gz")
    return same


def _root(source: Path) -> tuple[Path, bool]:
    """The folder that holds the patients' folders; or the one of h5 files, and True."""
    for folder in (source, source / "training", source / "database" / "training"):
        if any(folder.glob("patient[0-9][0-9][0-9]")):
            return folder, False
    for folder in (source / "data", source):
        if any(folder.glob("patient*.h5")) or any(folder.glob("slices/patient*.h5")):
            return folder, True
    raise FileNotFoundError(
        f"Neither {source} nor {source / 'training'} nor {source / 'database/training'} has folders patient001, "
        f"patient002, ... of ACDC, nor is there a file patient*.h5 in {source / 'data/slices'} or {source / 'data'}."
    )


def _find_patients(root: Path, h5: bool, needed: list[int], test: list[int], allow_missing: bool) -> dict[int, Patient]:
    """The patients of the lists, training patients first; h5 files of test patients may be missing."""
    found = _find_h5(root) if h5 else {}
    listed = [*needed, *test]
    there = {n for n in listed if (n in found if h5 else (root / f"patient{n:03d}").is_dir())}
    required = [*needed, *test] if not h5 or test is not TEST_PATIENTS else needed
    missing = [f"patient{number:03d}" for number in required if number not in there]
    if missing:
        message = f"{len(missing)} of {len(required)} listed patients are not in {root}: {', '.join(missing[:10])}"
        if not allow_missing:
            raise FileNotFoundError(f"{message}. Pass --allow-missing to go on without them.")
        print(message)
    return {n: found[n] if h5 else _find_patient(root / f"patient{n:03d}") for n in listed if n in there}


def _find_h5(root: Path) -> dict[int, Patient]:
    """The patients of a folder of h5 files and of its folder `slices`; a volume goes before slices of its frame."""
    slices: dict[tuple[int, int], dict[int, Path]] = {}
    volumes: dict[tuple[int, int], Path] = {}
    for file in sorted([*root.glob("patient*.h5"), *root.glob("slices/patient*.h5")]):
        match = H5_NAME.fullmatch(file.name)
        if match is None:
            raise ValueError(f"{file}: expected the name patientXXX_frameYY.h5 or patientXXX_frameYY_slice_N.h5.")
        frame = int(match[1]), int(match[2])
        if match[3] is None:
            volumes[frame] = file
        else:
            slices.setdefault(frame, {})[int(match[3])] = file
    for (number, frame), files in slices.items():
        gaps = sorted(set(range(1, len(files) + 1)) - files.keys())
        if gaps and (number, frame) not in volumes:
            name = f"patient{number:03d}_frame{frame:02d}_slice_{gaps[0]}.h5"
            raise ValueError(f"{files[max(files)]} is there, but {files[max(files)].with_name(name)} is not.")
    patients: dict[int, Patient] = {}
    for number, frame in sorted({*slices, *volumes}):
        whole, parts = volumes.get((number, frame)), slices.get((number, frame), {})
        files = (whole,) if whole is not None else tuple(parts[index] for index in sorted(parts))
        patients.setdefault(number, Patient({}, None)).frames[frame] = files
    return patients


def _find_patient(folder: Path) -> Patient:
    name = folder.name
    info = folder / "Info.cfg"
    if not info.is_file():
        raise FileNotFoundError(f"{info} is missing: it says which frames are annotated.")
    values = read_info(info)
    frames = {}
    for key in ("ED", "ES"):
        if not values.get(key, "").isdecimal():
            raise ValueError(f"{info} has no line '{key}: NUMBER' with the number of the annotated frame.")
        frame = int(values[key])
        found = [_file(folder, f"{name}_frame{frame:02d}{suffix}") for suffix in ("", "_gt")]
        if None in found:
            raise FileNotFoundError(
                f"{folder} has no {name}_frame{frame:02d}{'' if found[0] is None else '_gt'}.nii.gz, which {info.name} "
                f"names as {key}."
            )
        frames[frame] = tuple(found)
    return Patient(dict(sorted(frames.items())), _file(folder, f"{name}_4d"))


def _file(folder: Path, stem: str) -> Path | None:
    """The packed or unpacked file of this name."""
    return next((folder / f"{stem}{e}" for e in (".nii.gz", ".nii") if (folder / f"{stem}{e}").is_file()), None)
