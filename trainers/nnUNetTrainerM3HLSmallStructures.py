"""nnUNetTrainerM3HLSmallStructures by its own name; the class is in the file of its paper."""

from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HLSmallStructures as nnUNetTrainerM3HLSmallStructures
