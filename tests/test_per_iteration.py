import pytest

from restem_lightning.errors import UserError
from restem_lightning.per_iteration import value_at, values_by_setting

KNOWN = {"start_from", "sampling.temperature", "trainer.max_steps", "policy"}


def test_the_last_value_of_a_list_holds_on():
    assert [value_at([1, "a", None], i) for i in (1, 2, 3, 4, 9)] == [1, "a", None, None, None]


def test_growth_is_by_a_factor_or_a_sum_and_rounded_for_whole_numbers():
    assert [value_at({"first": 40, "times": 1.2}, i) for i in (1, 2, 3)] == [40, 48, 58]
    assert [value_at({"first": 300, "plus": 20}, i) for i in (1, 2, 3)] == [300, 320, 340]
    assert value_at({"first": 0.5, "times": 0.5}, 3) == 0.125


def test_settings_are_nested_like_the_settings_themselves():
    growth = {"first": 1, "plus": 1}
    nested = {"start_from": ["base"], "trainer": {"max_steps": growth}}
    found = values_by_setting(nested, KNOWN)
    assert found == {"start_from": ["base"], "trainer.max_steps": growth}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sampling": {"heat": [1]}}, r"sampling\.heat"),
        ({"policy": ["a"]}, r"policy\) must be a setting of one of start_from"),
        ({"sampling": {"temperature": 0.7}}, r"temperature \(0\.7\) must be a list"),
        ({"sampling": {"temperature": []}}, "must be a list"),
    ],
)
def test_what_is_no_such_setting_or_no_list_is_refused(setting, message):
    with pytest.raises(UserError, match=message):
        values_by_setting(setting, KNOWN)
