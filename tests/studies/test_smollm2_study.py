"""The study on SmolLM2: its plan, one run on a stand-in, its tables from rows that are known."""

import pytest
from gym_stand_in import install_gym
from stand_ins import write_model
from trl import GRPOConfig

from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.length_rewards import distance, laconic
from recipes.studies.smollm2 import report, run, study
from recipes.studies.smollm2.arms import find_arm
from trl_lambda import LambdaGRPOConfig

ARMS = {arm for _, arms, _ in study.PARTS.values() for arm in arms}


@pytest.fixture(autouse=True)
def gym(monkeypatch):
    install_gym(monkeypatch)
    run.questions.cache_clear()


@pytest.mark.parametrize("arm", sorted(ARMS))
def test_every_arm_is_a_configuration_of_its_own_and_in_the_plan(arm, tmp_path):
    definition = find_arm(arm)
    config_class = GRPOConfig if definition.trl else LambdaGRPOConfig
    config_class(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **definition.options)
    same = {other for other in ARMS if find_arm(other).key == definition.key}
    assert same == ({"dapo", "dapo_again"} if "dapo" in same else {arm})
    assert f"`{arm}`" in (report.PAGE.parent / "PLAN.md").read_text(encoding="utf-8")


def test_tuning_and_test_seeds_are_apart_and_no_test_question_is_trained_on():
    planned = [spec for part in study.PARTS if part != "tune" for spec in study.specs_of(part)]
    assert {spec.seed for spec in planned} == set(range(8)) and len(set(planned)) == len(planned)
    assert {spec.seed for spec in study.specs_of("tune")} == {900, 901, 902}
    one, other = (run.questions("products", seed) for seed in (0, 1))
    assert one["test"]["prompt"] == other["test"]["prompt"] and one["train"]["prompt"] != other["train"]["prompt"]
    asked = {str(prompt) for prompt in one["test"]["prompt"]}
    assert not asked & {str(prompt) for part in (one, other) for prompt in part["train"]["prompt"]}


def test_a_run_has_the_ledgers_columns_and_can_be_run_again(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")
    monkeypatch.setattr(run, "model_path", lambda: model)
    spec = run.SmolSpec("tune", "products_named", "softmax_tr", 900, max_steps=2, max_completion_length=6)
    row = run.run(spec)
    assert row["reward_curve"].count(" ") == row["at_max_curve"].count(" ") == 1
    assert 0 <= row["accuracy_greedy"] <= 1 and 1 <= row["mean_length"] <= 6 and row["commit"] and row["hardware"]
    ledger = Ledger(tmp_path / "runs.csv", study.KEY)
    ledger.append(row)
    assert ledger.done() == {ledger.key_of(row)}
    monkeypatch.setattr(study, "execute", lambda specs, to, workers, run: [to.append(run(spec)) for spec in specs])
    (line,) = study.reproduce(1, ledger, 1)
    assert line.endswith("(this processor): the same, bit for bit")


def test_any_number_of_a_reply_may_be_the_answer():
    metadata = ['{"entry": {"answer": "21"}}'] * 3
    replies = [[{"role": "assistant", "content": text}] for text in ("It is 21, not 3.", "210", "none")]
    assert run.names_answer(replies, metadata=metadata) == [1.0, 0.0, 0.0]


def test_the_yardstick_run_has_the_same_questions_and_other_replies(tmp_path):
    model, seen = write_model(tmp_path / "model"), []
    for arm in ("dapo", "dapo_again", "softmax"):
        spec = run.SmolSpec("tune", "products", arm, 900, max_steps=1, max_completion_length=6)
        trainer = run.make_trainer(spec, str(tmp_path / arm), model)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        seen.append((inputs["prompt_ids"].tolist(), inputs["completion_ids"].tolist()))
    (dapo, again, softmax) = seen
    assert dapo[0] == again[0] and dapo[1] != again[1] and dapo == softmax


def made_row(arm: str, seed: int, auc: float, lam: str = "") -> dict[str, str]:
    values = dict.fromkeys(("accuracy_sampled", "accuracy_greedy", "mean_length", "entropy", "grad_norm_mean"), "0.5")
    curves = {"reward_curve": " ".join([str(auc)] * 6), "length_curve": "9 8 7 6 5 4", "lambda_curve": lam}
    spec = {"study": "main", "task": "products", "arm": arm, "seed": str(seed), "auc": str(auc), "at_max_curve": ""}
    return spec | values | curves


def test_the_tables_pair_by_seed_and_count_what_has_not_run():
    rows = [made_row("dapo", seed, 0.4 + 0.01 * seed) for seed in range(8)]
    rows += [made_row("dapo_again", seed, 0.4 + 0.01 * seed + 0.02 * (-1) ** seed) for seed in range(8)]
    rows += [made_row("softmax", seed, 0.5 + 0.01 * seed + 0.001 * (-1) ** seed, "0 -0.1") for seed in range(8)]
    rows += [made_row("tr", 0, 0.9)]
    cells = report.cells_of(rows)
    assert report.differences(cells, "products", "softmax") == pytest.approx([0.101, 0.099] * 4)
    table = report.answers_table(cells, report.PUBLISHED, ("products", "products_named"))
    assert "| softmax | products | 8 | +10.0 [" in table and "| higher |" in table
    assert table.count("not run") == 4 and table.count("open: 1 of 8 pairs") == 1
    yardstick = report.yardstick_table(cells)
    assert "| products | 8 | 2.4 | +0.0 [" in yardstick and "| 2.1 |" in yardstick
    assert "| products | 8 of 8 | 0.100 |" in report.signs_table(cells)
    missing = report.not_run(rows, [{"task": "products"}])
    assert "| main | products | tr | 7 |" in missing and "| main | products | dapo |" not in missing
    assert "| length | products | dapo | 6 |" in missing and missing.endswith("nt | products_named | all | 1 |")
    assert report.verdict([0.01, -0.01] * 4, 1.0) == "level" and report.verdict([0.2, -0.2] * 4, 1.0) == "unknown"
    assert report.steps_to(list(cells["products", "dapo"].values()), 0.5) == "not reached"
    assert report.steps_to(list(cells["products", "softmax"].values()), 0.45) == "5"


def test_the_length_table_counts_who_holds_the_target():
    rows = []
    for arm, auc, end in (("dapo", 0.5, 10), ("laconic", 0.4, 6)):
        for seed in range(3):
            curve = " ".join(["20"] * 5 + [str(end + 0.5 * seed)] * 10)
            row = made_row(arm, seed, auc) | {"study": "length", "length_curve": curve}
            rows.append(row | {"accuracy_sampled": str(auc)})
    table = report.length_table([*rows, made_row("dapo", 0, 0.9)])
    assert "| dapo | 3 | 0 | 10.0, 11.0 | 0.5 |  | 50.0 |" in table
    assert "| laconic | 3 | 2 | 6.0, 7.0 | 0.5 | -10.0 | 50.0 |" in table


def test_the_report_replaces_its_tables_and_draws(tmp_path):
    page, ledger = tmp_path / "README.md", Ledger(tmp_path / "runs.csv", study.KEY)
    page.write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    for seed in range(3):
        for arm, lam in (("dapo", ""), ("softmax_tr", "0 -0.01")):
            ledger.append(made_row(arm, seed, 0.4 + 0.1 * seed, lam))
    row = {"task": "products", "seed": 1, "batches": 2, "ratio_raw": 0.9, "ratio_raw_se": 0.04, "ratio_adam": 0.8}
    alignment = Ledger(tmp_path / "alignment.csv", report.ALIGNMENT_KEY)
    for weight, error, same in (("dapo", 0, ""), ("tr", 0.09, ""), ("both", 0.09, "tr"), ("ar", 0.11, "")):
        alignment.append(row | {"weight": weight, "ratio_adam_se": error, "same_as": same})
    report.main(tmp_path, page)
    text = page.read_text(encoding="utf-8")
    assert "| products | softmax_tr | 3 |" in text and (tmp_path / "smollm2.png").is_file()
    assert "| tr | 0.900 ± 0.040 | 0.800 ± 0.090 | farther |" in text and "± 0.090 | as `tr` |" in text
    assert "| 0.800 ± 0.110 | unknown |" in text  # by two errors in one metric only


def test_the_length_rewards_follow_their_formulas():
    penalty = laconic(budget=10, eta=0.5)
    long, short = [[0] * 20, [0] * 10], [[0] * 2]
    assert penalty(["", ""], completion_ids=long) == [0.0, 0.0]  # λ is 0, then 0.5·(15/10 - 1)
    assert penalty(["", ""], completion_ids=long) == [-0.25, 0.0]
    assert penalty([""], completion_ids=short) == [0.0]  # λ 0.5, then 0.5 + 0.5·(0.2 - 1)
    assert penalty([""], completion_ids=[[0] * 20]) == pytest.approx([-0.1])
    hard = laconic(budget=1, eta=100.0)
    hard([""], completion_ids=[[0] * 9])
    assert hard([""], completion_ids=[[0] * 9]) == [-1.0]  # λ and the penalty stop at 1
    assert distance(10)(["", ""], completion_ids=[[0] * 15, [0] * 5]) == [-0.5, -0.5]
