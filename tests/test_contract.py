"""What the package relies on inside TRL, and what happens when it moves."""

import warnings

import pytest
import trl
from trl import GRPOTrainer
from trl_source import source_violations

from trl_lambda.trl_seam import contract


def test_installed_trl_keeps_the_contract():
    assert contract.contract_violations() == source_violations() == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contract.check_contract()


@pytest.mark.parametrize("name", sorted(contract.METHODS))
def test_a_missing_method_is_reported(name):
    class Moved(GRPOTrainer):
        pass

    setattr(Moved, name, None)
    assert contract.contract_violations(Moved) == (f"{name} is gone",)


@pytest.mark.parametrize("name", sorted(n for n, p in contract.METHODS.items() if p))
def test_a_changed_signature_is_reported(name):
    class Moved(GRPOTrainer):
        pass

    setattr(Moved, name, lambda self, renamed: None)
    assert [v.split(" takes")[0] for v in contract.contract_violations(Moved)] == [f"{name} no longer"]


class ReadsTooEarly(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        advantages = inputs["advantages"]
        logps, _, _ = self._get_per_token_logps_and_entropies(model, inputs, inputs, 1)
        return (logps - inputs.get("old_per_token_logps")) * advantages


class TwoForwards(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        first = self._get_per_token_logps_and_entropies(model, inputs, inputs, 1)
        second = self._get_per_token_logps_and_entropies(model, inputs, inputs, 1)
        return (first - second - inputs.get("old_per_token_logps")) * inputs["advantages"]


class OtherEntry(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        logps = self._get_per_token_logps_and_entropies(model, inputs, inputs, 1)
        return (logps - inputs.get("old_per_token_logps")) * inputs["token_advantages"]


@pytest.mark.parametrize(
    ("moved", "violation"),
    [
        (ReadsTooEarly, "reads inputs['advantages'] before _get_per_token_logps_and_entropies"),
        (TwoForwards, "calls _get_per_token_logps_and_entropies 2 times"),
        (OtherEntry, "no longer reads inputs['advantages']"),
    ],
)
def test_a_moved_order_is_seen_in_the_source(moved, violation):
    assert violation in "; ".join(source_violations(moved))


def test_a_missing_method_raises_and_names_the_tested_range():
    moved = type("Moved", (GRPOTrainer,), {"_compute_loss": None})
    with pytest.raises(RuntimeError) as error:
        contract.check_contract(moved, version="1.17.0")
    assert "_compute_loss is gone" in str(error.value)
    assert "TRL 1.17.0" in str(error.value) and "1.10.0 to 1.16.0" in str(error.value)


def test_an_untested_newer_version_warns_once_and_names_the_tested_range():
    with pytest.warns(UserWarning, match=r"tested with TRL 1.10.0 to 1.16.0; TRL 1.17.0 is newer") as seen:
        contract.check_contract(version="1.17.0")
    assert len(seen) == 1


def test_tested_versions_cover_the_installed_one():
    assert trl.__version__ in contract.TESTED_VERSIONS


def test_liger_bypass_is_recognised_by_the_method_that_bypasses():
    assert not contract.liger_bypasses_loss(type("Intact", (), {}))
    assert contract.liger_bypasses_loss(type("Old", (), {"compute_liger_loss": None}))


def test_unsloth_is_recognised_as_a_base_class_and_as_a_patched_method():
    assert not contract.patched_by_unsloth(GRPOTrainer)

    class UnslothGRPOTrainer(GRPOTrainer):
        pass

    class Ours(UnslothGRPOTrainer):
        pass

    assert contract.patched_by_unsloth(Ours)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return None

    compute_loss.__module__ = "unsloth_compiled_cache.UnslothTrainers"
    assert contract.patched_by_unsloth(type("Patched", (GRPOTrainer,), {"compute_loss": compute_loss}))
