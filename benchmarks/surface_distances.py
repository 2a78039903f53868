"""Time and memory of our metrics against medpy's on a volume of the left atrium's full size, 640 x 640 x 88 voxels.

    pip install medpy && python benchmarks/surface_distances.py

Ours gives Dice, Jaccard and three distances in mm and in voxels; medpy is asked for the three distances in mm. medpy is
GPL and no part of this package.
"""

import time
from pathlib import Path

import numpy as np
from medpy.metric.binary import asd, assd, hd95

from nnunet_ssl.commands.evaluate import case_metrics

SHAPE, SPACING = (88, 640, 640), (0.625, 0.625, 0.625)


def ellipsoid(center: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    axes = np.ogrid[tuple(slice(size) for size in SHAPE)]
    return sum(((x - c) / r) ** 2 for x, c, r in zip(axes, center, radii, strict=True)) < 1


def resident_mib(which: str) -> float:
    """VmRSS: memory of this process now; VmHWM: the most since the start or the last `reset_peak`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status[which].split()[0]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux


def main() -> None:
    prediction = ellipsoid((42, 318, 322), (30, 70, 62))
    reference = ellipsoid((44, 322, 320), (31, 66, 64))
    before = resident_mib("VmRSS")
    reset_peak()
    begin = time.perf_counter()
    metrics = case_metrics(prediction, reference, SPACING)
    ours = time.perf_counter() - begin
    memory = resident_mib("VmHWM") - before
    reset_peak()
    begin = time.perf_counter()
    theirs_values = [f(prediction, reference, SPACING) for f in (hd95, asd, assd)]
    theirs = time.perf_counter() - begin
    theirs_memory = resident_mib("VmHWM") - before
    np.testing.assert_allclose([metrics[name] for name in ("HD95_mm", "ASD_mm", "ASSD_mm")], theirs_values, atol=1e-9)
    text = (
        f"{' x '.join(map(str, SHAPE[::-1]))} voxels, two masks of {prediction.mean():.1%} of them, CPU, one process; "
        f"the distances are equal to 1e-9.\n\n"
        f"| | time | peak memory above the two masks |\n|---|---|---|\n"
        f"| nnunet-ssl, all metrics | {ours:.2f} s | {memory:.0f} MiB |\n"
        f"| medpy, three distances | {theirs:.2f} s ({theirs / ours:.0f} times) | {theirs_memory:.0f} MiB |\n"
    )
    print(text)
    (Path(__file__).parent / "results" / "surface_distances.md").write_text(text)


if __name__ == "__main__":
    main()
