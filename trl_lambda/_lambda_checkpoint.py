"""λ in checkpoints, beside saved models, and back."""

import shutil
from pathlib import Path

from ._lambda_files import (
    COMPANION_FILE,
    LAMBDA_FILE,
    companion_state_to_json,
    read_lambda_file,
    write_json,
)
from ._optimizer_state import LambdaState, fit_scheduler, widen_scheduler
from .companion import engine_owns_optimizer
from .lambda_parameter import unwrap_optimizer


class LambdaCheckpointMixin:
    """
    Hooks of `Trainer` that save and load, for a trainer with `self._lambda`.

    `lambda.json` goes beside every saved model or adapter and holds λ. λ's optimizer state is in the trainer's own
    `optimizer.pt`, or, for a companion, in `lambda_optimizer.json`.
    """

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        self._write_lambda(self.args.output_dir if output_dir is None else output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        self._write_lambda(output_dir)  # with sharded FSDP checkpoints `_save` is not called
        if self._lambda is not None and self._lambda.companion is not None and self.args.should_save:
            state = companion_state_to_json(self._lambda.companion.state_dict())
            write_json(output_dir, COMPANION_FILE, state)

    def _write_lambda(self, folder) -> None:
        if self._lambda is None or not self.args.should_save:
            return
        content = {
            "format": 1,
            "lambda": self._lambda.value,
            "skipped": self._lambda.skipped,
            "learnable": self._lambda.learnable,
            "aggregation": self.args.aggregation,
            "aggregation_scope": self.args.aggregation_scope,
            "length_scale": self.args.length_scale if self.args.aggregation == "lambda" else None,
            "global_step": self.state.global_step,
        }
        write_json(folder, LAMBDA_FILE, content)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        content = self._check_checkpoint(checkpoint)
        parameter, optimizer = self._lambda, unwrap_optimizer(self.optimizer)
        if parameter is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state, handle = LambdaState(parameter, checkpoint, content["learnable"]), None
        if not engine_owns_optimizer(self):
            handle = state.fit_into(optimizer)
            widen_scheduler(self.lr_scheduler)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if handle is None and "parameter group" in str(error):
                raise ValueError(
                    f"{type(optimizer).__name__} cannot take the optimizer state of {checkpoint}, whose λ was "
                    f"{'learned' if content['learnable'] else 'fixed'}: resume with the lambda_learnable of that run. "
                    f"To go on otherwise, pass model={str(checkpoint)!r} and lambda_init={content['lambda']} to a new "
                    "trainer: both optimizers then start afresh."
                ) from error
            raise
        finally:
            if handle is not None:
                handle.remove()
        if not engine_owns_optimizer(self):
            fit_scheduler(self.lr_scheduler, optimizer)
        state.finish()
        parameter.load(content["lambda"], content["skipped"])

    def _check_checkpoint(self, checkpoint) -> dict:
        """
        Read what a checkpoint says of its λ; empty where there is none and none is needed.

        Raises:
            `ValueError`: its λ and this trainer's are not the same quantity.
        """
        new_run = f"pass model={str(checkpoint)!r} to a new trainer, whose optimizer then starts afresh"
        if self._lambda is None:
            if (Path(checkpoint) / LAMBDA_FILE).is_file():
                content = read_lambda_file(checkpoint)
                raise ValueError(
                    f"aggregation={self.args.aggregation!r} has no λ, but {checkpoint} was trained with "
                    f"aggregation={content['aggregation']!r} and λ = {content['lambda']}. Resume with that one. To go "
                    f"on without λ, {new_run}."
                )
            return {}
        content = read_lambda_file(checkpoint)
        if content["aggregation"] != self.args.aggregation:
            raise ValueError(
                f"aggregation={self.args.aggregation!r}, but {checkpoint} was trained with "
                f"{content['aggregation']!r}, whose λ has another meaning. Resume with that one. To go on with the "
                f"new one, {new_run}."
            )
        if not self._lambda.learnable and content["lambda"] != self._lambda.value:
            raise ValueError(
                f"lambda_init={self.args.lambda_init} is fixed (lambda_learnable=False), but {checkpoint} has "
                f"λ = {content['lambda']}. Resume with lambda_init={content['lambda']}."
            )
        return content

    def _load_best_model(self):
        super()._load_best_model()
        if self._lambda is not None:
            content = read_lambda_file(self.state.best_model_checkpoint)
            self._lambda.load(content["lambda"], content["skipped"])

    def _push_from_checkpoint(self, checkpoint_folder):
        # TRL pushes `output_dir` with the files it knows copied there; λ goes with them.
        source = Path(checkpoint_folder) / LAMBDA_FILE
        if self._lambda is not None and self.args.should_save and source.is_file():
            shutil.copy(source, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)
