import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmount.errors import MappingError
from flatmount.plan.mapping import IdRange, Mapping, parse_ranges


def test_reads_what_the_kernel_takes() -> None:
    assert parse_ranges("0:100000:65536,65536:5:1") == (IdRange(0, 100000, 65536), IdRange(65536, 5, 1))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "CONTAINER:HOST:SIZE"),
        ("0:1", "CONTAINER:HOST:SIZE"),
        ("0:-1:5", "CONTAINER:HOST:SIZE"),
        ("0:1:²", "CONTAINER:HOST:SIZE"),
        ("0:1:0", "maps nothing"),
        ("0:4294967295:1", "past the last id"),
        ("0:100:10,5:200:10", "container's side"),
        ("0:100:10,10:105:10", "host's side"),
    ],
)
def test_refuses_in_one_line_what_cannot_be_meant(text: str, word: str) -> None:
    with pytest.raises(MappingError, match=word) as refusal:
        parse_ranges(text)
    assert refusal.value.hint
    assert "\n" not in refusal.value.line()


def test_another_map_for_gids() -> None:
    mapping = Mapping.parse("0:100000:10", "0:200000:10")
    assert (mapping.host_uid(3), mapping.host_gid(3)) == (100003, 200003)
    assert str(mapping) == "0:100000:10 (gids 0:200000:10)"


def test_names_the_id_that_has_no_place() -> None:
    with pytest.raises(MappingError, match="uid 1000"):
        Mapping.parse("0:100000:1000").host_uid(1000)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(0, 10**6))
def test_translates_every_id_of_a_chain_of_ranges(sizes: list[int], base: int) -> None:
    ranges, at = [], 0
    for size in sizes:
        ranges.append(IdRange(at, base + 2 * at, size))
        at += size
    mapping = Mapping(tuple(ranges), tuple(ranges))
    assert Mapping.parse(",".join(map(str, ranges))) == mapping
    for entry in ranges:
        assert mapping.host_uid(entry.container) == entry.host
        assert mapping.host_uid(entry.container + entry.size - 1) == entry.host + entry.size - 1
