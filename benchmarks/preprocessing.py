"""Time per case of `nnunet-ssl preprocess` against nnU-Net's own preprocessing of the same scans.

    python benchmarks/preprocessing.py -d 501 -c 3d_fullres -n 60

nnU-Net is given the scans without labels as well (its preprocessor's run_case_save, one after the other), so that both
do the same work; ours also reads every scan once more, to check it. One process each, in turns of ten scans.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.preprocessing import preprocess_unlabeled, unlabeled_folder

TURN = 10  # scans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", default="501")
    parser.add_argument("-c", dest="configuration", default="3d_fullres")
    parser.add_argument("-n", dest="number", type=int, default=60)
    args = parser.parse_args()

    name = maybe_convert_to_dataset_name(int(args.dataset))
    base = Path(nnUNet_preprocessed) / name
    plans = PlansManager(str(base / "nnUNetPlans.json"))
    configuration = plans.get_configuration(args.configuration)
    dataset_json = json.loads((base / "dataset.json").read_text())
    files = sorted((Path(nnUNet_raw) / name / "imagesTr").iterdir())[: args.number]
    seconds = {"nnU-Net": 0.0, "nnunet-ssl": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        # the dataset's own folder of unlabeled cases is left alone
        os.environ["nnUNet_preprocessed"] = str(scratch / "preprocessed")
        target = scratch / "preprocessed" / name
        target.mkdir(parents=True)
        for file in ("nnUNetPlans.json", "dataset.json"):
            shutil.copy2(base / file, target)
        for begin in range(0, len(files), TURN):
            part = files[begin : begin + TURN]
            images = scratch / f"images_{begin}"
            images.mkdir()
            for file in part:
                os.symlink(file, images / f"unlabeled_{file.name}")
            start = time.perf_counter()
            preprocessor = configuration.preprocessor_class(verbose=False)
            for file in part:
                output = str(scratch / file.name.split(".")[0])
                preprocessor.run_case_save(output, [str(file)], None, plans, configuration, dataset_json)
            seconds["nnU-Net"] += time.perf_counter() - start
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                preprocess_unlabeled(args.dataset, [args.configuration], images=images, num_processes=1)
            seconds["nnunet-ssl"] += time.perf_counter() - start
        made = len(list(unlabeled_folder(target, configuration.data_identifier).glob("*.pkl")))
        assert made == len(files)
    for who, value in seconds.items():
        print(f"{who}: {value / len(files):.2f} s per case, {len(files)} cases")
    print(f"ratio {seconds['nnunet-ssl'] / seconds['nnU-Net']:.3f}")


if __name__ == "__main__":
    main()
