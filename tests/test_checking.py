"""What `check` says of a run before it begins: networks, arithmetic, memory, steps."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bigsimclr.checking import CheckedRun, check_recipe, gpus_text, pipeline_text, stage_text
from bigsimclr.checking.costs import StageCost, si
from bigsimclr.checking.gpus import GPUS, Smallest
from bigsimclr.cli import app
from bigsimclr.errors import RecipeError
from bigsimclr.interop import PortableModel, Preprocessing
from bigsimclr.interop.model_file import write_model_file
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.anatomy import Memory
from bigsimclr.models.cost import cost
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from tests.models.live import Live
from tests.recipe.samples import FINETUNE, PRETRAIN
from tests.stages import tiny

# The paper's pretraining of the smallest network, on a machine without the images.
IMAGENET = """\
stage: pretrain
data: {kind: folder, root: nowhere}
augment: {image_size: 224}
backbone: {depth: 50}
optimizer: {kind: lars, learning_rate: 0.1}
schedule: {epochs: 800, warmup_epochs: 40}
batch: {global_batch: 4096}
"""
LABELS = """\
data: {kind: folder, root: nowhere}
augment: {image_size: 224}
optimizer: {kind: lars, learning_rate: 0.01}
schedule: {epochs: 60}
batch: {global_batch: 1024}
"""
IMAGES = 1_281_167
R50 = ResNetBackbone(depth=50)
PRETRAINED = Architecture(R50, HeadSection(), None, from_layer=0)

Check = Callable[..., CheckedRun]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    def run(
        text: str, *changes: str, examples: int | None = None, world_size: int = 1
    ) -> CheckedRun:
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        (found,) = check_recipe(str(file), changes, world_size=world_size, examples=examples)
        return found

    return run


def costs(found: CheckedRun) -> StageCost:
    assert found.cost is not None
    return found.cost


def rows(found: CheckedRun) -> dict[str, str]:
    topics = [topic for topic, _ in found.rows]
    assert len(set(topics)) == len(topics)
    return dict(found.rows)


def model_file(path: Path, architecture: Architecture) -> str:
    names = tuple(f"class {number}" for number in range(architecture.classes or 0))
    model = build_model(architecture, seed=0).eval()
    prepared = Preprocessing(image_size=32, resize="tf2", eval_crop_proportion=1.0)
    write_model_file(path, PortableModel(model, architecture, names, prepared, "a test"))
    return str(path)


def test_the_paper_without_its_images(check: Check) -> None:
    found = check(IMAGENET, examples=IMAGES)
    texts = rows(found)
    # The number of the released checkpoints' last update.
    assert texts["steps"].startswith("250,228 updates of 4,096 images (800.0 epochs), 12,511 ")
    assert texts["data"].startswith("1,281,167 training images, as given; data.root: now")
    assert texts["parameters"] == (
        "32.2 M: backbone 23.5 M (23.6 M with batch norm's statistics, as the paper counts), "
        "head 8.66 M, the classifier not counted, as its classes are not known here"
    )
    assert texts["compute"] == (
        "8.19 GFLOP forward per view, x 3 with the backward pass: 201 TFLOP per update, "
        "50.4 EFLOP in all"
    )
    assert texts["memory"] == (
        "activations 85.3 MB kept per view; about 699 GB per rank: 386 MB weights, gradients, "
        "moments + 699 GB for 8,192 views; images, loss and workspaces come on top"
    )
    network = cost(PRETRAINED, image_size=224)
    assert costs(found).update_flops == 4096 * 2 * 3 * network.total.flops
    assert costs(found).total_flops == 250_228 * 4096 * 2 * 3 * network.total.flops


def test_steps_stay_unknown_without_images_or_their_number(check: Check) -> None:
    found = check(IMAGENET)
    assert rows(found)["data"].startswith("steps are not known: data.root: nowhere does not exist")
    assert rows(found)["data"].endswith("DIR, or --examples N to plan for N images")
    assert "steps" not in rows(found)
    # What does not depend on their number is said all the same.
    topics = ("batch", "negatives", "chance loss", "learning rate", "parameters", "memory")
    known = rows(check(IMAGENET, examples=IMAGES))
    assert [rows(found)[topic] for topic in topics] == [known[topic] for topic in topics]
    assert rows(found)["learning rate"] == "6.4 (lars, 0.1, scaling sqrt), then cosine to 0"
    assert rows(found)["negatives"] == "8,190 for every view"
    assert rows(found)["compute"] == (
        "8.19 GFLOP forward per view, x 3 with the backward pass: 201 TFLOP per update"
    )
    assert rows(found)["batch"].startswith("4,096 = 1 rank x 4,096; ")
    assert costs(found).total_flops is None
    assert costs(found).update_flops == costs(check(IMAGENET, examples=IMAGES)).update_flops
    fixed = check(IMAGENET.replace("epochs: 800, warmup_epochs: 40", "steps: 7"))
    assert costs(fixed).total_flops == 7 * costs(fixed).update_flops
    assert rows(fixed)["data"].startswith("not counted: data.root: nowhere does not exist")


def test_images_that_are_here_are_counted(check: Check) -> None:
    assert rows(check(PRETRAIN, examples=IMAGES))["data"] == "1,437 training images, 360 held out"


def test_labelled_images_of_a_given_number(check: Check) -> None:
    text = f"stage: supervised\nbackbone: {{depth: 50}}\nlabels: {{percent: 1}}\n{LABELS}"
    found = check(text, examples=IMAGES)
    assert rows(found)["data"].startswith("12,811 training images of 1,281,167, as given; ")
    assert rows(found)["steps"].startswith("751 updates")
    unknown = check(text.replace("percent: 1", "per_class: 13"), examples=IMAGES)
    assert rows(unknown)["data"].startswith("steps are not known: data.root: nowhere")


@pytest.mark.parametrize("world_size", [1, 64])
def test_memory_is_divided_and_weights_are_not(check: Check, world_size: int) -> None:
    network = cost(PRETRAINED, image_size=224).total
    states = 12 * network.parameters + 4 * network.statistics
    found = costs(check(IMAGENET, world_size=world_size))
    assert found.state_bytes == states
    assert found.memory_bytes == states + 2 * 4096 // world_size * network.activation_bytes
    cached = costs(check(IMAGENET, "batch.micro_batch=16", world_size=world_size))
    assert cached.memory_bytes == states + 2 * 16 * network.activation_bytes
    assert cached.update_flops == 4096 * 2 * 4 * network.flops


def test_sixteen_bits_two_moments_and_the_queue(check: Check) -> None:
    half = cost(PRETRAINED, image_size=224, precision="bf16").total
    found = costs(check(IMAGENET, "parallel.precision=bf16"))
    assert found.state_bytes == 14 * half.parameters + 4 * half.statistics
    assert found.view_bytes == half.activation_bytes
    adam = costs(check(IMAGENET.replace("lars", "adamw")))
    assert adam.state_bytes == 16 * half.parameters + 4 * half.statistics
    queue = costs(check(IMAGENET, "loss.queue={length: 1000}"))
    assert queue.state_bytes == 16 * half.parameters + 8 * half.statistics + 4 * 1000 * 128
    assert queue.update_flops == 4096 * 7 * half.flops
    assert "averaged copy" in rows(check(IMAGENET, "loss.queue={length: 1000}"))["compute"]


def test_classes_are_the_folders(check: Check, tmp_path: Path) -> None:
    for name in ("cat", "dog", "owl", ".hidden"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_bytes(b"")
    (tmp_path / "images" / ".hidden" / "1.png").unlink()
    here = [f"data.root={tmp_path / 'images'}", "batch.global_batch=2", "schedule.warmup_epochs=0"]
    found = check(IMAGENET, *here)
    assert found.network == Architecture(R50, HeadSection(), 3, from_layer=0)
    assert rows(found)["parameters"].endswith("head 8.66 M, classifier 6.15 k")
    for change in ("probe.linear=false", "data.labelled=false"):
        other = check(IMAGENET, *here, change)
        assert other.network == PRETRAINED
        assert rows(other)["parameters"].endswith("head 8.66 M")


def test_a_network_of_a_model_file(check: Check, tmp_path: Path) -> None:
    small = ResNetBackbone(depth=18, width=0.25)
    known = Architecture(small, HeadSection(layers=2), 5, from_layer=1)
    parent = f"parent={model_file(tmp_path / 'm.safetensors', known)}"

    tuned = check(f"stage: finetune\nlabels: {{percent: 1}}\n{LABELS}", parent, examples=IMAGES)
    kept = Architecture(small, HeadSection(layers=2), None, from_layer=1, keep_head_layers=1)
    assert tuned.network == kept
    whole = cost(kept, image_size=224)
    assert costs(tuned).update_flops == 1024 * 3 * whole.total.flops
    assert costs(tuned).memory_bytes == (
        12 * whole.total.parameters
        + 4 * whole.total.statistics
        + 1024 * whole.total.activation_bytes
    )

    linear = check(f"stage: linear\n{LABELS}", parent, "data={kind: digits}")
    frozen = Architecture(small, HeadSection(layers=2), 10, from_layer=0, keep_head_layers=0)
    assert linear.network == frozen
    whole = cost(frozen, image_size=224, frozen=True)
    assert costs(linear).update_flops == 1024 * (whole.total.flops + 2 * 2 * 128 * 10)
    assert costs(linear).state_bytes == (
        4 * (whole.total.parameters + whole.total.statistics) + 8 * (128 + 1) * 10
    )
    assert costs(linear).view_bytes == 4 * 128 + 4 * 4 * 16 * 112 * 112

    student = check(f"stage: distill\n{LABELS}", parent, "batch.micro_batch=256")
    own = Architecture(small, HeadSection(), 5, from_layer=0, keep_head_layers=0)
    assert student.network == own
    taught, teacher = cost(own, image_size=224), cost(known, image_size=224)
    assert costs(student).update_flops == 1024 * (3 * taught.total.flops + teacher.total.flops)
    assert costs(student).state_bytes == (
        12 * taught.total.parameters
        + 4 * taught.total.statistics
        + 4 * (teacher.total.parameters + teacher.total.statistics)
    )
    assert "the teacher's forward pass" in rows(student)["compute"]


def test_a_network_of_a_finished_run(check: Check, tmp_path: Path) -> None:
    shortest = ["schedule.steps=1", "checkpoint.every_steps=null", "probe.knn_every_epochs=null"]
    tiny.run(tiny.PRETRAIN, tmp_path / "run", *shortest)
    found = check(tiny.FINETUNE, f"parent={tmp_path / 'run'}")
    assert found.network == Architecture(
        ResNetBackbone(depth=10, width=0.0625, stem="cifar"),
        HeadSection(layers=3, output_width=16),
        10,
        from_layer=1,
        keep_head_layers=1,
    )
    with pytest.raises(RecipeError, match="from_layer: 4 is beyond the 3 head layers of the par"):
        check(tiny.FINETUNE, f"parent={tmp_path / 'run'}", "from_layer=4")


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0" + b"[" * 8],
)
def test_a_parent_that_is_no_network(check: Check, tmp_path: Path, content: bytes | None) -> None:
    parent = tmp_path / "m.safetensors"
    if content is not None:
        parent.write_bytes(content)
    found = check(FINETUNE, f"parent={parent}")
    assert rows(found)["parameters"] == "not known: the network is the parent's, not found here"
    assert found.cost is None
    assert found.as_facts()["cost"] is None


def test_a_student_of_its_own_whose_teacher_is_not_here(check: Check) -> None:
    found = check(f"stage: distill\nbackbone: {{depth: 50}}\n{LABELS}")
    assert ", without the unknown teacher: " in rows(found)["compute"]
    assert rows(found)["parent"] == "not given; needed to run: parent=DIR"


def test_a_width_that_no_network_has(check: Check) -> None:
    with pytest.raises(RecipeError, match=r"^backbone: width 0\.01 leaves fewer than 2"):
        check(IMAGENET, "backbone.width=0.01")


def test_the_networks_of_a_pipeline() -> None:
    runs = {run.path: run for run in check_recipe("digits", [])}
    parameters = {path: found.cost for path, found in runs.items()}
    assert parameters["knn"] is None
    for path in ("pretrain", "linear", "finetune/per_class=1,draw=0", "distill/per_class=1,draw=0"):
        network = runs[path].network
        assert network is not None
        with torch.device("meta"):
            model = build_model(network, seed=0)
        expected = sum(parameter.numel() for parameter in model.parameters())
        assert costs(runs[path]).network.total.parameters == expected
    lines = pipeline_text(list(runs.values())).splitlines()
    assert lines[0].endswith("44 warm-up; 780 k parameters; 2.46 TFLOP")
    assert lines[1] == "knn: 1,437 training images, 360 held out"


def test_the_facts_are_whole_numbers(check: Check) -> None:
    facts = json.loads(json.dumps(check(PRETRAIN).as_facts()))
    assert set(facts["cost"]) == {
        "backbone_parameters",
        "backbone_statistics",
        "head_parameters",
        "head_statistics",
        "classifier_parameters",
        "forward_flops",
        "update_flops",
        "total_flops",
        "activation_bytes",
        "state_bytes",
        "memory_bytes",
    }
    assert all(type(value) is int for value in facts["cost"].values())
    assert facts["cost"]["classifier_parameters"] == (128 + 1) * 10
    assert "\nmemory         activations " in stage_text(check(PRETRAIN))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (23_508_032, "23.5 MB"),
        (794_704_160, "795 MB"),
        (10**33, "1e+09 YB"),
    ],
)
def test_numbers_in_words(value: float, text: str) -> None:
    assert si(value, "B") == text


@pytest.mark.parametrize("selective_kernel", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_estimate_is_near_the_peak(selective_kernel: bool, frozen: bool) -> None:
    backbone = ResNetBackbone(depth=50, selective_kernel=selective_kernel)
    architecture = Architecture(backbone, HeadSection(), None, from_layer=0)
    with torch.device("meta"):
        model = build_model(architecture, seed=0).train(mode=not frozen)
        images = torch.empty(64, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    model.requires_grad_(requires_grad=not frozen)
    with Live([images, *model.parameters(), *model.buffers()]) as live:
        projections = model(images).projections[-1]
        if not frozen:
            projections.sum().backward()
    found = cost(architecture, image_size=224)
    if frozen:
        assert 0.75 < live.peak / (64 * 4 * found.largest_activation_bytes) < 1.25
    else:
        gradients = 4 * found.total.parameters
        estimate = gradients + 64 * found.total.activation_bytes
        assert 0.95 < live.peak / estimate < 1.0


# --- ranks that share, and GPUs ------------------------------------------------------------------


R152_3X_SK = ("backbone.depth=152", "backbone.width=3", "backbone.selective_kernel=true")


@pytest.mark.parametrize(
    ("strategy", "whole", "shared", "units"),
    [
        ("ddp", 12, 0, 0),
        ("zero1", 8, 4, 0),
        ("deepspeed_zero1", 8, 4, 0),
        ("deepspeed_zero2", 4, 8, 0),
        ("deepspeed_zero3", 0, 12, 12),
        ("fsdp2", 0, 12, 12),
    ],
)
def test_what_ranks_share(check: Check, strategy: str, whole: int, shared: int, units: int) -> None:
    network = cost(PRETRAINED, image_size=224)
    parameters, statistics = network.total.parameters, network.total.statistics
    found = costs(check(IMAGENET, f"parallel.strategy={strategy}", world_size=64))
    # The largest unit is the head here.
    expected = whole * parameters + shared * parameters / 64 + 4 * statistics
    expected += units * network.head.parameters
    assert found.state_bytes == pytest.approx(expected, abs=16)
    assert found.state_bytes >= expected


def test_what_stays_gathered_and_what_leaves_the_gpu(check: Check) -> None:
    network = cost(PRETRAINED, image_size=224)
    parameters, statistics = network.total.parameters, network.total.statistics
    stays = ("parallel.strategy=fsdp2", "parallel.reshard=false")
    found = costs(check(IMAGENET, *stays, world_size=64))
    expected = (4 + 12 / 64) * parameters + 4 * network.head.parameters + 4 * statistics
    assert found.state_bytes == pytest.approx(expected, abs=16)
    leaves = ("parallel.strategy=deepspeed_zero1", "parallel.offload=true")
    found = costs(check(IMAGENET, *leaves, world_size=64))
    assert found.state_bytes == 8 * parameters + 4 * statistics


@pytest.mark.parametrize("memory", ["selective", "block"])
def test_a_lever_in_the_plan(check: Check, memory: Memory) -> None:
    network = cost(PRETRAINED, image_size=224, memory=memory)
    plain = costs(check(IMAGENET, world_size=64))
    found = check(IMAGENET, f"parallel.memory={memory}", world_size=64)
    assert costs(found).view_bytes == network.total.activation_bytes + network.again_bytes
    assert costs(found).view_bytes < plain.view_bytes
    assert costs(found).state_bytes == plain.state_bytes
    assert costs(found).update_flops - plain.update_flops == 4096 * 2 * network.again_flops
    assert " kept per view or made again; about " in rows(found)["memory"]
    share = {"selective": 20, "block": 100}[memory]
    assert f", and {share}% of the forward pass again: " in rows(found)["compute"]


def test_memory_that_is_left_to_what_there_is(check: Check) -> None:
    plain, auto = check(IMAGENET), check(IMAGENET, "parallel.memory=auto")
    assert costs(auto) == costs(plain)
    assert " kept per view unless memory=auto finds too little; " in rows(auto)["memory"]


def test_gpus_of_the_largest_network() -> None:
    (found,) = check_recipe("imagenet/1_pretrain", [*R152_3X_SK, "batch.global_batch=4096"])
    table = found.gpus
    assert table is not None
    needed = {(row.strategy, row.memory): row.gpu_bytes for row in table.estimates}
    assert len(needed) == 6 * 3
    # Counted apart from this code: 342, 163 and 79 MB kept per view.
    for memory, megabytes in (("none", 342), ("selective", 163), ("block", 79)):
        many, few = needed["ddp", memory][-1], needed["ddp", memory][0]
        assert many is not None
        assert few is not None
        kept = (few - many) / (2 * (512 - 32))
        assert megabytes * 0.98 < kept / 1e6 < megabytes + 15  # a block is made again beside it
    least = [table.smallest(memory) for memory in ("none", "selective", "block")]
    assert least == [Smallest(64, "ddp"), Smallest(32, "ddp"), Smallest(16, "ddp")]
    lines = gpus_text([found]).splitlines()
    assert lines[0] == ("GB per GPU, about; batch 4,096, each GPU's share in one forward pass")
    assert lines[2].split() == ["images", "per", "GPU", "512", "256", "128", "64", "32"]
    assert lines[-1] == (
        "80 GB are enough with memory=none on 64 GPUs (ddp); memory=selective on 32 GPUs (ddp); "
        "memory=block on 16 GPUs (ddp)"
    )


def test_the_table_agrees_with_the_plan_of_one_row(check: Check) -> None:
    table = check(IMAGENET, "batch.micro_batch=16").gpus
    assert table is not None
    needed = {(row.strategy, row.memory): row.gpu_bytes for row in table.estimates}
    row = ("parallel.strategy=zero1", "parallel.memory=selective")
    planned = costs(check(IMAGENET, *row, world_size=32))
    assert needed["zero1", "selective"][GPUS.index(32)] == planned.memory_bytes


def test_batches_that_do_not_divide(check: Check) -> None:
    table = check(IMAGENET, "batch.global_batch=48").gpus
    assert table is not None
    assert all(
        (n is None) == (gpus not in (8, 16))
        for n, gpus in zip(table.estimates[0].gpu_bytes, GPUS, strict=True)
    )
    assert table.text().splitlines()[2].split()[3:] == ["6", "3", "-", "-", "-"]
    facts = json.loads(json.dumps(table.as_facts()))
    assert facts["gpus"] == [8, 16, 32, 64, 128]
    assert facts["estimates"][0]["bytes"][2:] == [None, None, None]
    assert facts["smallest"]["none"] == {"gpus": 8, "strategy": "ddp"}
    nowhere = check(IMAGENET, "batch.global_batch=9").gpus
    assert nowhere is not None
    assert nowhere.smallest("none") is None
    assert nowhere.text().endswith("memory=block on none of these")


def test_gpus_of_runs_without_a_network(check: Check) -> None:
    assert gpus_text([check(FINETUNE)]) == "memory per GPU: not known"
    tables = gpus_text(check_recipe("digits", [])).split("\n\n")
    assert re.match(r"pretrain \(and \d+ more\):\nGB per GPU", tables[0])
    assert "knn:\nmemory per GPU: not known" in tables


def test_gpus_on_the_command_line(check: Check, tmp_path: Path) -> None:
    found = check(PRETRAIN)
    words = ["check", str(tmp_path / "mine.yaml"), "--gpus"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0
    assert shown.stdout == f"{stage_text(found)}\n\n{gpus_text([found])}\n"
    (facts,) = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert found.gpus is not None
    assert facts == {**found.as_facts(), "gpus": found.gpus.as_facts()}
    (plain,) = json.loads(CliRunner().invoke(app, [*words[:2], "--json"]).stdout)
    assert "gpus" not in plain
