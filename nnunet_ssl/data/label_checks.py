"""Whether a label file fits its scan: readable, in the same geometry, with the labels of the dataset only."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_ssl.data.plausibility import Expected
from nnunet_ssl.data.scan_checks import geometry, geometry_errors
from nnunet_ssl.data.scans import unpacked
from nnunet_ssl.system.wording import one_line


def label_problems(case: str, label: Path, files: Sequence[Path], expected: Expected) -> list[str]:
    """Lines with what is wrong with the label file of a scan whose images are sound; none where nothing is.

    Args:
        case: name of the scan.
        label: its label file, which may be missing.
        files: of its images.
        expected: of the dataset; with labels, the ignore label among them.
    """
    if not label.is_file():
        return [f"{case}: {label} is missing. Save the label there, with the geometry of the image."]
    try:
        with unpacked(label, expected.ending) as path:
            labels, properties = expected.reader().read_seg(str(path))
    except Exception as error:  # a damaged file makes readers raise anything
        reason = one_line(error)
        return [f"{case}: {label} cannot be read ({reason})"]
    with unpacked(files[0], expected.ending) as path:
        image, of_image = expected.reader().read_images([str(path)])
    geometries = {files[0].name: geometry(image, of_image), label.name: geometry(labels, properties)}
    # viewers write origin and direction with fewer digits
    problems = [f"{case}: {line}" for line in geometry_errors(geometries, rtol=1e-4, atol=1e-3)]
    strange = sorted(set(np.unique(labels).tolist()) - expected.labels)
    if strange:
        values, known = (", ".join(f"{value:g}" for value in sorted(each)[:5]) for each in (strange, expected.labels))
        problems.append(f"{case}: {label.name} has the values {values}, which are no labels of dataset.json ({known})")
    return problems
