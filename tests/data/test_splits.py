import json

import pytest

from nnunet_ssl.commands.split import nested_folds, split_dataset
from nnunet_ssl.data.splits import labels_learnt, require_hidden, save_splits
from nnunet_ssl.system.lock import locked

OLD = [{"train": ["a"], "val": ["b"]}]
NEW = [{"train": ["b"], "val": ["a"], "unlabeled": ["c"]}]


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A fully labeled dataset of ten cases; files are empty because only their names matter."""
    for folder in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{folder}", str(tmp_path / folder))
        (tmp_path / folder).mkdir()
    dataset = tmp_path / "raw" / "Dataset007_Ten"
    for folder in ("imagesTr", "labelsTr"):
        (dataset / folder).mkdir(parents=True)
    for case in range(10):
        for channel in range(2):
            (dataset / "imagesTr" / f"case{case}_{channel:04d}.nii.gz").touch()
        (dataset / "labelsTr" / f"case{case}.nii.gz").touch()
    (dataset / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    return dataset


def preprocessed_is_untouched(raw):
    return not any((raw.parent.parent / "preprocessed").iterdir())


def test_save_creates_the_folder_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "new" / "splits_final.json"
    save_splits(path, NEW)
    assert json.loads(path.read_text(encoding="utf-8")) == NEW
    assert [file.name for file in path.parent.iterdir()] == ["splits_final.json"]


def test_save_refuses_another_split_and_leaves_it_alone(tmp_path):
    path = tmp_path / "splits_final.json"
    save_splits(path, OLD)
    with pytest.raises(FileExistsError, match=r"splits_final\.json.*--overwrite"):
        save_splits(path, NEW)
    assert json.loads(path.read_text(encoding="utf-8")) == OLD


def test_save_of_the_same_split_does_nothing(tmp_path):
    path = tmp_path / "splits_final.json"
    save_splits(path, OLD)
    save_splits(path, OLD)
    save_splits(path, OLD, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["splits_final.json"]


def test_every_replaced_split_keeps_its_own_backup(tmp_path):
    path = tmp_path / "splits_final.json"
    newest = [{"train": ["c"], "val": ["a"]}]
    save_splits(path, OLD)
    save_splits(path, NEW, overwrite=True)
    save_splits(path, newest, overwrite=True)
    save_splits(path, OLD, overwrite=True)
    kept = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in tmp_path.iterdir()}
    assert kept == {
        "splits_final.json": OLD,
        "splits_final.json.bak": OLD,
        "splits_final.json.bak1": NEW,
        "splits_final.json.bak2": newest,
    }


def test_a_failed_write_keeps_the_old_split(tmp_path, monkeypatch):
    path = tmp_path / "splits_final.json"
    save_splits(path, OLD)

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("nnunet_ssl.system.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_splits(path, NEW, overwrite=True)
    assert json.loads(path.read_text(encoding="utf-8")) == OLD
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_a_fold_holds_every_case_once():
    cases = [f"case{number:02d}" for number in range(10)]
    for fold, number in zip(nested_folds(cases, [1, 3, 8]), [1, 3, 8], strict=True):
        assert (len(fold["train"]), len(fold["val"]), len(fold["unlabeled"])) == (number, 2, 8 - number)
        assert sorted(fold["train"] + fold["val"] + fold["unlabeled"]) == cases


def test_folds_are_nested_and_share_their_validation_cases():
    small, large = nested_folds([f"case{number}" for number in range(20)], [3, 7])
    assert set(small["train"]) < set(large["train"])
    assert small["val"] == large["val"]


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_cases():
    cases = [f"case{number}" for number in range(20)]
    assert nested_folds(cases, [5]) == nested_folds(cases[::-1], [5])
    assert nested_folds(cases, [5]) != nested_folds(cases, [5], seed=1)


def test_the_default_seed_gives_the_same_split_for_ever():
    # numpy.random.RandomState(12345).permutation(5) is [0, 4, 3, 1, 2]: a for validation, then e, d, b, c
    assert nested_folds(list("abcde"), [2]) == [{"train": ["d", "e"], "val": ["a"], "unlabeled": ["b", "c"]}]


@pytest.mark.parametrize(("count", "val"), [(2, 1), (4, 1), (9, 1), (10, 2), (14, 2)])
def test_a_fifth_of_the_cases_is_held_out_and_at_least_one(count, val):
    (fold,) = nested_folds([f"case{number}" for number in range(count)], [1])
    assert len(fold["val"]) == val


@pytest.mark.parametrize(
    ("labeled", "val", "message"),
    [
        ([], None, "--labeled is empty"),
        ([2, 0], None, "--labeled 0 is too small"),
        ([2, 3, 2], None, "--labeled has 2 more than once"),
        ([2], 0, "--val 0 is too small"),
        ([2, 8], 3, "--labeled 8 and --val 3 need 11 cases, but the dataset has 10"),
        ([9], None, "--labeled 9 and --val 2 need 11 cases"),
    ],
)
def test_impossible_numbers_are_refused_before_anything_is_written(raw, labeled, val, message):
    with pytest.raises(ValueError, match=message):
        split_dataset("7", labeled, val)
    assert preprocessed_is_untouched(raw)


@pytest.mark.parametrize("dataset", ["7", "Dataset007_Ten"])
def test_split_writes_what_nested_folds_draws_and_says_it(raw, dataset, capsys):
    path = split_dataset(dataset, [2, 4], val=3, seed=5)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(";")[0] for line in said] == [
        "fold 0: 2 labeled, 3 for validation, 5 unlabeled",
        "fold 1: 4 labeled, 3 for validation, 3 unlabeled",
    ]
    assert path == raw.parent.parent / "preprocessed" / "Dataset007_Ten" / "splits_final.json"
    assert json.loads(path.read_text(encoding="utf-8")) == nested_folds(
        [f"case{case}" for case in range(10)], [2, 4], 3, 5
    )


def test_split_replaces_another_split_only_when_told(raw):
    path = split_dataset("7", [2])
    with pytest.raises(FileExistsError, match="--overwrite"):
        split_dataset("7", [3])
    split_dataset("7", [3], overwrite=True)
    assert len(json.loads(path.read_text(encoding="utf-8"))[0]["train"]) == 3


def test_cases_without_a_label_file_are_named(raw):
    (raw / "labelsTr" / "case4.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 10 cases .* without a label file: case4\. .*imagesUn"):
        split_dataset("7", [2])
    assert preprocessed_is_untouched(raw)


def test_an_unknown_dataset_is_refused(raw):
    with pytest.raises(FileNotFoundError, match=r"Dataset008_None.*nnUNet_raw"):
        split_dataset("Dataset008_None", [2])
    with pytest.raises(RuntimeError, match="8"):
        split_dataset("8", [2])
    assert preprocessed_is_untouched(raw)


def test_what_a_model_has_learnt_is_looked_up_in_its_checkpoint_or_its_newest_log(tmp_path):
    path, model = tmp_path / "splits_final.json", tmp_path / "fold_0" / "checkpoint_final.pth"
    model.parent.mkdir()
    save_splits(path, [{"train": ["a", "b"], "val": ["z"], "unlabeled": ["c"], "test": ["d"]}])
    assert labels_learnt(model.parent) is None
    require_hidden(path, 0, model)
    refused = r"checkpoint_final.pth has learnt labels that fold 0 of .* hides or validates on now: "
    require_hidden(path, 0, model, ["b", "whose files are lost"])
    with pytest.raises(ValueError, match=refused + "the labels of c, d, z. The split has changed"):
        require_hidden(path, 0, model, ["d", "a", "z", "c"])
    for day, number in ((9, 2), (10, 3)):  # the newest is the last one by date, not by name
        log = model.with_name(f"training_log_2026_11_{day}_08_00_00.txt")
        log.write_text(
            f"2026: This split has 1 training and 1 validation cases.\n2026: This split has {number} training and"
        )
    assert labels_learnt(model.parent) == 3
    with pytest.raises(ValueError, match=refused + "3 labels, and that fold has 2 now"):
        require_hidden(path, 0, model)
    require_hidden(path, 0, model, ["a", "b"])  # the cases count more than a number
    require_hidden(path, "all", model)
    path.unlink()
    require_hidden(path, 0, model)


def test_the_split_of_a_running_training_is_not_replaced(raw):
    fold = raw.parents[1] / "results" / raw.name / "nnUNetTrainerM3HL__nnUNetPlans__3d_fullres/fold_0"
    fold.mkdir(parents=True)
    split_dataset("7", [3])
    for lock in (fold / ".training.lock", fold.with_name(".fold_0.lock")):  # the second one is held by `compare`
        with locked(lock, f"training in {fold}"):
            split_dataset("7", [3])  # nothing would change
            with pytest.raises(FileExistsError):
                split_dataset("7", [4])
            with pytest.raises(RuntimeError, match="has been training"):
                split_dataset("7", [4], overwrite=True)
    split_dataset("7", [4], overwrite=True)
