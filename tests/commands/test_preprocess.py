"""Unlabeled scans become what nnU-Net's own preprocessing makes of a scan, or are refused with the reasons."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import tiny
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage.io import imsave

from nnunet_ssl.commands.preprocess import preprocess_unlabeled
from nnunet_ssl.data.loading import UnlabeledDataset
from nnunet_ssl.data.plausibility import Expected
from nnunet_ssl.data.preprocessed import FILES, check_settings, unlabeled_folder, write_settings
from nnunet_ssl.data.scan_checks import Report, check_scan, geometry
from nnunet_ssl.data.scans import find_scans, unpacked
from nnunet_ssl.system.disk import FullDisk, say_full_disk
from nnunet_ssl.system.pool import run_all, worker_pool

DATASET = 941
CASES = ("unlabeled_000", "unlabeled_001")


@pytest.fixture(scope="module")
def planned() -> tuple[Path, Path]:
    """Raw and preprocessed folder of a planned dataset with two channels."""
    raw = tiny.make_raw_dataset(DATASET, "Unlabeled", cases=2, unlabeled=2, test=1, channels=2)
    return raw, tiny.plan(DATASET)


@pytest.fixture
def raw(planned) -> Path:
    return planned[0]


@pytest.fixture
def folder(planned):
    """The preprocessed folder; every test finds it without unlabeled cases, and leaves its plans as they were."""
    kept = {path: path.read_text(encoding="utf-8") for path in planned[1].glob("*.json")}
    yield planned[1]
    for path in planned[1].iterdir():
        if path.is_dir() and "_unlabeled" in path.name:
            shutil.rmtree(path)
        elif path.is_file() and path not in kept:
            path.unlink()
    for path, text in kept.items():
        path.write_text(text)


@pytest.fixture
def images(raw, tmp_path) -> Path:
    """A copy of imagesUn to do harm to, for -i."""
    return Path(shutil.copytree(raw / "imagesUn", tmp_path / "images"))


def preprocess(configurations=("3d_fullres",), num_processes=0, **kwargs) -> None:
    preprocess_unlabeled(str(DATASET), configurations, num_processes=num_processes, **kwargs)


def target_of(folder: Path, configuration: str = "3d_fullres") -> Path:
    return unlabeled_folder(folder, f"nnUNetPlans_{configuration}")


def names_in(target: Path) -> set[str]:
    return {path.name for path in target.iterdir()}


def content(target: Path) -> dict[str, np.ndarray]:
    """Every image and segmentation of a preprocessed folder, read as nnU-Net reads them."""
    dataset = infer_dataset_class(str(target))(str(target))
    arrays = {}
    for case in dataset.identifiers:
        image, segmentation, _, _ = dataset.load_case(case)
        arrays |= {case: image[:], f"{case}_seg": segmentation[:]}
    return arrays


def edit(file: Path, change) -> None:
    """Pass a scan through `change(image)`; None means that it was changed in place."""
    image = sitk.ReadImage(str(file))
    changed = change(image)
    sitk.WriteImage(image if changed is None else changed, str(file))


def edit_plans(folder: Path, **changes) -> None:
    file = folder / "nnUNetPlans.json"
    plans = json.loads(file.read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"] |= changes
    file.write_text(json.dumps(plans))


# What is written


def test_scans_go_beside_the_folder_that_nnunet_trains_on():
    assert unlabeled_folder(Path("a/Dataset001_X"), "nnUNetPlans_2d") == Path("a/Dataset001_X/nnUNetPlans_2d_unlabeled")


def test_two_configurations_at_once_give_the_files_of_nnunets_dataset_class(folder):
    before = names_in(folder)
    preprocess(("2d", "3d_fullres"))
    names = {"nnUNetPlans_2d_unlabeled", "nnUNetPlans_3d_fullres_unlabeled"}
    assert names_in(folder) - before == names | {f"{name}.json" for name in names}
    for name in names:
        assert names_in(folder / name) == {case + suffix for case in CASES for suffix in FILES}
        dataset = infer_dataset_class(str(folder / name))(str(folder / name))
        assert dataset.identifiers == list(CASES)
        for case in CASES:
            image, segmentation, _, properties = dataset.load_case(case)
            assert image.shape == (2, 24, 20, 22)
            assert segmentation.shape == (1, 24, 20, 22)
            assert "class_locations" not in properties


def test_a_scan_is_preprocessed_like_the_same_scan_with_a_label(raw, folder, tmp_path):
    for channel in range(2):
        shutil.copy(raw / "imagesTr" / f"case_000_{channel:04d}.nii.gz", tmp_path / f"twin_{channel:04d}.nii.gz")
    preprocess(("2d", "3d_fullres"), images=tmp_path, accept=["twin"])
    for configuration in ("2d", "3d_fullres"):
        stock = content(folder / f"nnUNetPlans_{configuration}")
        twin = content(target_of(folder, configuration))
        np.testing.assert_array_equal(twin["twin"], stock["case_000"])
        assert np.unique(stock["case_000_seg"]).tolist() == [0, 1]
        assert np.unique(twin["twin_seg"]).tolist() == [0]  # nothing of the label


def test_outside_of_the_body_is_minus_one_as_with_a_label_and_spacing_is_resampled(folder, tmp_path):
    rng = np.random.default_rng(1)
    images, label = tiny.make_case(rng, (24, 20, 22), 2, {"background": 0, "blob": 1})
    images[:, :6, :4] = 0  # a corner without body, away from the blob: resampled labels would shift its edge
    files = [tmp_path / f"case_{channel:04d}.nii.gz" for channel in range(2)]
    for file, image in zip(files, images, strict=True):
        tiny.write_image(file, image, spacing=(1, 1.5, 1))
    preprocess(images=tmp_path)
    ours = content(target_of(folder))

    label_file = tmp_path / "label.nii.gz"
    tiny.write_image(label_file, label, spacing=(1, 1.5, 1))
    plans = PlansManager(str(folder / "nnUNetPlans.json"))
    stock, stock_seg, _ = DefaultPreprocessor(verbose=False).run_case(
        [str(file) for file in files],
        str(label_file),
        plans,
        plans.get_configuration("3d_fullres"),
        json.loads((folder / "dataset.json").read_text(encoding="utf-8")),
    )
    assert stock.shape == (2, 24, 30, 22)
    np.testing.assert_array_equal(ours["case"], stock)
    np.testing.assert_array_equal(ours["case_seg"] == -1, stock_seg == -1)
    assert np.unique(ours["case_seg"]).tolist() == [-1, 0]


@pytest.mark.parametrize("name", ["a_b", "a.b.c", "a_0000", "2024.01.02_x_0001"])
def test_identifiers_may_have_underscores_and_dots(folder, images, name):
    for file in images.iterdir():
        file.rename(images / file.name.replace(CASES[0], name))
    preprocess(images=images)
    assert names_in(target_of(folder)) == {case + suffix for case in (name, CASES[1]) for suffix in FILES}


@pytest.mark.slow
def test_two_processes_give_the_same_as_none(folder):
    preprocess()
    alone = content(target_of(folder))
    shutil.rmtree(target_of(folder))
    preprocess(num_processes=2)
    together = content(target_of(folder))
    assert alone.keys() == together.keys()
    for case, array in alone.items():
        np.testing.assert_array_equal(together[case], array)


# What is refused


def constant(image):
    return image * 0 + 7


def shorter(image):
    cut = image[1:]
    cut.SetOrigin(image.GetOrigin())
    return cut


def shifted(image):
    image.SetOrigin((0, 0, 0.5))


def stretched(image):
    image.SetSpacing((1, 1, 1.01))


def turned(image):
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (constant, "constant, every voxel is 7"),
        (shorter, "shape [24.0, 20.0, 21.0] differs from [24.0, 20.0, 22.0] of unlabeled_000_0000.nii.gz"),
        (stretched, "spacing [1.01, 1.0, 1.0] differs from [1.0, 1.0, 1.0] of unlabeled_000_0000.nii.gz"),
        (shifted, "origin [0.0, 0.0, 0.5] differs from [0.0, 0.0, 0.0] of unlabeled_000_0000.nii.gz"),
        (turned, "direction [-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0] differs from"),
    ],
)
def test_an_unsound_image_is_refused(folder, images, change, reason):
    edit(images / "unlabeled_000_0001.nii.gz", change)
    with pytest.raises(ValueError, match="Problems in") as error:
        preprocess(images=images)
    assert f"unlabeled_000_0001.nii.gz: {reason}" in str(error.value)
    assert not target_of(folder).exists()


@pytest.mark.parametrize("as_records", [False, True], ids=["vectors", "RGB24"])
def test_an_rgb_nifti_is_told_what_it_is(as_records, folder, images):
    file, colours = images / "unlabeled_000_0001.nii.gz", np.zeros((4, 5, 6, 3), np.uint8)
    if as_records:
        records = colours.view([(name, "u1") for name in "RGB"])[..., 0]
        nibabel.save(nibabel.Nifti1Image(records, np.eye(4)), file)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(file))
    with pytest.raises(ValueError, match=r"unlabeled_000_0001\.nii\.gz: cannot be read \(its voxels are colours"):
        preprocess(images=images)
    assert not target_of(folder).exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_refused(tmp_path, value):
    file = tmp_path / "a_0000.mha"  # ITK itself turns them into 0 when it reads NIfTI
    image = np.zeros((4, 5, 6), np.float32)
    image[:2] = 1
    image[0, 0, :2] = value
    tiny.write_image(file, image)
    findings = check_scan("a", [file], Expected(("MR",), ".mha", SimpleITKIO))
    assert findings.errors == ["a_0000.mha: 2 of 120 voxels are NaN or infinite"]


def test_geometry_within_nnunets_tolerance_is_accepted(folder, images):
    edit(images / "unlabeled_000_0001.nii.gz", lambda image: image.SetSpacing((1, 1, 1 + 1e-6)))
    preprocess(images=images)
    assert len(content(target_of(folder))) == 4


def damage(images):
    (images / "unlabeled_000_0001.nii.gz").write_bytes(b"not an image")


def drop_second_channel(images):
    (images / "unlabeled_000_0001.nii.gz").unlink()


def drop_first_channel(images):
    (images / "unlabeled_000_0000.nii.gz").unlink()


def add_third_channel(images):
    shutil.copy(images / "unlabeled_000_0000.nii.gz", images / "unlabeled_000_0002.nii.gz")


def add(name):
    return lambda images: (images / name).write_text("")


def rename_to(case):
    def rename(images):
        for channel in range(2):
            (images / f"unlabeled_000_{channel:04d}.nii.gz").rename(images / f"{case}_{channel:04d}.nii.gz")

    return rename


NOT_A_SCAN = "not a scan; expected CASE_0000.nii.gz, CASE_0001.nii.gz, ..."


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (damage, "unlabeled_000_0001.nii.gz: cannot be read"),
        (drop_second_channel, "unlabeled_000: unlabeled_000_0001.nii.gz missing"),
        (drop_first_channel, "unlabeled_000: unlabeled_000_0000.nii.gz missing"),
        (add_third_channel, "_0002.nii.gz: nnU-Net takes _0002 for a channel, but dataset.json has 2 (MR0, MR1)"),
        (add("unlabeled_000_0000.nrrd"), f"unlabeled_000_0000.nrrd: {NOT_A_SCAN}"),
        (add("unlabeled_002.nii.gz"), f"unlabeled_002.nii.gz: {NOT_A_SCAN}"),
        (add("_0000.nii.gz"), f"_0000.nii.gz: {NOT_A_SCAN}"),
        (lambda images: (images / "unlabeled_000").mkdir(), f"unlabeled_000: {NOT_A_SCAN}"),
        (rename_to("case_000"), "case_000: also in {raw}/imagesTr and in {folder}/nnUNetPlans_3d_fullres; rename"),
        (rename_to("test_000"), "test_000: also in {raw}/imagesTs; rename or remove it in {images}"),
        (rename_to("held_out"), "held_out: also in a val or test list of {folder}/splits_final.json; rename"),
        (rename_to("final_test"), "final_test: also in a val or test list of {folder}/splits_final.json; rename"),
        (rename_to("unlabeled_001_seg"), "unlabeled_001_seg: nnU-Net takes CASE_seg for the segmentation of CASE"),
    ],
)
def test_an_unsound_folder_is_refused(raw, folder, images, harm, reason):
    splits = [{"train": ["case_000"], "val": ["held_out"]}, {"train": [], "val": [], "test": ["final_test"]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    harm(images)
    with pytest.raises(ValueError, match="Problems in") as error:
        preprocess(images=images)
    assert reason.format(raw=raw, folder=folder, images=images) in str(error.value)
    assert not target_of(folder).exists()


def test_one_report_lists_every_problem(folder, images):
    edit(images / "unlabeled_000_0000.nii.gz", constant)
    edit(images / "unlabeled_000_0001.nii.gz", shifted)
    drop = images / "unlabeled_001_0001.nii.gz"
    drop.unlink()
    add("notes.txt")(images)
    with pytest.raises(ValueError, match="Nothing was preprocessed") as error:
        preprocess(images=images)
    for part in ("unlabeled_000_0000.nii.gz: constant", "unlabeled_000_0001.nii.gz: origin", drop.name, "notes.txt"):
        assert part in str(error.value)


def test_a_training_case_listed_in_dataset_json_is_refused(folder, images):
    file = folder / "dataset.json"
    listed = {CASES[1]: {"images": ["/elsewhere/x_0000.nii.gz"], "label": "/elsewhere/x.nii.gz"}}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"dataset": listed}))
    with pytest.raises(ValueError, match=f"{CASES[1]}: also in .*imagesTr"):
        preprocess(images=images)


@pytest.mark.parametrize("there", ["an empty folder", "hidden files only"])
def test_without_scans_both_ways_to_give_some_are_named(raw, folder, tmp_path, there):
    images = tmp_path / "images"
    images.mkdir()
    if there == "hidden files only":
        (images / ".DS_Store").write_text("")
    with pytest.raises(FileNotFoundError) as error:
        preprocess(images=images)
    for part in (str(images), str(raw / "imagesUn"), "CASE_0000.nii.gz", f"nnunet-ssl split -d {DATASET}"):
        assert part in str(error.value)


def test_missing_plans_name_the_command_and_the_existing_ones(folder):
    with pytest.raises(FileNotFoundError, match=r"nnUNetv2_plan_and_preprocess -d 941 -c 3d_fullres.*-p nnUNetPlans"):
        preprocess(plans_identifier="nnUNetResEncUNetMPlans")


def test_an_unknown_configuration_names_the_known_ones(folder):
    with pytest.raises(ValueError, match=r"no configuration 3d_lowres.* -c 2d 3d_fullres"):
        preprocess(("2d", "3d_lowres"))


def test_several_channels_in_one_file_are_counted_as_such(tmp_path):
    file = tmp_path / "a_0000.png"
    imsave(file, np.arange(300, dtype=np.uint8).reshape(10, 10, 3), check_contrast=False)
    assert check_scan("a", [file], Expected(("R", "G", "B"), ".png", NaturalImage2DIO)).errors == []
    assert check_scan("a", [file], Expected(("gray",), ".png", NaturalImage2DIO)).errors == [
        "a: 3 channels, but dataset.json has 1 (gray)"
    ]


def test_color_images_are_bytes_and_may_be_opaque_everywhere(tmp_path):
    file = tmp_path / "a_0000.mha"
    expected = Expected(("R", "A"), ".mha", SimpleITKIO, ("RGBTo01Normalization",) * 2)
    image = np.zeros((2, 2, 5, 6), np.float32)
    image[0, 0], image[1] = 9, 255  # the last channel is constant
    tiny.write_image(file, image, spacing=(1, 1, 1, 1))
    findings = check_scan("a", [file], expected)
    assert findings.errors + findings.doubts == []
    image[0, 0, 0, 0] = 256
    tiny.write_image(file, image, spacing=(1, 1, 1, 1))
    refusal = "a_0000.mha: values outside of 0 to 255, which nnU-Net refuses in color images"
    assert check_scan("a", [file], expected).errors == [refusal]


@pytest.mark.parametrize(
    "stuff", [{"original_affine": 1, "reoriented_affine": 2}, {"original_orientation": "LPS", "reoriented_affine": 2}]
)
def test_readers_that_reorient_are_compared_after_it(stuff):
    properties = {"stuff": stuff, "spacing": [1, 1, 1]}
    expected = {"shape": (2, 3, 4), "reoriented_affine": 2, "spacing": [1, 1, 1]}
    assert geometry(np.zeros((1, 2, 3, 4)), properties) == expected


def test_spacing_files_of_tiff_scans_are_no_scans_and_no_strangers(tmp_path):
    for name in ("a_0000.tif", "a.json", "b.json", "b_0000.png"):
        (tmp_path / name).write_text("")
    assert find_scans(tmp_path, ".tif") == ({"a": [tmp_path / "a_0000.tif"]}, ["b.json", "b_0000.png"])


# Interruptions and changes


@pytest.mark.parametrize("lost", FILES)
def test_a_restart_redoes_half_written_cases_and_keeps_the_others(folder, lost):
    preprocess()
    target = target_of(folder)
    complete = content(target)
    whole, half = CASES
    before = {suffix: (target / f"{whole}{suffix}").stat() for suffix in FILES}
    for suffix in FILES:
        (target / f"{half}{suffix}").write_bytes(b"torn")
    (target / f"{half}{lost}").unlink()
    leftover = target.with_name(f"{target.name}.tmp")
    leftover.mkdir()
    (leftover / f"{half}.b2nd").write_bytes(b"torn")

    preprocess()
    for suffix, stat in before.items():
        again = (target / f"{whole}{suffix}").stat()
        assert (again.st_ino, again.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    for case, array in content(target).items():
        np.testing.assert_array_equal(array, complete[case])
    assert not leftover.exists()


def test_a_finished_case_is_not_read_again_and_a_new_one_is(folder, images):
    preprocess(images=images)
    (images / f"{CASES[0]}_0000.nii.gz").write_bytes(b"not an image")
    preprocess(images=images)
    (images / "new_0000.nii.gz").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"new_0000\.nii\.gz: cannot be read") as error:
        preprocess(images=images)
    assert CASES[0] not in str(error.value)


def test_a_finished_case_whose_scan_is_newer_is_named(folder, images, capsys):
    preprocess(images=images)
    before, file = (target_of(folder) / f"{CASES[0]}.pkl").stat().st_mtime_ns, images / f"{CASES[0]}_0001.nii.gz"
    said = capsys.readouterr().out
    assert "WARNING" not in said
    assert "was read" not in said
    os.utime(file, ns=(before + 1, before + 1))
    (images / f"{CASES[1]}_0000.nii.gz").unlink()
    (images / f"{CASES[1]}_0000.nii.gz").symlink_to(images / "nowhere")
    preprocess(images=images)
    said = capsys.readouterr().out
    assert f"WARNING: 1 scan is newer than the preprocessed cases: {CASES[0]}. To preprocess them again, remove" in said
    for name in target_of(folder).glob(f"{CASES[0]}*"):
        name.unlink()
    preprocess(images=images)
    said = capsys.readouterr().out
    assert "2, 1 of them new" in said
    assert f"Not all of {images} was read: 1 case of the same name is there already. If these are other" in said


def test_a_finished_case_that_was_labeled_since_is_refused(folder, images):
    preprocess(images=images)
    (folder / "splits_final.json").write_text(json.dumps([{"train": [], "val": [CASES[0]]}]))
    for file in images.glob(f"{CASES[0]}_*"):
        file.unlink()
    with pytest.raises(ValueError, match=f"{CASES[0]}: also in a val .* remove its files from {target_of(folder)}"):
        preprocess(images=images)


def test_a_finished_case_whose_scan_is_gone_is_kept_and_said(folder, images, capsys):
    preprocess(images=images)
    for file in images.glob(f"{CASES[0]}_*"):
        file.unlink()
    preprocess(images=images)
    assert f"though not in {images}: {CASES[0]}\n" in capsys.readouterr().out
    assert len(content(target_of(folder))) == 4


def test_cases_of_other_plans_are_refused_until_they_are_removed(folder):
    preprocess()
    edit_plans(folder, spacing=[1.0, 1.0, 1.1])
    with pytest.raises(ValueError, match=f"other plans: spacing changed. Remove {target_of(folder)} "):
        preprocess()
    shutil.rmtree(target_of(folder))
    preprocess()
    assert content(target_of(folder))[CASES[0]].shape == (2, 24, 20, 20)


@pytest.mark.parametrize("scheme", ["CTNormalization", "ZScoreNormalization"])
def test_statistics_of_new_labels_count_where_they_normalize(scheme, tmp_path):
    target = tmp_path / "cases"
    target.mkdir()
    for suffix in FILES:
        (target / f"a{suffix}").touch()
    settings = {"normalization_schemes": [scheme], "intensity_properties": {"0": {"mean": 1.0}}}
    write_settings(target, settings)
    refusal = pytest.raises(ValueError, match="other plans: intensity_properties changed")
    with refusal if scheme == "CTNormalization" else nullcontext():
        check_settings(target, settings | {"intensity_properties": {"0": {"mean": 2.0}}})


def test_a_patch_or_batch_size_changes_no_image_and_is_accepted(folder):
    preprocess()
    before = content(target_of(folder))
    edit_plans(folder, patch_size=[8, 8, 8], batch_size=7)
    preprocess()
    after = content(target_of(folder))
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[case], before[case]) for case in before)


def test_cases_without_a_note_of_their_plans_are_refused(folder):
    preprocess()
    target_of(folder).with_name(f"{target_of(folder).name}.json").unlink()
    with pytest.raises(ValueError, match=f"is gone. Remove {target_of(folder)} "):
        preprocess()


@pytest.mark.slow
def test_a_run_killed_between_two_files_and_restarted_gives_the_same_files(folder):
    preprocess()
    target = target_of(folder)
    complete = content(target)
    shutil.rmtree(target)
    script = (
        "import os, signal\n"
        "from nnunet_ssl.commands import preprocess\n"
        "replace, calls = os.replace, []\n"
        "def killed(*names):\n"
        "    calls.append(names)\n"
        "    if len(calls) == 7: os.kill(os.getpid(), signal.SIGKILL)\n"  # settings, one case, two files of the next
        "    replace(*names)\n"
        "os.replace = killed\n"
        f"preprocess.preprocess_unlabeled('{DATASET}', ['3d_fullres'], num_processes=1)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert names_in(target) == {CASES[0] + suffix for suffix in FILES} | {
        CASES[1] + suffix for suffix in ("_seg.b2nd", ".b2nd")
    }
    preprocess()
    again = content(target)
    assert again.keys() == complete.keys()
    for case, array in again.items():
        np.testing.assert_array_equal(array, complete[case])


@pytest.mark.slow
def test_a_dead_worker_is_an_error_in_words():
    with worker_pool(2) as pool, pytest.raises(RuntimeError, match="A worker process died"):
        run_all(pool, os._exit, {"case": (1,)}, "Working")


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed():
    script = (
        "import os, signal\n"
        "from nnunet_ssl.system.pool import worker_pool\n"
        "with worker_pool(2) as pool:\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # The workers hold this pipe too: it ends, within the time given, only when all of them have.
    run = subprocess.run([sys.executable, "-c", script], check=False, stdout=subprocess.PIPE, timeout=300)
    assert run.returncode == -signal.SIGKILL
    assert int(run.stdout) > 0


def test_a_case_that_fails_is_named():
    with worker_pool(1) as pool, pytest.raises(RuntimeError, match="Working failed at case_7: ValueError: invalid lit"):
        run_all(pool, int, {"case_7": ("x",)}, "Working")


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_others_are_done_before_it_is_said(processes, tmp_path):
    jobs = {name: (str(tmp_path / name),) for name in "abcd"}
    for name in "ac":
        (tmp_path / name).touch()
    with worker_pool(processes) as pool, pytest.raises(RuntimeError) as error:
        run_all(pool, os.mkdir, jobs, "Working")
    assert str(error.value).startswith("Working failed at ")
    assert all(f"{name}: FileExistsError:" in str(error.value) for name in "ac")
    assert (tmp_path / "d").is_dir()


def test_a_full_disk_ends_it_at_once(tmp_path, monkeypatch):
    done = []

    def work(number):
        done.append(number)
        if number == 1:
            with say_full_disk(tmp_path, lambda: 1):
                raise RuntimeError("Error while writing")  # of blosc2

    monkeypatch.setattr("nnunet_ssl.system.disk.why_not_written", lambda *_: "No space left on device")
    with pytest.raises(RuntimeError, match=r"Working failed at 1: FullDisk: .* has no room"):
        run_all(None, work, {str(number): (number,) for number in range(4)}, "Working")
    assert done == [0, 1]
    assert isinstance(pickle.loads(pickle.dumps(FullDisk("a"))), FullDisk)  # from a worker


# ---- one channel: plain names, DICOM series, test scans, parts ----


@pytest.fixture(scope="module")
def single():
    """Raw and preprocessed folder of a planned dataset with one channel; every test starts without unlabeled cases."""
    raw = tiny.make_raw_dataset(943, "Single", cases=2, unlabeled=3, test=2)
    return raw, tiny.plan(943, ("3d_fullres",))


@pytest.fixture
def single_target(single):
    target = target_of(single[1])
    yield target
    shutil.rmtree(target, ignore_errors=True)
    target.with_name(f"{target.name}.json").unlink(missing_ok=True)


def preprocess_single(**kwargs):
    preprocess_unlabeled("943", ["3d_fullres"], **{"num_processes": 0, **kwargs})


def array_of(target, case):
    return UnlabeledDataset({case: target / f"{case}.b2nd"}).load_image(case)[:]


def test_plain_names_and_dicom_series_are_scans_too(single, single_target, tmp_path):
    image = sitk.ReadImage(str(single[0] / "imagesUn" / "unlabeled_000_0000.nii.gz"))
    image = sitk.Cast(sitk.Cast(image, sitk.sitkInt16), sitk.sitkFloat32)  # DICOM has whole numbers
    image.SetSpacing((1.5, 1.25, 2.0))
    for name in ("numbered_0000.nii.gz", "plain.nii.gz"):
        sitk.WriteImage(image, str(tmp_path / name))
    tiny.write_dicom(image, tmp_path / "series")
    preprocess_single(images=tmp_path, num_processes=1, accept=["plain", "series"])
    assert {n for n in names_in(single_target) if n.endswith(".pkl")} == {"numbered.pkl", "plain.pkl", "series.pkl"}
    expected = array_of(single_target, "numbered")
    assert expected.shape[1:] != image.GetSize()[::-1]  # it was resampled: the spacing counts
    assert np.array_equal(array_of(single_target, "plain"), expected)
    np.testing.assert_allclose(array_of(single_target, "series"), expected, atol=1e-4)


def test_a_folder_without_exactly_one_dicom_series_is_named(single, single_target, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: cannot be read \(0 DICOM series in the folder, expected one\)"):
        preprocess_single(images=tmp_path)
    assert not single_target.exists()


@pytest.mark.parametrize("lost", [1, 4])
def test_a_series_that_lacks_slices_is_refused(lost, tmp_path):
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 500, (12, 8, 8)).astype(np.int16))
    image.SetSpacing((1.0, 1.0, 2.5))
    tiny.write_dicom(image, tmp_path / "series")
    with unpacked(tmp_path / "series", ".nii.gz") as file:
        assert file.name == "series_0000.nii"  # to pack it would take ten times as long
        assert sitk.ReadImage(str(file)).GetSpacing() == (1.0, 1.0, 2.5)
    for index in range(5, 5 + lost):
        (tmp_path / "series" / f"{7 * index % 12:03d}.dcm").unlink()
    words = f"its slices are 2.50 to {2.5 * (1 + lost):.2f} mm apart: some are missing"
    with pytest.raises(ValueError, match=words), unpacked(tmp_path / "series", ".nii.gz"):
        pass


@pytest.mark.parametrize(
    ("spacing", "position", "refused"),
    [
        (0.625, lambda x, y, z: f"{x:.1f}\\{y:.1f}\\{z:.1f}", False),  # a header with one decimal
        (2.5, lambda x, y, z: "", False),  # an empty one: nobody knows
        (2.5, lambda x, y, z: f"{x}\\{y}\\0", True),  # a heart in its phases
    ],
)
def test_headers_that_are_rounded_or_empty_are_let_through(spacing, position, refused, tmp_path, monkeypatch):
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 500, (12, 8, 8)).astype(np.int16))
    image.SetSpacing((1.0, 1.0, spacing))
    tiny.write_dicom(image, tmp_path / "series")
    get = sitk.ImageSeriesReader.GetMetaData

    def changed(reader, index, key):
        return position(*map(float, get(reader, index, key).split("\\")))

    monkeypatch.setattr(sitk.ImageSeriesReader, "GetMetaData", changed)
    refusal = pytest.raises(ValueError, match=r"its slices are 0\.00 to 0\.00 mm apart") if refused else nullcontext()
    with refusal, unpacked(tmp_path / "series", ".nii.gz") as file:
        assert sitk.ReadImage(str(file)).GetSize() == (8, 8, 12)


def test_names_with_spaces_are_said_as_a_shell_takes_them():
    with pytest.raises(ValueError, match=r"--accept 'Patient 01' plain$"):
        Report(["..."], [], ["Patient 01", "plain"]).require_sound("Nothing", Path("imagesUn"))


def test_what_is_no_folder_is_said(tmp_path):
    (tmp_path / "file").touch()
    for name, text in (("file", "is a file"), ("nowhere", "does not exist")):
        with pytest.raises(FileNotFoundError, match=rf"-i .*{name} {text}. Give the folder"):
            preprocess(images=tmp_path / name)


def test_an_ending_in_capitals_is_to_be_renamed(folder, images):
    (images / f"{CASES[0]}_0000.nii.gz").rename(images / "SCAN_0000.NII.GZ")
    with pytest.raises(ValueError, match=r"SCAN_0000\.NII\.GZ: nnU-Net reads \.nii\.gz; rename it"):
        preprocess(images=images)


def test_plain_names_are_no_scans_where_there_are_several_channels(folder, images):
    (images / f"{CASES[0]}_0000.nii.gz").rename(images / "plain.nii.gz")
    with pytest.raises(ValueError, match=r"plain\.nii\.gz: not a scan; expected CASE_0000\.nii\.gz"):
        preprocess(images=images)


def test_test_scans_are_used_on_demand_only_and_said_to_be_transductive(single, single_target, tmp_path, capsys):
    shutil.copy(single[0] / "imagesTs" / "test_000_0000.nii.gz", tmp_path)
    with pytest.raises(ValueError, match=r"test_000: also in .*imagesTs"):
        preprocess_single(images=tmp_path)
    preprocess_single(images=single[0] / "imagesTs")
    assert "transductive" in capsys.readouterr().out
    preprocess_single()  # imagesUn as well, later: what was chosen stays chosen
    assert "transductive" not in capsys.readouterr().out
    cases = {n.removesuffix(".pkl") for n in names_in(single_target) if n.endswith(".pkl")}
    assert cases == {"test_000", "test_001", "unlabeled_000", "unlabeled_001", "unlabeled_002"}
    preprocess_single()


def test_a_test_scan_that_is_not_used_any_more_may_not_be_copied(single, single_target, tmp_path):
    preprocess_single(images=single[0] / "imagesTs")
    shutil.rmtree(single_target)
    shutil.copy(single[0] / "imagesTs" / "test_000_0000.nii.gz", tmp_path / "other_0000.nii.gz")
    with pytest.raises(ValueError, match=r"other_0000\.nii\.gz: has the same voxels as test_000"):
        preprocess_single(images=tmp_path)


def test_numbers_that_nnunet_takes_for_channels_are_named_before_anything_is_read(single, single_target, tmp_path):
    for number in (5001, 5002):
        (tmp_path / f"amos_{number}.nii.gz").write_bytes(b"not read")
    with pytest.raises(ValueError, match=r"amos_5001\.nii\.gz \(and 1 more\): .* called amos_5001_0000\.nii\.gz\.$"):
        preprocess_single(images=tmp_path)


def test_the_spacing_of_a_tiff_needs_the_name_that_nnunet_looks_for(tmp_path):
    expected = Expected(("CT",), ".tif", Tiff3DIO)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5, 6), np.float32))
    (tmp_path / "a.json").write_text(json.dumps({"spacing": [3.0, 0.8, 0.8]}))
    (tmp_path / "series").mkdir()
    for name, fix in (("a.tif", "rename it to"), ("series", "a DICOM series has to be converted to")):
        [error] = check_scan("a", [tmp_path / name], expected).errors
        assert error.endswith(f"{fix} a_0000.tif")
    (tmp_path / "a.tif").rename(tmp_path / "a_0000.tif")
    assert check_scan("a", [tmp_path / "a_0000.tif"], expected).errors == []
    (tmp_path / "a_0000.tif").rename(tmp_path / "b.tif")  # which has no spacing to lose
    assert check_scan("b", [tmp_path / "b.tif"], expected).errors == []


def test_names_in_a_table_of_the_dataset_tell_nothing(tmp_path):
    files = [tmp_path / f"p17_t{index}_0000.nii.gz" for index in (1, 2)]
    for file in files:
        tiny.write_image(file, np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32))
    expected = Expected(("T1", "T2"), ".nii.gz", SimpleITKIO)
    assert check_scan("case17", files, expected, named=False).errors == []
    assert check_scan("case17", files[:1], expected, named=False).errors == [
        "case17: 1 channel, but dataset.json has 2 (T1, T2)"
    ]


def test_parts_share_the_scans(single, single_target, capsys):
    for part in range(2):
        preprocess_single(num_parts=2, part_id=part)
    done = re.findall(r"Unlabeled cases in .*: (\d), (\d) of them new", capsys.readouterr().out)
    assert done == [("2", "2"), ("3", "1")]
    parts = {n: array_of(single_target, n[:-4]) for n in names_in(single_target) if n.endswith(".pkl")}
    shutil.rmtree(single_target)
    preprocess_single()
    assert parts.keys() == {n for n in names_in(single_target) if n.endswith(".pkl")}
    assert all(np.array_equal(array_of(single_target, name[:-4]), array) for name, array in parts.items())


def test_parts_at_the_same_time_do_not_disturb_each_other(single, single_target):
    program = str(Path(sys.executable).with_name("nnunet-ssl"))
    command = [program, "preprocess", "-d", "943", "-c", "3d_fullres", "-np", "1", "-num_parts", "2", "-part_id"]
    runs = [subprocess.Popen([*command, str(part)], stderr=subprocess.PIPE, encoding="utf-8") for part in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=200)
        assert run.returncode == 0, errors
    assert len([n for n in names_in(single_target) if n.endswith(".pkl")]) == 3
    assert not list(single_target.parent.glob("*.tmp"))


@pytest.mark.parametrize(("num_parts", "part_id"), [(2, 2), (2, -1), (0, 0)])
def test_a_part_that_does_not_exist_is_refused(single, single_target, num_parts, part_id):
    with pytest.raises(ValueError, match="-part_id must be from 0 to"):
        preprocess_single(num_parts=num_parts, part_id=part_id)
    assert not single_target.exists()
