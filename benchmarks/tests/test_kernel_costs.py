"""The script behind docs/results/kernel_costs.md."""

from pathlib import Path

import pytest

from benchmarks import kernel_costs as script
from equiformer2.model.config import ModelConfig

TINY = ModelConfig(num_layers=3, lmax=2, mmax=1, grid_resolution=6, sphere_channels=4, num_heads=2)


def test_every_kernel_of_all_blocks_in_both_directions() -> None:
    found = {kernel.name: kernel for kernel in script.kernels(TINY, 5, 20, 4)}
    assert len(found) == 10
    assert {kernel.calls for kernel in found.values()} == {3}
    one = script.gather_rotate(5, 20, 2, 1, 4, False, 4)
    assert found["gather_rotate, forward"].total == one + one + one
    # 7 of 9 coefficients have |m| <= 1; 36 points; 64 channels.
    assert found["separable_s2_activation, forward"].total.flops == 3 * 20 * 64 * 2 * 36 * (7 + 7)


def test_roofline_takes_the_rate_of_the_precision() -> None:
    total = script.Cost(flops=989 * 10**9, exponentials=0, bytes=48 * 10**5, plain_bytes=0)
    tf32, bf16 = script.PRECISIONS
    kernel = script.Kernel("product", 1, total, on_tensor_cores=True)
    assert kernel.seconds(bf16) == pytest.approx(1e-3)
    assert kernel.seconds(tf32) == pytest.approx(989 / 494 * 1e-3)
    slow = script.Kernel("rotation", 1, total, on_tensor_cores=False)
    assert slow.seconds(bf16) == pytest.approx(989 / 67 * 1e-3)
    assert slow.bound(bf16) == "arithmetic"
    copy = script.Kernel("copy", 1, script.Cost(1, 0, 48 * 10**9, 0), on_tensor_cores=False)
    assert (copy.seconds(tf32), copy.bound(tf32)) == (pytest.approx(1e-2), "memory")


def test_written_page_is_the_printed_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--structures", "1", "--presets", "31M"]
    script.main(arguments)
    printed = capsys.readouterr().out
    assert "Counted, not measured" in printed
    assert printed.count("gather_rotate, backward") == 2
    script.main([*arguments, "--output", str(tmp_path / "costs.md")])
    assert (tmp_path / "costs.md").read_text(encoding="utf-8") == printed
    assert len(list(tmp_path.iterdir())) == 1


def test_kept_page_is_what_the_script_writes() -> None:
    page = Path(script.__file__).parents[1] / script.OUTPUT
    assert page.read_text(encoding="utf-8") == script.markdown(["31M", "83M", "153M"], 8)
