"""M3HL: mutual mask mix with high-low level feature consistency (2025).

Differs from the paper and its released code on purpose: masks are drawn per sample by count and really applied (the
released LA script returns masks of ones), the teacher starts as a copy of the student (released: an independent random
network), labeled voxels weigh 1 and pseudo-labeled ones alpha (the paper's Eq. 3 swaps them), the teacher sees a weak
view (spatial augmentation only), and the last part of the training is on whole patches without the feature terms:
networks that only ever saw mixed patches did worse on scans, which are not mixed (`unmixed=0.0` in benchmarks/results).
The student is deployed, as in the paper.
"""

import torch

from nnunet_ssl.losses import feature_cosine, feature_l1, masked_loss
from nnunet_ssl.mixing import block_mask, halves, mix_halves
from nnunet_ssl.networks import forward_with_features, frozen_copy, require_stages, update_ema
from nnunet_ssl.pseudo_labels import keep_largest_component
from nnunet_ssl.schedules import warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerM3HL(SemiSupervisedTrainer):
    """M3HL: labeled and unlabeled scans mixed by random block masks, feature consistency with an EMA teacher."""

    mask_cells = 4  # cells of the block grid per axis, fewer on thin axes
    mask_ratio = 0.5  # part of the cells that half a takes from unlabeled images; half b has the complement
    pseudo_weight = 0.5  # alpha: weight of pseudo-labeled voxels; labeled voxels have 1
    unmixed = 0.6  # last part of the training: half a is labeled scans, half b unlabeled ones; 0: as in the paper
    feature_weight = 0.5  # lambda: weight of L_low + L_high where cross entropy + Dice are summed over a and b (Eq. 1)
    feature_pairs = "all"  # mixed and unlabeled halves that are compared: "all" four, or "matched" (a-a and b-b)
    largest_component = False  # clean pseudo labels: keep the largest component per class
    teacher_decay = 0.99  # of the EMA, per step, after the warm-up
    weak_view = True

    def build_companions(self):
        if self.feature_pairs not in ("all", "matched"):
            raise ValueError(f'feature_pairs is "all" or "matched", not {self.feature_pairs!r}.')
        if self.feature_weight:
            require_stages(self.network, "The feature consistency of M3HL")
        return {"teacher": frozen_copy(self.network)}

    def losses(self, batch):
        half = (len(batch.image) + 1) // 2
        if self.step < (1 - self.unmixed) * self.max_steps:
            yield self.mixed(batch, half)
        else:
            yield self.whole(batch, half)

    def mixed(self, batch, half):
        """Terms of the paper: half a and half b mixed by masks and their complements."""
        pseudo, target_features = self.teach(batch.unlabeled_weak, self.feature_weight > 0)
        size, device = batch.image.shape[2:], batch.image.device
        mask = block_mask(half, size, cells=self.mask_cells, ratio=self.mask_ratio, device=device)
        image, target, mask = mix_halves(batch.image, batch.labels, batch.unlabeled, pseudo, mask)
        output, features = self.forward(self.network, image, self.feature_weight > 0)
        terms = {
            "labeled": masked_loss(self.loss, output, target, mask),
            "pseudo": self.pseudo_weight * masked_loss(self.loss, output, target, ~mask),
        }
        if self.feature_weight:
            a, b = slice(0, half), slice(half, None)
            pairs = [(a, a), (b, b)] + ([(a, b), (b, a)] if self.feature_pairs == "all" else [])
            # the terms above are means over both halves where Eq. 3 has sums: hence 1/2
            weight = self.feature_weight / 2 / len(pairs)
            (low, high), (target_low, target_high) = features, map(halves, target_features)
            terms["low"] = weight * sum(feature_l1(low[s], target_low[t]) for s, t in pairs)
            terms["high"] = weight * sum(feature_cosine(high[s], target_high[t]) for s, t in pairs)
        return terms

    def whole(self, batch, half):
        """The same terms of unmixed patches: half a is labeled scans, half b is unlabeled ones."""
        pseudo, _ = self.teach(batch.unlabeled_weak[-half:], False)
        output = self.network(torch.cat([batch.image[:half], batch.unlabeled[-half:]]))
        everything = torch.ones_like(batch.image[:half, :1], dtype=torch.bool)
        terms = {
            "labeled": masked_loss(self.loss, rows(output, slice(0, half)), batch.labels[:half], everything),
            "pseudo": self.pseudo_weight * masked_loss(self.loss, rows(output, slice(half, None)), pseudo, everything),
        }
        features = {"low": batch.image.new_zeros(()), "high": batch.image.new_zeros(())}
        return terms | features if self.feature_weight else terms

    def teach(self, image, with_features):
        """The teacher's hard labels and, if asked for, its features."""
        with torch.no_grad():
            output, features = self.forward(self.companions.teacher, image, with_features)
            pseudo = self.hard_labels(output[0] if isinstance(output, list) else output)
        return keep_largest_component(pseudo) if self.largest_component else pseudo, features

    def forward(self, network, image, with_features):
        """Output and, if asked for, the two feature taps: after the first downsampling and at the bottleneck."""
        if not with_features:
            return network(image), []
        output, skips = forward_with_features(network, image)
        return output, [skips[1], skips[-1]]

    def after_step(self):
        update_ema(self.companions.teacher, self.network, warmup_decay(self.step, self.teacher_decay))


def rows(output, samples):
    """Some samples of an output, with deep supervision at every scale."""
    return [scale[samples] for scale in output] if isinstance(output, list) else output[samples]


class nnUNetTrainerM3(nnUNetTrainerM3HL):
    """M3: M3HL's mutual mask mix without the feature terms."""

    feature_weight = 0.0
    unmixed = 0.4


__getattr__ = epoch_variants(globals())
