"""What stays in a workspace and what goes: promises over random worlds, each checked by a computation of its own."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deepfloyd_core.config.retention import Policy
from deepfloyd_core.store.counts import days, ranges, size
from deepfloyd_core.store.inventory import FileLink, Inventory, Stored
from deepfloyd_core.store.retention import GcPlan, Published, World, plan_gc

DAY_S, NOW = 86_400.0, 1_000 * 86_400.0
ORDER = "image_index", "stage1_pixels", "stage1_lora", "lora_bundle", "generated"  # each is made from kinds before it


def stored(name: str, age_days: float = 100, *inputs: str, **others: object) -> Stored:
    one = Stored(name, True, NOW - age_days * DAY_S, inputs, (), (), False)
    return replace(one, **others)  # type: ignore[arg-type]


def world(*artifacts: Stored, versions: tuple[Published, ...] = (), **others: object) -> World:
    inventory = Inventory(artifacts, (), (), ())
    served = (versions[-1].number,) if versions else ()
    return replace(World(inventory, versions, served, {}), **others)  # type: ignore[arg-type]


def version(number: int, bundle: str, index: str, age_days: float = 100, run_file: str = "") -> Published:
    return Published(number, bundle, index, {}, NOW - age_days * DAY_S, run_file)


def gone(plan: GcPlan) -> set[str]:
    return {going.artifact.name for going in plan.goes}


def after(before: World, plan: GcPlan) -> World:
    left = [one for one in before.inventory.artifacts if one.name not in gone(plan)]
    leftovers = [one for one in before.inventory.leftovers if one not in [each for each, _ in plan.leftovers]]
    return replace(before, inventory=replace(before.inventory, artifacts=tuple(left), leftovers=tuple(leftovers)))


def random_world(seed: int) -> World:
    """Artifacts with inputs among earlier kinds, some lost, unfinished, locked, leased; and versions of some bundles."""
    rng, artifacts, links = Random(seed), list[Stored](), [0, 1, 1, 1, 2, 2, 3, 3, 4, 5]
    for kind in ORDER:
        earlier = [one.name for one in artifacts if one.finished]
        for number in range(rng.randint(0, 5)):
            inputs = rng.sample(earlier, min(len(earlier), rng.randint(0, 3)))
            files = [
                FileLink(1, inode, links[inode], 10**inode) for inode in rng.choices(range(1, 10), k=rng.randint(0, 3))
            ]
            artifacts.append(
                stored(
                    f"{kind}/{number:016x}", rng.choice([0, 1, 5, 20, 40, 99]), *inputs,
                    weights=tuple(rng.sample(earlier, min(len(earlier), rng.randint(0, 1)))),
                    finished=rng.random() < 0.8, locked=rng.random() < 0.05, files=tuple(files),
                )
            )  # fmt: skip
    known = {one.name: list(one.inputs) for one in artifacts}
    lost, leased = ({name for name in known if rng.random() < share} for share in (0.1, 0.05))
    bundles, indices = ([name for name in known if name.startswith(kind)] for kind in ("lora_bundle/", "image_index/"))
    versions = tuple(
        replace(
            version(number, rng.choice(bundles), rng.choice(indices or ["image_index/" + "f" * 16]), 30 - number),
            lineage=known, run_file=rng.choice(["", "a.toml", "b.toml"]),
        )
        for number in range(1, rng.randint(1, 9) if bundles else 1)
    )  # fmt: skip
    served = tuple(rng.sample([one.number for one in versions], min(len(versions), rng.randint(0, 3))))
    left = tuple(one for one in artifacts if one.name not in lost)
    return World(Inventory(left, (), (), ()), versions, served, dict.fromkeys(leased, "process 1"))


worlds = st.integers(0, 2**32).map(random_world)
policies = st.builds(Policy, keep_versions=st.integers(1, 4), keep_days=st.sampled_from([0, 2, 10, 50]))


def below(lineage: dict[str, list[str]], name: str) -> Iterator[str]:
    """What an artifact was made from, by recursion; a bundle that something is made from is not followed."""
    yield name
    for each in lineage.get(name, []):
        yield from [each] if each.startswith("lora_bundle/") else below(lineage, each)


@given(worlds, policies)
def test_nothing_that_a_kept_version_was_made_from_goes(before: World, policy: Policy) -> None:
    lineage = {one.name: list(one.inputs) for one in before.inventory.artifacts}
    for one in before.versions:
        lineage = {**one.lineage, **lineage}
    kept = [one for one in before.versions if one.published >= NOW - policy.keep_days * DAY_S]
    for run_file in {one.run_file for one in before.versions}:
        kept += [one for one in before.versions if one.run_file == run_file][-policy.keep_versions :]
    kept += [one for one in before.versions if one.number in before.served[: max(2, policy.keep_versions)]]
    needed = {name for one in kept for root in (one.bundle, one.image_index) for name in below(lineage, root)}
    weights = {
        name for one in before.inventory.artifacts if one.name in needed for name in one.weights
    }  # of trainings that started from others
    assert not gone(plan_gc(before, policy, NOW)) & (needed | weights)


@given(worlds, policies)
def test_nothing_that_runs_use_or_that_is_young_goes_nor_what_the_next_run_reuses(
    before: World, policy: Policy
) -> None:
    goes = gone(plan_gc(before, policy, NOW))
    artifacts = before.inventory.artifacts
    assert not goes & (set(before.leased) | {one.name for one in artifacts if one.locked})
    assert not goes & {one.name for one in artifacts if one.changed >= NOW - policy.keep_days * DAY_S}
    for one in (one for one in artifacts if one.name in goes and one.kind != "generated"):
        newer = [other for other in artifacts if other.kind == one.kind and other.changed >= one.changed]
        assert any(other.finished >= one.finished and other.name not in goes for other in newer), one


@given(worlds, policies)
def test_a_second_gc_finds_nothing(before: World, policy: Policy) -> None:
    plan = plan_gc(before, policy, NOW)
    assert not gone(plan_gc(after(before, plan), policy, NOW))
    assert {one.artifact.name for one in plan.stays} | gone(plan) == {one.name for one in before.inventory.artifacts}


@given(worlds, policies, policies)
def test_who_keeps_more_loses_less(before: World, one: Policy, other: Policy) -> None:
    more = Policy(
        keep_versions=max(one.keep_versions, other.keep_versions), keep_days=max(one.keep_days, other.keep_days)
    )
    assert gone(plan_gc(before, more, NOW)) <= gone(plan_gc(before, one, NOW))


@given(worlds, policies)
def test_bytes_that_are_freed_are_those_of_files_whose_every_name_goes(before: World, policy: Policy) -> None:
    plan = plan_gc(before, policy, NOW)
    names = Counter(file for going in plan.goes for file in going.artifact.files)
    assert plan.frees == sum(file.bytes for file, count in names.items() if count >= file.links)


# ---- by example -------------------------------------------------------------------------------------------------------


def test_of_each_run_file_the_last_versions_stay_but_not_those_of_one_that_is_gone() -> None:
    bundles = [stored(f"lora_bundle/{number:016x}", 100 - number) for number in range(6)]
    files = ["b.toml", "", "a.toml", "a.toml", "", ""]
    versions = tuple(
        version(number, bundle.name, "image_index/" + "0" * 16, run_file=file)
        for number, (bundle, file) in enumerate(zip(bundles, files, strict=True), 1)
    )
    plan = plan_gc(world(*bundles, versions=versions), Policy(keep_versions=1), NOW)
    assert plan.versions == (2, 3, 5)
    assert [going.versions for going in plan.goes] == [(2,), (3,), (5,)]


def test_a_version_that_is_used_again_stays_with_the_one_to_return_to() -> None:
    bundles = [stored(f"lora_bundle/{number:016x}", 100 - number) for number in range(6)]
    versions = tuple(version(number, one.name, "image_index/" + "0" * 16) for number, one in enumerate(bundles, 1))
    before = world(*bundles, versions=versions, served=(2, 4, 3))
    assert plan_gc(before, Policy(keep_versions=2), NOW).versions == (1, 3)
    reasons = {one.artifact.name[-1]: one.why for one in plan_gc(before, Policy(keep_versions=2), NOW).stays}
    assert reasons["1"] == "version 2, the champion" and reasons["3"] == "former champions, for a rollback"


def test_a_version_that_pictures_were_drawn_with_lately_keeps_its_bundle_alone() -> None:
    index, lora = stored("image_index/" + "0" * 16), stored("stage1_lora/" + "0" * 16, 100)
    bundle = stored("lora_bundle/" + "0" * 16, 100, index.name, lora.name)
    newer = [stored(f"{one.kind}/{'1' * 16}", 90) for one in (index, lora, bundle)]
    drawn = stored("generated/" + "0" * 16, 1, bundle.name)
    versions = version(1, bundle.name, index.name), version(2, newer[2].name, newer[0].name)
    plan = plan_gc(world(index, lora, bundle, *newer, drawn, versions=versions), Policy(keep_versions=1), NOW)
    assert gone(plan) == {index.name, lora.name}
    assert plan_gc(world(index, lora, bundle, *newer, versions=versions), Policy(keep_versions=1), NOW).versions == (1,)


def test_weights_that_a_kept_training_started_from_stay() -> None:
    parent, child = stored("stage1_lora/" + "0" * 16, 100, "image_index/" + "a" * 16), stored("stage1_lora/" + "1" * 16)
    index = stored("image_index/" + "a" * 16, 100)
    others = stored("image_index/" + "b" * 16, 50), stored("stage1_lora/" + "2" * 16, 50)
    bundle = stored("lora_bundle/" + "1" * 16, 100, child.name)
    before = world(
        index, parent, replace(child, weights=(parent.name,)), bundle, *others,
        versions=(version(1, bundle.name, others[0].name),),
    )  # fmt: skip
    assert gone(plan_gc(before, Policy(), NOW)) == {index.name}


def test_the_texts_of_a_kept_version_stay_though_its_training_names_only_their_rows() -> None:
    embeds, text = stored("text_embeds/" + "0" * 16), stored("stage1_text/" + "0" * 16, 100, "text_embeds/" + "0" * 16)
    samples, bundle = stored("cascade_samples/" + "0" * 16, 100, embeds.name), stored("lora_bundle/" + "0" * 16)
    newer = [stored(f"{one.kind}/{'1' * 16}", 90) for one in (embeds, text, samples)]
    bundle = replace(bundle, inputs=(samples.name,))
    plan = plan_gc(
        world(embeds, text, samples, bundle, *newer, versions=(version(1, bundle.name, "image_index/" + "0" * 16),)),
        Policy(), NOW,
    )  # fmt: skip
    assert not plan.goes
    assert plan_gc(world(embeds, text, samples, bundle, *newer), Policy(), NOW).goes == ()  # the newest bundle's, too
    assert gone(plan_gc(world(embeds, text, *newer), Policy(), NOW)) == {embeds.name, text.name}


def test_unfinished_work_stays_while_it_is_the_newest_and_goes_when_it_was_overtaken() -> None:
    pixels = stored("stage1_pixels/" + "0" * 16, 80)
    unfinished = stored("stage1_lora/" + "1" * 16, 60, pixels.name, finished=False)
    newer_pixels, finished = stored("stage1_pixels/" + "2" * 16, 50), stored("stage1_lora/" + "2" * 16, 40)
    assert not gone(plan_gc(world(pixels, newer_pixels, unfinished), Policy(), NOW))
    plan = plan_gc(world(pixels, newer_pixels, unfinished, finished), Policy(), NOW)
    assert gone(plan) == {unfinished.name, pixels.name}
    assert gone(plan_gc(world(pixels, newer_pixels, unfinished, finished), Policy(keep_days=70), NOW)) == set()


def test_a_file_that_a_backup_links_frees_nothing_and_one_of_two_artifacts_counts_once() -> None:
    shared, backed_up = FileLink(1, 1, 2, 1_000), FileLink(1, 2, 2, 50)
    old = [stored(f"generated/{number:016x}", files=(shared, backed_up)[: 2 - number]) for number in range(2)]
    plan = plan_gc(world(*old), Policy(), NOW)
    assert [going.frees for going in plan.goes] == [0, 1_000] and plan.frees == 1_000
    assert plan_gc(world(old[0]), Policy(), NOW).frees == 0


@pytest.mark.parametrize(
    "values", [{"keep_versions": 0}, {"keep_versions": 10_001}, {"keep_days": -1}, {"keep_days": float("nan")},
               {"keep_days": float("inf")}, {"keep_version": 3}]
)  # fmt: skip
def test_a_policy_that_keeps_no_version_or_makes_no_sense_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Policy(**values)  # type: ignore[arg-type]


def test_numbers_are_told_as_people_read_them() -> None:
    sizes = {0: "0 B", 999: "999 B", 1_000: "1.00 kB", 12_345: "12.3 kB", 999_499: "999 kB", 999_500: "1.00 MB",
             9_996: "10.0 kB", 99_960: "100 kB", 34_500_000_000: "34.5 GB", 5_200 * 10**12: "5200 TB"}  # fmt: skip
    assert {count: size(count) for count in sizes} == sizes
    assert ranges([3, 1, 2, 9, 12, 13, 3]) == "1 to 3, 9, 12, 13"
    assert [days(count) for count in (1, 14, 0.5)] == ["1 day", "14 days", "0.5 days"]
