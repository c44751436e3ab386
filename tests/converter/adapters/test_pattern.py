"""Patterns match as Python's `re` matches them; those that take `re` exponential time are refused or match nothing."""

from __future__ import annotations

import json
import re
import warnings

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from converter.adapters import peft_config
from converter.adapters.pattern import Budget, fullmatch, match
from formats.errors import UserError
from formats.folder import LocalFolder

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "model.norm", "a.b", "aab", "A_1", ""]
ORDINARY = [
    r".*\.(q|v)_proj$", r"model\.layers\.(0|1)\..*", r".*(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj", "q_proj", "",
    r"^(?!.*vision).*\.(?:q|v)_proj$", r"(?i).*Q_PROJ", r".*layers\.[0-3]\..*_proj", r".*\.1\d?\..*", r"(\w+\.)*down_proj",
    r"(?:.*?(?:language|text).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))",
    r"model\.layers\.(?:[0-9]|1[01])\.(?!mlp)\S+", r"[^.]+(\.[^.]+){3,4}", r"(?s:.+)(?<=_proj)", r".*(?<!down)_proj",
    r"\Am\w+\.norm\Z",
    r"m(?P<x>o)del.{,5}", r"lm_head|(?P<idx>model)\.norm", r"[]a]+\.[b-]", r"a{2}b", r"a{,2}b", r"a{0,1}?a+?b", r"x{}|lm\x5fhead",
]  # fmt: skip


def by_re(pattern, text):
    whole, first = re.fullmatch(pattern, text), re.match(pattern, text)
    return whole is not None, first is not None


def by_us(pattern, text):
    return fullmatch(pattern, text, Budget()), match(pattern, text, Budget()) is not None


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_match_what_re_matches(pattern):
    for name in NAMES:
        assert by_us(pattern, name) == by_re(pattern, name), name


ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\w", r"\d", "[ab]", "[^a]", "^", "$", r"\b", "x", "1", r"\W", r"\Z"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{1,}?"])).map(
            lambda both: f"({both[0]}){both[1]}"
        ),
        st.tuples(st.sampled_from(["(?:", "(?=", "(?!", "(?i:", "(?s:"]), inner).map(lambda both: f"{both[0]}{both[1]})"),
    ),
    max_leaves=10,
)


@settings(deadline=None, max_examples=300)
@given(PATTERNS, st.text("ab.1A", max_size=7))
def test_any_pattern_matches_what_re_matches(pattern, text):
    assert by_us(pattern, text) == by_re(pattern, text)


@settings(deadline=None)
@given(PATTERNS, st.text("ab.1", max_size=6))
def test_the_number_of_a_layer_is_that_of_the_first_match_as_re_finds_it(before, text):
    pattern, name = rf"(?:^|.*?\.){before}\.(?P<idx>\d+)\.", f"{text}.1.ab.11.b"
    actual, expected = match(pattern, name, Budget()), re.match(pattern, name)
    span = expected and expected.span("idx")
    assert actual == (() if span == (-1, -1) else span)


@settings(deadline=None)
@given(st.text(r"ab.()[]{}*+?|\^$,1<=!:-Pi#", max_size=14), st.sampled_from(["ab", "a.b", "", "a{1", "b]"]))
def test_what_is_no_pattern_for_re_is_none_here_and_the_rest_matches_or_is_refused(pattern, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = by_re(pattern, text)
        except re.error:
            with pytest.raises(UserError, match="is not a regular expression"):
                by_us(pattern, text)
            return
        try:
            assert by_us(pattern, text) == expected
        except UserError:
            assume(False)


SLOW = [
    r"((\w|\.)+)+#", r"(a|a)*b", r"(.*)*x", r"(\w*)*#", r"(\w+\.?)+#", r"([a-z._0-9]+)*$#", ".*" * 12 + "x", r"(.|\w)*?#",
    r"(?=((\w|\.)+)+#)x", r"(?!((\w|\.)+)+#)x", r".*(?<=#)((\w*)*)*!", r"((((\w*)*)*)*)*#", r"(x?){40}\w{40}",
    r"(a?|\w?|\.?){60}#",
    r"^(([\w])+.)+([\w]{2,10})+#", r"(.*?,){11}P", r"(?i)((\w|\.)+)+#", "(|a|.)*" * 20 + "#", r"((.*)(.*)){9}#",
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "pattern"),
    [("target_modules", pattern) for pattern in SLOW]
    + [(field, SLOW[0]) for field in ("exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")],
)
def test_a_pattern_that_was_made_to_take_for_ever_matches_nothing_or_is_refused(tmp_path, field, pattern):
    value = {"rank_pattern": {pattern: 9}, "alpha_pattern": {pattern: 9}, "layers_pattern": [pattern]}.get(field, pattern)
    fields = {"target_modules": ["q_proj"], "layers_to_transform": [1], field: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    config = peft_config.read(LocalFolder(tmp_path))
    refused = ""
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.q_proj"
        try:
            assert (config.rank(name), config.alpha(name)) == (8, 8)
            assert config.targets(name) == (layer == 1 and field in ("exclude_modules", "rank_pattern", "alpha_pattern"))
        except UserError as error:
            refused = str(error)
    assert not refused or refused.endswith(", which takes too long to match\n\nhint: name the modules one by one")


BY_ONE = "\n\nhint: name the modules one by one"
NOT_ALL = "\n\nhint: backreferences, possessive repeats, conditions and comments are not; name the modules one by one"
REFUSED = {
    "(((": "is not a regular expression: the fault is at character 3",
    "a" * 5000: "has 5000 characters; a pattern may have 4096",
    r"(a)\1": rf"has at `\1` what is not supported in a pattern{NOT_ALL}",
    "a*+b": f"has at `+b` what is not supported in a pattern{NOT_ALL}",
    "(?>a)b": f"has at `?>a)b` what is not supported in a pattern{NOT_ALL}",
    "((a{99}){99}){99}": f"repeats too much{BY_ONE}",
    "(a{1,9000}){1,9000}#": f"repeats too much{BY_ONE}",
    "(.{1,90}){1,80}#": f"repeats too much{BY_ONE}",
    "(" * 60 + "a" + ")" * 60: f"has at `{'(' * 9}a{')' * 60}` what is not supported in a pattern{NOT_ALL}",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_is_no_pattern_is_refused_by_name(tmp_path, pattern):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": pattern}))
    config = peft_config.read(LocalFolder(tmp_path))
    with pytest.raises(UserError) as refusal:
        config.targets("model.layers.0.self_attn.q_proj")
    assert str(refusal.value) == f"`adapter_config.json` holds `{pattern[:100]}`, which {REFUSED[pattern]}"


def test_many_exact_names_with_ranks_of_their_own_are_quick_and_right():
    names = {f"model.layers.{layer}.self_attn.{part}_proj": layer + 1 for layer in range(80) for part in "qkv"}
    config = peft_config.PeftConfig(8, 16, False, False, 0.0, "all-linear", rank_pattern=names)
    assert all(config.rank(name) == rank for name, rank in names.items())
    assert config.rank("model.layers.80.self_attn.q_proj") == 8
