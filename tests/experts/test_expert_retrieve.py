"""Retrieval from a file of experts: the set, what is read, and the merged network."""

from pathlib import Path

import pytest
import torch
from model_helpers import batch_of, cluster, slab
from test_expert_prune import ready
from tiny_experts import contents_of, network

from equiformer2.checkpoint import load_checkpoint
from equiformer2.checkpoint.expert_files import read_experts, write_experts
from equiformer2.checkpoint.samples import Samples
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.experts import ExpertNetwork
from equiformer2.experts.composition import composition_of
from equiformer2.experts.prune import PruneSettings, prune_experts
from equiformer2.experts.retrieve import ExpertStore

SLAB, CLUSTER = ready(slab(), "slab"), ready(cluster(), "cluster")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = {"dft": Samples.from_structures([SLAB, CLUSTER]), "teacher": Samples.from_structures([SLAB])}
    contents = contents_of(network(num_experts=8), samples=samples)
    for name, info in contents.tasks.items():
        structures = [SLAB, CLUSTER] if name == "dft" else [SLAB]
        info.composition.copy_(torch.cat([composition_of(each, 90) for each in structures]).mean(0))
    path = tmp_path_factory.mktemp("experts") / "experts.safetensors"
    write_experts(path, contents)
    return path


def test_only_the_experts_of_the_set_are_read(file: Path) -> None:
    store = ExpertStore(file, keep=0.25)
    found = store.find(CLUSTER)
    assert (found.task, len(found.experts)) == ("dft", 2)
    before = store.bytes_read
    store.network(found)
    contents = read_experts(file)
    weights = contents.weights["raw"]
    stacks = sum(stack.nbytes for stack in weights.experts.values())
    heads = sum(stack.nbytes for stack in weights.heads.values())
    shared = sum(tensor.nbytes for tensor in weights.shared.values())
    assert store.loaded_bytes < stacks / 4 + heads / 2 + shared + 10_000
    assert store.bytes_read - before < stacks / 4 + heads / 2 + shared + 40_000
    assert store.bytes_read < contents.bytes_read < file.stat().st_size + 1
    assert contents.bytes_read == file.stat().st_size


def test_the_merged_network_is_that_of_the_whole_file(file: Path) -> None:
    whole = ExpertNetwork.from_contents(read_experts(file))
    for per in ("task", "composition"):
        store = ExpertStore(file, per=per)  # type: ignore[arg-type]
        for structure in (SLAB, CLUSTER):
            found = store.find(structure, ["dft"])
            expected = whole.merged("dft", composition_of(structure, 90)[0], found.experts)
            with torch.no_grad():
                for name, value in expected(structure).items():
                    torch.testing.assert_close(
                        store.network(found)(structure)[name], value, rtol=1e-5, atol=1e-5
                    )
            assert found.coefficients.sum().item() == pytest.approx(1.0)


def test_merged_networks_are_kept_within_the_limit(file: Path) -> None:
    store = ExpertStore(file)
    found = [store.find(structure, ["dft"]) for structure in (SLAB, CLUSTER)]
    first = store.network(found[0])
    read = store.bytes_read
    assert store.network(store.find(SLAB, ["dft"])) is first
    assert store.bytes_read == read
    store.network(found[1])
    assert (store.bytes_read > read, len(store.cache)) == (True, 2)
    one = sum(p.nbytes for p in first.parameters())
    small = ExpertStore(file, cache_bytes=int(1.5 * one))
    for each in (*found, found[0]):
        small.network(each)
    assert (len(small.cache), small.cache.hits, small.cache.misses) == (1, 0, 3)


def test_structures_beyond_the_training_data(file: Path) -> None:
    store = ExpertStore(file)
    other = CLUSTER.clone()
    other.atomic_numbers = torch.full_like(other.atomic_numbers, 9)
    with pytest.raises(InputError, match=r"no task of .* was trained on F, which the structure holds"):
        store.find(other)
    with pytest.raises(InputError, match=r"no task 'pbe\*': its tasks are dft, teacher"):
        store.find(SLAB, ["pbe*"])
    here = store.find(SLAB)
    assert (here.match.far, here.unseen, here.warnings()) == (False, (), [])
    assert not (store.tasks["teacher"].composition > 0)[CLUSTER.atomic_numbers].all()
    with pytest.raises(InputError, match="no task of"):
        store.find(CLUSTER, ["teacher"])


def test_equally_near_tasks_are_told(file: Path, tmp_path: Path) -> None:
    """The same slab with two kinds of labels: nothing in it says which energies are wanted."""
    store = ExpertStore(file, per="composition")
    found = store.find(SLAB)
    assert (found.task, found.match.second, found.match.tied) == ("dft", "teacher", True)
    assert found.warnings() == ["teacher is as near as dft: name the task that is wanted"]
    assert store.find(SLAB, ["teacher"]).warnings() == []
    described = store.describe(store.find(SLAB, ["teacher"]))
    assert (described["energy_kind"], described["tied"]) == ("total", False)
    store.write(found, tmp_path / "new" / "slab.pt")
    merged = load_checkpoint(tmp_path / "new" / "slab.pt").provenance["merged_from"]
    assert (merged["sha256"], merged["unseen_elements"]) == (sha256(file), [])


def test_a_pruned_file_has_one_set_of_all_that_is_left(file: Path, tmp_path: Path) -> None:
    pruned, record = prune_experts(read_experts(file), "dft", PruneSettings(0.5))
    write_experts(tmp_path / "half.safetensors", pruned)
    store = ExpertStore(tmp_path / "half.safetensors")
    found = store.find(SLAB)
    assert (found.task, found.experts) == ("dft", (0, 1, 2, 3))
    whole = ExpertNetwork.from_contents(read_experts(file))
    expected = whole.merged("dft", composition_of(SLAB, 90)[0], record["kept"])
    with torch.no_grad():
        answer = store.network(found)(SLAB)
    torch.testing.assert_close(answer["energy"], expected(SLAB)["energy"], rtol=1e-5, atol=1e-5)


def test_settings_and_files_that_are_none(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keeps none"):
        ExpertStore(file, keep=0.01)
    with pytest.raises(InputError, match="keeps all"):
        ExpertStore(file, keep=1.0)
    with pytest.raises(InputError, match="limit of the cache"):
        ExpertStore(file, cache_bytes=-1)
    with pytest.raises(InputError, match="per task or composition"):
        ExpertStore(file, per="element")  # type: ignore[arg-type]
    for per in ("task", "composition"):
        with pytest.raises(InputError, match=r"leading experts .* must be at least 1"):
            ExpertStore(file, per=per, top=0)  # type: ignore[arg-type]
    store = ExpertStore(file)
    for names in ([], "dft"):
        with pytest.raises(InputError, match="a list of names or patterns"):
            store.find(SLAB, names)
    with pytest.raises(InputError, match="one structure at a time, not for 2"):
        store.find(batch_of(SLAB, CLUSTER))
    with pytest.raises(FileNotFoundError):
        ExpertStore(tmp_path / "none.safetensors")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(InputError, match="no file of an expert network"):
        ExpertStore(tmp_path / "text.pt")
