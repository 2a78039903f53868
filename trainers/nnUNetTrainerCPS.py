"""CPS, cross pseudo supervision: Chen et al. 2021 (arXiv:2106.01226).

Differs from the released code on purpose: cross supervision acts on unlabeled images only and is ramped up, both as in
the SSL4MIS benchmark; its weight lies between that benchmark's (0.1, or 0.2 where the supervised loss is nnU-Net's) and
the paper's (1.5). The first student is deployed. With -pretrained_weights only the first student starts from them.
"""

import torch

from nnunet_ssl.losses import cross_entropy
from nnunet_ssl.networks import logits
from nnunet_ssl.schedules import sigmoid_rampup
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerCPS(SemiSupervisedTrainer):
    """CPS: two students with independent initial weights learn from each other's labels of the unlabeled scans."""

    cross_weight = 1.0  # of the cross entropy with the other student's labels, after the ramp-up
    rampup = 0.4  # part of the training after which the cross weight is full

    def build_companions(self):
        return {"student_2": self.new_network()}

    def losses(self, batch):
        first, second = self.network, self.companions.student_2
        weight = self.cross_weight * sigmoid_rampup(self.step, self.rampup * self.max_steps)
        # one more forward pass instead of two graphs in memory at the same time
        with torch.no_grad():
            labels_of_second = self.hard_labels(logits(second, batch.unlabeled))

        yield {"supervised": self.loss(first(batch.image), batch.target)}
        output = logits(first, batch.unlabeled)
        labels_of_first = self.hard_labels(output)
        yield {"cross": weight * cross_entropy(self.loss, output, labels_of_second)}
        del output

        yield {"supervised_2": self.loss(second(batch.image), batch.target)}
        yield {"cross_2": weight * cross_entropy(self.loss, logits(second, batch.unlabeled), labels_of_first)}


__getattr__ = epoch_variants(globals())
