"""The environment variables: read when asked for, and every one of them in README."""

import re

import pytest

from realm_web import env


def test_an_unset_or_blank_variable_has_its_default():
    assert env.get("REALM_DEVICE", {}) == "auto"
    assert env.get("REALM_DEVICE", {"REALM_DEVICE": " "}) == "auto"
    assert env.get("REALM_DEVICE", {"REALM_DEVICE": " cpu "}) == "cpu"


def test_a_name_that_is_not_in_the_table_cannot_be_read():
    with pytest.raises(KeyError):
        env.get("REALM_TYPO", {"REALM_TYPO": "1"})


@pytest.mark.parametrize(("text", "level"), [(None, 0), ("", 0), ("0", 0), ("1", 1), ("2", 2), ("yes", 1)])
def test_the_debug_level_is_a_number_and_any_other_word_counts_as_one(text, level):
    assert env.debug_level({} if text is None else {"REALM_DEBUG": text}) == level


def test_disabled_features_are_words_between_commas():
    assert env.disabled_features({"REALM_DISABLE": " F16, subgroups,,"}) == {"f16", "subgroups"}
    assert env.disabled_features({}) == frozenset()


def test_unknown_realm_variables_are_found():
    assert env.unknown_names({"REALM_DEVCE": "cpu", "REALM_DEVICE": "cpu", "HOME": "/"}) == ("REALM_DEVCE",)


def test_the_readme_lists_every_variable_with_its_default_and_no_other(repository):
    readme = (repository / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `(REALM_\w+)` \| (.*?) \| (.*?) \|$", readme, re.M)
    assert rows == [
        (variable.name, f"`{variable.default}`" if variable.default else "–", variable.doc)
        for variable in env.VARIABLES.values()
    ]


def test_no_variable_is_read_past_the_table(repository):
    named = {
        name
        for path in (repository / "realm_web").rglob("*.py")
        for name in re.findall(r"\bREALM_[A-Z_]+\b", path.read_text("utf-8"))
    }
    assert named <= set(env.VARIABLES)
