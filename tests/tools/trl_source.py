"""What the package relies on in the text of TRL's loss, read off its source: for the contract's test only."""

import ast
import inspect
import textwrap

from trl import GRPOTrainer

from trl_lambda.trl_seam.contract import ATTRIBUTES, LOGPS_METHOD, READ_AFTER_LOGPS, SCORED_KEYS


def source_violations(trainer_class: type = GRPOTrainer) -> tuple[str, ...]:
    """One line for each attribute, key or order of `_compute_loss` that is not as relied on; empty when intact."""
    init = _attributes_set(trainer_class.__init__)
    violations = [f"self.{name} is no longer set in __init__" for name in ATTRIBUTES if name not in init]
    scored = _string_constants(trainer_class._generate_and_score_completions)
    violations += [f"the scored batch has no {key!r}" for key in SCORED_KEYS if key not in scored]
    return (*violations, *_order_violations(trainer_class._compute_loss))


def _order_violations(compute_loss) -> list[str]:
    """Read `_compute_loss`: one call for log-probabilities, and the weighted entries read only after it."""
    tree = _parse(compute_loss)
    calls = [node.lineno for node in ast.walk(tree) if _called_name(node) == LOGPS_METHOD]
    if len(calls) != 1:
        return [f"_compute_loss calls {LOGPS_METHOD} {len(calls)} times instead of once"]
    violations = []
    for key in READ_AFTER_LOGPS:
        lines = [node.lineno for node in ast.walk(tree) if _read_key(node) == key]
        if not lines:
            violations.append(f"_compute_loss no longer reads inputs[{key!r}]")
        elif min(lines) < calls[0]:
            violations.append(f"_compute_loss reads inputs[{key!r}] before {LOGPS_METHOD}")
    return violations


def _called_name(node: ast.AST) -> str | None:
    """`name` of a node that is a call ``self.name(...)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr
    return None


def _read_key(node: ast.AST) -> str | None:
    """`key` of a node that is ``inputs["key"]`` or ``inputs.get("key", ...)``."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "inputs":
        return node.slice.value if isinstance(node.slice, ast.Constant) else None
    if _called_name(node) == "get" and isinstance(node.func.value, ast.Name) and node.func.value.id == "inputs":
        return node.args[0].value if isinstance(node.args[0], ast.Constant) else None
    return None


def _parse(function) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))


def _attributes_set(function) -> set[str]:
    """Names `x` that `function` assigns as ``self.x``."""
    return {
        node.attr
        for node in ast.walk(_parse(function))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }


def _string_constants(function) -> set[str]:
    return {
        node.value
        for node in ast.walk(_parse(function))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
