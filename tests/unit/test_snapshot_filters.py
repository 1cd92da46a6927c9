"""Filters mean here what they mean to containerd."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmount.snapshotter.filters import parse_filters
from flatmount.snapshotter.model import Info, InvalidRequest, Kind

LABELS = {"l": "2", "containerd.io/gc.root": "walk", 'odd "one"': "x,y", "dotted.key": "z"}
INFO = Info("default/7/a-wl", "default/3/sha256:ab", Kind.ACTIVE, 1, 2, LABELS)
BARE = Info("p", "", Kind.COMMITTED, 1, 2, {})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", True),
        ("name==default/7/a-wl", True),
        ("name==default/7/a", False),
        ("name!=p", True),
        ("kind==active", True),
        ("kind==Active", False),
        ('parent!=""', True),
        ("parent==default/3/sha256:ab", True),
        ("labels.l", True),
        ("labels.m", False),
        ("labels.l==2", True),
        ('labels."containerd.io/gc.root"==walk', True),
        ('labels."odd \\"one\\""=="x,y"', True),
        ("labels.dotted.key==z", True),
        ("labels.m!=2", True),
        ("name~=/^default\\/[0-9]+\\/a/", True),
        ("name~=|a-(wl)$|", True),
        ('name~="("', False),
        (" kind == active , labels.l == 2 ", True),
        ("kind==active,labels.l==3", False),
        ("unknown", False),
        ("unknown!=x", True),
        ('labels."\\x6c"==2', True),
    ],
)
def test_selectors(text: str, wanted: bool) -> None:
    assert parse_filters([text])(INFO) is wanted


def test_one_of_several_is_enough_and_none_wants_all() -> None:
    either = parse_filters(["name==p", "labels.l==2"])
    assert either(INFO)
    assert either(BARE)
    assert not parse_filters(["name==x", "name==y"])(BARE)
    assert parse_filters([])(BARE)
    assert not parse_filters(["labels.l"])(BARE)
    assert parse_filters(["parent"])(BARE)


@pytest.mark.parametrize(
    "text",
    ["==x", "name=x", "name===x", "name==", "name,", 'name=="x', "name==/x/", "name x", "na me==x", '"\\q"==x', "."],
)
def test_what_is_no_filter_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(InvalidRequest, match="at character"):
        parse_filters([text])


@given(st.text(max_size=60))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    try:
        parse_filters([text])(INFO)
    except InvalidRequest:
        return


@given(st.text(st.characters(codec="ascii", exclude_characters='"\\\n\0'), max_size=30))
def test_any_value_can_be_quoted(value: str) -> None:
    assert parse_filters([f'name=="{value}"'])(Info(value, "", Kind.VIEW, 0, 0))
