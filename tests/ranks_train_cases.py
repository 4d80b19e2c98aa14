"""Run by horovodrun: train every case of a JSON file, one after the other, on these ranks.

A case has the settings of its run; its key `resume` is the checkpoint to resume from.
"""

import json
import sys

from horovod_lm.train import run_distributed_training
from horovod_lm.utils.config import load_config
from horovod_lm.utils.distributed import setup_horovod, shutdown

world_size, rank, local_rank, _ = setup_horovod()
for name, overrides in json.load(open(sys.argv[2])).items():
    checkpoint = overrides.pop("resume", None)
    config = load_config(sys.argv[1], overrides)
    run_distributed_training(config, rank, world_size, local_rank, checkpoint, name)
shutdown()
