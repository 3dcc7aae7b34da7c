"""The playground's agent: its problems, its environment, its conversations in TRL and outside, and that it learns."""

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.playground.lookup_agent import LookUp
from recipes.playground.make_base_model import BASE_MODELS
from recipes.playground.rewards import exact_answer
from recipes.playground.rollouts import roll_out
from recipes.playground.tasks import make_splits
from recipes.studies.arena import learn_agent
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.recipe import train_recipe
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

SPEC = BASE_MODELS["lookup_agent"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SPEC.folder)


def test_the_tokenizer_renders_and_reads_a_conversation(tokenizer):
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"key": "a"}}}
    messages = [{"role": "user", "content": "Fa"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages += [{"role": "tool", "name": "look_up", "content": "7"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "Fa=[a]<eos>(7)="
    assert tokenizer.parse_response("[a]<eos>", prefix="Fa=")["tool_calls"] == [call]
    # The second turn is read alone, whatever came before it.
    assert tokenizer.parse_response("7<eos>", prefix="Fa=[a]<eos>(7)=") == {"role": "assistant", "content": "7"}


@pytest.mark.parametrize("limit", [48, 18, 9])
def test_conversations_for_measuring_are_those_of_trls_loop(limit, tokenizer, tmp_path):
    """Greedily, also where the limit cuts a turn, and where a tool's answer would not fit."""
    problems = make_splits("lookup_agent")["test"][:24]
    twice, model = [p for p in problems for _ in range(2)], AutoModelForCausalLM.from_pretrained(SPEC.folder)
    completions, own = roll_out(model, tokenizer, twice, limit=limit, sampling={"do_sample": False})
    rows, options = [problem.row() for problem in twice], {"top_k": 1, "max_completion_length": limit}
    options |= {"per_device_train_batch_size": len(rows), "num_generations": 2, "use_cpu": True, "bf16": False}
    args = LambdaGRPOConfig(str(tmp_path), report_to="none", **options)
    given = {"train_dataset": Dataset.from_list(rows), "environment_factory": LookUp}
    trainer = LambdaGRPOTrainer(model.train(), exact_answer, args, processing_class=tokenizer, **given)
    output = trainer._generate_and_score_completions(rows)
    for row, (ids, mask) in enumerate(zip(completions, own, strict=True)):
        kept = output["completion_mask"][row].bool()
        assert output["completion_ids"][row][kept].tolist() == ids
        assert output["tool_mask"][row][kept].tolist() == mask
    assert {0, 1} == {x for mask in own for x in mask}
    assert max(map(len, own)) == (26 if limit == 48 else limit)


def test_it_learns_to_look_everything_up():
    options = ["--max_steps", "30", "--eval_strategy", "no", "--eval_on_start", "false"]
    history = train_recipe(["recipes/train.py", "--config", str(learn_agent.RECIPE), *options])
    logged = {key: [entry[key] for entry in history if key in entry] for key in history[0]}
    first, last = (sum(logged["reward"][s]) / 10 for s in (slice(10), slice(-10, None)))
    assert last > first + 0.1
    assert sum(logged["tools/call_frequency"][-10:]) > sum(logged["tools/call_frequency"][:10])
    assert logged["lambda/value"][-1] > 0 and max(logged["tools/failure_frequency"]) < 0.2


def test_the_rows_of_six_seeds_show_what_the_readme_says():
    rows = Ledger(learn_agent.RESULTS, ("arm", "seed")).rows()
    readme = " ".join((BASE_MODELS["demo"].folder.parent / "README.md").read_text().split())
    for arm in learn_agent.ARMS:
        runs = [row for row in rows if row["arm"] == arm]
        assert [int(row["seed"]) for row in runs] == list(learn_agent.SEEDS)
        assert sum(float(row["reward_last_10"]) > 0.9 for row in runs) >= 5
        columns = ("reward_first_5", "reward_last_10", "held_out_before", "held_out_after", "calls_last_10")
        means = [f"{sum(float(row[name]) for row in runs) / len(runs):.3f}" for name in columns]
        assert f"| {' | '.join(means)} |" in readme
