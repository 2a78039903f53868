"""What a training survives: 50 SIGKILLs at random and at chosen moments, and other faults; writes a table.

    python benchmarks/faults.py [--kills 50] [--seed 0] [-o benchmarks/results/faults.md]

After each fault: every checkpoint can be read, the one of the last epoch is there, no process is left, `--c` goes on to
the end, every epoch is in losses.csv once, no temporary file is left, and the output names the cause. On a tiny dataset
(patch 16^3, 4 epochs of 3 steps, a checkpoint per epoch) on one CPU core; exit code 1 where anything is not so.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

root = tempfile.TemporaryDirectory(prefix="faults_")
for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ[name] = str(Path(root.name, name))
    Path(root.name, name).mkdir()
os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "0", "MPLBACKEND": "agg"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import make_tiny_dataset  # noqa: E402
from faults import finish, kills, other_faults, run, start  # noqa: E402
from tqdm import tqdm  # noqa: E402

from nnunet_ssl.autoregister import register  # noqa: E402
from nnunet_ssl.system.files import replacing  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("-o", dest="output", type=Path, default=Path(__file__).parent / "results" / "faults.md")
    args = parser.parse_args()
    register()
    dataset = make_tiny_dataset(701, "Tiny")

    began = time.monotonic()
    process = start(dataset, Path(root.name, "whole"), workers=0)
    if finish(process) != 0:
        sys.exit(process.log.read_text())
    seconds = time.monotonic() - began
    rows = []
    for fault in tqdm([*kills(args.kills, seconds, args.seed), *other_faults()], unit="fault"):
        where, problems = run(fault, dataset, Path(root.name, "scratch"))
        rows.append(f"| {fault.name} | {where} | {'; '.join(problems).replace(chr(10), ' ') or 'ok'} |")
        tqdm.write(rows[-1])
    bad = sum(not row.endswith("| ok |") for row in rows)
    text = (
        f"# Faults of a training, and what was left\n\nWritten by `python benchmarks/faults.py --kills {args.kills} "
        f'--seed {args.seed}`, which says what "ok" means. {len(rows)} faults, {bad} with a bad outcome. One training '
        f"without a fault took {seconds:.1f} s; Python {platform.python_version()} on {platform.system()}.\n\n"
        "| fault | where the training was | outcome |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    args.output.parent.mkdir(exist_ok=True)
    with replacing(args.output) as temporary:
        temporary.write_text(text)
    print(f"{bad} of {len(rows)} faults had a bad outcome: {args.output}")
    return int(bad > 0)


if __name__ == "__main__":
    try:
        code = main()
    finally:
        root.cleanup()
    sys.exit(code)
