"""OMF, overlay mantle-free: Liu, Qian, Cao & Liu, MICCAI 2024; the recipe of its released code for the left atrium.

Differs from that code on purpose: the teacher is the moving average of the first phase's student and in eval mode
(released: its last weights, in training mode), the partner of a patch is another patch of the batch (released: of two),
labeled scans have nnU-Net's Dice and cross entropy, the teacher sees a weak view, the pasted foreground is not reduced
to its largest component, and the learning rate decays over both phases (released: it begins again). With a batch of one
there is nothing to paste from. As there, the second phase has no labeled scan: the student learns from what the frozen
teacher says of the patch without the paste. The student is deployed.
"""

import torch

from nnunet_ssl.blocks.losses import masked_loss, probability_mse
from nnunet_ssl.blocks.mixing import mix
from nnunet_ssl.blocks.networks import frozen_copy, logits, update_ema
from nnunet_ssl.blocks.schedules import warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerOMF(SemiSupervisedTrainer):
    """OMF: a teacher learns from pasted foreground and is frozen; a student learns to see through pasted foreground."""

    pretraining = 0.5  # first part of the training: labeled scans, and the foreground of one pasted into another
    pasted_weight = 0.5  # of the loss on pasted patches in the first phase; plain ones have 1
    consistency_weight = 1.7  # of the mean squared difference to the frozen teacher in the second phase
    teacher_decay = 0.99  # of the EMA in the first phase, per step, after the warm-up
    weak_view = True

    def build_companions(self):
        return {"teacher_frozen": frozen_copy(self.network)}  # after the first phase

    def streams(self):
        return self.is_pretraining(), not self.is_pretraining()

    def is_pretraining(self):
        return self.step < self.pretraining * self.max_steps

    def losses(self, batch):
        if self.is_pretraining():
            yield {"supervised": self.loss(self.network(batch.image), batch.target)}
            keep = ~self.foreground(batch.labels).any(1, keepdim=True).roll(1, 0)
            image, target = (mix(x, x.roll(1, 0), keep) for x in (batch.image, batch.labels))
            loss = masked_loss(self.loss, self.network(image), target, torch.ones_like(keep))
            yield {"labeled": self.pasted_weight * loss}
            return
        with torch.no_grad():
            output = logits(self.companions.teacher_frozen, batch.unlabeled_weak)
            target, found = self.probabilities(output), self.foreground(self.hard_labels(output))
            keep = ~found.any(1, keepdim=True).roll(1, 0)
        image = mix(batch.unlabeled, batch.unlabeled.roll(1, 0), keep)
        prediction = self.probabilities(logits(self.network, image))
        yield {"consistency": self.consistency_weight * probability_mse(prediction, target)}

    def after_step(self):
        if self.is_pretraining():
            update_ema(self.companions.teacher_frozen, self.network, warmup_decay(self.step, self.teacher_decay))


__getattr__ = epoch_variants(globals())
