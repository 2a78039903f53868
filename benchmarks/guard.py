"""Fails when a ratio of the last benchmarks is more than 10 % worse than in baseline.json.

    python benchmarks/step_time.py && python benchmarks/step_time.py -tr nnUNetTrainerM3HL --supervised
    python benchmarks/loader.py && python benchmarks/loader.py --on-device && python benchmarks/guard.py
    python benchmarks/guard.py --update                                 # the last benchmarks become the baseline

All ratios are against nnUNetTrainer on the same machine at the same time, so that they hold on other machines too. One
that is not measured anew is compared as it was.
"""

import argparse
import json
import shutil
from pathlib import Path

HERE = Path(__file__).parent
BASELINE, RATIOS = HERE / "baseline.json", HERE / "results" / "ratios.json"
TOLERANCE = 1.10


def worse(baseline: dict[str, dict[str, float]], ratios: dict[str, dict[str, float]]) -> list[str]:
    """A line for every ratio of the baseline that is missing now, or larger by more than the tolerance."""
    lines = []
    for configuration, known in baseline.items():
        for name, before in known.items():
            now = ratios.get(configuration, {}).get(name)
            if now is None or now > TOLERANCE * before:
                lines.append(f"{configuration}, {name}: {'missing' if now is None else f'{now:.2f}'}, was {before:.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="make the last benchmarks the baseline")
    if parser.parse_args().update:
        shutil.copyfile(RATIOS, BASELINE)
        return
    lines = worse(json.loads(BASELINE.read_text()), json.loads(RATIOS.read_text()))
    if lines:
        raise SystemExit("Worse than benchmarks/baseline.json by more than 10 %:\n  " + "\n  ".join(lines))
    print("No ratio is more than 10 % worse than in benchmarks/baseline.json.")


if __name__ == "__main__":
    main()
