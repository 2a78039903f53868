"""CPS, cross pseudo supervision: Chen et al. 2021 (arXiv:2106.01226).

Differs from the released code on purpose: cross supervision acts on unlabeled images only and is ramped up, both as in
the SSL4MIS benchmark; its weight lies between that benchmark's (0.1, or 0.2 where the supervised loss is nnU-Net's) and
the paper's (1.5). The first student is deployed. With -pretrained_weights only the first student starts from them, and
after a supervised phase only it has learnt: the second student begins with random weights.
"""

from nnunet_ssl.blocks.losses import cross_entropy, labeled_loss
from nnunet_ssl.blocks.networks import logits
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerCPS(SemiSupervisedTrainer):
    """CPS: two students with independent initial weights learn from each other's labels of the unlabeled scans."""

    cross_weight = 1.0  # of the cross entropy with the other student's labels, after the ramp-up
    rampup = 0.4  # part of the training after which the cross weight is full

    def build_companions(self):
        return {"student_2": self.new_network()}

    def losses(self, batch):
        first, second = self.network, self.companions.student_2
        weight = self.cross_weight * self.ramp
        yield {"supervised": labeled_loss(self.loss, first(batch.image), batch.target)}
        yield {"supervised_2": labeled_loss(self.loss, second(batch.image), batch.target)}
        for part in self.half_batches(len(batch.unlabeled)):
            image = batch.unlabeled[part]
            share = weight * len(image) / len(batch.unlabeled)
            output, output_2 = logits(first, image), logits(second, image)
            yield {
                "cross": share * cross_entropy(self.loss, output, self.hard_labels(output_2)),
                "cross_2": share * cross_entropy(self.loss, output_2, self.hard_labels(output)),
            }
            del output, output_2


__getattr__ = epoch_variants(globals())
