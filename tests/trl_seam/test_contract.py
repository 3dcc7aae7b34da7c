"""What the package relies on inside TRL, by name and by the order in TRL's source, and what happens when it moves."""

import ast
import inspect
import textwrap
import warnings

import pytest
import trl
from trl import GRPOTrainer

from trl_lambda.trl_seam import contract

LOGPS_METHOD = "_get_per_token_logps_and_entropies"
# Entries of `inputs` that `_compute_loss` must read after it has called LOGPS_METHOD.
READ_AFTER_LOGPS = ("advantages", "old_per_token_logps")
# Attributes that the trainer reads: TRL sets them in `__init__`.
ATTRIBUTES = (
    *("_metrics", "_logs", "_buffered_inputs", "num_generations", "num_generations_eval", "num_iterations"),
    *("reward_weights", "loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high"),
)
# Entries of the scored batch that the trainer reads.
SCORED_KEYS = ("completion_mask", "advantages", "tool_mask", "num_items_in_batch")


def parse(function) -> list[ast.AST]:
    return list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))))


def order_violations(compute_loss) -> list[str]:
    """What of the order log-probabilities, then weighted entries is not so in a loss."""
    nodes = [(ast.unparse(n), n.lineno) for n in parse(compute_loss) if isinstance(n, ast.Subscript | ast.Call)]

    def lines_of(*beginnings):
        return [line for text, line in nodes if text.startswith(beginnings)]

    calls = lines_of(f"self.{LOGPS_METHOD}(")
    if len(calls) != 1:
        return [f"{len(calls)} calls"]
    found = {key: lines_of(f"inputs['{key}']", f"inputs.get('{key}'") for key in READ_AFTER_LOGPS}
    wrong = {key: lines for key, lines in found.items() if not lines or min(lines) < calls[0]}
    return [f"{key} is {'read too early' if lines else 'not read'}" for key, lines in wrong.items()]


def test_installed_trl_keeps_the_contract():
    assert contract.contract_violations() == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contract.check_contract()
    assert order_violations(GRPOTrainer._compute_loss) == []
    stored = [n for n in parse(GRPOTrainer.__init__) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    assert set(ATTRIBUTES) <= {node.attr for node in stored}
    scored = [n.value for n in parse(GRPOTrainer._generate_and_score_completions) if isinstance(n, ast.Constant)]
    assert set(SCORED_KEYS) <= set(scored)
    assert trl.__version__ in contract.TESTED_VERSIONS


@pytest.mark.parametrize("name", sorted(contract.METHODS))
def test_a_missing_method_or_a_changed_signature_is_reported(name):
    gone, changed = type("Moved", (GRPOTrainer,), {name: None}), type("Moved", (GRPOTrainer,), {name: lambda self: 0})
    assert contract.contract_violations(gone) == (f"{name} is gone",)
    parameters = ", ".join(sorted(contract.METHODS[name]))
    expected = (f"{name} no longer takes {parameters}",) if parameters else ()
    assert contract.contract_violations(changed) == expected


def test_what_is_missing_raises_and_what_is_newer_warns_with_the_tested_range():
    moved = type("Moved", (GRPOTrainer,), {"_compute_loss": None})
    with pytest.raises(RuntimeError, match=r"TRL 1.17.0: _compute_loss is gone.* TRL 1.10.0 to 1.16.0"):
        contract.check_contract(moved, version="1.17.0")
    with pytest.warns(UserWarning, match=r"tested with TRL 1.10.0 to 1.16.0, and TRL 1.17.0 is newer") as seen:
        contract.check_contract(version="1.17.0")
    assert len(seen) == 1
