"""URPC, uncertainty rectified pyramid consistency: Luo et al. 2021 (arXiv:2012.07042).

Differs from the released code on purpose: the pyramid's heads are those of nnU-Net's deep supervision, with the
released 3D code's dropout of whole channels in front of each (released: in the decoder, and for 2D another perturbation
per head), labeled scans have nnU-Net's Dice and cross entropy at the resolution of each head, as the mean over the
heads (released: at full resolution), the rectified distance is normalised over half a batch (released: all of it), the
ramp-up is a part of the training, and the weight is doubled because nnU-Net's Dice + cross entropy is twice that code's
supervised loss. In networks of up to five stages the pyramid has the head that nnU-Net does not train: after a
supervised phase it is random.
"""

import torch
import torch.nn.functional as F
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

from nnunet_ssl.blocks.losses import full_resolution, kl_divergence, masked_loss
from nnunet_ssl.blocks.networks import Pyramid, require_stages, unwrap
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerURPC(SemiSupervisedTrainer):
    """URPC: the heads of several scales agree with their mean on unlabeled scans, most where they are not unsure."""

    consistency_weight = 0.2  # of the rectified consistency, after the ramp-up
    rampup = 0.4  # part of the training after which the consistency weight is full
    dropout = (0.1, 0.2, 0.3, 0.5)  # in front of the heads, highest resolution first; as many heads form the pyramid

    def build_companions(self):
        require_stages(self.network, "URPC")
        pyramid = Pyramid(self.network, self.dropout)
        if len(pyramid.dropout) < 2:
            raise NotImplementedError("URPC needs two heads or more: a network of three stages, and two dropout rates.")
        return {"pyramid": pyramid}

    def losses(self, batch):
        everything = torch.ones_like(batch.image[:, :1], dtype=torch.bool)
        outputs = self.outputs(batch.image)
        pyramid = DeepSupervisionWrapper(full_resolution(self.loss), [1 / len(outputs)] * len(outputs))
        yield {"labeled": masked_loss(pyramid, outputs, batch.labels, everything)}
        del outputs
        for part in self.half_batches(len(batch.unlabeled)):
            image = batch.unlabeled[part]
            share = self.consistency_weight * self.ramp * len(image) / len(batch.unlabeled)
            yield {"consistency": share * self.rectified(self.outputs(image))}

    def outputs(self, image):
        """Logits of the pyramid's heads, highest resolution first."""
        return self.companions.pyramid(unwrap(self.network).encoder(image))

    def rectified(self, outputs):
        """Squared distance of every head to their mean, weighted by exp(-KL) of the voxel, plus the KL (Eq. 4)."""
        patch, mode = outputs[0].shape[2:], "bilinear" if outputs[0].ndim == 4 else "trilinear"
        heads = [F.interpolate(logits.float(), patch, mode=mode) for logits in outputs]
        predictions = [self.probabilities(head) for head in heads]
        mean = sum(predictions) / len(predictions)
        total = 0
        for head, own in zip(heads, predictions, strict=True):
            divergence = kl_divergence(mean, head, regions=self.label_manager.has_regions)
            trust = (-divergence).exp()
            squared = ((mean - own).square() * trust).mean() / (trust.mean() + 1e-8)
            total = total + squared + divergence.mean()
        return total / len(heads)


__getattr__ = epoch_variants(globals())
