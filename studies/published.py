"""What the papers report for their own domains, as far as their abstracts say; context, not our claims."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One paper's figures, in our words.

    Attributes:
        ours: method and state of training in our studies, whose figures stand beside.
    """

    method: str
    domain: str
    figures: str
    source: str
    ours: tuple[tuple[str, str], ...]


PUBLISHED = (
    Published(
        "FTP (trained token router)",
        "language models (LLaMA2-7B, Qwen1.5-7B)",
        "keeps about 10 points more accuracy than BlockPruner and ShortGPT at comparable token sparsity",
        "abstract of arXiv 2412.11494",
        (("route_ftp", "cut"),),
    ),
    Published(
        "Zero-TPrune",
        "image classification (DeiT-S on ImageNet)",
        "34.7 % fewer operations, 45.3 % more throughput, 0.4 % accuracy lost, untrained",
        "abstract of the CVPR 2024 paper, arXiv 2305.17328",
        (("route_atom", "cut"), ("route_edge", "cut")),
    ),
    Published(
        "MultiPruner",
        "language models (Llama2-7B, 22 % of the parameters cut)",
        "mean accuracy 68.96 to 62.83 untrained, 64.18 after tuning",
        "repository of the paper, arXiv 2501.09949",
        (("multi", "cut"), ("multi", "distilled")),
    ),
    Published(
        "BlockPruner",
        "language models (Llama3.1-8B, 20 % cut)",
        "59.08 where MultiPruner reaches 63.07",
        "repository of MultiPruner",
        (("block", "cut"),),
    ),
    Published(
        "PhAST (without subsurface atoms, or super-nodes)",
        "OC20, direct prediction of relaxed energies, trained that way",
        "3 to 8 times less compute, energy MAE 4 to 42 % better for the whole bundle of its changes",
        "README of vict0rsch/phast, arXiv 2211.12020",
        (("route_context_only", "cut"),),
    ),
    Published(
        "Structural pruning of channels and orders (Compact SO(3) models)",
        "atomistic: MACE-MP and MACE-OFF, trained on after the cut",
        "better than the official small model (from scratch) in 7 of 9 metrics of Matbench Discovery; "
        "1.5 to 4 times fewer parameters, 2.5 to 4 times less compute than pre-training the small one",
        "abstract of arXiv 2605.08885",
        (("multi", "distilled"), ("multi_time", "distilled")),
    ),
    Published(
        "Fewer interaction blocks (efficient JMP)",
        "atomistic: JMP-L, fine-tuned on molecular properties after the cut",
        "two blocks fewer: 32 % fewer parameters, 1.3 times the throughput, a minimal loss",
        "abstract of arXiv 2504.19538",
        (("block", "cut"),),
    ),
)
