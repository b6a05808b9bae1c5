"""Raw frames: as ASE reads them, and errors that name the frame."""

import lzma
from pathlib import Path

import ase.io
import numpy as np
import pytest
from oc20_files import frame_text

from datasets_oc20 import DataError
from datasets_oc20.extxyz import read_frames

ROOT = Path(__file__).parents[2]


def test_a_real_relaxation_as_ase_reads_it() -> None:
    path = ROOT / "data" / "oc20_trajs" / "random1447590.extxyz.xz"
    frames = list(read_frames(path))
    reference = ase.io.read(path, index=":")
    assert len(frames) == len(reference) == 47
    for number, (frame, atoms) in enumerate(zip(frames, reference, strict=True)):
        assert frame.index == number
        np.testing.assert_array_equal(frame.pos, atoms.positions)
        np.testing.assert_array_equal(frame.cell, atoms.cell[:])
        np.testing.assert_array_equal(frame.pbc, atoms.pbc)
        np.testing.assert_array_equal(frame.atomic_numbers, atoms.numbers)
        np.testing.assert_array_equal(frame.tags, atoms.get_tags())
        np.testing.assert_array_equal(np.flatnonzero(frame.fixed), sorted(atoms.constraints[0].index))
        np.testing.assert_array_equal(frame.forces, atoms.get_forces(apply_constraint=False))
        assert frame.energy == atoms.get_potential_energy()


def test_columns_in_another_order_and_more_of_them(tmp_path: Path) -> None:
    (tmp_path / "a.extxyz").write_text(
        '1\nLattice="9 0 0 0 9 0 0 0 9" energy=-1.5 '
        "Properties=tags:I:1:forces:R:3:species:S:1:magmoms:R:1:pos:R:3:move_mask:L:1\n"
        "2 0.1 0.2 0.3 Fe 2.2 1.0 2.0 3.0 T\n"
    )
    (frame,) = read_frames(tmp_path / "a.extxyz")
    assert (frame.tags.tolist(), frame.forces.tolist()) == ([2], [[0.1, 0.2, 0.3]])
    assert (frame.atomic_numbers.tolist(), frame.pos.tolist()) == ([26], [[1.0, 2.0, 3.0]])
    assert frame.pbc.all()
    assert not frame.fixed.any()


def test_empty_lines_at_the_end_are_no_frames(tmp_path: Path) -> None:
    (tmp_path / "a.extxyz").write_text(frame_text() + "\n \n")
    assert len(list(read_frames(tmp_path / "a.extxyz"))) == 1


def test_largest_force_is_that_of_the_free_atoms(tmp_path: Path) -> None:
    (tmp_path / "a.extxyz").write_text(frame_text(force=-0.3))
    (frame,) = read_frames(tmp_path / "a.extxyz")
    assert np.abs(frame.forces).max() == 99.0  # on the fixed atom
    assert frame.max_free_force == pytest.approx(0.3)


GOOD = frame_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no frame"),
        ("4 atoms\n", "frame 0: '4 atoms' is not a number of atoms"),
        (GOOD + GOOD[: len(GOOD) // 2], "frame 1: (the file ends inside|atom . does not have)"),
        (GOOD + "\n" + GOOD, "frame 1: there is an empty line before it"),
        (GOOD + GOOD.rsplit("\n", 2)[0] + "\n", "frame 1: the file ends inside the frame"),
        (GOOD + GOOD.replace("tags:I:1", "labels:I:1"), "frame 1: the frame has no column tags; tags tell"),
        (GOOD.replace("move_mask:L:1", "mask:L:1"), "no column move_mask"),
        (GOOD.replace("forces:R:3", "forces:R:2"), "no column forces"),
        (GOOD.replace(" energy=-20.0", ""), "frame 0: the frame has no energy"),
        (GOOD.replace(" energy=-20.0", " energy=low"), "energy holds something that is not a number"),
        (GOOD.replace("Lattice", "Box"), "no Lattice"),
        (GOOD.replace('"8.0 0.0', '"8.0'), "Lattice must hold 9 numbers"),
        (GOOD.replace('"T T T"', '"T T"'), "pbc is"),
        (GOOD.replace("\nO ", "\nXx "), "atom 3 is 'Xx', which is not an element"),
        (GOOD.replace(" 2 0.1 0.0 0.0", " 2 0.1 0.0"), "atom 3 does not have the 9 columns"),
        (GOOD.replace(" 2 0.1 0.0 0.0", " 2 0.1 0.0").replace("\nCu", "\nCu 1", 1), "atom 0 does not have"),
        (GOOD.replace(" 2 0.1 0.0 0.0", " 2 big 0.0 0.0"), "column forces holds something that is not"),
        (GOOD.replace(" T ", " yes "), "move_mask holds something other than T and F"),
    ],
)
def test_bad_frames_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.extxyz").write_text(text)
    with pytest.raises(DataError, match=rf"a\.extxyz(, |: ).*{message}|a\.extxyz: .*{message}"):
        list(read_frames(tmp_path / "a.extxyz"))


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.extxyz: no such file"):
        list(read_frames(tmp_path / "none.extxyz"))
    whole = lzma.compress(GOOD.encode())
    for content in (whole[: len(whole) // 2], b"", b"plain text", whole[:-4]):
        (tmp_path / "a.extxyz.xz").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.extxyz\.xz: .*(truncated|no frame)"):
            list(read_frames(tmp_path / "a.extxyz.xz"))
