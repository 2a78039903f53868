"""FixMatch with CutMix: Sohn et al. 2020 (arXiv:2001.07685), for segmentation as in UniMatch (Yang et al. 2023).

The plain method that others have to beat: hard labels of the student's own weak view, without a teacher. Differs from
the papers on purpose: the first half of the training is stock nnU-Net on the labeled scans; every pseudo label counts,
without a threshold on its confidence; the loss is nnU-Net's, cross entropy and Dice; the strong view is nnU-Net's
intensity augmentation, and a box of it is another unlabeled patch (CutMix) in every sample of a batch of two or more.
"""

import torch

from nnunet_ssl.blocks.losses import masked_loss
from nnunet_ssl.blocks.mixing import box_mask, mix
from nnunet_ssl.blocks.networks import logits
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerFixMatch(SemiSupervisedTrainer):
    """FixMatch: the student's labels of weak views teach it strong views, in which boxes are swapped (CutMix)."""

    supervised_part = 0.5  # first part of the training: stock nnU-Net on the labeled scans; the rest is of what follows
    unlabeled_weight = 1.0  # of the loss with pseudo labels, from the first step of the second part
    box_side = 0.5  # edge of the box as a part of the patch's
    weak_view = True

    def losses(self, batch):
        yield {"supervised": self.loss(self.network(batch.image), batch.target)}
        with torch.no_grad():
            pseudo = self.hard_labels(logits(self.network, batch.unlabeled_weak))
        torch.clear_autocast_cache()  # older versions of torch would go on with weights that were cast without gradient
        mask = box_mask(len(pseudo), pseudo.shape[2:], side=self.box_side, device=pseudo.device)
        image = mix(batch.unlabeled, batch.unlabeled.roll(1, 0), mask)
        target = mix(pseudo, pseudo.roll(1, 0), mask)
        everywhere = torch.ones_like(mask)
        yield {"pseudo": self.unlabeled_weight * masked_loss(self.loss, self.network(image), target, everywhere)}


__getattr__ = epoch_variants(globals())
