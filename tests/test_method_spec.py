"""Methods of a comparison as text: settings with their types, labels, and what is refused."""

from __future__ import annotations

import pytest

import bmsn
from bmsn.method_spec import MethodSpec, parse_methods, parse_settings


def test_settings_belong_to_the_method_before_them():
    text = "mixture, spos,mixture:supernets=4,refresh_every=200,label=refreshed,mixture:schedule=inverse,lr=5e-2"
    assert parse_methods(text) == (
        MethodSpec(label="mixture", method="mixture", settings={}),
        MethodSpec(label="spos", method="spos", settings={}),
        MethodSpec(label="refreshed", method="mixture", settings={"supernets": 4, "refresh_every": 200}),
        MethodSpec(
            label="mixture:schedule=inverse,lr=5e-2", method="mixture", settings={"schedule": "inverse", "lr": 0.05}
        ),
    )


def test_values_have_the_types_of_the_fields():
    assert parse_settings("balance_every=epoch,supernets=3") == {"balance_every": "epoch", "supernets": 3}
    assert parse_settings("balance_every=5,fast_eval=False,score=pairs") == {
        "balance_every": 5, "fast_eval": False, "score": "pairs",
    }  # fmt: skip
    assert parse_settings("") == {}
    assert type(parse_settings("confidence=1")["confidence"]) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "methods must name at least one of mixture, spos"),
        ("mixtur", r"method 'mixtur' is unknown \(did you mean 'mixture'\?\)"),
        ("supernets=4,mixture", "a method must come before the setting 'supernets=4'"),
        ("mixture:supernet=4", r"setting 'supernet' is unknown \(did you mean 'supernets'\?\)"),
        ("spos:seedless", "methods: spos:seedless: settings must be name=value; got 'seedless'"),
        ("mixture:supernets=four", "mixture:supernets=four: supernets must be int; got 'four'"),
        ("mixture:fast_eval=1", "fast_eval must be bool; got '1'"),
        ("mixture:balance_every=never", "balance_every must be int, 'epoch'; got 'never'"),
        ("mixture:supernets=", "settings must be name=value; got 'supernets='"),
        ("mixture:epochs=5", "epochs cannot be set for one method of a comparison: --budget, the same for all methods"),
        ("mixture:resume=true", "resume cannot be set for one method of a comparison$"),
        ("mixture,spos,mixture", "each needs a label of its own .*; mixture stands for several"),
    ],
)  # fmt: skip
def test_bad_input(text, message):
    with pytest.raises(bmsn.InputError, match=message):
        parse_methods(text)
