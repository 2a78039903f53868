"""Checks an installation and a data set: what has to hold before a semi-supervised training, each with its fix.

Nothing heavy is imported at the top: a torch that cannot be imported is one of the failures to be reported.
"""

import ast
import json
import os
import platform
import shlex
import shutil
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple

from nnunet_ssl.autoregister import trainers_folder
from nnunet_ssl.system.quiet import quiet
from nnunet_ssl.system.wording import counted

SHARED_MEMORY = Path("/dev/shm")  # of Linux
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
REINSTALL_TORCH = "install the two together: pip install --upgrade --force-reinstall torch torchvision"
# In the order in which they import each other, so that the first failure is the cause of those below it.
LIBRARIES = {
    "torch": REINSTALL_TORCH,
    "torchvision": REINSTALL_TORCH,
    "timm": "pip install --upgrade timm",
    "nnunetv2": 'pip install "nnunetv2>=2.8,<2.9"',
}


class Check(NamedTuple):
    """One line of the report; `fix` says in one sentence what to do where `ok` is False."""

    name: str
    ok: bool
    text: str
    fix: str = ""


def doctor(
    dataset: str | None = None,
    configurations: Sequence[str] = (),
    plans_identifier: str = "nnUNetPlans",
    fold: int | str | None = None,
    as_json: bool = False,
) -> int:
    """Print what was found, and a fix for whatever is wrong; returns 1 if any check failed, else 0.

    With a `dataset` (name or id), also whether its unlabeled cases are ready for `configurations` (default: those for
    which imagesUn was preprocessed or, where it was for none, all that are preprocessed) and `fold` (a number or "all";
    default: every fold that has a list of unlabeled cases). `as_json` prints a JSON object with "passed" and "checks".
    """
    with quiet():
        checks = _check_everything(dataset, configurations, plans_identifier, fold)
    failed = sum(not check.ok for check in checks)
    if as_json:
        print(json.dumps({"passed": not failed, "checks": [check._asdict() for check in checks]}, indent=1))
        return int(failed > 0)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'ok' if check.ok else 'FAIL':>4}  {check.name:<{width}}  {check.text}")
        if not check.ok:
            print(f"{'':>4}  {'':<{width}}  -> {check.fix}")
    number = counted(len(checks), "check")
    print(f"\n{failed} of {number} failed." if failed else f"\nAll {number} passed.")
    return int(failed > 0)


def _check_everything(
    dataset: str | None, configurations: Sequence[str], plans_identifier: str, fold: int | str | None
) -> list[Check]:
    """All checks that can be made, for the arguments of `doctor`."""
    libraries = list(_check_libraries())
    checks = [Check("python", True, f"{platform.python_version()} on {platform.platform()}"), *libraries]
    checks += [*_check_folders(), *_check_workers(), *_check_shared_memory()]
    if all(check.ok for check in libraries):
        checks.append(_check_device())
        checks += _check_trainers()
        if dataset is not None:
            try:
                checks += _check_unlabeled(str(dataset), configurations, plans_identifier, fold)
            except Exception as error:  # a file that is not what it should be: report it after what was found so far
                fix = f"write the data set's files anew: nnUNetv2_plan_and_preprocess -d {dataset}"
                checks.append(Check(f"dataset {dataset}", False, _describe(error), fix))
    else:
        text = "not looked for, as long as the libraries above cannot be imported"
        checks.append(Check("trainers", False, text, "fix the libraries first, then run this again"))
    return checks


def list_trainers() -> list[tuple[str, str]]:
    """Name and first docstring line of every trainer in the trainers folder, sorted; reads the files, imports nothing.

    A class without a docstring is described by its file's.
    """
    trainers = []
    for file in sorted(Path(trainers_folder()).glob("nnUNetTrainer*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        for node in module.body:
            if isinstance(node, ast.ClassDef) and node.name.startswith("nnUNetTrainer"):
                text = ast.get_docstring(node) or ast.get_docstring(module) or ""
                trainers.append((node.name, text.partition("\n")[0]))
    return trainers


def _describe(error: Exception) -> str:
    """An exception's type and first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _check_libraries() -> Iterator[Check]:
    for name, fix in LIBRARIES.items():
        try:
            version = metadata.version(name)
            import_module(name)
        except Exception as error:  # whatever a broken library raises is what this check reports
            yield Check(name, False, _describe(error), fix)
        else:
            fits = name != "nnunetv2" or version.split(".")[:2] == ["2", "8"]
            yield Check(name, fits, version if fits else f"{version}, but 2.8 is needed", fix)


def _check_device() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("device", True, f"cuda: {torch.cuda.get_device_name()}")
    if torch.backends.mps.is_available():
        return Check("device", True, "mps (train with -device mps)")
    return Check("device", True, "cpu only (train with -device cpu; slow)")


def _check_folders() -> Iterator[Check]:
    for name in FOLDERS:
        folder = os.environ.get(name)
        if not folder:
            yield Check(name, False, "not set", f"export {name}=/path/to/{name}")
        elif not os.path.isdir(folder):
            yield Check(
                name, False, f"{folder} does not exist", f"mkdir -p {shlex.quote(folder)}, or set {name} to another one"
            )
        # Raw data are only read.
        elif name != "nnUNet_raw" and not os.access(folder, os.W_OK):
            yield Check(
                name,
                False,
                f"{folder} is not writable",
                f"chmod u+w {shlex.quote(folder)}, or set {name} to another one",
            )
        else:
            yield Check(name, True, folder)


def _check_workers() -> Iterator[Check]:
    """What nnU-Net makes of nnUNet_n_proc_DA; nothing where it is not set."""
    name = "nnUNet_n_proc_DA"
    value = os.environ.get(name)
    if value is None:
        return
    if not value.strip().isdecimal():
        yield Check(name, False, f"{value!r} is not a number of worker processes", f"export {name}=4, or unset it")
    elif int(value) == 0:
        text = (
            f"0: trainings work, but nnU-Net's planning crashes; plan with: env -u {name} nnUNetv2_plan_and_preprocess"
        )
        yield Check(name, True, text)
    else:
        yield Check(name, True, value)


def _check_shared_memory() -> Iterator[Check]:
    """Whether the workers' patches have room, which a container's default has not; nothing where there are none."""
    if SHARED_MEMORY.is_dir() and os.environ.get("nnUNet_n_proc_DA", "").strip() != "0":
        size = shutil.disk_usage(SHARED_MEMORY).total
        text = f"{size / 2**20:.0f} MiB, for the patches of the worker processes"
        fix = "start the container with --ipc=host or --shm-size=2g, or train with nnUNet_n_proc_DA=0"
        yield Check(str(SHARED_MEMORY), size >= 2**29, text, fix)


def _check_trainers() -> Iterator[Check]:
    """Whether nnU-Net's own finder finds each of our trainers, and finds ours."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    trainers = list_trainers()
    if not trainers:
        text = f"no nnUNetTrainer*.py in {trainers_folder()}"
        yield Check("trainers", False, text, "pip install --force-reinstall --no-deps nnunet-ssl")
    for name, _ in trainers:
        try:
            with quiet() as said:  # the finder names every file that it opens
                found = recursive_find_trainer_class_by_name(name)
        except Exception as error:  # the finder imports every trainer that it passes: anything can come out of one
            if trainers_folder() not in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep):
                fix = 'export nnUNet_extTrainer="$(nnunet-ssl trainers --path)" (append it to what is there)'
            else:
                last = said.getvalue().strip().rpartition("\n")[2].strip()
                fix = f"repair what nnU-Net stopped at ({last}), or take its folder out of nnUNet_extTrainer"
            yield Check(name, False, _describe(error), fix)
            continue
        found_in = said.getvalue().rpartition(f"Using trainer '{name}' from: ")[2].strip() or "nnunetv2 itself"
        # a user's own trainer imports the one that it is derived from: that is the same class
        same = os.path.realpath(found_in) == os.path.realpath(trainers_folder())
        ours = same or found.__module__.startswith("nnunet_ssl.trainers.")
        fix = f"rename the class {name} there, or remove that folder from nnUNet_extTrainer"
        yield Check(name, ours, "found" if ours else f"hidden by a class of the same name in {found_in}", fix)


def _check_unlabeled(
    dataset: str, configurations: Sequence[str], plans_identifier: str, fold: int | str | None
) -> Iterator[Check]:
    """Whether the unlabeled cases that training will use are preprocessed."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_ssl.data.preprocessed import check_settings, preprocessing_settings, unlabeled_folder

    if not all(os.environ.get(name) for name in FOLDERS):
        text = "not looked for, as long as the folders above are not set"
        yield Check(f"dataset {dataset}", False, text, "set the three folders first, then run this again")
        return
    try:
        name = maybe_convert_to_dataset_name(dataset)
    except (RuntimeError, ValueError) as error:
        fix = f"put the data set into {os.environ['nnUNet_raw']}/DatasetXXX_NAME and call it by its number XXX"
        yield Check(f"dataset {dataset}", False, _describe(error), fix)
        return

    preprocessed = Path(os.environ["nnUNet_preprocessed"], name)
    plans_file = preprocessed / f"{plans_identifier}.json"
    if not plans_file.is_file():
        fix = f"nnUNetv2_plan_and_preprocess -d {dataset} (with the planner, -pl, that makes {plans_identifier})"
        yield Check(name, False, f"{plans_file} does not exist", fix)
        return
    plans = PlansManager(str(plans_file))
    folders = {c: plans.get_configuration(c).data_identifier for c in plans.available_configurations}
    there = [c for c, folder in folders.items() if (preprocessed / folder).is_dir()]
    prepared = [c for c in there if unlabeled_folder(preprocessed, folders[c]).is_dir()]  # the others are not meant
    configurations = configurations or prepared or there
    if not configurations:
        fix = f"nnUNetv2_preprocess -d {dataset} -plans_name {plans_identifier}"
        yield Check(name, False, "no configuration is preprocessed", fix)
    for configuration in configurations:
        title = f"{name} {configuration}"
        if configuration not in folders:
            text = f"{plans_identifier} has no such configuration"
            yield Check(title, False, text, f"choose one of {', '.join(folders)}")
            continue
        images_un = Path(os.environ["nnUNet_raw"], name, "imagesUn")
        ours = f"nnunet-ssl preprocess -d {dataset} -c {configuration} -p {plans_identifier}"
        stock = f"nnUNetv2_preprocess -d {dataset} -c {configuration} -plans_name {plans_identifier}"
        own = unlabeled_folder(preprocessed, folders[configuration])
        try:
            check_settings(own, preprocessing_settings(plans, plans.get_configuration(configuration)))
        except ValueError as error:
            yield Check(title, False, str(error), f"rm -r {shlex.quote(str(own))}, then run: {ours}")
            continue
        found = [
            *_check_images_un(title, images_un, own, ours),
            *_check_splits(title, preprocessed / folders[configuration], fold, stock),
        ]
        if not found:
            text = f"no unlabeled cases for fold all: none in {images_un}"
            fix = f"put scans into {images_un}, then run: {ours}"
            if fold != "all":  # which uses the labels of every case
                where = "any fold" if fold is None else f"fold {fold}"
                text = (
                    f'no unlabeled cases: neither {images_un} nor an "unlabeled" list in {where} of splits_final.json'
                )
                fix += f" (or hide the labels of some cases: nnunet-ssl split -d {dataset} --labeled N)"
            found = [Check(title, False, text, fix)]
        yield from found


def _check_images_un(title: str, images_un: Path, folder: Path, fix: str) -> Iterator[Check]:
    """Every case of imagesUn is preprocessed into `folder`; nothing when there are no cases in either."""
    from nnunet_ssl.data.dataset_json import read_dataset_json
    from nnunet_ssl.data.preprocessed import finished_cases
    from nnunet_ssl.data.scans import no_scan, unlabeled_scans

    dataset_json = read_dataset_json(folder.parent / "dataset.json", "channel_names", "file_ending")
    scans, others = unlabeled_scans(images_un, dataset_json)
    raw, finished = scans.keys(), finished_cases(folder)
    if others:
        text = f"imagesUn: {counted(len(others), 'file is no scan', 'files are no scans')}, as "
        text += no_scan(others[0], dataset_json["file_ending"])
        yield Check(title, False, text, f"rename or remove them in {images_un}")
    if raw or finished:
        missing = len(raw - finished)
        text = f"imagesUn: {counted(len(raw), 'case')}, {len(finished)} finished in {folder.name}"
        yield Check(title, not missing, text + (f", {missing} missing" if missing else ""), fix)


def _check_splits(title: str, folder: Path, fold: int | str | None, fix: str) -> Iterator[Check]:
    """The unlabeled cases of the folds are preprocessed in `folder`; nothing when no fold has any, or for fold all."""
    from nnunet_ssl.data.preprocessed import finished_cases
    from nnunet_ssl.data.splits import read_splits

    splits_file = folder.parent / "splits_final.json"
    folds = read_splits(splits_file)
    if isinstance(fold, int) and folds and not 0 <= fold < len(folds):
        text = f"Fold {fold} does not exist in {splits_file}"
        yield Check(title, False, text, f"choose a fold from 0 to {len(folds) - 1}")
    for index, cases in enumerate(folds):
        unlabeled = set(cases.get("unlabeled", ()))
        if unlabeled and fold in (None, index):
            missing = len(unlabeled - finished_cases(folder))
            text = f"fold {index}: {counted(len(unlabeled), 'unlabeled case')} in splits_final.json"
            text += f", {missing} of them missing in {folder.name}" if missing else ""
            yield Check(title, not missing, text, fix)
