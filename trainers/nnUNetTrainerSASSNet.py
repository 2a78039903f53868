"""SASSNet, shape-aware semi-supervised segmentation: Li et al. 2020 (arXiv:2007.10732).

Differs from the released code on purpose: every foreground class or region has its distances (released: one class), the
discriminator takes patches of any size (released: one size), with channels in proportion to the network's (64 and more,
as released, for the 32 that nnU-Net plans), and learns from the distances of the step's own forward passes (released:
of another pass after the step), a class without a boundary in the patch, whose distances are 0, teaches the second head
nothing (released: that every voxel is on the boundary), nor do ignored voxels, the ramp-up is a part of the training
(released: all of it), and the weights are doubled because nnU-Net's Dice + cross entropy is about twice that code's
supervised loss, which is Dice alone. The adversarial weight is that for 16 labeled scans (for 8: 0.03). The
segmentation head is deployed, as in the released code.
"""

import torch
import torch.nn.functional as F

from nnunet_ssl.blocks.distances import distance_mse
from nnunet_ssl.blocks.heads import Discriminator, DistanceHead
from nnunet_ssl.blocks.networks import frozen, require_stages, unwrap
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants
from nnunet_ssl.training.optimizer import adam


class nnUNetTrainerSASSNet(SemiSupervisedTrainer):
    """SASSNet: a second head predicts signed distances; a discriminator shall not tell unlabeled scans by theirs."""

    distance_weight = 0.6  # of the mean squared error of the labeled scans' signed distances
    adversarial_weight = 0.02  # of the cross entropy of unlabeled scans being taken for labeled, after the ramp-up
    rampup = 0.4  # part of the training after which the adversarial weight is full
    discriminator_rate = 1e-4  # the discriminator's learning rate, constant
    discriminator_betas = (0.9, 0.99)  # of its Adam
    signed_distance = True

    def build_companions(self):
        require_stages(self.network, "The distances of SASSNet")
        classes = self.label_manager.num_segmentation_heads - (not self.label_manager.has_regions)
        distance, patch_size = DistanceHead(self.network, classes), self.configuration_manager.patch_size
        discriminator = Discriminator(classes, self.num_input_channels, patch_size, width=2 * distance.features)
        return {"distance": distance, "discriminator": discriminator}

    def build_optimizers(self):
        discriminator = self.companions.discriminator
        return {"discriminator": adam(discriminator, self.discriminator_rate, self.discriminator_betas)}

    def losses(self, batch):
        discriminator = self.companions.discriminator
        annotated = self.annotated(batch.labels)
        output, distances = self.outputs(batch.image)
        yield {
            "supervised": self.loss(output, batch.target),
            "labeled_distance": self.distance_weight * distance_mse(distances, batch.signed_distance, annotated),
        }
        found = [distances.detach()]
        del output, distances
        _, distances = self.outputs(batch.unlabeled)
        with frozen(discriminator):
            fooled = self.is_labeled(distances, batch.unlabeled, True)
        yield {"adversarial": self.adversarial_weight * self.ramp * fooled}
        found.append(distances.detach())
        del distances, fooled
        images = (batch.image, batch.unlabeled)
        parts = zip(found, images, (True, False), strict=True)
        yield {"discriminator": sum(self.is_labeled(*part) for part in parts) / 2}

    def outputs(self, image):
        """What the decoder gives, and the distances."""
        return self.companions.distance(unwrap(self.network).encoder(image))

    def is_labeled(self, distances, image, labeled):
        """Cross entropy of the discriminator's verdict."""
        verdict = self.companions.discriminator(distances, image)
        return F.cross_entropy(verdict, torch.full((len(image),), int(labeled), device=image.device))


__getattr__ = epoch_variants(globals())
