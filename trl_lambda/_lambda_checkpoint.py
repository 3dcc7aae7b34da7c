"""λ in checkpoints, beside saved models, and back."""

import shutil
from pathlib import Path

from ._lambda_files import (
    COMPANION_FILE,
    LAMBDA_FILE,
    companion_state_to_json,
    read_companion_state,
    read_lambda_file,
    write_json,
)
from ._whole_checkpoint import check_whole


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

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_whole(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self._lambda is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        content = read_lambda_file(checkpoint)
        if content["aggregation"] != self.args.aggregation:
            raise ValueError(
                f"aggregation={self.args.aggregation!r}, but {checkpoint} was trained with "
                f"{content['aggregation']!r}, whose λ has another meaning. Resume with that one."
            )
        if not self._lambda.learnable and content["lambda"] != self._lambda.value:
            raise ValueError(
                f"lambda_init={self.args.lambda_init} is fixed (lambda_learnable=False), but {checkpoint} has "
                f"λ = {content['lambda']}. Resume with lambda_init={content['lambda']}."
            )
        # With save_only_model there is no optimizer state, neither the model's nor λ's.
        if self._lambda.companion is not None and not self.args.save_only_model:
            self._lambda.companion.load_state_dict(read_companion_state(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)
        self._lambda.load(content["lambda"], content["skipped"])

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
