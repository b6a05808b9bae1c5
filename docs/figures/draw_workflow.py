"""Draws `docs/figures/workflow.svg`: run `python docs/figures/draw_workflow.py` after a change."""

from pathlib import Path

WIDTH, HEIGHT = 1050, 350
BOX_WIDTH, BOX_HEIGHT = 160, 56

# x, y (top left), title, line below, colour
BOXES = (
    (20, 40, "Raw OC20 files", "extxyz, system.txt", "#e8eef7"),
    (310, 40, "LMDB", "datasets_oc20/", "#e8eef7"),
    (310, 140, "Public checkpoint", "OCP, fairchem v1", "#e8eef7"),
    (540, 40, "Checkpoint", "equiformer2/checkpoint/", "#fdf1d8"),
    (540, 240, "Smaller checkpoint", "equiformer2/pruning/", "#fdf1d8"),
    (870, 40, "OC20 metrics", "equiformer2/training/", "#e6f3e8"),
    (870, 140, "Relaxed structures", "equiformer2/inference/", "#e6f3e8"),
    (870, 240, "Adsorption energies", "equiformer2/adsorption/", "#e6f3e8"),
)

# command, points of the arrow, place of the label, its anchor
ARROWS = (
    ("data preprocess", ((180, 68), (310, 68)), (245, 60), "middle"),
    ("train", ((470, 68), (540, 68)), (505, 60), "middle"),
    ("checkpoint import", ((470, 168), (590, 168), (590, 96)), (476, 186), "start"),
    ("evaluate", ((700, 68), (870, 68)), (790, 60), "middle"),
    ("relax", ((716, 68), (716, 168), (870, 168)), (790, 160), "middle"),
    ("adsorption energy", ((716, 68), (716, 268), (870, 268)), (790, 260), "middle"),
    ("prune plan, apply", ((650, 96), (650, 240)), (643, 222), "end"),
)


def draw() -> str:
    """The picture as SVG text: boxes are files, arrows are commands."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="DejaVu Sans, '
        'Helvetica, Arial, sans-serif" font-size="13">',
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L10 5L0 10z" fill="#44546a"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
    ]
    for _, points, _, _ in ARROWS:
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        lines.append(
            f'<path d="{path}" fill="none" stroke="#44546a" stroke-width="1.6" marker-end="url(#head)"/>'
        )
    for x, y, title, below, colour in BOXES:
        middle = x + BOX_WIDTH / 2
        lines += [
            f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="{colour}" '
            'stroke="#44546a"/>',
            f'<text x="{middle:g}" y="{y + 24}" text-anchor="middle" font-weight="bold">{title}</text>',
            f'<text x="{middle:g}" y="{y + 42}" text-anchor="middle" font-size="11" fill="#44546a">'
            f"{below}</text>",
        ]
    for command, _, (x, y), anchor in ARROWS:
        lines.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="12" '
            f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" fill="#1f3b73">{command}</text>'
        )
    lines += [
        f'<text x="20" y="{HEIGHT - 16}" font-size="12" fill="#44546a">Boxes are files, arrows are '
        "subcommands of equiformer2. A smaller checkpoint is used like any other.</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("workflow.svg").write_text(draw(), encoding="utf-8")
