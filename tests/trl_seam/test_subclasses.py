"""Subclasses between TRL and the loss: as TRL's own for the same subclass, in float64, or refused in one sentence."""

import copy

import harness
import pytest
import torch
from harness import Batch, assert_equal_in_double, assert_same_bits, build_model, by_length, largest_deviation, train
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

CUT = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}


class InDouble(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return output | {"advantages": output["advantages"].double()}


def run(mixin, trainer_class=LambdaGRPOTrainer, config_class=LambdaGRPOConfig, batch=None, noise=0.3, **options):
    bases = [cls for cls in (mixin, trainer_class, InDouble) if cls not in (None, GRPOTrainer)]
    trainer_class = type(bases[0].__name__, tuple(bases), {})
    extra = {"model": build_model(double=True), "trainer_options": {"noise": noise}}
    return train(trainer_class, config_class, batch, **extra, **options)


def run_trl(mixin, loss_type, **options):
    return run(mixin, GRPOTrainer, GRPOConfig, loss_type=loss_type, **options)


def keep_rows(output, rows):
    size = output["completion_mask"].size(0)
    per_row = {k: v[rows] for k, v in output.items() if torch.is_tensor(v) and v.dim() and v.size(0) == size}
    output = output | per_row
    return output | {"num_items_in_batch": output["completion_mask"].sum()}


def masks(where, *, counts_anew=True):
    """A filter, as for overlong completions; without `counts_anew` it leaves the count that TRL divides by."""

    class Masks:
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            mask = output["completion_mask"].clone()
            mask[where] = 0
            return output | {"completion_mask": mask} | ({"num_items_in_batch": mask.sum()} if counts_anew else {})

    return Masks


MasksRows, MasksRowsOnly = masks([1, 6]), masks([1, 6], counts_anew=False)
MasksTails = masks((slice(None), slice(2, None)))


class KeepsSome:  # GFPO: the two best of each group
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        best = output["advantages"].view(-1, 4).argsort(dim=1, descending=True)[:, :2]
        return keep_rows(output, (best + torch.arange(0, 12, 4).unsqueeze(1)).flatten())


class DynamicSampling:  # DAPO: groups of two rounds
    def _generate_and_score_completions(self, inputs):
        first = super()._generate_and_score_completions(inputs)
        second = super()._generate_and_score_completions(inputs)
        first, second = keep_rows(first, range(8)), keep_rows(second, range(4))
        both = {k: torch.cat([v, second[k]]) if torch.is_tensor(v) and v.dim() else v for k, v in first.items()}
        return both | {"num_items_in_batch": both["completion_mask"].sum()}


class Turning(Batch):  # every second call gives each prompt the completions of the next one
    def rollout(self, prompts, trainer):
        output = super().rollout(prompts, trainer)
        if getattr(self, "calls", 0) % 2:
            output["completion_ids"] = output["completion_ids"][4:] + output["completion_ids"][:4]
        self.calls = getattr(self, "calls", 0) + 1
        return output


class Replays:  # from the second batch on, the last group is a remembered one
    memory = None

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        memory, self.memory = self.memory, keep_rows(output, range(4))
        if memory is not None:
            for key, value in memory.items():
                if torch.is_tensor(value) and value.dim():
                    output[key] = output[key].clone()
                    output[key][8:] = value
            output["num_items_in_batch"] = output["completion_mask"].sum()
        return output


@pytest.mark.parametrize("member", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("mixin", [MasksRows, MasksRowsOnly, KeepsSome, DynamicSampling, Replays])
def test_members_equal_trls_loss_for_the_same_subclass(mixin, member):
    """N and S are those of the rows that the loss sees; groups stay what they were (faults 4 and 5)."""
    options = ({"per_device_train_batch_size": 12} if mixin is DynamicSampling else CUT) | {"max_steps": 2}
    theirs = run_trl(mixin, member, batch=Turning(), **options)
    assert_equal_in_double(run(mixin, batch=Turning(), length_weight=member, **options), theirs)


@pytest.mark.parametrize("mixin", [MasksRows, KeepsSome])
def test_sapo_has_the_same_denominators(mixin):
    sapo = {"loss_type": "sapo"} | CUT
    assert_equal_in_double(run(mixin, length_weight="grpo", **sapo), run_trl(mixin, **sapo))

    class TokenMean(mixin):
        """TRL's mean of sequence means made a token mean by hand: sapo uses of A no more than sign and factor."""

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            lengths = output["completion_mask"].sum(dim=1)
            output["advantages"] = output["advantages"].double() * lengths / lengths.double().mean()
            return output

    assert_equal_in_double(run(mixin, length_weight="dapo", **sapo), run_trl(TokenMean, **sapo))


def test_f_of_groups_that_were_put_together_is_f_of_each():
    """λ = 1.5 on DAPO's dynamic sampling: the weights of a plain batch that has just these groups."""
    mine = run(DynamicSampling, batch=Turning(), noise=0, lambda_init=1.5, lambda_learnable=False)
    scored = mine.trainer._scoring.batches["train"]
    assert scored.lengths.tolist() == [[3, 1, 12, 6], [2, 2, 9, 5], [2, 2, 9, 5]]
    plain = run(None, batch=Batch(lengths=scored.lengths.tolist()), noise=0, lambda_init=1.5, lambda_learnable=False)
    weights = [r.trainer._response_weights.weigh(r.trainer._scoring.batches["train"], 1)[0] for r in (mine, plain)]
    assert torch.equal(*weights) and weights[0].max() > 1.1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 1, 2, 3, 0, 1, 2, 3, 8, 9, 10, 11], "no whole groups: a row occurs twice"),
        ([0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9], "no whole groups: a row occurs twice"),
        ([0, 1, 2, 4, 5, 8], r"groups have \[1, 2, 3\] rows.*keep whole groups"),
    ],
)
def test_rows_that_are_no_groups_are_refused(rows, message):
    class Keeps:
        def _generate_and_score_completions(self, inputs):
            return keep_rows(super()._generate_and_score_completions(inputs), rows)

    with pytest.raises(RuntimeError, match=message):
        run(Keeps)


@pytest.mark.parametrize("kept", [slice(0, 12, 2), slice(0, 8)], ids=["two of four", "two groups of three"])
def test_a_base_class_that_drops_rows_is_refused(kept):
    class Filters(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return keep_rows(super()._generate_and_score_completions(inputs), kept)

    above = type("Above", (LambdaGRPOTrainer, Filters), {})
    with pytest.raises(RuntimeError, match="rows were scored for 12 inputs: a base class adds or drops rows"):
        train(above, LambdaGRPOConfig)


def test_a_base_class_that_replays_rows_gives_them_no_rewards():
    above = type("Above", (LambdaGRPOTrainer, type("Buffer", (Replays, GRPOTrainer), {})), {})
    with pytest.raises(RuntimeError, match="rewards are not known"):
        train(above, LambdaGRPOConfig, drop_tied_groups=True)


SIGNED = {"lambda_side": "signed", "lambda_features": ["length", "mean_logp", "min_logp"]}


@pytest.mark.parametrize("mixin", [MasksTails, MasksRows])
@pytest.mark.parametrize("options", [{"lambda_init": 1.5}, SIGNED, {"length_target": 5.0}], ids=str)
def test_lengths_and_features_are_those_of_what_the_loss_sees(mixin, options):
    """The same masks by way of the rollout, which TRL knows of before it scores, give the same run (fault 9)."""
    kept = (lambda row, t: t < 2) if mixin is MasksTails else (lambda row, t: row not in (1, 6))
    batch, known = by_length(), by_length(env_mask=lambda row, n: [int(kept(row, t)) for t in range(n)])
    options = options | CUT | {"length_weight": "power", "max_steps": 3, "lambda_learning_rate": 0.5, "noise": 0}
    mine, theirs, unmasked = (run(m, batch=b, **options) for m, b in ((mixin, batch), (None, known), (None, batch)))
    assert_equal_in_double(mine, theirs)
    assert mine.lambdas == pytest.approx(theirs.lambdas, rel=1e-9) and mine.lambdas[-1] != 0
    assert mine.lambdas[-1] != pytest.approx(unmasked.lambdas[-1], rel=1e-2)


class OwnInputs:  # a generation batch at each optimizer step, and nothing of TRL's buffer
    def _prepare_inputs(self, inputs):
        if not self.model.training:
            return self._generate_and_score_completions(inputs)
        part = self._step % self.args.steps_per_generation
        if part == 0:
            self.scored = self._generate_and_score_completions(inputs)
        rows = self.scored["completion_mask"].size(0) // self.args.steps_per_generation
        count = {"num_items_in_batch": self.scored["num_items_in_batch"]}
        return keep_rows(self.scored, slice(part * rows, (part + 1) * rows)) | count


@pytest.mark.parametrize("options", [{"length_target": 4.0}, {"lambda_side": "signed"}, {"lambda_init": 1.0}], ids=str)
@pytest.mark.parametrize("cut", [{}, CUT], ids=["whole", "micro-batches"])
def test_lambda_learns_with_a_prepare_inputs_of_the_users(options, cut):
    """Fault 6."""
    options = options | cut | {"max_steps": 3, "length_weight": "power", "noise": 0, "batch": by_length()}
    mine, plain = run(OwnInputs, **options), run(None, **options)
    assert mine.lambdas == pytest.approx(plain.lambdas, rel=1e-9) and len(set(mine.lambdas)) == 3
    (a, b) = (each.logs[-1]["advantage/length_correlation"] for each in (mine, plain))
    assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("options", [{"lambda_init": 1.5}, {"length_weight": "balanced"}], ids=["λ-GRPO", "balanced"])
def test_the_group_size_is_read_where_trl_reads_it(options):
    """Fault 7."""
    options = options | {"max_steps": 1, "lambda_learnable": False} if "lambda_init" in options else options
    trainer = run(None, **options).trainer
    trainer.num_generations = 2
    of_pairs = harness.watch(trainer)
    trainer.seen_losses.clear()
    trainer.train()
    assert trainer._scoring.batches["train"].lengths.shape == (6, 2)
    assert_equal_in_double(of_pairs, run(None, num_generations=2, **options))


@pytest.mark.parametrize("bases", [(LambdaGRPOTrainer, GMPOTrainer), (GMPOTrainer, LambdaGRPOTrainer)])
def test_gmpo_is_refused_while_weights_are_on_and_gmpo_without(bases):
    mixed = type("Mixed", bases, {})
    for weights in ({"length_weight": "grpo"}, {"length_weight": None, "token_weight": "tr_grpo"}):
        with pytest.raises(ValueError, match="GMPOTrainer replaces GRPOTrainer's _compute_loss.*loss_reduction"):
            train(mixed, LambdaGRPOConfig, **weights)
    steps = {"max_steps": 2, "learning_rate": 1e-2, "epsilon": 0.4}
    mine = train(mixed, LambdaGRPOConfig, length_weight=None, **steps)
    assert_same_bits(mine, train(GMPOTrainer, GMPOConfig, **steps))


def test_gmpo_that_declares_its_reduction():
    """`grpo` is that reduction itself, `dapo` weights each sequence by |o_i|/μ."""

    class Declared(LambdaGRPOTrainer, GMPOTrainer):
        loss_reduction = "sequence"

    plain = run(None, GMPOTrainer, GMPOConfig, epsilon=0.4)
    assert_equal_in_double(run(None, Declared, epsilon=0.4, length_weight="grpo"), plain)
    by_length = run(None, Declared, epsilon=0.4, length_weight="dapo", noise=0)
    lengths = torch.tensor([float(len(c)) for c in Batch().completions])
    advantages = torch.tensor(list(plain.trainer._logs["advantages"])[:12])
    assert by_length.losses[0] == pytest.approx(-(lengths / lengths.mean() * advantages).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="token_weight must be None: Declared declares loss_reduction='sequence'"):
        train(Declared, LambdaGRPOConfig, token_weight="tr_grpo")


class SequenceMean:
    """A loss of the user's, which happens to be TRL's own mean of sequence means whatever `loss_type` says."""

    loss_reduction = "sequence_mean"

    def _compute_loss(self, model, inputs):
        self.loss_type = "grpo"
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("options", [{"length_weight": "dapo"}, {"length_weight": "power", "lambda_init": 0.7}])
def test_f_restates_a_declared_sequence_mean(options):
    assert_equal_in_double(run(SequenceMean, **options, **CUT), run(None, **options, **CUT))


def test_positive_weight_beside_a_declared_reduction_of_the_users():
    """Fault 11."""
    options = {"length_weight": None, "positive_weight": 3.0} | CUT
    mine, theirs = run(SequenceMean, **options), run(None, loss_type="grpo", **options)
    assert_equal_in_double(mine, theirs)
    for q in (1, 2, 3, 4):
        assert mine.logs[0][f"share/length_q{q}"] == pytest.approx(theirs.logs[0][f"share/length_q{q}"], rel=1e-5)
    token_mean = run(None, **options)
    assert largest_deviation(mine.grads[0], token_mean.grads[0]) > 0.05


class Anew(LambdaGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {key: value for key, value in output.items() if not key.startswith("generation_batch")}


class Bypasses(LambdaGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        return GRPOTrainer._generate_and_score_completions(self, inputs)


class Late(LambdaGRPOTrainer):
    def _prepare_inputs(self, inputs):
        inputs = dict(super()._prepare_inputs(inputs))
        return inputs | {"completion_mask": inputs["completion_mask"] * (torch.arange(12) < 2)}


class Replaced(LambdaGRPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self._compute_loss(model, inputs)


class Copies(LambdaGRPOTrainer):
    loss_reduction = "token_mean"

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, dict(inputs))


class SecondTerm(LambdaGRPOTrainer):
    loss_reduction = "token_mean"

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self._get_per_token_logps_and_entropies(model, inputs["prompt_ids"], inputs["prompt_mask"], 1)
        return loss


Unknown = type("Unknown", (LambdaGRPOTrainer,), {"loss_reduction": "mean"})
Silent = type("Silent", (SequenceMean, LambdaGRPOTrainer), {"loss_reduction": None})


@pytest.mark.parametrize(
    ("trainer_class", "message"),
    [
        (Anew, "builds it anew. Return the dictionary that super"),
        (Bypasses, "rows that trl_lambda has not seen.*_generate_and_score_completions"),
        (Late, "masks or replaces rows after super"),
        (Replaced, r"replaces compute_loss without calling super\(\).compute_loss"),
        (Copies, r"Copies._compute_loss may pass on a copy of `inputs`, such as dict"),
        (SecondTerm, "asked for the policy's log-probabilities twice"),
        (Unknown, "Unknown.loss_reduction='mean' is unknown; accepted: token_mean"),
        (Silent, "SequenceMean replaces GRPOTrainer's _compute_loss"),
    ],
)
@pytest.mark.parametrize("weights", [{}, {"token_weight": "tr_grpo"}], ids=["f", "f and v"])
def test_a_subclass_that_the_weights_would_not_reach_is_named(trainer_class, message, weights):
    with pytest.raises((RuntimeError, ValueError), match=message):
        train(trainer_class, LambdaGRPOConfig, Batch(lengths=[[3, 1, 12, 12]] * 3), **weights)


class Reference(LambdaGRPOTrainer):
    loss_reduction = "token_mean"

    def _compute_loss(self, model, inputs):
        if self.ref_model is not None:
            self._get_per_token_logps_and_entropies(self.ref_model, inputs["prompt_ids"], inputs["prompt_mask"], 1)
        return super()._compute_loss(model, inputs)


def test_a_reference_model_is_no_second_loss_and_a_loss_needs_no_gradient():
    trainer = run(None, Reference).trainer
    loss = trainer.compute_loss(trainer.model, trainer._buffered_inputs[0]).detach()
    trainer.ref_model = copy.deepcopy(trainer.model)
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, trainer._buffered_inputs[0]) == loss


def test_advantages_per_token_and_what_needs_their_sign():
    class PerToken(LambdaGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["advantages"] = output["advantages"].unsqueeze(1).expand(output["completion_mask"].shape)
            return output

    options = {"lambda_init": 1.0, "token_weight": "tr_grpo"}
    wide, narrow = run(None, PerToken, **options), run(None, **options)
    assert sum(wide.losses) == pytest.approx(sum(narrow.losses), rel=1e-6)  # f in float32 without one A per response
    assert largest_deviation(wide.grads[0], narrow.grads[0]) < 1e-6
    with pytest.raises(ValueError, match="lambda_side='both'"):
        train(PerToken, LambdaGRPOConfig, length_weight="power", lambda_side="positive")
    with pytest.raises(ValueError, match="one advantage per response.*positive_weight=1"):
        train(PerToken, LambdaGRPOConfig, positive_weight=2.0)
