"""Training goes on from a pruned checkpoint."""

from pathlib import Path

import pytest
import torch
import yaml

from equiformer2 import EquiformerV2
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.pruning import PruningPlan
from equiformer2.pruning.structured.apply import shrink
from equiformer2.training.configuration import parse
from equiformer2.training.run import train


@pytest.mark.slow
def test_a_run_takes_the_blocks_of_its_start(tiny_arguments: list[str], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EquiformerV2(parse(tiny_arguments).model)
    plan = PruningPlan.keep_all(model.config).with_block(0, heads=(1,), mmax=1).with_block(1, attention=False)
    small = shrink(model, plan)
    path = tmp_path / "small.pt"
    save_checkpoint(
        path,
        model=small,
        raw_state=small.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(Normalizer(0.0, 1.0), Normalizer(0.0, 1.0)),
        energy_kind="adsorption",
        provenance={},
    )
    arguments = [*tiny_arguments, f"--runs_dir={tmp_path / 'runs'}", "--name=tuned", f"--init_from={path}"]
    still = ["--optim.lr=1e-12", "--optim.weight_decay=0", "--trainer.max_steps=2"]
    folder = train(parse([*arguments, *still]))
    tuned = load_checkpoint(folder / "checkpoints/last.pt", weights="raw").model
    assert tuned.config.blocks == small.config.blocks
    for name, value in small.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], value, atol=1e-6, rtol=0)
    # What a resumed run is built from.
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["model"]["blocks"][0]["num_heads"] == 1
    again = parse([f"--config={folder / 'config.yaml'}"])
    assert again.model.blocks == small.config.blocks
