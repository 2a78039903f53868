"""nnUNetTrainerCoLearningPaper by its own name; the class is in the file of its paper."""

from nnunet_ssl.trainers.nnUNetTrainerCoLearning import nnUNetTrainerCoLearningPaper as nnUNetTrainerCoLearningPaper
