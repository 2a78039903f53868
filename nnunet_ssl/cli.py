"""`nnunet-ssl <command>`: argument parsing only; the work of the commands is in nnunet_ssl/commands."""

import argparse
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

from nnunet_ssl.system.nnunet_version import require_nnunet
from nnunet_ssl.system.quiet import without_warnings_of_others
from nnunet_ssl.system.wording import counted


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; bad input ends in one sentence on stderr and exit code 1, without a traceback."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if "check" in options:
        options.check(parser, options)
    try:
        if options.run not in (_doctor, _trainers):  # which work, and help, with any version
            require_nnunet()
        with nullcontext() if options.traceback else without_warnings_of_others():
            return options.run(options) or 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if options.traceback:
            raise
        print(f"nnunet-ssl {options.command}: {error}", file=sys.stderr)
        return 1


def _command(commands, name: str, run: Callable, description: str) -> argparse.ArgumentParser:
    """A new command that is done by `run(options)`."""
    parser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run=run)
    return parser


def _arguments(options) -> dict:
    """What was typed, by the names of the parameters of the function that does a command's work."""
    ours = {"command", "run", "check", "traceback"}
    return {name: value for name, value in vars(options).items() if name not in ours}


def _add_model(parser: argparse.ArgumentParser, folds: str = "one") -> None:
    """Adds -d, -c, -p and -f: of a trained model "one" fold, "some", or "all trained" ones where none is given."""
    parser.add_argument("-d", dest="dataset", required=True, help="dataset name or id")
    parser.add_argument("-c", dest="configuration", required=True, help="configuration, as 3d_fullres")
    parser.add_argument("-p", dest="plans_identifier", default="nnUNetPlans", help="plans identifier")
    if folds == "one":
        parser.add_argument("-f", dest="fold", type=_fold, required=True, help="fold, a number or all")
        return
    needed, default = folds == "some", "" if folds == "some" else " (default: all that are trained)"
    text = f"folds, numbers or all{default}"
    parser.add_argument("-f", dest="folds", nargs="+", type=_fold, required=needed, help=text)


def _add_prediction(parser: argparse.ArgumentParser) -> None:
    """Adds what is asked of a command that predicts scans."""
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"])
    parser.add_argument("-np", dest="num_processes", type=int, default=3, help="processes (default: 3)")
    parser.add_argument(
        "--disable_tta", dest="mirroring", action="store_false", help="no mirroring: faster, less accurate"
    )


def _add_accept(parser: argparse.ArgumentParser) -> None:
    """Adds what lets through scans that look wrong."""
    text = "scans that are right, though their voxels or their size look wrong"
    parser.add_argument("--accept", nargs="+", default=(), metavar="CASE", help=text)


def _add_parts(parser: argparse.ArgumentParser) -> None:
    """Adds what lets several runs share the scans."""
    parser.add_argument("-num_parts", type=int, default=1, help="runs that share the scans, started one by one")
    parser.add_argument("-part_id", type=int, default=0, help="which of them this one is, from 0")


# nnU-Net is imported inside the functions: it takes seconds, and `--help` should not


def _add_trainers(commands) -> None:
    parser = _command(commands, "trainers", _trainers, "List the semi-supervised trainers.")
    parser.add_argument("--path", action="store_true", help="print the folder for nnU-Net's variable nnUNet_extTrainer")


def _trainers(options) -> None:
    from nnunet_ssl.autoregister import trainers_folder
    from nnunet_ssl.commands.doctor import list_trainers

    if options.path:
        print(trainers_folder())
        return
    found = list_trainers()
    width = max(len(name) for name, _ in found) + 1
    for name, description in found:
        print(f"{name:<{width}}{description}")


def _add_convert(commands) -> None:
    parser = _command(
        commands, "convert", _convert, "Convert a public dataset to nnU-Net's format, with folds for label budgets."
    )
    text = "la: left atrium, 2018 Atrial Segmentation Challenge; acdc: Automated Cardiac Diagnosis Challenge"
    parser.add_argument("name", choices=["la", "acdc"], help=text)
    parser.add_argument("-i", dest="input", type=Path, required=True, help="folder with one folder per case or patient")
    parser.add_argument("-d", dest="dataset_id", type=int, required=True, help="id of the dataset that is written")
    parser.add_argument("--train-list", type=Path, help="la: file with one training case per line; default: published")
    parser.add_argument("--test-list", type=Path, help="file with one test case per line; default: published")
    text = "cases (acdc: patients) of each fold; one more fold has all labels (default: la 8 4 16, acdc 7 3 14)"
    parser.add_argument("--labeled", type=int, nargs="+", help=f"labeled {text}")
    parser.add_argument("--allow-missing", action="store_true", help="go on when listed cases are not in the folder")
    parser.add_argument(
        "--crop-margin",
        type=int,
        help="la: crop in plane around the reference segmentation with this margin in voxels, as the "
        "literature does. This uses the label of EVERY case, unlabeled and test cases as well",
    )
    parser.add_argument(
        "--cine-frames",
        type=_number_or_all,
        default=0,
        metavar="all|N",
        help="acdc: write N (or all) frames without annotation of every training patient to imagesUn (default: 0)",
    )
    parser.add_argument("--slice-spacing", type=float, help="acdc: mm between slices of h5 files (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset and its splits")
    parser.set_defaults(check=_check_convert)


def _convert(options) -> None:
    shared = {"allow_missing": options.allow_missing, "overwrite": options.overwrite}
    if options.labeled:
        shared["labeled"] = options.labeled
    if options.name == "acdc":
        from nnunet_ssl.dataset_conversion import acdc

        cine_frames = None if options.cine_frames == "all" else options.cine_frames
        if options.slice_spacing is not None:
            shared["slice_spacing"] = options.slice_spacing
        test_list = options.test_list
        acdc.convert(options.input, options.dataset_id, cine_frames=cine_frames, test_list=test_list, **shared)
        return
    from nnunet_ssl.dataset_conversion import la

    lists = (options.train_list, options.test_list)
    la.convert(options.input, options.dataset_id, *lists, crop_margin=options.crop_margin, **shared)


def _check_convert(parser: argparse.ArgumentParser, options) -> None:
    """Ends with the usage where an option is of the other dataset."""
    own = {"la": ("train_list", "crop_margin"), "acdc": ("cine_frames", "slice_spacing")}
    for dataset, names in own.items():
        for name in names:
            if dataset != options.name and getattr(options, name) not in (None, 0):
                parser.error(f"--{name.replace('_', '-')} is for {dataset}, not for {options.name}")


def _add_split(commands) -> None:
    text = "Hide labels of a fully labeled dataset, or add new labels to a fold (--add)."
    parser = _command(commands, "split", _split, text)
    parser.add_argument("-d", dest="dataset", required=True, help="dataset name or id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--labeled", type=int, nargs="+", help="labeled cases, one fold per number")
    text = (
        "unlabeled scans whose labels are in labelsTr now: they become labeled ones of fold -f, without planning again"
    )
    what.add_argument("--add", nargs="+", metavar="CASE", help=text)
    parser.add_argument("--val", type=int, help="validation cases, the same in every fold (default: 20 %% of all)")
    text = "of the draw of validation and labeled cases (default: 12345)"
    parser.add_argument("--seed", type=int, default=12345, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace splits_final.json (a backup is kept)")
    parser.add_argument("-f", dest="fold", type=_fold, help="--add: the fold that gets the labels")
    parser.add_argument("--new-fold", action="store_true", help="--add: leave -f as it is, and append a fold")
    parser.add_argument("-np", dest="num_processes", type=int, default=3, help="--add: processes (default: 3)")
    parser.set_defaults(check=_check_split)


def _split(options) -> None:
    if options.add:
        from nnunet_ssl.commands.add_labels import add_labels

        how = (options.dataset, options.add, options.fold, options.new_fold, options.num_processes)
        number, fold = add_labels(*how)
        counts = ", ".join(f"{len(fold.get(key, []))} {key}" for key in ("train", "val", "unlabeled"))
        other = f" --model-fold {options.fold}" if number != options.fold else ""
        print(
            f"Fold {number} has {counts} now. A model of fold {options.fold} can be trained on with:\n  nnunet-ssl "
            f"start-from -d {options.dataset} -c CONFIGURATION -f {number} -tr TRAINER --model MODEL{other}"
        )
        return
    from nnunet_ssl.commands.split import split_dataset

    how = (options.dataset, options.labeled, options.val, options.seed, options.overwrite)
    path = split_dataset(*how)
    print(f"Wrote {counted(len(options.labeled), 'fold')} to {path}.")


def _check_split(parser: argparse.ArgumentParser, options) -> None:
    """Ends with the usage where an option is of the other kind of split."""
    if options.add and (options.fold is None or options.val is not None or options.overwrite):
        parser.error("--add needs -f, and neither --val nor --overwrite")
    if options.labeled and (options.fold is not None or options.new_fold):
        parser.error("-f and --new-fold are for --add")


def _add_preprocess(commands) -> None:
    parser = _command(commands, "preprocess", _preprocess, "Preprocess unlabeled scans with the dataset's plans.")
    parser.add_argument("-d", dest="dataset", required=True, help="dataset name or id")
    parser.add_argument("-c", dest="configurations", nargs="+", required=True, help="configurations, as 3d_fullres")
    parser.add_argument("-p", dest="plans_identifier", default="nnUNetPlans", help="plans identifier")
    parser.add_argument("-i", dest="images", type=Path, help="folder with the scans (default: the dataset's imagesUn)")
    parser.add_argument("-np", dest="num_processes", type=int, default=4, help="processes (default: 4)")
    _add_parts(parser)
    _add_accept(parser)


def _preprocess(options) -> None:
    from nnunet_ssl.commands.preprocess import preprocess_unlabeled

    preprocess_unlabeled(**_arguments(options))


def _add_pseudo_label(commands) -> None:
    parser = _command(
        commands, "pseudo-label", _pseudo_label, "Self-training: label the unlabeled scans with trained models."
    )
    _add_model(parser, folds="some")
    parser.add_argument("-tr", dest="trainers", nargs="+", default=["nnUNetTrainer"], help="trainers of the models")
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", help="checkpoint of the models")
    parser.add_argument("-o", dest="output_id", type=int, required=True, help="id of the dataset that is written")
    text = "further model folders with the same plans and folds, as of other seeds"
    parser.add_argument("--also", type=Path, nargs="+", default=[], help=text)
    text = "voxels on which the models disagree: keep the label of the mean, or ignore them in the training"
    parser.add_argument("--uncertain", choices=["keep", "ignore"], default="keep", help=text)
    text = "leave out so many scans, those on which the models disagree most"
    parser.add_argument("--drop-worst", type=int, default=0, metavar="N", help=text)
    text = (
        "folder of nnunet-ssl rank: its labels are taken, nothing is predicted, and -tr, -chk, --also, --accept, "
        "-device and --disable_tta have no effect"
    )
    parser.add_argument("--predictions", type=Path, metavar="OUT", help=text)
    _add_accept(parser)
    _add_prediction(parser)


def _pseudo_label(options) -> None:
    from nnunetv2.paths import nnUNet_preprocessed

    from nnunet_ssl.commands.pseudo_label import pseudo_label

    folder = pseudo_label(**_arguments(options))
    splits = Path(nnUNet_preprocessed) / folder.name / "splits_final.json"
    # without validation cases nnU-Net would draw some, those with predicted labels among them
    fold = 0 if splits.is_file() else "all"
    plans = options.plans_identifier
    print(
        f"Wrote {folder}. Train on it, with the same plans:\n"
        f"  nnUNetv2_extract_fingerprint -d {options.output_id}\n"
        f"  nnUNetv2_preprocess -d {options.output_id} -plans_name {plans} -c {options.configuration}\n"
        f"  nnUNetv2_train {options.output_id} {options.configuration} {fold} -p {plans}"
    )


def _add_rank(commands) -> None:
    text = "Predict the unlabeled scans with every network of a model, and sort them by expected error, worst first."
    parser = _command(commands, "rank", _rank, text)
    parser.description += (
        " It finds bad predictions. It is no proven active learning: MIC-DKFZ's nnActive found no method that reliably "
        "beats a random choice that looks at the foreground, and what did so since chooses patches, not whole scans."
    )
    _add_model(parser, folds="some")
    parser.add_argument("-tr", dest="trainers", nargs="+", default=["nnUNetTrainer"], help="trainers of the models")
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", help="checkpoint of the models")
    text = "folder of scans, named as in imagesTr (default: the folds' unlabeled scans)"
    parser.add_argument("-i", dest="images", type=Path, help=text)
    text = "folder for rank.csv, the labels, and the label maps of every network; a begun one is continued"
    parser.add_argument("-o", dest="output", type=Path, required=True, help=text)
    text = "further model folders with the same plans and folds, as of other seeds"
    parser.add_argument("--also", type=Path, nargs="+", default=[], help=text)
    text = "student, student_2, teacher, ...: networks of the checkpoints (default: all that segment)"
    parser.add_argument("--network", dest="networks", nargs="+", default=[], help=text)
    text = "name so many scans to annotate next: bad ones that do not look alike, and beside them a random choice"
    parser.add_argument("--next", dest="number", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=12345, help="of the random choice (default: 12345)")
    _add_parts(parser)
    _add_accept(parser)
    _add_prediction(parser)


def _rank(options) -> None:
    from nnunet_ssl.commands.rank import rank

    print("\n".join(rank(**_arguments(options))))


def _add_start_from(commands) -> None:
    text = "Let a training begin with a trained supervised model: in place of its supervised phase, if it has one."
    parser = _command(commands, "start-from", _start_from, text)
    _add_model(parser)
    parser.add_argument("-tr", dest="trainer_name", required=True, help="trainer of the training, one of ours")
    parser.add_argument("--model", required=True, help="trainer of the model, as nnUNetTrainer, or a model folder")
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", help="checkpoint of the model")
    text = "fold of the model, where it is another one: its labeled cases must be among those of -f (default: -f)"
    parser.add_argument("--model-fold", type=_fold, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a training that is there")


def _start_from(options) -> None:
    from nnunet_ssl.commands.start_from import start_from

    written = start_from(**_arguments(options))
    print(
        f"Wrote {written}. Train on with:\n  nnUNetv2_train {options.dataset} "
        f"{options.configuration} {options.fold} -tr {options.trainer_name} -p {options.plans_identifier} --c"
    )


def _add_export(commands) -> None:
    parser = _command(commands, "export", _export, "Write a trained model that plain nnU-Net predicts with.")
    _add_model(parser, folds="all trained")
    parser.add_argument("-tr", dest="trainer", required=True, help="trainer of the model, one of ours")
    text = "new model folder, or a file ending in .zip"
    parser.add_argument("-o", dest="output", type=Path, required=True, help=text)
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", help="checkpoint of the model")
    parser.add_argument(
        "--network",
        dest="networks",
        nargs="+",
        help="student, student_2, teacher, ...: networks of the checkpoint; several become folds, whose predictions "
        "nnU-Net averages (default: the deployed one)",
    )
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], help="further model folders, as of other seeds, for the average"
    )


def _export(options) -> None:
    from nnunet_ssl.commands.export import export_model

    exported = export_model(**_arguments(options))
    networks = ", ".join(f"{fold}: {network}" for fold, network in exported.items())
    print(f"Wrote {options.output} ({networks}) as a model of nnUNetTrainer. Plain nnU-Net predicts with it:")
    output = shlex.quote(str(options.output))
    arguments = "-f " + " ".join(fold.removeprefix("fold_") for fold in exported)
    if options.checkpoint != "checkpoint_final.pth":
        arguments += f" -chk {options.checkpoint}"
    if options.output.suffix.lower() == ".zip":
        model = f"-d {options.dataset} -c {options.configuration} -p {options.plans_identifier}"
        print(
            f"  nnUNetv2_install_pretrained_model_from_zip {output}\n"
            f"  nnUNetv2_predict {model} {arguments} -i IN -o OUT\n"
            f"Remove a model of nnUNetTrainer for the same dataset first, if there is one: the installation "
            f"overwrites some of its folds and keeps the others."
        )
    else:
        print(f"  nnUNetv2_predict_from_modelfolder -m {output} {arguments} -i IN -o OUT")


def _add_evaluate(commands) -> None:
    parser = _command(
        commands, "evaluate", _evaluate, "Dice, Jaccard and surface distances of a folder of predictions."
    )
    parser.add_argument("-r", dest="reference", type=Path, required=True, help="folder of the references, as labelsTs")
    parser.add_argument("-p", dest="prediction", type=Path, required=True, help="folder of the predictions")
    parser.add_argument(
        "-djfile",
        dest="dataset_json",
        type=Path,
        help="dataset.json (default: that of the predictions, or beside the references)",
    )
    text = "values of the labels, as 1 2 3, for folders without dataset.json"
    parser.add_argument("-l", dest="labels", type=int, nargs="+", default=(), help=text)
    parser.add_argument("-o", dest="output", type=Path, help="folder for evaluation.csv and .json (default: -p)")
    parser.add_argument("-np", dest="num_processes", type=int, default=4, help="processes (default: 4)")
    parser.add_argument(
        "--protocol",
        choices=["strict", "la-literature", "acdc-literature"],
        default="strict",
        help="strict (default): distances in mm, undefined where a mask is empty. As in published tables, in voxels "
        "and 0 where the prediction is empty: la-literature (test_3d_patch.py of BCP, SS-Net, M3HL), only the largest "
        "component of every label; acdc-literature (test_ACDC.py of BCP, SS-Net, MC-Net), all components",
    )


def _evaluate(options) -> None:
    from nnunet_ssl.commands.evaluate import evaluate

    print(evaluate(**_arguments(options)))


def _add_preview(commands) -> None:
    parser = _command(
        commands, "preview", _preview, "Draw one training batch as the method sees it, with what it mixes."
    )
    _add_model(parser)
    parser.add_argument("-tr", dest="trainer_name", required=True, help="one of our trainers")
    parser.add_argument("-chk", dest="checkpoint", help="a checkpoint of the fold (default: untrained networks)")
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda", "mps"])
    parser.add_argument(
        "-o", dest="output", type=Path, default=Path("preview.png"), help="picture (default: preview.png)"
    )


def _preview(options) -> None:
    from nnunet_ssl.commands.preview import preview

    mixed = preview(**_arguments(options))
    print(f"Wrote {options.output}." + ("" if mixed else " No mixes: the patches as they are loaded."))


def _add_compare(commands) -> None:
    parser = _command(
        commands, "compare", _compare, "Predict the test scans with several trainers: one table, a test and a figure."
    )
    _add_model(parser, folds="some")
    parser.add_argument(
        "-tr", dest="trainers", nargs="+", required=True, help="trainers; the others are tested against the first"
    )
    parser.add_argument(
        "-o",
        dest="output",
        type=Path,
        help="folder for table, figure, page, predictions and logs (default: comparison_PLANS_CONFIGURATION in the "
        "dataset's folder of nnUNet_results)",
    )
    text = (
        "folders in place of nnUNet_results, one for every seed: the means over their trainings are compared; "
        "predictions and logs stay there, whatever -o is"
    )
    parser.add_argument("--results", type=Path, nargs="+", default=[], metavar="FOLDER", help=text)
    parser.add_argument("--train", action="store_true", help="train what is not trained yet, go on with what is begun")
    text = "one job at a time, or a cluster"
    parser.add_argument("--launcher", default="local", choices=["local", "slurm"], help=text)
    parser.add_argument(
        "--slurm",
        type=_setting,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the cluster's jobs, as partition=gpu timeout_min=2880 gpus_per_node=1 cpus_per_task=12",
    )
    _add_prediction(parser)
    parser.set_defaults(check=_check_compare)


def _compare(options) -> int:
    from nnunet_ssl.commands.compare.run import compare

    table, failures = compare(**_arguments(options) | {"slurm": dict(options.slurm)})
    print(f"\n{table}", end="")
    return int(bool(failures))


def _check_compare(parser: argparse.ArgumentParser, options) -> None:
    """Ends with the usage where settings for Slurm would have no effect."""
    if options.slurm and options.launcher != "slurm":
        parser.error("--slurm is for --launcher slurm")


def _add_report(commands) -> None:
    parser = _command(
        commands, "report", _report, "One page of HTML about a training: curves, doubtful and wrong predictions."
    )
    _add_model(parser)
    parser.add_argument("-tr", dest="trainer_name", required=True, help="trainer of the training")
    text = "folder that nnunet-ssl rank has written: the unlabeled scans, worst first"
    parser.add_argument("--rank", dest="ranking", type=Path, metavar="OUT", help=text)
    text = "predictions of scans with labels (default: those of the validation cases)"
    parser.add_argument("--predictions", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--labels", type=Path, metavar="FOLDER", help="labels of these scans, as labelsTs")
    text = "their images (default: the folder beside the labels, as imagesTs)"
    parser.add_argument("--images", type=Path, metavar="FOLDER", help=text)
    text = "pictures of unlabeled scans, the others are rows of a table (default: 40)"
    parser.add_argument("--pictures", type=int, default=40, metavar="N", help=text)
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda", "mps"], help="for one batch (default: cpu)")
    parser.add_argument("-np", dest="num_processes", type=int, default=3, help="processes (default: 3)")
    text = "the page (default: report.html)"
    parser.add_argument("-o", dest="output", type=Path, default=Path("report.html"), help=text)
    parser.set_defaults(check=_check_report)


def _report(options) -> None:
    from nnunet_ssl.commands.report.run import report

    report(**_arguments(options))
    print(f"Wrote {options.output}. Open it in any browser.")


def _check_report(parser: argparse.ArgumentParser, options) -> None:
    """Ends with the usage where one of two folders is missing, or a number of pictures is none."""
    if (options.predictions is None) != (options.labels is None):
        parser.error("--predictions and --labels belong together")
    if options.images is not None and options.labels is None:
        parser.error("--images is for --predictions and --labels")
    if options.pictures < 0:
        parser.error(f"--pictures {options.pictures} is no number of pictures")


def _add_doctor(commands) -> None:
    parser = _command(
        commands, "doctor", _doctor, "Check the installation and, with -d and -c, a dataset's unlabeled cases."
    )
    parser.add_argument("-d", dest="dataset", help="dataset name or id")
    parser.add_argument("-c", dest="configurations", nargs="+", default=[], help="configurations, as 3d_fullres")
    parser.add_argument("-p", dest="plans_identifier", default="nnUNetPlans", help="plans identifier")
    parser.add_argument("-f", dest="fold", type=_fold, help="fold, a number or all (default: every fold)")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the result as JSON, for programs")


def _doctor(options) -> int:
    from nnunet_ssl.commands.doctor import doctor

    return doctor(**_arguments(options))


def _add_demo(commands) -> None:
    parser = _command(
        commands, "demo", _demo, "Train nnUNetTrainer and nnUNetTrainerM3HL on a small synthetic dataset and compare."
    )
    parser.add_argument("-o", dest="output", type=Path, default=Path("nnunet_ssl_demo"), help="folder for everything")


def _demo(options) -> None:
    from nnunet_ssl.commands.demo import demo

    demo(**_arguments(options))


def _number_or_all(text: str) -> int | str:
    if not (text == "all" or text.isdecimal()):
        raise argparse.ArgumentTypeError(f'"{text}" is neither a number nor all')
    return text if text == "all" else int(text)


def _fold(text: str) -> int | str:
    if not (text == "all" or text.removeprefix("-").isdecimal()):
        raise argparse.ArgumentTypeError(f'Fold "{text}" does not exist: give a number, or all')
    return text if text == "all" else int(text)


def _setting(text: str) -> tuple[str, str | int]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, int(value) if value.isdecimal() else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nnunet-ssl", description="Semi-supervised learning for nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"nnunet-ssl {metadata.version('nnunet-ssl')}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    commands = parser.add_subparsers(dest="command", required=True)
    before = (_add_trainers, _add_convert, _add_split, _add_preprocess, _add_pseudo_label, _add_rank, _add_start_from)
    for add in (*before, _add_export, _add_evaluate, _add_preview, _add_compare, _add_report, _add_doctor, _add_demo):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
