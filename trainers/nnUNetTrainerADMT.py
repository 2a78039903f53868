"""AD-MT, alternate diverse mean teachers: Zhao et al. 2024 (arXiv:2311.17325).

Differs from the released code on purpose: the student's own prediction, which overrides the teachers' in conflicts, is
mixed with the image (released: it is that of the unmixed one), every voxel counts by default, because nnU-Net's
probabilities are close to 0 and 1 (released: those above 0.8 or 0.95), pseudo labels have nnU-Net's cross entropy and
Dice (released: the one on LA, the other on ACDC), the box has one size and lies inside of the patch, both teachers are
in eval mode, the strong view is nnU-Net's intensity augmentation, the teachers' warm-up is that of Mean Teacher
(released: copies until the ramp-up has ended; teacher_2 copies the student never quite), and the ramp-up is a part of
the training. The weight stands as released before pseudo labels' cross entropy plus Dice, which is twice their mean, as
nnU-Net's labeled loss is of the released one: their ratio is the released one. With a batch of one there is no other
patch for the box. The student is deployed, as in the released code.
"""

from math import log2

import torch

from nnunet_ssl.blocks.losses import masked_loss
from nnunet_ssl.blocks.mixing import box_mask, mix
from nnunet_ssl.blocks.networks import frozen_copy, logits, update_ema
from nnunet_ssl.blocks.pseudo_labels import confidence, hard_labels, uncertainty
from nnunet_ssl.blocks.schedules import turn, warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerADMT(SemiSupervisedTrainer):
    """AD-MT: two EMA teachers that are updated in turns label together; the student overrides where they disagree."""

    unlabeled_weight = 2.0  # of the loss with pseudo labels, after the ramp-up
    rampup = 0.4  # part of the training after which the unlabeled weight is full
    longest_turn = 19  # steps; the length of a turn is drawn from 1 to this
    threshold = 0.0  # probability of a pseudo label from which it counts
    box_side = 0.7  # edge of the box as a part of the patch's, in the turns of teacher_2
    teacher_decay = 0.99  # of the EMA, per update, after the warm-up
    weak_view = True

    def build_companions(self):
        return {"teacher": frozen_copy(self.network), "teacher_2": frozen_copy(self.network)}

    def losses(self, batch):
        yield {"supervised": self.loss(self.network(batch.image), batch.target)}
        image, pseudo, counts = self.teach(batch)
        loss = masked_loss(self.loss, self.network(image), pseudo, counts)
        yield {"pseudo": self.unlabeled_weight * self.ramp * loss}

    def teach(self, batch):
        """The image for the student, its pseudo labels, and the voxels that count."""
        regions = {"regions": self.label_manager.has_regions}
        with torch.no_grad():
            weak = batch.unlabeled_weak
            teachers = [logits(teacher, weak) for teacher in (self.companions.teacher, self.companions.teacher_2)]
            own = self.probabilities(logits(self.network, weak))
            torch.clear_autocast_cache()  # older versions of torch would go on with weights cast without gradient
            first, second = (self.probabilities(output) for output in teachers)
            share = (self.bits(second) - self.bits(first)).sigmoid()  # exp(-h1) / (exp(-h1) + exp(-h2))
            both = share * first + (1 - share) * second
            conflict = hard_labels(first - 0.5, **regions) != hard_labels(second - 0.5, **regions)
            conflict = conflict.any(1, keepdim=True)
            image = batch.unlabeled
            if self.turn():
                mask = box_mask(len(weak), weak.shape[2:], side=self.box_side, device=weak.device)
                image, both, own, conflict = (mix(x, x.roll(1, 0), mask) for x in (weak, both, own, conflict))
            override = conflict & (confidence(own, **regions) > confidence(both, **regions))
            prediction = torch.where(override, own, both)
            return image, self.hard_labels(prediction - 0.5), confidence(prediction, **regions) >= self.threshold

    def turn(self):
        """The number of the teacher that this step updates: 0 or 1."""
        return turn(self.step, self.longest_turn)

    def bits(self, probabilities):
        """Entropy of every voxel in bits."""
        regions, channels = self.label_manager.has_regions, probabilities.shape[1]
        return uncertainty(probabilities, regions=regions) * (channels if regions else log2(channels))

    def after_step(self):
        teacher = self.companions.teacher_2 if self.turn() else self.companions.teacher
        update_ema(teacher, self.network, warmup_decay(self.step // 2, self.teacher_decay))


__getattr__ = epoch_variants(globals())
