"""MC-Net and MC-Net+, mutual consistency: Wu et al. 2021 (arXiv:2103.02911) and 2022 (arXiv:2109.09960).

Differs from the released code on purpose: sharpened probabilities are targets without gradient (released: the gradient
goes through them too), labeled scans have nnU-Net's Dice and cross entropy with deep supervision (released: Dice
alone), as the mean over the decoders, further decoders start as copies of the first one but for their upsampling, so
that they are of use after a supervised training, and the ramp-up ends within the training. Relative to the labeled loss
the weight lies between those released: half of the left atrium's, five times that of ACDC. The first decoder is
deployed, as in the released code. The halves of a batch (thirds of an odd one) follow each other, for the sake of
memory: each has its own mean over annotated voxels, and its own Dice where nnU-Net takes that of a batch.
"""

from nnunet_ssl.blocks.losses import labeled_loss, probability_mse
from nnunet_ssl.blocks.networks import finest, further_decoder, require_stages, unwrap
from nnunet_ssl.blocks.pseudo_labels import sharpen
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerMCNet(SemiSupervisedTrainer):
    """MC-Net: decoders of one encoder that upsample in different ways learn from each other's sharpened predictions."""

    decoders = 2  # 3: MC-Net+
    consistency_weight = 1.0  # of the mean squared differences, summed over pairs of decoders, after the ramp-up
    rampup = 0.4  # part of the training after which the consistency weight is full
    temperature = 0.1  # of the sharpening; towards 0 targets are 0 and 1

    def build_companions(self):
        if self.decoders not in (2, 3):
            raise ValueError(f"decoders is 2 or 3, not {self.decoders!r}.")
        require_stages(self.network, "MC-Net")
        names = {2: ("decoder_2",), 3: ("decoder_2", "decoder_3")}[self.decoders]
        return {name: further_decoder(self.network, nearest=name == "decoder_3") for name in names}

    def losses(self, batch):
        # the graph of all decoders needs twice the memory of one network's
        for part in self.half_batches(len(batch.image)):
            samples = batch.part(part)
            share = len(samples.image) / len(batch.image)
            for terms in self.learn(samples):
                yield {name: share * value for name, value in terms.items()}

    def learn(self, batch):
        """Terms on labeled patches, then on unlabeled ones."""
        outputs = self.outputs(batch.image)
        terms = {"consistency": self.mutual(outputs, 0.5)}
        for number, output in enumerate(outputs, start=1):
            terms[f"labeled_{number}"] = labeled_loss(self.loss, output, batch.target) / self.decoders
        del outputs, output
        yield terms
        del terms
        yield {"consistency": self.mutual(self.outputs(batch.unlabeled), 0.5)}

    def outputs(self, image):
        """What every decoder makes of the stage outputs of the one encoder."""
        network = unwrap(self.network)
        skips = network.encoder(image)
        return [decoder(skips) for decoder in (network.decoder, *vars(self.companions).values())]

    def mutual(self, outputs, share):
        """Mean squared differences between each decoder and the sharpened others; half of it is of labeled scans."""
        found = [self.probabilities(finest(output)) for output in outputs]
        targets = [sharpen(probabilities.detach(), self.temperature) for probabilities in found]
        pairs = [(p, t) for i, p in enumerate(found) for j, t in enumerate(targets) if i != j]
        return share * self.consistency_weight * self.ramp * sum(probability_mse(p, t) for p, t in pairs)


__getattr__ = epoch_variants(globals())
