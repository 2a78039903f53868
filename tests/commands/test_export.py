"""Exported models: plain nnU-Net predicts with them, and they predict the same."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.paths import nnUNet_raw
from tiny_trainers import every_trainer, make_trainer, seed

from nnunet_ssl.cli import main
from nnunet_ssl.commands.export import PROVENANCE_KEY, export_model
from nnunet_ssl.trainer import SemiSupervisedTrainer

pytestmark = pytest.mark.slow

# Plain nnU-Net: NNUNET_SSL_PLAIN_PYTHON is the Python of an environment without our package (.ci/check_wheel has one).
# Without it, this one, in which our package cannot be imported and nnU-Net is told of no further folder of trainers.
# As the commands nnUNetv2_install_pretrained_model_from_zip and nnUNetv2_predict_from_modelfolder.
PLAIN = """
import sys
sys.modules["nnunet_ssl"] = None
import os
os.environ.pop("nnUNet_extTrainer", None)
import torch
torch.set_num_threads(1)
from pathlib import Path
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_import import install_model_from_zip_file

images, *jobs = sys.argv[1:]
image, properties = SimpleITKIO().read_images([images])
for job in jobs:
    model, folds, output = job.split(",")
    if model.endswith(".zip"):
        install_model_from_zip_file(model)
        model = str(next(Path(os.environ["nnUNet_results"]).glob("*/*")))
    for chosen in folds.split("+"):
        predictor = nnUNetPredictor(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(model, (chosen,))
        assert predictor.trainer_name == "nnUNetTrainer"
        labels = predictor.predict_single_npy_array(image, properties, save_or_return_probabilities=True)[1]
        labels.astype("float32").tofile(f"{output}_{chosen}")
"""


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory):
    """Every trainer after a training, in results of their own, and the deployed network's probabilities."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(results))
        for trainer_class in every_trainer():
            seed()
            trainer = make_trainer(trainer_class, tiny_dataset)
            trainer.run_training()
            (Path(trainer.output_folder) / "validation").mkdir()
            (Path(trainer.output_folder) / "validation/summary.json").write_text("{}")
            (Path(trainer.output_folder) / "segmenting").write_text(" ".join(trainer.segmenting_networks()))
        yield results


def scan():
    return str(next(Path(nnUNet_raw).glob("Dataset701_*/imagesTs/test_000_0000.nii.gz")))


def probabilities(model, weights=None, fold="0"):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (fold,) if isinstance(fold, str) else fold)
    if weights is not None:
        predictor.list_of_parameters = [weights]
    image, properties = SimpleITKIO().read_images([scan()])
    return predictor.predict_single_npy_array(image, properties, save_or_return_probabilities=True)[1]


def model_folder(results, trainer):
    return results / "Dataset701_Tiny" / f"{trainer}__nnUNetPlans__3d_fullres"


def test_plain_nnunet_predicts_the_same_to_the_last_bit(trained, tmp_path):
    jobs, expected = [], {}
    torch.set_num_threads(1)
    for trainer in [t.__name__ for t in every_trainer()]:
        exported = export_model("701", "3d_fullres", trainer, tmp_path / trainer)
        assert exported == {"fold_0": "student"}
        jobs.append(f"{tmp_path / trainer},0,{tmp_path / trainer}_out")
        expected[f"{trainer}_out_0"] = probabilities(model_folder(trained, trainer))
    export_model("701", "3d_fullres", "nnUNetTrainerM3HL", tmp_path / "model.zip")
    jobs.append(f"{tmp_path / 'model.zip'},0,{tmp_path / 'zip'}")
    expected["zip_0"] = expected["nnUNetTrainerM3HL_out_0"]

    (tmp_path / "installed").mkdir()
    environment = {**os.environ, "nnUNet_results": str(tmp_path / "installed"), "NNUNET_SSL_NO_AUTOREGISTER": "1"}
    environment.pop("PYTHONPATH", None)
    python = os.environ.get("NNUNET_SSL_PLAIN_PYTHON", sys.executable)
    command = [python, "-c", PLAIN, scan(), *jobs]
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    for name, values in expected.items():
        found = np.fromfile(tmp_path / name, dtype=np.float32).reshape(values.shape)
        assert np.array_equal(found, values.astype(np.float32))


@pytest.mark.parametrize("trainer_class", every_trainer())
def test_every_network_of_a_checkpoint_can_be_exported(trainer_class, trained, tmp_path):
    name = trainer_class.__name__
    source = torch.load(model_folder(trained, name) / "fold_0/checkpoint_final.pth", weights_only=False)
    networks = {"student": source["nnunet_ssl"]["student"], **source["nnunet_ssl"]["companions"]}
    segmenting = (model_folder(trained, name) / "fold_0/segmenting").read_text().split()
    for other in networks.keys() - segmenting:
        with pytest.raises(ValueError, match=f"plain nnU-Net cannot load {other}"):
            export_model("701", "3d_fullres", name, tmp_path / other, networks=[other])
    networks = {network: networks[network] for network in segmenting}
    for network, weights in networks.items():
        folder = tmp_path / network
        assert export_model("701", "3d_fullres", name, folder, networks=[network]) == {"fold_0": network}
        state = torch.load(folder / "fold_0/checkpoint_final.pth", weights_only=False)
        assert all(torch.equal(state["network_weights"][key], weights[key]) for key in weights)
        assert state["trainer_name"] == "nnUNetTrainer"
        assert state[PROVENANCE_KEY]["trainer"] == name
        assert state[PROVENANCE_KEY]["network"] == network
        assert state.keys() - {PROVENANCE_KEY} == source.keys() - {"nnunet_ssl"}  # nothing of ours is left
        ours = (model_folder(trained, name) / "fold_0/checkpoint_final.pth").stat().st_size
        assert (folder / "fold_0/checkpoint_final.pth").stat().st_size < ours
        # what nnU-Net has validated is the deployed network
        assert (folder / "fold_0/validation/summary.json").is_file() == (network == "student")
    for other in networks.keys() - {"student"}:
        assert not np.array_equal(probabilities(tmp_path / other), probabilities(tmp_path / "student"))


def test_several_networks_are_an_ensemble_whose_prediction_plain_nnunet_averages(trained, tmp_path, capsys):
    output, other = tmp_path / "ensemble", tmp_path / "other" / model_folder(trained, "nnUNetTrainerM3HL").name
    shutil.copytree(model_folder(trained, "nnUNetTrainerM3HL"), other)
    command = f"export -d 701 -c 3d_fullres -tr nnUNetTrainerCoLearning --network student student_2 -o {output}"
    assert main([*command.split(), "--also", str(other)]) == 1
    assert "nnUNetTrainerM3HL__nnUNetPlans__3d_fullres/fold_0" in capsys.readouterr().err  # it has no student_2
    assert not output.exists()
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "(fold_0: student, fold_1: student_2)" in printed
    assert f"nnUNetv2_predict_from_modelfolder -m {output} -f 0 1 -i IN" in printed
    assert not list(output.rglob("summary.json"))  # nnU-Net has validated none of the ensembles
    source = model_folder(trained, "nnUNetTrainerCoLearning") / "fold_0/checkpoint_final.pth"
    ours = torch.load(source, weights_only=False)["nnunet_ssl"]
    for fold, weights in (("0", ours["student"]), ("1", ours["companions"]["student_2"])):
        state = torch.load(output / f"fold_{fold}/checkpoint_final.pth", weights_only=False)
        assert all(torch.equal(state["network_weights"][name], tensor) for name, tensor in weights.items())
    both = probabilities(output, fold=("0", "1"))
    single = [np.log(probabilities(output, fold=fold)) for fold in "01"]
    mean = np.exp(sum(single) / 2)  # nnU-Net takes the mean of the logits
    np.testing.assert_allclose(both, mean / mean.sum(0), atol=2e-3)
    assert not np.allclose(both, np.exp(single[0]), atol=2e-3)


def test_models_of_several_seeds_are_joined_if_their_plans_are_the_same(trained, tmp_path, capsys):
    other = tmp_path / "seed_1" / model_folder(trained, "nnUNetTrainerM3HL").name
    shutil.copytree(model_folder(trained, "nnUNetTrainerM3HL"), other)
    command = f"export -d 701 -c 3d_fullres -tr nnUNetTrainerM3HL --also {other} -o {tmp_path / 'out'}"
    (other / "plans.json").write_text("{}")
    assert main(command.split()) == 1
    assert f"{other} has other plans than" in capsys.readouterr().err
    shutil.copy(model_folder(trained, "nnUNetTrainerM3HL") / "plans.json", other)
    assert main(command.split()) == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("fold_*")) == ["fold_0", "fold_1"]
    assert main([*command.split()[:-1], str(tmp_path / "none"), "-chk", "checkpoint_none.pth"]) == 1
    shutil.rmtree(other / "fold_0")
    assert main([*command.split()[:-1], str(tmp_path / "none")]) == 1
    assert f"{other / 'fold_*/checkpoint_final.pth'} is missing. --also takes" in capsys.readouterr().err
    lower = other.rename(other.with_name(other.name.replace("fullres", "lowres")))
    shutil.copytree(model_folder(trained, "nnUNetTrainerM3HL") / "fold_0", lower / "fold_0")
    assert main([*command.replace(str(other), str(lower)).split()[:-1], str(tmp_path / "none")]) == 1
    assert f"{lower} is not of the configuration and plans of" in capsys.readouterr().err


def test_the_command_says_how_to_use_the_folder(trained, tmp_path, capsys):
    model = model_folder(trained, "nnUNetTrainerM3HL")
    output = tmp_path / "shared" / "model"
    assert main(f"export -d 701 -c 3d_fullres -tr nnUNetTrainerM3HL -f 0 -o {output}".split()) == 0
    assert f"nnUNetv2_predict_from_modelfolder -m {output} -f 0 -i IN -o OUT" in capsys.readouterr().out
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert {"plans.json", "dataset.json", "dataset_fingerprint.json", "fold_0/checkpoint_final.pth"} <= names
    assert "fold_0/progress.png" in names
    assert not [name for name in names if name.endswith(("losses.csv", "debug.json"))]  # the latter names cases
    assert (output / "plans.json").read_bytes() == (model / "plans.json").read_bytes()
    assert [p.name for p in output.parent.iterdir()] == ["model"]  # nothing temporary is left


def test_another_checkpoint_and_fold_all_are_named_in_the_command(trained, tmp_path, capsys):
    model = model_folder(trained, "nnUNetTrainerM3HL")
    shutil.copytree(model / "fold_0", model / "fold_all")
    shutil.copytree(model / "fold_0", model / "fold_0_backup")
    (model / "fold_0/checkpoint_final.pth").rename(model / "fold_0/checkpoint_other.pth")
    try:
        assert main(f"export -d 701 -c 3d_fullres -tr nnUNetTrainerM3HL -o {tmp_path / 'a'}".split()) == 0
        assert f"-m {tmp_path / 'a'} -f all -i IN" in capsys.readouterr().out
        (model / "fold_0/checkpoint_final.pth").hardlink_to(model / "fold_0/checkpoint_other.pth")
        assert main(f"export -d 701 -c 3d_fullres -tr nnUNetTrainerM3HL -f 0 all -o {tmp_path / 'c'}".split()) == 0
        assert {file.name for file in (tmp_path / "c").glob("fold_*")} == {"fold_0", "fold_all"}
        (model / "fold_0/checkpoint_final.pth").unlink()
        command = f"export -d 701 -c 3d_fullres -tr nnUNetTrainerM3HL -chk checkpoint_other.pth -o {tmp_path / 'b'}"
        assert main(command.split()) == 0
        assert f"-m {tmp_path / 'b'} -f 0 -chk checkpoint_other.pth -i IN" in capsys.readouterr().out
        assert not (tmp_path / "b/fold_0/validation").exists()
    finally:
        (model / "fold_0/checkpoint_other.pth").rename(model / "fold_0/checkpoint_final.pth")
        shutil.rmtree(model / "fold_all")
        shutil.rmtree(model / "fold_0_backup")


def test_a_zip_file_is_replaced_as_a_whole(trained, tmp_path):
    archive = tmp_path / "m.zip"
    archive.write_bytes(b"old")
    assert main(f"export -d 701 -c 3d_fullres -tr nnUNetTrainerM3HL -o {archive}".split()) == 0
    with zipfile.ZipFile(archive) as file:
        assert file.testzip() is None
        top = {name.split("/")[0:2][-1] for name in file.namelist() if "checkpoint" in name}
        assert top == {"nnUNetTrainer__nnUNetPlans__3d_fullres"}
    before = archive.read_bytes()
    assert main(f"export -d 701 -c 3d_fullres -tr nnUNetTrainerM3HL --network none -o {archive}".split()) == 1
    assert archive.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.zip"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "-tr nnUNetTrainerM3HL -f 3",
            "fold_3/checkpoint_final.pth is missing. Train it first: nnUNetv2_train 701 3d",
        ),
        ("-tr nnUNetTrainerM3HL --network student_2", "has no network 'student_2'; it has student, teacher."),
        ("-tr nnUNetTrainer_1epoch", "is no semi-supervised trainer: export makes"),
        ("-tr nnUNetTrainerM3HL_1epochs", "is missing. Train it first"),
        ("-tr nnUNetTrainerM3HL -chk other.pth", "other.pth is missing"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_words(options, message, trained, tmp_path, capsys):
    assert main(f"export -d 701 -c 3d_fullres -o {tmp_path / 'out'} {options}".split()) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(trained, tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert main(f"export -d 701 -c 3d_fullres -tr nnUNetTrainerM3HL -o {tmp_path}".split()) == 1
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_stock_model_and_another_architecture_are_refused(trained, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"export makes models of our trainers.*: nnUNetv2_export_model_to_zip"):
        export_model("701", "3d_fullres", "nnUNetTrainer", tmp_path / "out")

    class Other(SemiSupervisedTrainer):
        build_network_architecture = staticmethod(lambda *_: None)

    monkeypatch.setattr("nnunet_ssl.commands.export.recursive_find_trainer_class_by_name", lambda name: Other)
    with pytest.raises(NotImplementedError, match="builds its own network"):
        export_model("701", "3d_fullres", "nnUNetTrainerM3HL", tmp_path / "out")


def test_paths_are_quoted_and_nothing_of_nnunet_is_printed(trained, tmp_path, capsys):
    output = tmp_path / "my model"
    assert main(["export", *"-d 701 -c 3d_fullres -tr nnUNetTrainerM3HL -o".split(), str(output)]) == 0  # noqa: SIM905
    shown = capsys.readouterr()
    assert f"nnUNetv2_predict_from_modelfolder -m '{output}' -f 0" in shown.out
    assert "Searching" not in shown.out + shown.err
