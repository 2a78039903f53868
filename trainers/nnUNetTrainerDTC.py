"""DTC, dual-task consistency: Luo et al. 2021 (arXiv:2009.04448).

Differs from the released code on purpose: every foreground class or region has its distances (released: one class), the
sigmoid that makes probabilities of them has a steepness of 100 (released: 1500, where nnU-Net's half precision gives
other gradients than single precision; with large patches and small organs it is flat: the first voxel outside an organ
is 0.2 in a patch of 112 and 0.4 in one of 512), a class without a boundary in the patch, whose distances are 0, teaches
the second head nothing (released: that every voxel is on the boundary), nor do ignored voxels, the ramp-up is a part of
the training (released: all of it), and the weights are doubled because nnU-Net's Dice + cross entropy is about twice
that code's supervised loss, which is Dice alone. The segmentation head is deployed, as in the released code.
"""

from nnunet_ssl.blocks.distances import distance_mse
from nnunet_ssl.blocks.heads import DistanceHead
from nnunet_ssl.blocks.networks import finest, require_stages, unwrap
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerDTC(SemiSupervisedTrainer):
    """DTC: a second head predicts signed distances, and agrees with the segmentation, also on unlabeled scans."""

    distance_weight = 0.6  # of the mean squared error of the labeled scans' signed distances
    consistency_weight = 2.0  # of the mean squared difference of both heads' probabilities, after the ramp-up
    rampup = 0.4  # part of the training after which the consistency weight is full
    steepness = 100.0  # of the sigmoid that turns distances, which are in [-1, 1], into probabilities
    signed_distance = True

    def build_companions(self):
        require_stages(self.network, "The distances of DTC")
        labels = self.label_manager
        return {"distance": DistanceHead(self.network, labels.num_segmentation_heads - (not labels.has_regions))}

    def losses(self, batch):
        annotated = self.annotated(batch.labels)
        output, distances = self.outputs(batch.image)
        yield {
            "supervised": self.loss(output, batch.target),
            "labeled_distance": self.distance_weight * distance_mse(distances, batch.signed_distance, annotated),
            "consistency": self.consistency(output, distances) / 2,
        }
        del output, distances
        yield {"consistency": self.consistency(*self.outputs(batch.unlabeled)) / 2}

    def outputs(self, image):
        """What the decoder gives, and the distances."""
        return self.companions.distance(unwrap(self.network).encoder(image))

    def consistency(self, output, distances):
        """Mean squared difference of the heads' probabilities, without the background's; both learn from it."""
        segmented = self.probabilities(finest(output))[:, -distances.shape[1] :]
        difference = (-self.steepness * distances).sigmoid() - segmented
        return self.consistency_weight * self.ramp * difference.square().mean()


__getattr__ = epoch_variants(globals())
