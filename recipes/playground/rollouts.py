"""
Conversations with a task's environment, outside a trainer, for measuring a model. Rules are those of TRL's loop: a
turn ends with the end token, calls are parsed by the tokenizer's response template, and an answer that does not fit
into the limit ends the conversation before it.
"""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.playground.problem import Problem

ROWS_AT_ONCE = 512


def roll_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    limit: int,
    sampling: dict[str, Any],
) -> tuple[list[list[int]], list[list[int]]]:
    """
    Let the model converse with the environment of each problem until it makes no call.

    Args:
        model (`PreTrainedModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            With a chat template and a response template.
        problems (`list[Problem]`):
            One per row, all of a task with an environment.
        limit (`int`):
            Where a completion is cut, in tokens, those of the tool included.
        sampling (`dict`):
            What `generate` is given.

    Returns:
        `tuple[list[list[int]], list[list[int]]]`: per row, the tokens of the completion, and 1 for those that the
        model wrote, 0 for those of the tool and its frame.
    """
    completions: list[list[int]] = [[] for _ in problems]
    own: list[list[int]] = [[] for _ in problems]
    environments = [problem.environment() for problem in problems]
    for environment, problem in zip(environments, problems, strict=True):
        environment.reset(**problem.row())
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    active = list(range(len(problems)))
    while active:
        contexts = [prompts[i] + completions[i] for i in active]
        goes_on = []
        turns = _turns(model, tokenizer, contexts, limit, sampling)
        for i, context, turn in zip(active, contexts, turns, strict=True):
            turn = turn[: limit - len(completions[i])]
            completions[i] += turn
            own[i] += [1] * len(turn)
            calls = tokenizer.parse_response(turn, prefix=context).get("tool_calls") if turn else None
            answer = tokenizer("".join(f"({_call(environments[i], call)})" for call in calls or []) + "=")["input_ids"]
            if calls and len(completions[i]) + len(answer) <= limit:
                completions[i] += answer
                own[i] += [0] * len(answer)
                goes_on.append(i)
        active = goes_on
    return completions, own


def _call(environment: Any, call: dict[str, Any]) -> str:
    function = call["function"]
    try:
        return str(getattr(environment, function["name"])(**function["arguments"]))
    except Exception as error:  # as TRL tells the model
        return str({"error": str(error)})


def _turns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: list[list[int]],
    limit: int,
    sampling: dict[str, Any],
) -> list[list[int]]:
    """Generate one turn for each context, up to and with the end token."""
    turns = []
    for start in range(0, len(contexts), ROWS_AT_ONCE):
        rows = [{"input_ids": ids} for ids in contexts[start : start + ROWS_AT_ONCE]]
        batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**batch, **sampling, max_new_tokens=limit)[:, batch["input_ids"].shape[1] :]
        for ids in output.tolist():
            ended = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            turns.append(ids[:ended])
    return turns
