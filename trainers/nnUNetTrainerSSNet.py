"""SS-Net, smoothness and class separation: Wu et al. 2022 (arXiv:2203.01324).

Differs from the released code on purpose: the memory keeps the vectors that its selectors rate best (released: the
worst, by an ascending sort), the mean of the separation is over the foreground classes (released: the background counts
in the divisor, not in the sum), at most 4,096 random voxels of a class are compared (released: all), the projector and
its like have layer normalisation (released: batch normalisation, which several GPUs would have to share), radius and
probe are root mean squares, those of the released code on patches of 112 x 112 x 80 (released: L2 norms of 10, so that
larger patches are changed less), the direction is found in float32, the distance is a Dice with squares on all patches,
as in the released 2D code (its 3D code has one that certainty makes smaller), labeled scans have nnU-Net's Dice and
cross entropy with deep supervision, the ramp-up is a part of the training, and the weight is doubled because nnU-Net's
Dice + cross entropy is about twice that code's Dice alone. Weight and radius are those for the left atrium: for ACDC
the same rules give 0.2 and 0.0234. Where there is batch normalisation it sees the changed patches too, and where it or
dropout is, the direction is that of the network in eval mode. Features are those in front of the last head; regions
have memories as classes have.
"""

import torch

from nnunet_ssl.blocks.heads import FeatureDecoder
from nnunet_ssl.blocks.losses import soft_dice_distance
from nnunet_ssl.blocks.networks import finest, frozen, logits, require_stages, unwrap
from nnunet_ssl.blocks.perturbations import adversarial_direction, in_float32
from nnunet_ssl.blocks.prototypes import (
    ClassMemory,
    PrototypeHeads,
    at_voxels,
    class_separation,
    random_voxels,
    scores,
)
from nnunet_ssl.blocks.pseudo_labels import hard_labels
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerSSNet(SemiSupervisedTrainer):
    """SS-Net: predictions withstand adversarial noise, and features of a class are drawn to a memory of good ones."""

    unlabeled_weight = 2.0  # of smoothness and separation, after the ramp-up
    separation_weight = 0.1  # of the separation, where smoothness has 1; once for labeled and once for unlabeled scans
    rampup = 0.4  # part of the training after which the unlabeled weight is full
    radius = 0.01  # root mean square of the adversarial noise, in units of the normalized image
    probe = 0.01  # the same of the noise from which its direction is found
    voxels = 4096  # of a class that are compared with its memory, in a batch, at most
    memory_size = 32  # feature vectors per class
    vector_size = 32  # values of a projected feature vector

    def build_companions(self):
        require_stages(self.network, "The class separation of SS-Net")
        manager, head = self.label_manager, unwrap(self.network).decoder.seg_layers[-1]
        classes = manager.num_segmentation_heads - (not manager.has_regions)
        return {
            "features": FeatureDecoder(self.network),
            "heads": PrototypeHeads(head.in_channels, classes, self.vector_size),
            "memory": ClassMemory(classes, self.memory_size, self.vector_size),
        }

    def losses(self, batch):
        weight, regions = self.unlabeled_weight * self.ramp, self.label_manager.has_regions
        output, features = self.forward(batch.image)
        correct = self.foreground(hard_labels(finest(output), regions=regions))
        separation = self.separation(features, self.foreground(batch.labels), correct)
        supervised = self.loss(output, batch.target)
        del output, features
        yield {"supervised": supervised, "separation": weight * self.separation_weight * separation}
        del supervised, separation
        output, features = self.forward(batch.unlabeled)
        separation = self.separation(features, self.foreground(self.hard_labels(finest(output))))
        del output, features
        yield {"separation": weight * self.separation_weight * separation}
        del separation
        for image in (batch.image, batch.unlabeled):
            for part in self.half_batches(len(image)):
                yield {"smoothness": weight * self.smoothness(image[part]).sum() / (2 * len(image))}

    def forward(self, image):
        """Output of the network and the features in front of its last head."""
        return self.companions.features(unwrap(self.network).encoder(image))

    def separation(self, features, classes, correct=None):
        """How far vectors of voxels are from the memory of their class; `correct` ones of a labeled batch refill it."""
        heads, memory = self.companions.heads, self.companions.memory
        voxels, valid = random_voxels(classes, self.voxels)
        projected, predicted = heads(at_voxels(features, voxels))
        if correct is not None:
            correct = valid & correct.transpose(0, 1).flatten(1).gather(1, voxels)
            memory.refill(projected.detach(), scores(heads.selectors, projected), correct)
        kept = torch.nn.functional.normalize(memory.vectors, dim=2)
        weights = scores(heads.selectors, predicted) * valid, scores(heads.memory_selectors, kept) * memory.filled
        return class_separation(predicted, weights[0], kept, weights[1])

    def smoothness(self, image):
        """Distance of every sample's prediction to that with adversarial noise on the image."""

        def soft(x):
            return self.probabilities(logits(self.network, x))

        with torch.no_grad(), in_float32(image.device):
            target = soft(image.float())
        with frozen(self.network):  # where it is compiled, autograd would compute the gradients of its weights as well
            direction = adversarial_direction(lambda x: soft_dice_distance(soft(x), target).sum(), image, self.probe)
        return soft_dice_distance(soft(image + self.radius * direction), target)


__getattr__ = epoch_variants(globals())
