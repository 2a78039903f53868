"""`nnunet-ssl rank`: what it writes, that nothing is predicted twice, and what is refused."""

import csv
import json
import queue
import shutil
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2 import paths
from nnunetv2.inference import data_iterators
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tiny import make_raw_dataset, plan
from tiny_trainers import make_trainer, seed

from nnunet_ssl.blocks.networks import logits
from nnunet_ssl.cli import main
from nnunet_ssl.commands.evaluate import label_values
from nnunet_ssl.commands.labeling import changed_part
from nnunet_ssl.commands.predictors import load_predictors, pooled_bottleneck
from nnunet_ssl.commands.rank import of_classes
from nnunet_ssl.commands.ranking_files import table, write_table
from nnunet_ssl.commands.trained_models import Model, Network, all_networks
from nnunet_ssl.trainers.nnUNetTrainerCoLearning import nnUNetTrainerCoLearning
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.training.checkpoints import CHECKPOINT_KEY

UNLABELED = [f"case_{i:03d}" for i in range(3, 7)] + ["unlabeled_000", "unlabeled_001"]
FAST = ["-device", "cpu", "-np", "1", "--disable_tta"]
COMMAND = ["rank", "-d", "701", "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerM3HL", *FAST]
LABEL = ["pseudo-label", "-d", "701", "-c", "3d_fullres", "-f", "0", "-o", "985", "--predictions"]


@pytest.fixture(scope="module", autouse=True)
def threads():
    """Preprocessing in threads: processes take seconds to start."""
    context = SimpleNamespace(Process=threading.Thread)
    manager = SimpleNamespace(Event=threading.Event, Queue=queue.Queue)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_iterators, "multiprocessing", SimpleNamespace(get_context=lambda method: context))
        patch.setattr(data_iterators, "Manager", lambda: manager)
        yield


@pytest.fixture(scope="module")
def model(tiny_dataset, tmp_path_factory):
    """Folder of a model of M3HL for fold 0, whose student and teacher differ, in results of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(tmp_path_factory.mktemp("results")))
        seed()
        trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset, num_iterations_per_epoch=12)
        trainer.run_training()
        yield Path(trainer.output_folder_base)


@pytest.fixture(scope="module")
def ranked(model, tmp_path_factory):
    """What the command has written, and printed."""
    output = tmp_path_factory.mktemp("ranked") / "out"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        assert main([*COMMAND, "-o", str(output), "--next", "2"]) == 0
    return output, "\n".join(lines)


def rows(output, name="rank.csv"):
    with (output / name).open(newline="") as f:
        return list(csv.DictReader(f))


def files_of(case):
    cases = get_filenames_of_train_images_and_targets(str(Path(paths.nnUNet_raw) / "Dataset701_Tiny"))
    own = Path(paths.nnUNet_raw) / "Dataset701_Tiny/imagesUn"
    return cases[case]["images"] if case in cases else [str(own / f"{case}_0000.nii.gz")]


def read(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def test_every_networks_labels_and_their_mean_lie_beside_the_image(ranked, model):
    output, _ = ranked
    state = torch.load(model / "fold_0/checkpoint_final.pth", weights_only=False)
    ours, found, some = state[CHECKPOINT_KEY], {}, UNLABELED[::5]  # of both sources
    for name, weights in {"student": ours["student"], "teacher": ours["companions"]["teacher"]}.items():
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        predictor.list_of_parameters = [weights]
        images = [files_of(case) for case in some]
        found[name] = predictor.predict_from_files_sequential(images, None, save_probabilities=True)
    changed = 0
    for i, case in enumerate(some):
        for name, predicted in found.items():
            np.testing.assert_array_equal(read(output / "networks" / name / f"{case}.nii.gz"), predicted[i][0])
        mean = sum(predicted[i][1] for predicted in found.values()).argmax(0)
        assert (read(output / "labels" / f"{case}.nii.gz") != mean).mean() < 1e-3  # taken before the scan is resampled
        changed += np.count_nonzero(found["student"][i][0] != found["teacher"][i][0])
        image, label = (sitk.ReadImage(str(f)) for f in (files_of(case)[0], output / "labels" / f"{case}.nii.gz"))
        assert (image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()) == (
            (label.GetSize(), label.GetSpacing(), label.GetOrigin(), label.GetDirection())
        )
    assert changed > 0


def test_the_table_says_what_the_label_maps_are_like_worst_first(ranked):
    output, printed = ranked
    found = rows(output)
    assert sorted(row["case"] for row in found) == UNLABELED
    scores = [float(row["score"]) for row in found]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    assert [*found[0]] == [
        *("case", "score", "disagreement", "disagreement_blob", "entropy_blob", "volume_ml_blob", "volume_z"),
        *("components", "missing"),
    ]
    for row in found:
        student, teacher = (read(output / "networks" / n / f"{row['case']}.nii.gz") > 0 for n in ("student", "teacher"))
        dice = 2 * (student & teacher).sum() / (student.sum() + teacher.sum())
        assert float(row["disagreement"]) == float(row["disagreement_blob"]) == pytest.approx(1 - dice, abs=1e-5)
        volume = (read(output / "labels" / f"{row['case']}.nii.gz") > 0).sum() / 1000
        assert float(row["volume_ml_blob"]) == pytest.approx(volume, rel=1e-5)
        assert 0 < float(row["entropy_blob"]) <= 1
        assert row["missing"] == ("" if volume else "blob")
    assert f"The worst of 6: {found[0]['case']}" in printed
    assert sorted(path.name for path in output.iterdir() if not path.name.startswith(".")) == [
        *("labels", "measured", "networks", "next.csv", "rank.csv", "settings.json")
    ]


def test_the_settings_say_what_it_was_made_from(ranked, model):
    settings = json.loads((ranked[0] / "settings.json").read_text())
    file = model / "fold_0/checkpoint_final.pth"
    assert settings["networks"] == {
        name: {
            "file": str(file),
            "network": name,
            "size": file.stat().st_size,
            "changed_ns": file.stat().st_mtime_ns,
        }
        for name in ("student", "teacher")
    }
    del settings["networks"]
    assert settings == {
        "dataset": "Dataset701_Tiny",
        "configuration": "3d_fullres",
        "plans": "nnUNetPlans",
        "folds": [0],
        "trainers": ["nnUNetTrainerM3HL"],
        "also": [],
        "checkpoint": "checkpoint_final.pth",
        "mirroring": False,
        "scans": "unlabeled",
        "classes": {"blob": [1]},
        "file_ending": ".nii.gz",
    }


def test_the_scans_to_annotate_next_are_named_beside_a_random_choice(ranked):
    output, printed = ranked
    chosen = rows(output, "next.csv")
    assert [row["order"] for row in chosen] == ["1", "2"]
    assert chosen[0]["case"] == rows(output)[0]["case"]
    assert chosen[0]["distance"] == ""
    assert float(chosen[1]["distance"]) > 0
    expected = np.random.RandomState(12345).permutation(UNLABELED)[:2]
    assert [row["random_case"] for row in chosen] == list(expected)
    assert f"To annotate next: {' '.join(row['case'] for row in chosen)}" in printed
    assert f"A random choice (seed 12345) would be: {' '.join(expected)}" in printed
    assert "is not proven" in printed


def test_a_model_that_has_seen_labels_that_are_hidden_now_is_refused(ranked, tiny_dataset, tmp_path, capsys):
    splits = tiny_dataset / "splits_final.json"
    text = splits.read_text(encoding="utf-8")
    [fold] = json.loads(text)
    *kept, moved = fold["train"]
    splits.write_text(json.dumps([fold | {"train": kept, "val": [*fold["val"], moved]}]))
    try:
        assert main([*COMMAND, "-o", str(tmp_path / "new")]) == 1
        assert f"hides or validates on now: the labels of {moved}. The split" in capsys.readouterr().err
        assert main([*LABEL, str(ranked[0])]) == 1  # it does not read the model: its log says how many
        assert "hides or validates on now: 2 labels, and that fold has 1 now. The split" in capsys.readouterr().err
    finally:
        splits.write_text(text)
    assert not list(Path(paths.nnUNet_raw).glob("*985*"))


def counting(monkeypatch, stop_at=None):
    """Counts predictions; raises KeyboardInterrupt in place of that number."""
    original, calls = nnUNetPredictor.predict_logits_from_preprocessed_data, []

    def predict(predictor, data):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(data)
        return original(predictor, data)

    monkeypatch.setattr(nnUNetPredictor, "predict_logits_from_preprocessed_data", predict)
    return calls


def test_parts_and_a_killed_run_write_the_same_table_and_predict_nothing_twice(ranked, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    parts = [[*COMMAND, "-o", str(output), "-num_parts", "2", "-part_id", str(part)] for part in (0, 1)]
    with monkeypatch.context() as patch:
        calls = counting(patch, stop_at=3)  # in the second of three scans
        with pytest.raises(KeyboardInterrupt):
            main(parts[0])
    assert len(calls) == 3
    with monkeypatch.context() as patch:
        calls = counting(patch)
        assert main(parts[0]) == 0
    assert len(calls) == 4  # two scans, two networks
    assert "3 scans are left for other parts" in capsys.readouterr().out
    assert not (output / "rank.csv").exists()
    assert main(parts[1]) == 0
    assert (output / "rank.csv").read_bytes() == (ranked[0] / "rank.csv").read_bytes()
    with monkeypatch.context() as patch:
        calls = counting(patch)
        (output / "rank.csv").unlink()
        assert main([*COMMAND, "-o", str(output)]) == 0
    assert calls == []
    assert (output / "rank.csv").read_bytes() == (ranked[0] / "rank.csv").read_bytes()


def test_pseudo_labels_are_those_of_the_ranking_and_nothing_is_predicted(ranked, monkeypatch):
    calls = counting(monkeypatch)
    folder = Path(paths.nnUNet_raw) / "Dataset985_TinyPseudoLabels"
    try:
        for options in ([], ["--uncertain", "ignore", "--drop-worst", "2"]):
            assert main([*LABEL, str(ranked[0]), *options]) == 0
            description = json.loads((folder / "dataset.json").read_text())
            kept = description["pseudo_labels"]["cases"]
            by_disagreement = sorted(rows(ranked[0]), key=lambda row: float(row["disagreement"]))
            assert kept == sorted(row["case"] for row in by_disagreement[: 6 - 2 * bool(options)])
            assert description["pseudo_labels"]["trainer"] == "nnUNetTrainerM3HL"
            assert description["pseudo_labels"]["networks"] == ["student", "teacher"]
            with (folder / "disagreement.csv").open(newline="") as f:
                found = {row["case"]: float(row["disagreement"]) for row in csv.DictReader(f)}
            for case, value in found.items():
                maps = [read(ranked[0] / "networks" / name / f"{case}.nii.gz") for name in ("student", "teacher")]
                assert value == pytest.approx(changed_part(maps), abs=1e-4)  # as pseudo-label measures it itself
            for case in kept:
                expected = read(ranked[0] / "labels" / f"{case}.nii.gz").astype(int)
                if options:
                    student, teacher = (
                        read(ranked[0] / "networks" / name / f"{case}.nii.gz") for name in ("student", "teacher")
                    )
                    expected[student != teacher] = 2
                np.testing.assert_array_equal(read(folder / "labelsTr" / f"{case}.nii.gz"), expected)
            shutil.rmtree(folder)
            shutil.rmtree(Path(paths.nnUNet_preprocessed) / folder.name)
    finally:
        for root in (paths.nnUNet_raw, paths.nnUNet_preprocessed):
            shutil.rmtree(Path(root) / folder.name, ignore_errors=True)
    assert calls == []


def lose_a_label(output):
    (output / "labels/case_003.nii.gz").unlink()


def train_on(output):
    settings = json.loads((output / "settings.json").read_text())
    settings["networks"]["teacher"]["changed_ns"] -= 1
    (output / "settings.json").write_text(json.dumps(settings))


def lose_the_settings(output):
    (output / "settings.json").unlink()


def cut_the_settings(output):
    (output / "settings.json").write_text('{"dataset": "Dataset701_Tiny"}')


def of_another_dataset(output):
    settings = json.loads((output / "settings.json").read_text())
    (output / "settings.json").write_text(json.dumps({**settings, "dataset": "Dataset001_Other"}))


def of_another_fold(output):
    settings = json.loads((output / "settings.json").read_text())
    (output / "settings.json").write_text(json.dumps({**settings, "folds": [1]}))


# harm to a copy of the folder, arguments, words of the sentence
REFUSED = {
    "other settings": (None, [*COMMAND, "--network", "student", "-o", "{out}"], "was made with other networks ("),
    "trained on": (train_on, [*COMMAND, "-o", "{out}"], "networks change when a model is trained on"),
    "no ranking": (lose_the_settings, [*COMMAND, "-o", "{out}"], "is no folder of nnunet-ssl rank. Choose another -o"),
    "no network": (None, [*COMMAND, "--network", "nobody", "-o", "{new}"], "has no network 'nobody'; it has student"),
    "part": (None, [*COMMAND, "-num_parts", "2", "-part_id", "2", "-o", "{new}"], "-part_id must be from 0 to 1"),
    "next": (None, [*COMMAND, "--next", "7", "-o", "{new}"], "--next 7: there are 6 scans to choose from."),
    "no folder": (None, [*COMMAND, "-i", "{new}", "-o", "{new}"], "does not exist. Give the folder"),
    "no scans": (None, [*COMMAND, "-i", "{empty}", "-o", "{new}"], "has no scans, as CASE_0000.nii.gz."),
    "strange file": (None, [*COMMAND, "-i", "{strange}", "-o", "{new}"], "notes.txt: not a scan; expected CASE_0000"),
    "inside": (None, [*COMMAND, "-i", "{empty}", "-o", "{empty}/out"], "is in the folder of the scans"),
    "unsound": (None, [*COMMAND, "-i", "{unsound}", "-o", "{new}"], "a_0000.nii.gz: cannot be read"),
    "accept": (None, [*COMMAND, "--accept", "nobody", "-o", "{new}"], "--accept nobody: no such case in"),
    "no model": (None, [*COMMAND, "-chk", "none.pth", "-o", "{new}"], "none.pth is missing. Train the model first"),
    "predictions of nothing": (lose_the_settings, [*LABEL, "{out}"], "is no folder of nnunet-ssl rank."),
    "predictions cut": (cut_the_settings, [*LABEL, "{out}"], "settings.json is damaged"),
    "predictions of a dataset": (of_another_dataset, [*LABEL, "{out}"], "predictions of dataset Dataset001_Other, not"),
    "predictions of a fold": (of_another_fold, [*LABEL, "{out}"], "has predictions of -f 1, not 0"),
    "predictions lost": (lose_a_label, [*LABEL, "{out}"], "1 unlabeled scan is not in"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(mistake, ranked, tmp_path, capsys):
    harm, line, words = REFUSED[mistake]
    names = {name: tmp_path / name for name in ("out", "new", "empty", "strange", "unsound")}
    shutil.copytree(ranked[0], names["out"])
    for name in ("empty", "strange", "unsound"):
        names[name].mkdir()
    (names["strange"] / "notes.txt").touch()
    (names["unsound"] / "a_0000.nii.gz").write_bytes(b"nothing")
    if harm is not None:
        harm(names["out"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([word.format(**names) for word in line]) == 1
    assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list(Path(paths.nnUNet_raw).glob("*985*"))


def test_a_folder_of_2d_scans_with_two_channels_regions_and_an_ignore_label(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    raw = make_raw_dataset(
        *(707, "Flat"), cases=5, unlabeled=0, test=3, shape=(1, 20, 24), channels=2, labels=labels,
        regions_class_order=[1, 2],
    )  # fmt: skip
    folder = plan(707, ["2d"])
    trainer = make_trainer(nnUNetTrainer, folder, "2d")
    trainer.initialize()
    for name in ("plans.json", "dataset.json"):
        source = folder / name.replace("plans", "nnUNetPlans")
        shutil.copy(source, Path(trainer.output_folder_base) / name)
    Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    output = tmp_path / "out"
    line = ["rank", "-d", "707", "-c", "2d", "-f", "0", "-i", str(raw / "imagesTs"), "-o", str(output), "--next", "3"]
    assert main([*line, *FAST]) == 0
    found = {row["case"]: row for row in rows(output)}
    assert sorted(found) == ["test_000", "test_001", "test_002"]
    assert len(rows(output, "next.csv")) == 3
    for case, row in found.items():
        own = read(output / "labels" / f"{case}.nii.gz")
        np.testing.assert_array_equal(own, read(output / "networks/student" / f"{case}.nii.gz"))
        assert float(row["volume_ml_whole"]) == pytest.approx((own > 0).sum() / 1000, rel=1e-5)
        assert float(row["volume_ml_core"]) == pytest.approx((own == 2).sum() / 1000, rel=1e-5)
        assert row["disagreement"] == row["disagreement_core"] == ""  # one network
        assert row["missing"].split() == [name for name in ("whole", "core") if float(row[f"volume_ml_{name}"]) == 0]
    assert json.loads((output / "settings.json").read_text())["classes"] == {"whole": [1, 2], "core": [2]}


def test_another_decoder_is_loaded_and_features_are_of_the_last_scan(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    seed()
    trainer = make_trainer(nnUNetTrainerCoLearning, tiny_dataset, num_epochs=1, num_iterations_per_epoch=1)
    trainer.run_training()
    model = Model(Path(trainer.output_folder_base), 0, "checkpoint_final.pth")
    names = all_networks([model], "3d_fullres")
    assert set(names) == set(trainer.segmenting_networks())
    networks = [Network(model, name) for name in trainer.segmenting_networks()]
    predictors = load_predictors(networks, "cpu", mirroring=False)
    patch = torch.randn(1, 16, 16, 16)
    for predictor, network in zip(predictors, trainer.segmenting_networks().values(), strict=True):
        inner = (slice(None), *[slice(4, 12)] * 3)  # in the corners the weight of a window is next to nothing
        expected = logits(network.eval(), patch[None])[0][inner]
        found = predictor.predict_logits_from_preprocessed_data(patch).float()[inner]  # in half precision
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    with pooled_bottleneck(predictors[0]) as features:
        predictors[0].predict_logits_from_preprocessed_data(torch.zeros(1, 16, 16, 16))
        features()
        predictors[0].predict_logits_from_preprocessed_data(patch)
        bottleneck = predictors[0].network.encoder(patch[None])[-1]
        found = features()
    torch.testing.assert_close(torch.tensor(found), bottleneck.mean((0, 2, 3, 4)), atol=1e-5, rtol=1e-4)


def test_names_tell_folds_trainers_and_seeds_apart(model, tmp_path):
    other = tmp_path / "nnUNetTrainerM3HL__nnUNetPlans__3d_fullres"
    shutil.copytree(model, other)
    models = [Model(folder, 0, "checkpoint_final.pth") for folder in (model, other)]
    assert [*all_networks(models, "3d_fullres", ["teacher"])] == ["teacher", "teacher_seed_2"]
    assert [*all_networks(models, "3d_fullres")] == ["student", "teacher", "student_seed_2", "teacher_seed_2"]
    third = tmp_path / "nnUNetTrainerX__nnUNetPlans__3d_fullres"
    other.rename(third)
    models[1] = Model(third, 0, "checkpoint_final.pth")
    assert [*all_networks(models, "3d_fullres", ["student"])] == ["nnUNetTrainerM3HL", "nnUNetTrainerX"]


def test_the_table_of_many_scans_needs_little_memory(tmp_path):
    rng, number = np.random.default_rng(0), 1000
    cases = [f"scan_{i:05d}" for i in range(number)]
    (tmp_path / "measured").mkdir()
    features = rng.random(320).round(4).tolist()
    for case in cases:
        own = dict(zip(("disagreement", "disagreement_a", "entropy_a", "volume_ml_a"), rng.random(4), strict=True))
        content = {"row": {**own, "components": 1, "missing": []}, "features": features}
        (tmp_path / "measured" / f"{case}.json").write_text(json.dumps(content))
    tracemalloc.start()
    found = table(tmp_path, cases)
    write_table(tmp_path / "rank.csv", found, ["a"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows(tmp_path)) == number
    assert peak < 4000 * number  # bytes; the features alone would be 10,000 a scan


def test_every_class_has_its_own_channel():
    labels = {"background": 0, "b": 2, "a": 1, "ignore": 3}  # not in the order of their values
    values = torch.arange(3.0)[:, None]
    classes, _ = label_values({"labels": labels})
    found = of_classes(values, LabelManager(labels, None), classes)
    assert dict(zip(classes, found[:, 0], strict=True)) == {"b": 2, "a": 1}
    labels = {"background": 0, "core": 2, "whole": [1, 2], "ignore": 3}
    classes, _ = label_values({"labels": labels})
    found = of_classes(values[:2], LabelManager(labels, [2, 1]), classes)
    assert dict(zip(classes, found[:, 0], strict=True)) == {"core": 0, "whole": 1}
