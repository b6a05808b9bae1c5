"""Systems, networks and sizes of the demo."""

from dataclasses import dataclass

CHECKPOINT = "models/study_teacher.pt"
"""Network that the demo starts from: trained on slabs labelled by SevenNet-0 (models/README.md)."""

PRUNING_PLAN = "configs/pruning/demo_plan.json"
"""Plan for a network of this architecture, found by `equiformer2 prune plan` on the network itself."""

SCRATCH_LEARNING_RATE = 2e-3
"""Learning rate of the training from nothing, the better of two (docs/results/fine_tuning.md); that of
fine-tuning is in configs/demo.yaml."""

UNSEEN_SYSTEMS = ("random1000100", "random1000120", "random1000151", "random1000193")
"""DFT relaxations that no training ever reads: 33 to 77 atoms, of elements that the network has seen."""

RELAXED_SYSTEMS = ("random1000100", "random1000120", "random1000193")
"""The unseen DFT systems that are relaxed, of at most 50 atoms: a minute on two cores. The first one, O on a
gold-sodium slab, is shown in full."""

LARGE_SYSTEMS = (
    "random1000102",
    "random1000117",
    "random1000126",
    "random1000127",
    "random1000129",
    "random1000157",
    "random1000162",
    "random1000179",
    "random1000191",
)
"""More than 80 atoms: in the same minutes the network sees fewer frames of them."""

TEACHER_SYSTEMS = {"tn1000036": "*C*C on GaTa(100)", "tn700075": "*C on CuNiSb2(100)"}
"""Systems of data/teacher_large/test, whose bulks the network has not seen: those that SevenNet-0's own
relaxation left closest to rest (largest force 0.1 eV/Å)."""

TEACHER_ENERGIES = "teacher.json"
"""File beside the DFT relaxations: SevenNet-0's adsorption energies of the unseen ones, relaxed by itself
(`python -m studies.teacher_adsorption`)."""

TEACHER_END = 7
"""Last frame of these relaxations; the frames behind it are rattled."""


@dataclass(frozen=True)
class DemoPlan:
    """Sizes of a demo.

    Attributes:
        training_time: seconds of fine-tuning, and of training from nothing beside it.
        distillation_time: seconds of distillation of the pruned network.
        min_force: frames with smaller largest forces are nearly at rest and left out, eV/Å.
        frames: most training frames per DFT system.
        distillation_frames: most frames per DFT system that the dense network answers for the pruned one.
        unseen_frames: frames per unseen system.
        relaxation_steps: most steps of each relaxation.
        timed_calls: pairs of force calls that are timed.
    """

    training_time: int = 150
    distillation_time: int = 60
    min_force: float = 0.5
    frames: int = 60
    distillation_frames: int = 8
    unseen_frames: int = 15
    relaxation_steps: int = 150
    timed_calls: int = 10

    @classmethod
    def short(cls) -> "DemoPlan":
        """The same path in a fraction of the time; its errors mean nothing."""
        return cls(
            training_time=10,
            distillation_time=5,
            frames=10,
            distillation_frames=1,
            unseen_frames=3,
            relaxation_steps=5,
            timed_calls=2,
        )
