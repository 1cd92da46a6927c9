import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmount.errors import MissingFeature, TooManyLayers, UsageError
from flatmount.plan import MountPlan, Parameter, as_data, encode, explain, undo
from flatmount.plan import operations as op
from flatmount.plan.facts import HostFacts
from flatmount.rootfs.assembler import Assembler
from flatmount.rootfs.ranges import RangePool
from flatmount.strategies import AUTO, STRATEGIES, Attach, RootfsSpec, Upper, choose, pin, pin_image, pin_superblock

EVERYTHING = HostFacts(**{field.name: True for field in dataclasses.fields(HostFacts)})
OLD = dataclasses.replace(EVERYTHING, detached_layers=False)


def spec(layers: int, **changes: object) -> RootfsSpec:
    base = RootfsSpec(tuple(f"layers/{i}" for i in range(1, layers + 1)), flat="flat/1", shifted="shifted/1")
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [1, 2, 50, 500])
def test_mount_operations_follow_the_formula(layers: int) -> None:
    counts = {name: build(spec(layers), EVERYTHING).mount_operations for name, build in STRATEGIES.items()}
    assert counts == {
        "per-layer": 2 * (1 + 2 * layers) + 1,
        "common-parent": 7,
        "detached": 1,
        "flat": 1,
        "chown": 1,
    }


@pytest.mark.parametrize("name", ["detached", "flat"])
@pytest.mark.parametrize("facts", [EVERYTHING, OLD], ids=["detached layers", "helper namespace"])
def test_the_constant_strategies_attach_once_whatever_the_kernel(name: str, facts: HostFacts) -> None:
    assert STRATEGIES[name](spec(60), facts).mount_operations == 1
    assert STRATEGIES[name](spec(60, upper=Upper.NONE), facts).mount_operations == 1
    assert STRATEGIES[name](spec(60, attach=Attach.NONE), facts).mount_operations == 0


@pytest.mark.parametrize("facts", [EVERYTHING, OLD], ids=["detached layers", "helper namespace"])
@pytest.mark.parametrize("upper", list(Upper))
def test_an_erofs_image_is_the_one_lower_and_the_hard_links_are_left_alone(facts: HostFacts, upper: Upper) -> None:
    wanted = spec(60, erofs="erofs/2", upper=upper)
    plan = STRATEGIES["flat"](wanted, facts)
    assert plan.mount_operations == 1
    assert STRATEGIES["flat"](dataclasses.replace(wanted, attach=Attach.NONE), facts).mount_operations == 0
    assert plan == STRATEGIES["flat"](dataclasses.replace(wanted, flat=None), facts)
    lowers = [one.value for one in plan.operations if isinstance(one, op.FsConfigString) and one.key == "lowerdir"]
    where = "." if facts.detached_layers else (Parameter.IMAGE_AT,)
    assert lowers == ([] if upper is Upper.NONE else [where])
    assert "flat/1" not in explain(plan)
    # What it names is lent: a run that is given nothing else can be encoded.
    assert (op.IMAGE_ROOT in encode(plan).lent) == facts.detached_layers
    assert (Parameter.IMAGE_AT in encode(plan).parameters) != facts.detached_layers


def test_what_an_image_needs_once_attaches_nothing_to_the_host() -> None:
    assert pin_superblock(EVERYTHING).mount_operations == pin_image(EVERYTHING).mount_operations == 0
    for plan in (pin_superblock(OLD), pin_image(OLD)):
        assert plan.mount_operations == 1
        inside = False
        for operation in plan.operations:
            if isinstance(operation, op.Setns):
                inside = operation.namespace is op.HELPER
            assert inside or not isinstance(operation, op.MoveMount)
        assert not inside


def test_a_root_of_its_own_is_the_topmost_lower_of_a_read_only_overlay_alone() -> None:
    wanted = spec(3, top="roots/9", upper=Upper.NONE)

    def lowers(of: RootfsSpec) -> list[object]:
        return [
            one.value
            for one in STRATEGIES["detached"](of, EVERYTHING).operations
            if getattr(one, "key", "") == "lowerdir+"
        ]

    assert lowers(wanted) == ["roots/9", "layers/3", "layers/2", "layers/1"]
    assert lowers(dataclasses.replace(wanted, upper=Upper.STORE)) == ["layers/3", "layers/2", "layers/1"]
    STRATEGIES["detached"](spec(499, top="roots/9", upper=Upper.NONE), EVERYTHING)
    with pytest.raises(TooManyLayers, match="501 directories"):
        STRATEGIES["detached"](spec(500, top="roots/9", upper=Upper.NONE), EVERYTHING)


@pytest.mark.parametrize("name", ["per-layer", "common-parent", "detached"])
def test_more_lowers_than_overlayfs_takes_names_the_limit_and_the_way_out(name: str) -> None:
    STRATEGIES[name](spec(500), EVERYTHING)
    with pytest.raises(TooManyLayers, match=r"501 layers .* 500") as refusal:
        STRATEGIES[name](spec(501), EVERYTHING)
    assert "flat" in refusal.value.hint


def test_flat_does_not_know_how_many_layers_there_are() -> None:
    assert STRATEGIES["flat"](spec(1), EVERYTHING) == STRATEGIES["flat"](spec(10_000), EVERYTHING)


@pytest.mark.parametrize("name", ["per-layer", "common-parent", "detached", "flat"])
def test_nothing_falls_back_to_copying(name: str) -> None:
    with pytest.raises(MissingFeature, match="id-mapped") as refusal:
        STRATEGIES[name](spec(3), HostFacts())
    assert "chown" in refusal.value.hint


@pytest.mark.parametrize(
    ("facts", "flat_ready", "expected"),
    [
        (EVERYTHING, True, "flat"),
        (EVERYTHING, False, "detached"),
        (OLD, True, "flat"),
        (dataclasses.replace(OLD, lowerdir_append=False), False, "common-parent"),
    ],
)
def test_auto_takes_the_best_and_says_why(facts: HostFacts, flat_ready: bool, expected: str) -> None:
    choice = choose(AUTO, facts, flat_ready=flat_ready, layers=60)
    assert choice.name == expected
    assert choice.reason


def test_auto_never_copies() -> None:
    with pytest.raises(MissingFeature, match="cannot id-map"):
        choose(AUTO, HostFacts(), flat_ready=True, layers=1)


def test_an_unknown_strategy_names_those_there_are() -> None:
    with pytest.raises(UsageError) as refusal:
        choose("fast", EVERYTHING, flat_ready=True, layers=1)
    assert "per-layer" in refusal.value.hint


def calls(plan: MountPlan) -> list[str]:
    return [type(operation).__name__ for operation in plan.operations]


def test_per_layer_makes_containerds_calls_in_its_order() -> None:
    once = ["Mkdir", "OpenTree", "MountSetattr", "MoveMount", "Close"]
    one_pass = ["Mkdir", *once * 2, "Mount", *["Unmount", "Rmdir"] * 2, "Rmdir"]
    look = ["ReadFile", "ReadFile", "Unmount", "Unmount", "Rmdir"]
    upper = ["Mkdir", "Mkdir", "Chown", "Mkdir"]
    assert calls(STRATEGIES["per-layer"](spec(2), EVERYTHING)) == [*upper, "Mkdir", *one_pass, *look, *one_pass]


def test_common_parent_makes_containerds_calls_in_its_order() -> None:
    one_pass = ["Mkdir", "OpenTree", "MountSetattr", "MoveMount", "Close", "Mount", "Unmount", "Rmdir"]
    look = ["ReadFile", "ReadFile", "Unmount", "Unmount", "Rmdir"]
    upper = ["Mkdir", "Mkdir", "Chown", "Mkdir"]
    assert calls(STRATEGIES["common-parent"](spec(50), EVERYTHING)) == [*upper, "Mkdir", *one_pass, *look, *one_pass]


def test_the_usual_code_id_maps_read_only_and_by_path() -> None:
    plan = STRATEGIES["common-parent"](spec(3), EVERYTHING)
    attributes = {operation.attributes for operation in plan.operations if isinstance(operation, op.MountSetattr)}
    assert attributes == {op.MountAttribute.RDONLY | op.MountAttribute.NODEV}
    overlay = [operation for operation in plan.operations if isinstance(operation, op.Mount)][-1]
    assert isinstance(overlay.data, tuple)
    lowers = [part for part in overlay.data if isinstance(part, str) and part.strip(":/").isdigit()]
    assert lowers == ["3", "2", "1"]  # topmost first


def test_long_options_are_compacted_from_a_working_directory() -> None:
    short, long = (STRATEGIES["per-layer"](spec(n), EVERYTHING) for n in (10, 200))
    assert "Chdir" not in calls(short)
    assert calls(long).count("Chdir") == 4


def test_the_layers_reach_overlayfs_topmost_first() -> None:
    plan = STRATEGIES["detached"](spec(3), EVERYTHING)
    lowers = [o.value for o in plan.operations if isinstance(o, op.FsConfigString) and o.key == "lowerdir+"]
    assert lowers == ["layers/3", "layers/2", "layers/1"]


def test_a_slot_nobody_fills_is_refused() -> None:
    with pytest.raises(ValueError, match="before anything fills it"):
        encode(MountPlan((op.MoveMount(op.Slot("nothing"), "/x"),)))


def test_a_string_the_kernel_cannot_carry_is_refused() -> None:
    with pytest.raises(UsageError, match="control character"):
        encode(MountPlan((op.Mkdir("/a\0b"),)))


def test_explain_counts_and_marks_the_mount_operations() -> None:
    for build in STRATEGIES.values():
        plan = build(spec(4), EVERYTHING)
        lines = explain(plan, {Parameter.TARGET: "/mnt"}).splitlines()
        assert len(lines) == len(plan.operations)
        assert sum(line[5] == "*" for line in lines) == plan.mount_operations
        assert sum(entry["mount_operation"] for entry in as_data(plan)) == plan.mount_operations


def test_undoing_a_whole_plan_leaves_only_what_it_kept() -> None:
    plan = STRATEGIES["per-layer"](spec(3, make_target=True), EVERYTHING)
    undone = undo(plan)
    assert [type(o).__name__ for o in undone.operations] == ["Unmount", "Rmdir", "Rmdir", "Rmdir", "Rmdir"]


@given(st.integers(0, 60), st.sampled_from(sorted(STRATEGIES)))
def test_undoing_after_any_operation_takes_back_every_mount_and_directory(done: int, name: str) -> None:
    plan = STRATEGIES[name](spec(3, make_target=True), EVERYTHING)
    mounted: list[op.Text] = []
    made: list[op.Text] = []
    for operation in [*plan.operations[:done], *undo(plan, done).operations]:
        match operation:
            case op.MoveMount(_, target) | op.Mount(_, target):
                mounted.append(target)
            case op.Unmount(target, _, expect_gone) if not expect_gone:
                mounted.remove(target)
            case op.Mkdir(path):
                made.append(path)
            case op.Rmdir(path):
                made.remove(path)
                assert path not in mounted
    assert not made
    assert not mounted


def test_undoing_takes_back_in_each_namespace_what_was_done_there_and_ends_at_home() -> None:
    place = (Parameter.RANGE,)
    undone = undo(pin("/store", OLD, id_mapped=True), 5).operations
    unmount = op.Unmount(place, op.UnmountFlag.NOFOLLOW)
    assert undone == (op.Setns(op.HELPER), unmount, op.Rmdir(place, if_empty=True), op.Setns(op.HOME))
    both = MountPlan((op.Mkdir("/a"), op.Setns(op.HELPER), op.Mkdir("/a"), op.Setns(op.HOME), op.Rmdir("/a")))
    rmdir = op.Rmdir("/a", if_empty=True)
    assert undo(both).operations == (op.Setns(op.HELPER), rmdir, op.Setns(op.HOME))
    assert undo(both, 4).operations == (op.Setns(op.HELPER), rmdir, op.Setns(op.HOME), rmdir)


def test_undoing_does_not_unmount_what_only_changed_how_it_propagates() -> None:
    plan = MountPlan((op.Mount("x", "/a", "tmpfs"), op.Mount("none", "/a", None, op.MountFlag.PRIVATE)))
    assert undo(plan).operations == (op.Unmount("/a", op.UnmountFlag.NOFOLLOW),)


def overlays(plan: MountPlan) -> list[op.Mount]:
    return [operation for operation in plan.operations if isinstance(operation, op.Mount)]


@pytest.mark.parametrize("name", ["per-layer", "common-parent"])
@pytest.mark.parametrize(("layers", "upper_is_a_lower"), [(1, True), (60, True), (499, True), (500, False)])
def test_the_first_pass_looks_through_the_upper_where_overlayfs_takes_one_more(
    name: str, layers: int, upper_is_a_lower: bool
) -> None:
    first, second = (overlay.data for overlay in overlays(STRATEGIES[name](spec(layers), EVERYTHING)))
    through = ("lowerdir=", Parameter.UPPERS, "/", Parameter.UPPER, "/fs:")
    assert isinstance(first, tuple) and isinstance(second, tuple)
    assert (first[:5] == through) is upper_is_a_lower
    assert second[:5] != through


@pytest.mark.parametrize("name", ["per-layer", "common-parent"])
def test_one_read_only_layer_is_bound_with_as_many_mount_operations(name: str) -> None:
    plan = STRATEGIES[name](spec(1, upper=Upper.NONE), EVERYTHING)
    assert plan.mount_operations == 7
    assert [(mount.fstype, mount.flags) for mount in overlays(plan)] == [(None, op.MountFlag.BIND)] * 2


@pytest.mark.parametrize("name", ["per-layer", "common-parent"])
@pytest.mark.parametrize("character", [",", ":", "\\"])
def test_a_path_that_mount_options_cannot_carry_is_refused_by_its_character(name: str, character: str) -> None:
    pool = RangePool("/store", EVERYTHING)
    with pytest.raises(UsageError) as refusal:
        Assembler(spec(2), name, pool, uppers=f"/st{character}ore/uppers", scratch="/run/s-")
    assert repr(character) in str(refusal.value) and name in str(refusal.value)
    with pytest.raises(UsageError):
        Assembler(spec(2), name, pool, uppers="/uppers", scratch=f"/r{character}n/s-")
    Assembler(spec(2, upper=Upper.NONE), name, pool, uppers=f"/st{character}ore/uppers", scratch="/run/s-")
    Assembler(spec(2), "flat", pool, uppers=f"/st{character}ore/uppers", scratch="/run/s-")
