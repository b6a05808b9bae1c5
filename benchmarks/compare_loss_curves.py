"""Train a small network twice, with the chunked kernels and with plain expressions, and draw the losses.

    equiformer2 data preprocess --data data/teacher --out runs/data/teacher_train.lmdb
    python -m benchmarks.compare_loss_curves --data runs/data/teacher_train.lmdb \\
        --out docs/results/loss_curves

Same initial weights, same batches, no dropout. The plain expressions are what runs when derivatives with
respect to positions are wanted, so the second training only asks for them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from equiformer2.script import origin, run_script


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="LMDB with adsorption energies and forces")
    parser.add_argument("--out", required=True, type=Path, help="path without ending for the .png and .json")
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=4, help="default: %(default)s")
    return parser.parse_args(words)


def losses(arguments: argparse.Namespace, plain: bool) -> list[float]:
    """The loss of every step."""
    from tqdm import tqdm

    from datasets_oc20 import OC20DataModule
    from equiformer2 import EquiformerV2, ModelConfig
    from equiformer2.training.losses import energy_l1, force_l2

    data = OC20DataModule(
        arguments.data, arguments.data, energy_kind="adsorption", batch_size=arguments.batch_size
    )
    data.setup()
    (mean, std), (_, force_std) = data.normalizers["energy"], data.normalizers["forces"]
    torch.manual_seed(0)
    model = EquiformerV2(small_config(ModelConfig)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    batches: list[Any] = []
    while len(batches) < arguments.steps:
        batches += list(data.train_dataloader())[: arguments.steps - len(batches)]
    curve = []
    for batch in tqdm(batches, desc="plain" if plain else "kernels"):
        batch.pos.requires_grad_(plain)
        out = model(batch)
        loss = 4 * energy_l1(out["energy"], (batch.energy - mean) / std)
        loss = loss + 100 * force_l2(out["forces"], batch.forces / force_std, ~batch.fixed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def small_config(config: Any) -> Any:
    """Every kind of layer of the paper's networks, small."""
    return config(
        num_layers=2,
        sphere_channels=32,
        attn_hidden_channels=16,
        num_heads=4,
        attn_alpha_channels=8,
        attn_value_channels=8,
        ffn_hidden_channels=32,
        edge_channels=32,
        lmax=3,
        mmax=2,
        grid_resolution=10,
        max_radius=6.0,
        max_neighbors=12,
        num_distance_basis=64,
        alpha_drop=0.0,
        drop_path_rate=0.0,
    )


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(words)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from equiformer2.files import check_target, write_json

    figure_path = arguments.out.with_suffix(".png")
    for target in (figure_path, arguments.out.with_suffix(".json")):
        check_target(target, inputs=[arguments.data])
    kernels, plain = losses(arguments, plain=False), losses(arguments, plain=True)
    differences = [abs(a - b) / abs(b) for a, b in zip(kernels, plain, strict=True)]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(6, 5), height_ratios=(2, 1))
    above.plot(plain, lw=4, alpha=0.4, label="plain expressions")
    above.plot(kernels, lw=1, color="black", label="kernels")
    above.set_ylabel("loss")
    above.legend()
    below.semilogy([max(value, 1e-9) for value in differences])
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(figure_path, dpi=150)
    record = {"steps": arguments.steps, "kernels": kernels, "plain": plain, "worst": max(differences)}
    write_json(arguments.out.with_suffix(".json"), {**origin(), **record})
    print(f"largest relative difference of the losses in {arguments.steps} steps: {max(differences):.1e}")
    print(f"figure: {figure_path}")


if __name__ == "__main__":
    run_script(main)
