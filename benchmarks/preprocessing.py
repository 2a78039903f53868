"""Time per case of `nnunet-ssl preprocess` against nnU-Net's own preprocessing of the same scans.

    python benchmarks/preprocessing.py -d 501 -c 3d_fullres -n 60

nnU-Net is given the scans without labels as well (its preprocessor's run_case_save, one after the other), so that both
do the same work; ours also reads every scan once more, to check it, and compares it with the scans of imagesTr that are
left. One process each, in turns of 30 scans, in which either goes first every second time. Afterwards the command is
killed several times and must end with the same voxels.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import blosc2
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.commands.preprocess import preprocess_unlabeled
from nnunet_ssl.data.preprocessed import unlabeled_folder

TURN = 30  # scans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", default="501")
    parser.add_argument("-c", dest="configuration", default="3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans")
    parser.add_argument("-n", dest="number", type=int, default=60)
    args = parser.parse_args()

    name = maybe_convert_to_dataset_name(int(args.dataset))
    base = Path(nnUNet_preprocessed) / name
    plans = PlansManager(str(base / f"{args.plans}.json"))
    configuration = plans.get_configuration(args.configuration)
    dataset_json = json.loads((base / "dataset.json").read_text())
    everything = sorted((Path(nnUNet_raw) / name / "imagesTr").iterdir())
    files = everything[: args.number]
    seconds = {"nnU-Net": 0.0, "nnunet-ssl": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        # the dataset's own folder of unlabeled cases is left alone
        os.environ["nnUNet_preprocessed"] = str(scratch / "preprocessed")
        # the labeled scans are the others, and the scans are compared with them
        os.environ["nnUNet_raw"] = str(scratch / "raw")
        (scratch / "raw" / name).mkdir(parents=True)
        link(everything[args.number :], scratch / "raw" / name / "imagesTr")
        target = scratch / "preprocessed" / name
        target.mkdir(parents=True)
        for file in (f"{args.plans}.json", "dataset.json"):
            shutil.copy2(base / file, target)
        preprocessor = configuration.preprocessor_class(verbose=False)

        def nnunet(part: list[Path], images: Path) -> None:
            for file in part:
                output = str(scratch / file.name.split(".")[0])
                preprocessor.run_case_save(output, [str(file)], None, plans, configuration, dataset_json)

        def ours(part: list[Path], images: Path) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                preprocess_unlabeled(args.dataset, [args.configuration], args.plans, images, num_processes=1)

        for begin in range(0, len(files), TURN):
            part = files[begin : begin + TURN]
            images = link(part, scratch / f"images_{begin}")
            both = [("nnU-Net", nnunet), ("nnunet-ssl", ours)]
            for who, run in both if begin // TURN % 2 else reversed(both):
                start = time.perf_counter()
                run(part, images)
                seconds[who] += time.perf_counter() - start
        for who, value in seconds.items():
            print(f"{who}: {value / len(files):.2f} s per case, {len(files)} cases")
        print(f"ratio {seconds['nnunet-ssl'] / seconds['nnU-Net']:.3f}")

        made, images = unlabeled_folder(target, configuration.data_identifier), link(files, scratch / "images")
        shutil.rmtree(made)
        ours(files, images)
        expected = checksums(made)
        assert len([name for name in expected if name.endswith(".pkl")]) == len(files)
        shutil.rmtree(made)
        kills = run_and_kill(args, images, seconds["nnunet-ssl"] / 4, made)
        ended = checksums(made)
        different = [name for name in expected.keys() | ended.keys() if expected.get(name) != ended.get(name)]
        assert not different, f"different after the kills {kills}: {sorted(different)}"
        print(f"killed with {', '.join(map(str, kills))} of {len(files)} cases finished: the same in the end")


def link(files: list[Path], folder: Path) -> Path:
    folder.mkdir()
    for file in files:
        os.symlink(file, folder / f"unlabeled_{file.name}")
    return folder


def run_and_kill(args, images: Path, seconds: float, made: Path) -> list[int]:
    """Starts the command again and again and kills it after so many seconds of work, until it ends by itself.

    Returns:
        How many cases were finished at every kill.
    """
    command = ["nnunet-ssl", "preprocess", "-d", args.dataset, "-c", args.configuration, "-p", args.plans]
    command += ["-i", str(images), "-np", "1"]
    finished = []
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list(made.glob("*.pkl")))
        while process.poll() is None and len(list(made.glob("*.pkl"))) == before:
            time.sleep(0.01)  # until it has started
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            finished.append(len(list(made.glob("*.pkl"))))
            continue
        assert process.returncode == 0
        return finished


def checksums(folder: Path) -> dict[str, str]:
    """Of what the files hold: blosc2's threads write the blocks of an array in any order."""
    contents = {
        file.name: blosc2.open(str(file))[:].tobytes() if file.suffix == ".b2nd" else file.read_bytes()
        for file in sorted(folder.iterdir())
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


if __name__ == "__main__":
    main()
