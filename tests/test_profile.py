"""Profiles: what the rules mean, the shipped files, and hostile or mistaken ones."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopgguf.errors import UsageError
from loopgguf.formats import GgmlType
from loopgguf.profile import MAX_PROFILE_BYTES, PROFILE_FOLDER, ROLES, Layers, Rule, load_profile, parse_profile, profile_names

EXAMPLE = """
name: mine
description: an example
file_type: q4_k_m
default: q4_k
rules:
  - {role: output, type: Q6_K}
  - {role: [attn_v, attn_k], layers: [0-3, 7], type: Q5_K}
  - {role: ffn_down, layers: {first: 1/8, last: 2}, type: Q6_K}
  - {match: 'blk\\.1[0-2]\\.ffn_(up|gate)', type: IQ4_XS}
  - {layers: 30, type: Q8_0}
"""


def test_example_is_read() -> None:
    """Would catch a key that is read wrongly or dropped."""
    profile = parse_profile(EXAMPLE, "example")
    assert (profile.name, profile.description, profile.file_type, profile.default) == ("mine", "an example", 15, GgmlType.Q4_K)
    assert profile.rules == (
        Rule(GgmlType.Q6_K, ("output",)),
        Rule(GgmlType.Q5_K, ("attn_v", "attn_k"), Layers(ranges=((0, 3), (7, 7)))),
        Rule(GgmlType.Q6_K, ("ffn_down",), Layers(Fraction(1, 8), 2)),
        Rule(GgmlType.IQ4_XS, match=r"blk\.1[0-2]\.ffn_(up|gate)"),
        Rule(GgmlType.Q8_0, layers=Layers(ranges=((30, 30),))),
    )


def test_json_is_read_too(tmp_path: Path) -> None:
    """Would catch JSON profiles being refused, and a missing name not taken from the file's."""
    path = tmp_path / "tiny.json"
    path.write_text('{"default": "IQ4_XS", "rules": [{"role": "attn_v", "type": "Q6_K"}]}', encoding="utf-8")
    profile = load_profile(path)
    assert (profile.name, profile.default, profile.file_type) == ("tiny", GgmlType.IQ4_XS, 30)


@pytest.mark.parametrize(
    ("rule", "name", "applies"),
    [
        (Rule(GgmlType.Q6_K, ("attn_v",)), "blk.3.attn_v.weight", True),
        (Rule(GgmlType.Q6_K, ("attn_v",)), "blk.3.attn_v_b.weight", False),
        (Rule(GgmlType.Q6_K, ("ffn_down",)), "blk.3.ffn_down_exps.weight", True),
        (Rule(GgmlType.Q6_K, ("ffn_down",)), "blk.3.ffn_down_shexp.weight", True),
        (Rule(GgmlType.Q6_K, ("token_embd",)), "token_embd.weight", True),
        (Rule(GgmlType.Q6_K, ("token_embd",)), "per_layer_token_embd.weight", True),
        (Rule(GgmlType.Q6_K, ("output",)), "token_embd.weight", False),
        (Rule(GgmlType.Q6_K, ("output",)), "blk.3.attn_output.weight", False),
        (Rule(GgmlType.Q6_K, (), Layers(first=4)), "blk.3.ffn_up.weight", True),
        (Rule(GgmlType.Q6_K, (), Layers(first=3)), "blk.3.ffn_up.weight", False),
        (Rule(GgmlType.Q6_K, (), Layers(last=100)), "token_embd.weight", False),
        (Rule(GgmlType.Q6_K, ("attn_v",), None, "blk.4"), "blk.3.attn_v.weight", False),
        (Rule(GgmlType.Q6_K, match="3.attn"), "blk.13.attn_v.weight", True),
    ],
)
def test_conditions(rule: Rule, name: str, applies: bool) -> None:
    """Would catch a rule that is about other tensors than it says."""
    assert rule.applies(name, 16, is_tied=False) is applies


def test_tied_embeddings_are_the_output() -> None:
    """Would catch tied embeddings, the most sensitive tensor of a small model, being treated as a mere table."""
    assert Rule(GgmlType.Q6_K, ("output",)).applies("token_embd.weight", 16, is_tied=True)
    assert Rule(GgmlType.Q6_K, ("token_embd",)).applies("token_embd.weight", 16, is_tied=True)


@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 12))
def test_parts_of_the_layers(n_layer: int, numerator: int, denominator: int) -> None:
    """Would catch a part that is empty in a small model, or not the same at both ends."""
    part = Fraction(min(numerator, denominator), denominator)
    first = [i for i in range(n_layer) if Layers(first=part).contains(i, n_layer)]
    last = [i for i in range(n_layer) if Layers(last=part).contains(i, n_layer)]
    assert first and first == list(range(len(first)))
    assert last == [n_layer - 1 - i for i in reversed(first)]
    assert part * n_layer <= len(first) < part * n_layer + 1


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles(name: str) -> None:
    """Would catch a shipped profile that does not parse, has another name than its file, or has grown beyond reading."""
    profile = load_profile(name)
    assert profile.name == name and profile.description and profile.rules
    text = (PROFILE_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("#") and len(text.splitlines()) <= 30


def test_profiles_ship() -> None:
    """Would catch a profile lost in packaging."""
    assert {"balanced", "attention-high", "compression-max", "quality", "singular-bit", "cpu-fast"} <= set(profile_names())


# ggml-cpu/repack.cpp, `ggml_repack_get_optimal_repack_type`, as of llama-cpp-python 0.3.36
REPACKED = {"Q2_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q8_0", "MXFP4", "Q1_0"}


def test_cpu_fast_has_only_types_with_repacked_kernels() -> None:
    """Would catch a type in the profile that the CPU runs one row at a time."""
    profile = load_profile("cpu-fast")
    assert {t.name for t in (profile.default, *profile.types, *(rule.type for rule in profile.rules if rule.type))} <= REPACKED


def test_a_profile_protects_super_weights() -> None:
    """Would catch a flag that is read as its text, or that a shipped profile's comment alone promises."""
    assert load_profile("singular-bit").protect_super_weights
    assert not load_profile("balanced").protect_super_weights
    with pytest.raises(UsageError, match="protect_super_weights in p: got 'yes', expected true or false"):
        parse_profile("default: Q4_K\nprotect_super_weights: 'yes'", "p", "p")


DEEP = "[" * 20000
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "\n".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(12))


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", "expected a mapping"),
        ("- 1", "expected a mapping"),
        ("default: Q4_K\nrule: []", "unknown key.*'rule'.*rules"),
        ("default: Q4_K_M", "default.*Q4_K_M"),
        ("rules: []", "default.*None"),
        ("default: 4", "default.*4"),
        ("default: Q4_K\nfile_type: Q9", "file_type.*Q9"),
        ("default: Q4_K\nname: [1]", "name.*a list"),
        ("default: Q4_K\ndefault: Q5_K", "'default' twice"),
        ("default: Q4_K\nrules: {role: output}", "rules.*a dict"),
        ("default: Q4_K\nrules: [output]", "rule 1.*'output'"),
        ("default: Q4_K\nrules: [{type: Q4_K}]", "rule 1.*no condition"),
        ("default: Q4_K\nrules: [{role: output}]", "type in rule 1"),
        ("default: Q4_K\nrules: [{role: outptu, type: Q6_K}]", "outptu.*attn_v"),
        ("default: Q4_K\nrules: [{role: {a: b}, type: Q6_K}]", "role in rule 1.*a dict"),
        ("default: Q4_K\nrules: [{role: output, typ: Q6_K}]", "'typ'.*role, layers, match, type"),
        ("default: Q4_K\nrules: [{layers: 1/8, type: Q6_K}]", "layers in rule 1.*1/8"),
        ("default: Q4_K\nrules: [{layers: 5-3, type: Q6_K}]", "layers in rule 1.*5-3"),
        ("default: Q4_K\nrules: [{layers: {first: 9/8}, type: Q6_K}]", "9/8"),
        ("default: Q4_K\nrules: [{layers: {first: 1/0}, type: Q6_K}]", "1/0"),
        ("default: Q4_K\nrules: [{layers: {middle: 1/8}, type: Q6_K}]", "'middle'.*first, last"),
        ("default: Q4_K\nrules: [{layers: true, type: Q6_K}]", "True"),
        ("default: Q4_K\nrules: [{layers: 999999999999999999999999, type: Q6_K}]", "layers in rule 1"),
        ("default: Q4_K\nrules: [{match: '(', type: Q6_K}]", r"regular expression.*\("),
        ("default: Q4_K\nrules: [{match: 3, type: Q6_K}]", "match in rule 1.*3"),
        ("default: Q4_K\nrules: [{match: '[a--b]', type: Q6_K}]", "regular expression.*set difference"),
        ("default: !!python/object/apply:os.system [true]", "cannot parse"),
        ("default: [", "cannot parse"),
        ("default: 2001-99-99", "cannot parse"),
        ("? [a, b]\n: c", "cannot parse|unknown key"),
        ("a: \x00", "cannot parse"),
        (DEEP, "cannot parse"),
        (BOMB, "unknown key"),
        ("&a [*a]", "expected a mapping"),
        ("&a {default: *a}", "default.*a dict"),
    ],
)  # fmt: skip
def test_bad_profiles(text: str, culprit: str) -> None:
    """Would catch a mistake that is ignored, a traceback, or a hostile file that takes time or memory."""
    with pytest.raises(UsageError, match=culprit) as caught:
        parse_profile(text, "profile x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_bad_files(tmp_path: Path) -> None:
    """Would catch an unreadable file ending in a traceback, and a huge one being parsed."""
    large = tmp_path / "large.yaml"
    large.write_text("#" * (MAX_PROFILE_BYTES + 1), encoding="utf-8")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"description: \xe9t\xe9")
    for path, culprit in ((large, "small file"), (latin, "UTF-8"), (tmp_path / "none.yaml", "unknown profile.*balanced"), (tmp_path, "unknown profile")):
        with pytest.raises(UsageError, match=culprit):
            load_profile(path)
    with pytest.raises(UsageError, match="balanced"):
        load_profile("balance")


def test_known_roles_are_roles() -> None:
    """Would catch a role in the list that no rule could ever match."""
    for role in ROLES:
        name = f"{role}.weight" if role in ("token_embd", "output") else f"blk.0.{role}.weight"
        assert Rule(GgmlType.Q6_K, (role,)).applies(name, 1, is_tied=False)
