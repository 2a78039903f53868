"""The left atrium dataset (LA) of the 2018 Atrial Segmentation Challenge, as an nnU-Net dataset.

Xiong et al., "A global benchmark of algorithms for segmenting the left atrium from late gadolinium-enhanced cardiac
magnetic resonance imaging", Medical Image Analysis 2021, arXiv:2004.12314. The lists of 80 training and 20 test cases
are those of Yu et al., "Uncertainty-aware self-ensembling model", MICCAI 2019, arXiv:1907.07034, and of the
semi-supervised literature since.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2 import paths
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from tqdm import tqdm

from nnunet_ssl.data.splits import check_splits, save_splits
from nnunet_ssl.dataset_conversion.h5 import read_h5
from nnunet_ssl.dataset_conversion.staging import staging, target_folder, write_image
from nnunet_ssl.system.files import read_text

VAL_CASES = 8  # cases at the end of the training list that every fold validates on
H5_SPACING = (0.625, 0.625, 0.625)  # mm; the community's h5 files do not store it
IMAGE_FILE, LABEL_FILE, H5_FILE = "lgemri.nrrd", "laendo.nrrd", "mri_norm2.h5"

# The order matters: the first 4, 8 or 16 training cases are the labeled ones of the literature.
# fmt: off
TRAIN_CASES = [
    "06SR5RBREL16DQ6M8LWS", "0RZDK210BSMWAA6467LU", "1D7CUD1955YZPGK8XHJX", "1GU15S0GJ6PFNARO469W",
    "1MHBF3G6DCPWHSKG7XCP", "23X6SY44VT9KFHR7S7OC", "2XL5HSFSE93RMOJDRGR4", "38CWS74285MFGZZXR09Z",
    "3C2QTUNI0852XV7ZH4Q1", "3DA0T2V6JJ2NLUAV6FWM", "4498CA6DZWELOXCBRYRF", "45C45I6IXAFGNRO067W9",
    "4CHFJGF6ZUM7CMZTNFQF", "4EPVTT1HPA8U60CDUKXE", "57SGAJMLCTCH92QUA0EE", "5BHTH9RHH3PQT913I59W",
    "5FKQL4K14KCB72Y8YMC2", "5HH0WPWIY06DLAFOBQ4M", "5QFK2PMHNX7UALK52NNA", "5UB5KFD2PK38Z4LS6W80",
    "6799D6LEBH3NSRV1KH27", "78NJ5YFQF72BGC8RO51C", "7FUCNXB39F78WTOP5K71", "8GYK8A9MBRC9TV0FVSRA",
    "8M99G0JLAXG9GLPV0O8G", "8RE90C8H5DKF4V6HO8UU", "8ZG2TRZ81MAWHZPN9KKG", "9DCM2IB45SK6YKQNYUQY",
    "9DHWWP5Y66VDMPXISZ13", "9DQYTIU00I4JC0OEOKQQ", "A11O45O3NAXWM7T2H8CH", "A4R1S23KR0KU2WSYHK2X",
    "A5RNNK0A891WUSC2V624", "AT5CRO5JUDBWD4RUPXSQ", "BNK95S2SJXEGSW7VAKYU", "BXJWOUYP2J3EN4U92517",
    "BYSRSI3H4YTWKMM3MADP", "BZUFJX66T0W6ZPVTL9DU", "CB5P5W7X310NIIVU7UZV", "CBIJFVZ5L9BS0LKWE8YL",
    "CCGAKN4EDT72KC8TTJ76", "CLXFYOBQDCVXQ9P7YC07", "CMPXO4J23G58J53Q98SZ", "CZPMV6KWZ4I7IJJP9FOK",
    "DLKXBV73A55ZTSZ0QQI2", "DQ5UYBGR5QP6L692QSG6", "DYXSCIWHLSUOZIDDSZ40", "E2ZMO66WGS74UKXTZPPQ",
    "EJ5V7SPR4961JWD6SS8V", "FGM5NIWN3URY4HF4WNUW", "GSC9KNY0VEZXFSGWNF25", "HVE7DR3CUA2IM3RC6OMA",
    "HZZ4O0BRKF8S0YX3NNF7", "I2VZ7N8H9QYNYT7ZZF1Y", "IDWWHGWJ5STOQXSDT6GU", "IIY6TYJMTJIZRIZLB9YW",
    "IJJY51YW3W4YJJ7DTVTK", "IQYKPTWXVV9H0IHB8YXC", "JEC6HJ7SQJXBKVREX03F", "JGFOLWJF7YCYD8DPHQNH",
    "K32FD6LRSUSSXGS1YUOX", "KM5RYAMP4P4ZP6XWP3Q2", "KSNYHUBHHUJTYJ14UQZR", "LH4FVU3TQDEC87YGN6FL",
    "LJSDNMND9SHKM7Q4IRHJ", "MFTDVMBWFNQ3F5KHBRDR", "MJHV7F65TB2A76CQLOC3", "MVKIPGBKTNSENNP1S4HB",
    "O5TSIKRD4AIB8K84WIR9", "OIRDLE32TXZX942FVZMM", "P1OTI3IWJUIB5NRLULLH", "PVNXUK681N9BY14K4Z86",
    "Q0MEX9ZIKAGJORSPLQ3Y", "Q7J0WYM695R9MA285ZW0", "QZC1W0FNR19KJFLOCFLH", "R8ER97O9UUN77C02VE2J",
    "RSZY41MT2FGDKHWWL5L2", "SN4LF8SGBSRQUPTDSX78", "TDDI6L3Y0L9VVFP9MNFS", "UZUZZT2W9IUSHL6ASOX3",
]
TEST_CASES = [
    "UPT6DX9IQY9JAZ7HJKA7", "UTBUJIWZMKP64E3N73YC", "ULHWPWKKLTE921LQLH1P", "V0MZOWJ6MU3RMRCV9EXR",
    "VDOF02M8ZHEAADFMS6NP", "VG4C826RAAKVMV9BQLVD", "VIXBEFTNVHZWKAKURJBN", "VQ2L3WM8KEVF6L44E6G9",
    "WBG9WYZ1B25WDT5WAT8T", "WMDG2EFA6L2SNDZXIRU0", "WNPKE0W404QE9AELX1LR", "WSJB9P4JCXUVHBOYFVWL",
    "WW8F5CO4S4K5IM5Z7EXX", "X18LU5AOBNNDMLTA0JZL", "XYDLYJ5CS19FDBVLJIPI", "Y7ZU0B2APPF54WG6PDMF",
    "YDKD1HVHSME6NVMA8I39", "Z9GMG63CJLL0VW893BB1", "ZIJLJAVQV3FJ6JSQOH1E", "ZQPMJ4XEC5A4BISD45P1",
]
# fmt: on


def convert(
    source: Path,
    dataset_id: int,
    train_list: Path | None = None,
    test_list: Path | None = None,
    labeled: Sequence[int] = (8, 4, 16),
    allow_missing: bool = False,
    crop_margin: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert LA to `nnUNet_raw/DatasetXXX_LA` with one fold per labeled number, plus an all-labeled one; return it.

    `source` holds one folder per case, with `lgemri.nrrd` and `laendo.nrrd` (the challenge's files) or `mri_norm2.h5`
    (the community's). The lists are text files, one identifier a line; without them the published ones are used.
    `crop_margin`, in voxels, crops every case in-plane around its reference segmentation: off by default, because it
    uses the label of every case, unlabeled and test cases included. The dataset appears only when every case was
    converted; `overwrite` replaces what this function writes and leaves other files, such as imagesUn, alone
    (preprocessed data is then out of date: preprocess again).
    Raises: ValueError, FileNotFoundError or FileExistsError in words, before the dataset is touched.
    """
    if crop_margin is not None and crop_margin < 0:
        raise ValueError(f"--crop-margin {crop_margin} is negative: give the margin in voxels, for example 20.")
    raw = target_folder(dataset_id, "LA", overwrite)
    splits = Path(paths.nnUNet_preprocessed) / raw.name / "splits_final.json"

    train, test = _read_lists(train_list, test_list)
    train, test = _drop_missing(source, train, test, allow_missing)
    folds = make_folds(train, labeled)
    check_splits(splits, folds, overwrite)
    layouts = {_layout(source / case) for case in train + test}
    if len(layouts) > 1:
        raise ValueError(
            f"{source} mixes cases with {IMAGE_FILE} and cases with {H5_FILE} only, whose intensities are not "
            "comparable. Give every case the same layout."
        )

    with staging(raw) as folder:
        jobs = [("Tr", case) for case in train] + [("Ts", case) for case in test]
        for suffix in ("Tr", "Ts"):
            (folder / f"images{suffix}").mkdir()
            (folder / f"labels{suffix}").mkdir()
        for suffix, case in tqdm(jobs, desc=raw.name, unit="case"):
            image, label = read_case(source / case)
            if crop_margin is not None:
                image, label = crop_in_plane(image, label, crop_margin, case)
            write_image(image, folder / f"images{suffix}" / f"{case}_0000.nii.gz")
            write_image(label, folder / f"labels{suffix}" / f"{case}.nii.gz")
        generate_dataset_json(
            str(folder),
            channel_names={0: "MRI"},
            labels={"background": 0, "left atrium": 1},
            num_training_cases=len(train),
            file_ending=".nii.gz",
            dataset_name=raw.name,
            reference="https://www.cardiacatlas.org/atriaseg2018-challenge/",
            license="see the terms of the challenge",
            description=_description(layouts.pop(), crop_margin),
            converted_by="nnunet-ssl",
        )
    save_splits(splits, folds, overwrite)
    return raw


def make_folds(train: Sequence[str], labeled: Sequence[int]) -> list[dict[str, list[str]]]:
    """Make one fold per labeled number (the first n training cases have labels), then one in which all have.

    The last `VAL_CASES` training cases are `val` in every fold and in no `unlabeled` list. They are for monitoring
    only: the final checkpoint is the result, nothing is selected on them.
    Raises: ValueError for a number that leaves no unlabeled case.
    """
    if len(train) < VAL_CASES + 2:
        raise ValueError(
            f"{len(train)} training cases are too few: {VAL_CASES} are for validation, and at least 1 labeled and 1 "
            "unlabeled case are needed."
        )
    most = len(train) - VAL_CASES - 1
    for number in labeled:
        if not 1 <= number <= most:
            raise ValueError(
                f"--labeled {number} is not possible: {len(train)} training cases are available, {VAL_CASES} of them "
                f"are for validation and at least 1 stays unlabeled, so the number must be from 1 to {most}."
            )
    val = list(train[-VAL_CASES:])
    folds = [
        {"train": list(train[:number]), "val": val, "unlabeled": list(train[number:-VAL_CASES])} for number in labeled
    ]
    # The upper bound of the literature trains on all 80 cases, so its validation cases are training cases as well.
    return [*folds, {"train": list(train), "val": val}]


def read_case(folder: Path) -> tuple[sitk.Image, sitk.Image]:
    """Read the image, as stored, and the label, as 0/1 in uint8 with the image's geometry, of one case in 3D.

    Raises: ValueError naming the file when the two do not fit together or hold values that they cannot have.
    """
    image, label, label_file = _read_h5(folder) if _layout(folder) == "h5" else _read_nrrd(folder)
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"The image in {folder} is not one 3D volume with one channel.")
    if image.GetSize() != label.GetSize():
        raise ValueError(f"{label_file}: the label's size {label.GetSize()} is not the image's {image.GetSize()}.")
    if not _same_geometry(image, label):
        raise ValueError(
            f"{label_file}: spacing, origin or direction differ from the image's by more than rounding "
            f"(label {_geometry(label)}, image {_geometry(image)})."
        )
    if not np.isfinite(sitk.GetArrayViewFromImage(image)).all():
        raise ValueError(f"The image in {folder} has voxels that are not finite.")
    array = sitk.GetArrayViewFromImage(label)
    values = np.unique(array).tolist()
    if not (set(values) <= {0, 255} or set(values) <= {0, 1}):
        raise ValueError(f"{label_file}: the label holds {values[:10]}; expected 0 and 255, or 0 and 1.")
    binary = sitk.GetImageFromArray((array > 0).astype(np.uint8))
    binary.CopyInformation(image)
    return image, binary


def crop_in_plane(image: sitk.Image, label: sitk.Image, margin: int, case: str) -> tuple[sitk.Image, sitk.Image]:
    """Crop both to the label's bounding box in x and y plus `margin` voxels, as far as the image reaches; z is kept.

    The literature draws each side's margin from 10 to 19 voxels and widens small boxes to its patch size; here the
    margin is fixed, so that a conversion can be repeated.
    Raises: ValueError when the label is empty.
    """
    array = sitk.GetArrayViewFromImage(label)
    if not array.any():
        raise ValueError(f"{case}: the label is empty, so --crop-margin has nothing to crop around.")
    y, x = (np.flatnonzero(array.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    box = tuple(
        slice(max(int(inside[0]) - margin, 0), min(int(inside[-1]) + 1 + margin, size))
        for inside, size in zip((x, y), image.GetSize()[:2], strict=True)
    )
    return image[(*box, slice(None))], label[(*box, slice(None))]


def _read_nrrd(folder: Path) -> tuple[sitk.Image, sitk.Image, Path]:
    for file in (folder / IMAGE_FILE, folder / LABEL_FILE):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: a case needs {IMAGE_FILE} and {LABEL_FILE}.")
    return sitk.ReadImage(folder / IMAGE_FILE), sitk.ReadImage(folder / LABEL_FILE), folder / LABEL_FILE


def _read_h5(folder: Path) -> tuple[sitk.Image, sitk.Image, Path]:
    file = folder / H5_FILE
    arrays = read_h5(file)
    images = []
    for array in arrays:
        image = sitk.GetImageFromArray(array.transpose())  # stored as (x, y, z); SimpleITK takes (z, y, x)
        image.SetSpacing(H5_SPACING[: image.GetDimension()])
        images.append(image)
    return images[0], images[1], file


def _layout(folder: Path) -> str | None:
    """Tell "nrrd", "h5" or None (no case here); the original files win where both are present."""
    if (folder / IMAGE_FILE).is_file() or (folder / LABEL_FILE).is_file():
        return "nrrd"
    return "h5" if (folder / H5_FILE).is_file() else None


def _geometry(image: sitk.Image) -> tuple[tuple[float, ...], ...]:
    return image.GetSpacing(), image.GetOrigin(), image.GetDirection()


def _same_geometry(image: sitk.Image, label: sitk.Image) -> bool:
    tolerance = 1e-3 * min(image.GetSpacing())  # mm
    pairs = zip(_geometry(image), _geometry(label), strict=True)
    return all(np.allclose(a, b, rtol=1e-4, atol=tolerance) for a, b in pairs)


def _read_lists(train_list: Path | None, test_list: Path | None) -> tuple[list[str], list[str]]:
    train = TRAIN_CASES if train_list is None else _read_list(train_list)
    test = TEST_CASES if test_list is None else _read_list(test_list)
    both = sorted(set(train) & set(test))
    if both:
        raise ValueError(f"In both the training and the test list: {', '.join(both)}. Remove them from one.")
    return train, test


def _read_list(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"The list {file} does not exist.")
    cases = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    twice = sorted({case for case in cases if cases.count(case) > 1})
    if twice:
        raise ValueError(f"{file} names cases more than once: {', '.join(twice)}.")
    if not cases:
        raise ValueError(f"{file} names no case: write one identifier a line.")
    return cases


def _drop_missing(source: Path, train: list[str], test: list[str], allow_missing: bool) -> tuple[list[str], list[str]]:
    if not source.is_dir():
        raise FileNotFoundError(f"The source folder {source} does not exist.")
    missing = [case for case in train + test if _layout(source / case) is None]
    if missing:
        message = f"{len(missing)} of {len(train) + len(test)} listed cases are not in {source}: {', '.join(missing)}"
        if not allow_missing:
            raise FileNotFoundError(
                f"{message}. A case is a folder with {IMAGE_FILE} and {LABEL_FILE}, or with {H5_FILE}. "
                "Pass --allow-missing to go on without them; the first n cases that are present are then the labeled."
            )
        print(message)
    return [case for case in train if case not in missing], [case for case in test if case not in missing]


def _description(layout: str | None, crop_margin: int | None) -> str:
    text = f"Left atrium in late gadolinium-enhanced MRI, from the {layout} files"
    if crop_margin is None:
        return text
    return f"{text}, cropped in-plane around each case's reference segmentation (margin {crop_margin} voxels)"
