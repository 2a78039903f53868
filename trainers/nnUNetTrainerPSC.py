"""PSC, pair shuffle consistency: He, Cai, Li & Ma, MICCAI 2024. A reconstruction from its abstract; it has no code.

What the abstract says: pairs of images are divided into patches, which are shuffled over both; labeled patches have
their labels, unlabeled ones are held consistent with what is said of the unshuffled image, also in pairs of unlabeled
images. What it does not say, and is our choice: an EMA teacher speaks of the unshuffled image (in a weak view), its
hard labels teach the unlabeled patches of mixed pairs, its probabilities those of unlabeled pairs, grid, weights and
ramp-up.
"""

import torch

from nnunet_ssl.blocks.losses import masked_losses, probability_mse
from nnunet_ssl.blocks.mixing import random_order, shuffle_cells
from nnunet_ssl.blocks.networks import frozen_copy, logits, update_ema
from nnunet_ssl.blocks.schedules import warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerPSC(SemiSupervisedTrainer):
    """PSC (reconstruction): patches of two scans shuffled over both, labeled ones supervised, others consistent."""

    cells = 4  # of the grid per axis, fewer on thin axes
    pseudo_weight = 0.5  # of unlabeled voxels in pairs of a labeled and an unlabeled scan; labeled voxels have 1
    consistency_weight = 0.2  # of the mean squared difference in pairs of unlabeled scans, after the ramp-up
    rampup = 0.4  # part of the training after which the consistency weight is full
    teacher_decay = 0.99  # of the EMA, per step, after the warm-up
    weak_view = True

    def build_companions(self):
        return {"teacher": frozen_copy(self.network)}

    def losses(self, batch):
        with torch.no_grad():
            output = logits(self.companions.teacher, batch.unlabeled_weak)
            pseudo, soft = self.hard_labels(output).to(batch.labels.dtype), self.probabilities(output)
        labeled = torch.ones_like(batch.image[:, :1], dtype=torch.bool)
        pairs = (batch.image, batch.unlabeled), (batch.labels, pseudo), (labeled, ~labeled)
        for image, target, mask in zip(*self.shuffled(*pairs), strict=True):
            labeled_term, pseudo_term = masked_losses(self.loss, self.network(image), target, (mask, ~mask))
            yield {"labeled": labeled_term / 2, "pseudo": self.pseudo_weight * pseudo_term / 2}
        half = (len(soft) + 1) // 2  # of an odd batch the middle sample is in two pairs
        pairs = [(x[:half], x[-half:]) for x in (batch.unlabeled, soft)]
        image, target = (torch.cat(both) for both in self.shuffled(*pairs))
        difference = probability_mse(self.probabilities(logits(self.network, image)), target)
        yield {"consistency": self.consistency_weight * self.ramp * difference}

    def shuffled(self, *pairs):
        """Pairs of images and what belongs to them, all shuffled by one order."""
        image = pairs[0][0]
        order = random_order(len(image), image.shape[2:], cells=self.cells, device=image.device)
        return [shuffle_cells(*pair, order, cells=self.cells) for pair in pairs]

    def after_step(self):
        update_ema(self.companions.teacher, self.network, warmup_decay(self.step, self.teacher_decay))


__getattr__ = epoch_variants(globals())
