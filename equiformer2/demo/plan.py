"""Systems, training times and sizes of the demo."""

from dataclasses import dataclass

UNSEEN_SYSTEMS = ("random1000100", "random1000120", "random1000151", "random1000193")
"""DFT relaxations that no training ever reads: 33 to 77 atoms, every element occurs in the training data."""

RELAXED_SYSTEM = "random1000187"
"""The system whose relaxation is shown in full: an adsorbate on a calcium-lead slab. The model was trained on
frames of DFT's own relaxation of it."""

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
"""More than 80 atoms: in the same minutes the model sees fewer frames of them."""

UNSEEN_TEACHER_SYSTEMS = (
    "teacher100011",
    "teacher100036",
    "teacher100058",
    "teacher100073",
    "teacher100080",
    "teacher100088",
    "teacher100105",
    "teacher200000",
    "teacher200005",
    "teacher200011",
    "teacher200028",
    "teacher200031",
    "teacher200037",
    "teacher200038",
    "teacher200062",
)
"""Teacher-labelled systems kept unseen, the same in the demo and in configs/oc20_small_teacher.yaml."""


@dataclass(frozen=True)
class DemoPlan:
    """Sizes of a demo.

    Attributes:
        teacher_time, dft_time: seconds of training on teacher labels, then on DFT frames.
        min_force: frames with smaller largest forces are nearly at rest and left out, eV/Å.
        frames, later_frames: most training frames and later frames per DFT system.
        unseen_frames: frames per unseen system.
        relaxation_steps: most steps of each relaxation.
    """

    teacher_time: int = 120
    dft_time: int = 180
    min_force: float = 0.5
    frames: int = 60
    later_frames: int = 8
    unseen_frames: int = 15
    relaxation_steps: int = 60

    @classmethod
    def short(cls) -> "DemoPlan":
        """The same path in a fraction of the time; its errors mean nothing."""
        return cls(
            teacher_time=12, dft_time=12, frames=10, later_frames=2, unseen_frames=3, relaxation_steps=8
        )
