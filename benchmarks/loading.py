"""Loading of a saved model of 164 M parameters, against reading its files once.

The files lie in the page cache, so the ratio shows the work beside the disk: hashes, checks, and
the copy into the model.
"""

import shutil
import tempfile
from pathlib import Path

from benchmarks.measure import Result, clock_for, in_turns, ratio, spread
from skillnet.config import SkillNetConfig
from skillnet.model import SkillNet
from skillnet.serialization import hash_file
from skillnet.skipped_init import SkippedInit

#: Loading takes seconds.
MOST_ROUNDS = 5
#: Seven skills in twelve layers: 164 M parameters, as in the issue that asked for quick loading.
SIZES = {"dim": 384, "num_layers": 12, "num_heads": 6, "ffn_dim": 1536, "vocab_size": 30_000}


def run(rounds: int, threads: int) -> list[Result]:
    """Ratios of the times to load a model, and to hash its files, to that of reading them."""
    rounds = min(rounds, MOST_ROUNDS)
    with tempfile.TemporaryDirectory(prefix="skillnet-") as scratch:
        folder = Path(scratch) / "model"
        with SkippedInit():  # the values do not matter
            model = SkillNet(SkillNetConfig(**SIZES))  # type: ignore[arg-type]
        count = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder)
        del model
        files = sorted(folder.iterdir())
        took = in_turns(
            {
                "load": lambda: SkillNet.from_pretrained(folder),
                "hash": lambda: [hash_file(path) for path in files],
                "read": lambda: [path.read_bytes() for path in files],
            },
            rounds,
            clock_for(threads),
            warmup=1,
        )
        shutil.rmtree(folder)
    setting = f"{count / 1e6:.0f} M parameters in float32, files in the page cache"
    return [
        Result("load", "", "s", *spread(took["load"]), "", rounds, setting),
        Result("load", "read", "ratio", *ratio(took["load"], took["read"]), "", rounds, setting),
        Result("hash", "read", "ratio", *ratio(took["hash"], took["read"]), "", rounds, setting),
    ]
