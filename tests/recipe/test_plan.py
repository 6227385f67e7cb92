"""Plans: how a batch is shared, and which settings contradict each other."""

import pytest

from bigsimclr.errors import RecipeError
from bigsimclr.recipe import load_recipe, parse_recipe
from bigsimclr.recipe.plan import BatchShares, describe, make_plan, share_batch
from bigsimclr.recipe.schema import AnyTraining, PretrainRecipe
from tests.recipe.samples import PRETRAIN


def recipe(batch: str = "", parallel: str = "") -> AnyTraining:
    """Give the sample more settings in its batch, and in a section `parallel`."""
    text = PRETRAIN.replace("global_batch: 64", f"global_batch: 64{batch}")
    read = parse_recipe(f"{text}parallel: {{{parallel}}}\n", name="r.yaml")
    assert isinstance(read, PretrainRecipe)
    return read


def test_auto_is_the_whole_share_until_it_is_known_what_fits() -> None:
    auto = recipe(", micro_batch: auto")
    assert share_batch(auto) == BatchShares(64, 64, "direct")
    assert share_batch(auto, world_size=4) == BatchShares(16, 16, "direct")
    assert share_batch(auto, world_size=4, micro_batch=8) == BatchShares(16, 8, "cached")
    assert share_batch(auto, world_size=4, micro_batch=16) == BatchShares(16, 16, "direct")
    plan = make_plan(auto, examples=640, world_size=2, micro_batch=4)
    assert (plan.rank_batch, plan.micro_batch, plan.update) == (32, 4, "cached")
    rows = dict(describe(auto, examples=None, world_size=2))
    assert rows["batch"] == "64 = 2 ranks x 32; micro-batch as large as fits, at most 32"


def test_what_fits_is_for_auto_alone() -> None:
    given = recipe(", micro_batch: 16")
    assert share_batch(given, micro_batch=8) == BatchShares(64, 16, "cached")
    assert share_batch(recipe(), micro_batch=8) == BatchShares(64, 64, "direct")
    with pytest.raises(RecipeError, match=r"^batch\.micro_batch: 64 images per rank are not a mul"):
        share_batch(recipe(", micro_batch: auto"), micro_batch=7)


def test_two_passes_are_those_of_one_direct_update() -> None:
    assert share_batch(recipe(", batch_norm: two_pass")).update == "direct"
    assert share_batch(recipe(", batch_norm: two_pass"), world_size=8).update == "direct"
    pieces = recipe(", batch_norm: two_pass, micro_batch: 16")
    assert share_batch(pieces, world_size=4).update == "direct"
    with pytest.raises(RecipeError) as caught:
        share_batch(pieces, world_size=2)
    message = str(caught.value)
    assert message.startswith("batch.batch_norm: two_pass would make every layer's statistics wait")
    assert "parallel.memory=block without batch.micro_batch" in message
    grouped = recipe(", batch_norm: two_pass", "sync_group_size: 2")
    assert share_batch(grouped, world_size=2).update == "direct"
    with pytest.raises(RecipeError, match=r"^batch\.batch_norm: .* drop parallel\.sync_group_size"):
        share_batch(grouped, world_size=4)


@pytest.mark.parametrize(
    ("batch", "parallel", "message"),
    [
        (", batch_norm: two_pass, micro_batch: auto", "", "batch.batch_norm: two_pass would"),
        (
            ", batch_norm: two_pass, micro_batch: 8, update: cached",
            "",
            "batch.batch_norm: two_pass would",
        ),
        (", micro_batch: auto, update: direct", "", "batch.update: direct takes the whole batch"),
        (
            ", micro_batch: auto, update: accumulated",
            "",
            "batch.update: accumulated is not offered for a contrastive loss: with micro-batches "
            "of 32 ",
        ),
        (", micro_batch: most", "", "batch.micro_batch: "),
        ("", "reshard: false", "parallel.reshard: ddp gathers no parameters"),
        ("", "strategy: deepspeed_zero3, reshard: false", "parallel.reshard: deepspeed_zero3 gat"),
        ("", "offload: true", "parallel.offload: ddp keeps the optimizer state on the device"),
        (
            "",
            "strategy: fsdp2, gradient_exchange: bf16",
            "parallel.gradient_exchange: fsdp2 adds gradients up in its own type",
        ),
        ("", "strategy: fsdp2, offload: true", "parallel.offload: fsdp2 keeps the optimizer"),
    ],
)
def test_settings_that_contradict_each_other(batch: str, parallel: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(batch, parallel)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_settings_that_belong_together() -> None:
    recipe("", "strategy: fsdp2, reshard: false")
    recipe("", "strategy: deepspeed_zero2, offload: true")


def test_groups_of_ranks_come_out_even() -> None:
    groups = recipe("", "sync_group_size: 4")
    for world_size in (4, 8, 64):
        assert share_batch(groups, world_size=world_size).rank_batch == 64 // world_size
    for world_size, fits in ((1, 1), (2, 2)):
        with pytest.raises(RecipeError) as caught:
            share_batch(groups, world_size=world_size)
        assert str(caught.value) == (
            f"parallel.sync_group_size: {world_size} ranks do not make groups of 4; "
            f"parallel.sync_group_size={fits} does"
        )


def test_batch_norm_never_sees_one_image_alone() -> None:
    one, alone = recipe(", micro_batch: 1"), recipe("", "sync_group_size: 1")
    with pytest.raises(RecipeError, match=r"^batch\.micro_batch: batch norm needs 2 images"):
        share_batch(one)
    with pytest.raises(RecipeError, match=r"^batch\.global_batch: batch norm needs 2 images"):
        share_batch(alone, world_size=64)
    assert share_batch(one, world_size=2) == BatchShares(32, 1, "cached")
    assert share_batch(recipe(), world_size=64) == BatchShares(1, 1, "direct")
    assert share_batch(alone, world_size=32) == BatchShares(2, 2, "direct")


def test_the_batch_that_is_advised_can_be_filled() -> None:
    with pytest.raises(RecipeError, match=r"^batch\.global_batch: 3 .* batch\.global_batch=2$"):
        make_plan(recipe(), examples=3)
    with pytest.raises(RecipeError, match=r"^data: a contrastive loss needs 2 images at least"):
        make_plan(recipe(), examples=1)


def test_a_shipped_recipe_of_many_ranks() -> None:
    shipped = load_recipe("recipes/imagenet/1_pretrain.yaml")
    assert isinstance(shipped, PretrainRecipe)
    assert share_batch(shipped, world_size=64) == BatchShares(64, 64, "direct")
