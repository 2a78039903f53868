"""BCP, bidirectional copy-paste: Bai et al. 2023 (arXiv:2305.00673).

Differs from the released code on purpose: a mask per sample (released: one per batch), the first phase is a part of the
same training and hands over its last weights (released: the best on the test scans), the teacher is a moving average
from the first step on and in eval mode, it sees a weak view (spatial augmentation only), the cross entropy is the mean
over the labeled (pseudo-labeled) voxels of both mixes together (released: the mean of their means), and its labels are
not reduced to their largest component by default, because that is wrong for classes with several parts and makes a GPU
wait. The student is deployed, as in the released code.
"""

import torch

from nnunet_ssl.blocks.losses import masked_loss, masked_losses
from nnunet_ssl.blocks.mixing import box_mask, mix, mix_halves
from nnunet_ssl.blocks.networks import frozen_copy, logits, update_ema
from nnunet_ssl.blocks.pseudo_labels import keep_largest_component
from nnunet_ssl.blocks.schedules import warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerBCP(SemiSupervisedTrainer):
    """BCP: a box of a labeled scan in an unlabeled one and the other way round, labels of an EMA teacher."""

    pretraining = 0.12  # first part of the training: copy-paste between labeled scans (2,000 of 17,000 steps)
    box_side = 2 / 3  # edge of the box as a part of the patch's
    pseudo_weight = 0.5  # alpha: weight of pseudo-labeled voxels; labeled voxels have 1
    largest_component = False  # clean pseudo labels: keep the largest component per class
    teacher_decay = 0.99  # of the EMA, per step, after the warm-up
    weak_view = True

    def build_companions(self):
        return {"teacher": frozen_copy(self.network)}

    def streams(self):
        return True, not self.is_pretraining()

    def is_pretraining(self):
        return self.step < self.pretraining * self.max_steps

    def losses(self, batch):
        size, patch, device = len(batch.image), batch.image.shape[2:], batch.image.device
        # nnU-Net puts the patches with foreground last: the halves take turns, and so do samples that are in both
        batch = batch.rolled(self.step * ((size + 1) // 2))
        if self.is_pretraining():
            mask = box_mask(size, patch, side=self.box_side, device=device)
            # every sample is the background of one mix and the box of another
            image = mix(batch.image, batch.image.roll(size // 2, 0), mask)
            target = mix(batch.labels, batch.labels.roll(size // 2, 0), mask)
            everything = torch.ones_like(mask)
            yield {"labeled": masked_loss(self.loss, self.network(image), target, everything)}
            return
        with torch.no_grad():
            pseudo = self.hard_labels(logits(self.companions.teacher, batch.unlabeled_weak))
        if self.largest_component:
            pseudo = keep_largest_component(pseudo)
        mask = box_mask((size + 1) // 2, patch, side=self.box_side, device=device)
        mask = torch.cat([mask, ~mask])  # half b is labeled in the box, half a around it
        image, target = mix_halves(batch.image, batch.labels, batch.unlabeled, pseudo, mask)
        labeled, unlabeled = masked_losses(self.loss, self.network(image), target, (mask, ~mask))
        yield {"labeled": labeled, "pseudo": self.pseudo_weight * unlabeled}

    def after_step(self):
        update_ema(self.companions.teacher, self.network, warmup_decay(self.step, self.teacher_decay))


__getattr__ = epoch_variants(globals())
