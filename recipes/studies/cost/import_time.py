"""
Seconds that `import trl_lambda` takes beyond TRL's trainer, in fresh processes.

    python -m recipes.studies.cost.import_time
"""

import json
import subprocess
import sys
from typing import Any

from recipes.studies.cost.measure.rows import ROOT, append, bench_parser, row

BENCH = "import"
_CHILD = """
import json, sys, time
from typing import Any
start = time.perf_counter()
from trl import GRPOConfig, GRPOTrainer
trl = time.perf_counter()
before, cpu = set(sys.modules), time.process_time()
import trl_lambda.lambda_grpo_trainer
ours, cpu = time.perf_counter(), time.process_time() - cpu
modules = len(set(sys.modules) - before)
print(json.dumps([trl - start, ours - trl, cpu, modules]))
"""


def measure(repeats: int) -> list[dict[str, Any]]:
    """Rows of as many processes."""
    seen = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _CHILD], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seen.append(json.loads(done.stdout.strip().splitlines()[-1]))
    trl, ours, cpu, modules = zip(*seen, strict=True)
    return [
        row(BENCH, "GRPOTrainer", "fresh process", "import", trl, "s"),
        row(BENCH, "trl_lambda", "after TRL's trainer", "import", ours, "s"),
        row(BENCH, "trl_lambda", "after TRL's trainer", "import, CPU time", cpu, "s"),
        row(BENCH, "trl_lambda", "after TRL's trainer", "modules", modules[0], "count"),
    ]


def main() -> None:
    """Measure and append the rows."""
    parser = bench_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    append(args.out, measure(1 if args.smoke else args.repeats), "cpu")


if __name__ == "__main__":
    main()
