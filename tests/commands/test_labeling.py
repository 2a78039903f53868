"""What several models make of a scan: the mean of their probabilities, and how far they disagree."""

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_ssl.commands.labeling import changed_part, disagreeing, mean_logits

CLASSES = LabelManager({"background": 0, "a": 1, "b": 2}, None)
REGIONS = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])


@pytest.mark.parametrize("manager", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_the_probabilities_are_the_mean_of_the_models(manager):
    generator = torch.Generator().manual_seed(0)
    logits = [4 * torch.randn(manager.num_segmentation_heads, 5, 6, generator=generator) for _ in range(3)]

    def probabilities(values):
        return values.sigmoid() if manager is REGIONS else values.softmax(0)

    mean = torch.from_numpy(mean_logits([values.numpy() for values in logits], manager))
    expected = sum(probabilities(values) for values in logits) / 3
    torch.testing.assert_close(probabilities(mean), expected, atol=1e-5, rtol=1e-4)
    # not the mean of the logits, which one sure model decides
    assert not torch.allclose(probabilities(sum(logits) / 3), expected, atol=0.05)


@pytest.mark.parametrize("manager", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_half_precision_and_sure_models_give_finite_logits(manager):
    sure = np.full((manager.num_segmentation_heads, 2, 2), -200, dtype=np.float16)
    sure[0] = 200
    mean = mean_logits([sure, sure], manager)
    assert mean.dtype == np.float32
    assert np.isfinite(mean).all()
    assert (mean.argmax(0) == 0).all()


def test_the_disagreement_is_the_mean_part_of_the_foreground_that_changes():
    maps = [np.array(row) for row in ([0, 1, 1, 2], [0, 1, 2, 2], [1, 1, 2, 2])]
    assert changed_part(maps[:2]) == pytest.approx(1 / 3)  # one voxel of three
    assert changed_part(maps) == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert changed_part([maps[0], maps[0]]) == 0
    assert changed_part([np.zeros(4), maps[0]]) == 1
    assert changed_part([np.zeros(4), np.zeros(4)]) == 0
    assert disagreeing(maps).tolist() == [True, False, True, False]
