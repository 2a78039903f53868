"""Mean Teacher: Tarvainen & Valpola 2017 (arXiv:1703.01780), as the SSL4MIS benchmark adapts it to segmentation.

Differs from that code on purpose: the teacher sees a weak view (spatial augmentation only) plus noise and is in eval
mode, the ramp-up ends within the training (there it is as long, 30,000 steps) and begins with the first step (there the
consistency has no weight in the first 1,000), and the weight is doubled because nnU-Net's Dice + cross entropy is twice
that code's supervised loss.
"""

import torch

from nnunet_ssl.blocks.losses import probability_mse
from nnunet_ssl.blocks.networks import frozen_copy, logits, update_ema
from nnunet_ssl.blocks.perturbations import add_noise
from nnunet_ssl.blocks.schedules import warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerMeanTeacher(SemiSupervisedTrainer):
    """Mean Teacher: on unlabeled scans the student agrees with the moving average of its weights."""

    consistency_weight = 0.2  # of the mean squared difference of probabilities, after the ramp-up
    rampup = 0.4  # part of the training after which the consistency weight is full
    noise = 0.1  # standard deviation of the teacher's input noise, in units of the normalized image
    teacher_decay = 0.99  # of the EMA, per step, after the warm-up
    weak_view = True

    def build_companions(self):
        return {"teacher": frozen_copy(self.network)}

    def losses(self, batch):
        yield {"supervised": self.loss(self.network(batch.image), batch.target)}
        with torch.no_grad():
            noisy = add_noise(batch.unlabeled_weak, self.noise)
            target = self.probabilities(logits(self.companions.teacher, noisy))
        weight = self.consistency_weight * self.ramp
        prediction = self.probabilities(logits(self.network, batch.unlabeled))
        yield {"consistency": weight * probability_mse(prediction, target)}

    def after_step(self):
        update_ema(self.companions.teacher, self.network, warmup_decay(self.step, self.teacher_decay))


__getattr__ = epoch_variants(globals())
