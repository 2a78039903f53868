"""CutMix in a Mean Teacher: French et al. 2020 (arXiv:1906.01916).

Differs from the paper on purpose: the box has half of the voxels, as there, but the patch's shape, not a random one; it
mixes nnU-Net's strong views, where the paper has plain images; every voxel counts, not only where the teacher is sure:
nnU-Net's probabilities nearly always are. The squared difference is a mean over the classes, there a sum.
"""

import torch

from nnunet_ssl.blocks.losses import probability_mse
from nnunet_ssl.blocks.mixing import box_mask, mix
from nnunet_ssl.blocks.networks import frozen_copy, logits, update_ema
from nnunet_ssl.blocks.schedules import warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerCutMixMT(SemiSupervisedTrainer):
    """CutMix-MT: on unlabeled patches mixed by a box, the student agrees with what an EMA teacher says of each."""

    consistency_weight = 1.0  # of the mean squared difference of probabilities, after the ramp-up
    rampup = 0.4  # part of the training after which the consistency weight is full
    box_volume = 0.5  # part of the voxels that are in the box
    teacher_decay = 0.99  # of the EMA, per step, after the warm-up
    weak_view = True

    def build_companions(self):
        return {"teacher": frozen_copy(self.network)}

    def losses(self, batch):
        yield {"supervised": self.loss(self.network(batch.image), batch.target)}
        with torch.no_grad():
            target = self.probabilities(logits(self.companions.teacher, batch.unlabeled_weak))
        patch = target.shape[2:]
        mask = box_mask(len(target), patch, side=self.box_volume ** (1 / len(patch)), device=target.device)
        image, target = (mix(x, x.roll(1, 0), mask) for x in (batch.unlabeled, target))
        prediction = self.probabilities(logits(self.network, image))
        yield {"consistency": self.consistency_weight * self.ramp * probability_mse(prediction, target)}

    def after_step(self):
        update_ema(self.companions.teacher, self.network, warmup_decay(self.step, self.teacher_decay))


__getattr__ = epoch_variants(globals())
