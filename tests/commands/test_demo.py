"""The demo's scans, folders and commands; the trainings themselves are left to `nnunet-ssl demo`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2 import paths
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import ndimage
from tiny import plan

from nnunet_ssl.commands import demo


@pytest.fixture
def cases():
    rng = np.random.default_rng(1)
    return [demo.make_case(rng, **demo.ONE_SCANNER) for _ in range(5)]


def python(name: str, code: str, **settings: str) -> demo.Command:
    return demo.Command(name, Path(sys.executable).name, ("-c", code), settings)


# ---- scans ----


def test_a_case_depends_on_the_generator_alone():
    image, label = demo.make_case(np.random.default_rng(3), **demo.ANY_SCANNER)
    same_image, same_label = demo.make_case(np.random.default_rng(3), **demo.ANY_SCANNER)
    other_image, other_label = demo.make_case(np.random.default_rng(4), **demo.ANY_SCANNER)
    assert np.array_equal(image, same_image)
    assert np.array_equal(label, same_label)
    assert not np.array_equal(image, other_image)
    assert not np.array_equal(label, other_label)


def test_a_case_has_the_shape_and_the_types_that_are_promised():
    image, label = demo.make_case(np.random.default_rng(0), **demo.ANY_SCANNER, shape=(20, 26, 30))
    assert image.shape == label.shape == (20, 26, 30)
    assert image.dtype == np.float32
    assert label.dtype == np.uint8
    assert np.isfinite(image).all()


def test_the_organ_is_one_part_away_from_the_faces(cases):
    for _, label in cases:
        assert set(np.unique(label)) == {0, 1}
        assert ndimage.label(label)[1] == 1
        assert label[1:-1, 1:-1, 1:-1].sum() == label.sum()
        assert 0.005 < label.mean() < 0.2


def test_the_organ_is_brighter_than_its_surroundings(cases):
    for image, label in cases:
        shell = ndimage.binary_dilation(label, iterations=3) & (label == 0)
        assert image[label == 1].mean() > image[shell].mean() + 10


def test_vessels_and_balls_are_there_and_not_labeled(monkeypatch):
    drawn = []
    original = demo.make_neighbours
    monkeypatch.setattr(demo, "make_neighbours", lambda *args: drawn.append(original(*args)) or drawn[-1])
    image, label = demo.make_case(np.random.default_rng(5), **demo.ONE_SCANNER | {"noise": (1, 2)})
    vessels, balls = drawn[0]
    for neighbour in (vessels, balls):
        assert neighbour.sum() > 50
        assert not neighbour[label == 1].any()
    background = ~vessels & ~balls & (label == 0)
    assert image[vessels].mean() > image[background].mean() + 20


def test_contrast_differs_between_cases(cases):
    contrast = [image[label == 1].mean() - image[label == 0].mean() for image, label in cases]
    assert np.ptp(contrast) > 10


def test_noise_texture_and_slope_reach_the_image():
    def image(**ranges):
        return demo.make_case(np.random.default_rng(5), **demo.ONE_SCANNER | ranges)[0]

    plain = image(noise=(0, 0), slope=(0, 0))
    assert (image(noise=(20, 20), slope=(0, 0)) - plain).std() == pytest.approx(20, rel=0.05)
    ratio = image(noise=(0, 0), slope=(1, 1)) / plain
    # a plane of slope 1 over the longest axis: e from side to side along an axis, more along a diagonal
    assert 1 <= np.log(ratio.max() / ratio.min()) <= np.sqrt(3)
    background = [image(noise=(0, 0), slope=(0, 0), texture=(t, t)) - plain for t in (15, 30)]
    assert not background[0].any()
    assert background[1].std() == pytest.approx(15, rel=0.01)


def test_unlabeled_and_test_scans_are_of_other_scanners(tmp_path):
    demo.write_dataset(tmp_path)

    def noise(folder):
        scans = [sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in (tmp_path / folder).iterdir()]
        return np.mean([(scan - ndimage.median_filter(scan, 3)).std() for scan in scans])

    assert noise("imagesUn") > 2 * noise("imagesTr") < noise("imagesTs")


def test_the_dataset_is_laid_out_as_nnunet_wants_it_and_unlabeled_scans_have_no_label(tmp_path):
    demo.write_dataset(tmp_path)
    names = {
        folder.name: sorted(file.name for file in folder.iterdir()) for folder in tmp_path.iterdir() if folder.is_dir()
    }
    assert {name: len(files) for name, files in names.items()} == {
        "imagesTr": 4,
        "labelsTr": 4,
        "imagesUn": 16,
        "imagesTs": 8,
        "labelsTs": 8,
    }
    for kind in ("Tr", "Ts"):
        assert [name.replace("_0000", "") for name in names[f"images{kind}"]] == names[f"labels{kind}"]
    description = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    assert description["numTraining"] == 4
    assert description["labels"] == {"background": 0, "organ": 1}

    scans = [sitk.ReadImage(str(file)) for file in sorted(tmp_path.glob("images*/*"))]
    assert {scan.GetSpacing() for scan in scans} == {(demo.SPACING,) * 3}
    arrays = [sitk.GetArrayFromImage(scan).tobytes() for scan in scans]
    assert len(set(arrays)) == sum(demo.CASES.values())


def test_writing_the_dataset_again_changes_nothing(tmp_path):
    demo.write_dataset(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.gz")}
    demo.write_dataset(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.gz")} == before


@pytest.mark.slow
def test_nnunet_plans_the_dataset_and_builds_the_small_network(monkeypatch):
    monkeypatch.setitem(demo.CASES, "unlabeled", 1)
    demo.write_dataset(Path(paths.nnUNet_raw) / demo.DATASET)
    file = plan(int(demo.DATASET[7:10]), (), preprocess_cases=False) / "nnUNetPlans.json"
    planned = json.loads(file.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]
    demo.add_configuration(file)
    demo.add_configuration(file)  # as a demo that goes on may do

    plans = PlansManager(str(file))
    small, full = plans.get_configuration(demo.CONFIGURATION), plans.get_configuration("3d_fullres")
    assert small.data_identifier == full.data_identifier
    assert json.loads(file.read_text(encoding="utf-8"))["configurations"]["3d_fullres"] == planned
    assert small.network_arch_init_kwargs["features_per_stage"] == [8, 16, 32]
    network = get_network_from_plans(
        small.network_arch_class_name,
        small.network_arch_init_kwargs,
        small.network_arch_init_kwargs_req_import,
        1,
        2,
        deep_supervision=False,
    )
    assert network(torch.zeros(1, 1, *small.patch_size)).shape == (1, 2, *demo.PATCH)


# ---- folder ----


def test_a_folder_that_the_demo_did_not_make_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not made by the demo"):
        demo.demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not made by the demo"):
        demo.claim(tmp_path / "file")


def test_an_empty_folder_and_a_new_one_are_claimed(tmp_path):
    assert demo.claim(tmp_path) == []
    assert demo.claim(tmp_path / "a" / "b") == []
    assert demo.claim(tmp_path) == []  # by now the demo's own


def test_the_demo_of_another_version_is_refused(tmp_path):
    (tmp_path / demo.MARKER).write_text(json.dumps({"version": "0.0.0", "finished": []}))
    with pytest.raises(FileExistsError, match=r"nnunet-ssl 0\.0\.0"):
        demo.claim(tmp_path)


# ---- commands ----


def test_both_trainers_run_the_same_commands_for_the_same_number_of_epochs(tmp_path):
    steps = demo.commands(tmp_path, "cpu")
    assert [step.program for step in steps] == [
        "nnUNetv2_plan_and_preprocess",
        "nnunet-ssl",
        *["nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_evaluate_simple"] * 2,
    ]
    assert len({trainer.rpartition("_")[2] for trainer in demo.TRAINERS}) == 1
    supervised, ours = (
        [str(step).replace(trainer, "X") for step in steps if trainer in step.name] for trainer in demo.TRAINERS
    )
    assert supervised == ours


def test_the_training_has_no_workers_on_the_cpu_only_and_planning_always_has_some(tmp_path):
    for device, expected in (("cpu", {"train": "0"}), ("cuda", {})):
        steps = demo.commands(tmp_path, device)
        found = {step.name.partition("_")[0]: step.settings["nnUNet_n_proc_DA"] for step in steps if step.settings}
        assert found == expected
        assert all(f"-device {device}" in str(step) for step in steps if step.name.startswith(("train", "predict")))


def test_output_goes_to_the_log_and_settings_to_the_environment(tmp_path):
    code = "import os, sys; print(os.environ['A'], os.environ['B']); print('error', file=sys.stderr)"
    ticks = []
    demo.run(python("show", code, B="2"), tmp_path / "logs" / "show.log", {"A": "1", "B": "1"}, lambda: ticks.append(1))
    assert sorted((tmp_path / "logs" / "show.log").read_text(encoding="utf-8").split()) == ["1", "2", "error"]
    assert ticks


def test_a_failing_command_ends_in_a_message_with_the_end_of_its_log(tmp_path):
    command = python("broken", "for i in range(100): print('line', i)\nraise SystemExit(3)")
    with pytest.raises(SystemExit) as failure:
        demo.run(command, tmp_path / "broken.log", {}, lambda: None)
    message = str(failure.value)
    assert "exit code 3" in message
    assert "line 99" in message
    assert "line 50" not in message
    assert str(tmp_path / "broken.log") in message


def test_a_program_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(SystemExit, match="nnUNetv2_missing is neither in"):
        demo.run(demo.Command("x", "nnUNetv2_missing", ()), tmp_path / "x.log", {}, lambda: None)


def test_an_interrupted_command_does_not_run_on(tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    started = []
    original = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: started.append(original(*args, **kwargs)) or started[-1]
    )
    with pytest.raises(KeyboardInterrupt):
        demo.run(python("long", "import time; time.sleep(60)"), tmp_path / "long.log", {}, interrupt)
    assert started[0].returncode not in (None, 0)


def test_a_demo_that_failed_goes_on_behind_the_last_finished_command(tmp_path, monkeypatch, capsys):
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    summary = {"metric_per_case": [{"metrics": {"1": {"Dice": value}}} for value in (0.5, 0.9)]}
    steps = [python("plan", count), python("broken", "raise SystemExit(1)")]
    monkeypatch.setattr(demo, "commands", lambda output, device: steps)
    monkeypatch.setattr(demo, "write_dataset", lambda folder: None)
    monkeypatch.setattr(demo, "add_configuration", lambda file: None)
    monkeypatch.setattr(demo, "picture", lambda *_: None)
    output = tmp_path / "demo"
    with pytest.raises(SystemExit, match="exit code 1"):
        demo.demo(output)

    steps[1] = python("mended", "")
    for trainer in demo.TRAINERS:
        (output / "predictions" / trainer).mkdir(parents=True)
        (output / "predictions" / trainer / "summary.json").write_text(json.dumps(summary))
    demo.demo(output)
    assert (tmp_path / "runs").read_text(encoding="utf-8") == "x"
    printed = capsys.readouterr().out
    assert "finished before" in printed
    assert f"| {demo.TRAINERS[0]} | 4 | 0 | 70.0 | 50.0 |" in printed
    assert f"| {demo.TRAINERS[1]} | 4 | 16 | 70.0 | 50.0 |" in printed
    assert str(output / "predictions") in printed
