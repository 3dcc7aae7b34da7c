"""
`trl-lambda train` as a script, for `accelerate launch` in a checkout.

    accelerate launch recipes/train.py --config recipes/configs/playground.yaml
    python recipes/train.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/DeepMath-103K \\
        --reward_funcs accuracy_reward --lambda_init 0.0 --output_dir runs/deepmath
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:  # run as a script, Python puts this file's own folder there instead
    sys.path.insert(0, ROOT)

from trl_lambda.training import main  # noqa: E402

if __name__ == "__main__":
    main()
