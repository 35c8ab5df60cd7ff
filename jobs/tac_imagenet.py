"""ImageNet-1K as in the paper: fitted to train, scored on train and val.

ray job submit --working-dir . -- python jobs/tac_imagenet.py \
    --images s3://bucket/imagenet/train --val-images s3://bucket/imagenet/val --out s3://bucket/run

Any tree in ImageNet layout works; smaller ones need --n-clusters and --batch-size.
"""

import sys

from tac_ray.cli import run_command
from tac_ray.config import EncoderConfig, TrainHeadsConfig

if __name__ == "__main__":
    run_command(
        sys.argv[1:],
        methods=("kmeans", "train-free", "tac", "graph"),
        n_clusters=1000,
        labels="folder",
        encoder=EncoderConfig(resize=256),
        train_heads=TrainHeadsConfig(epochs=100, batch_size=8192, distillation_temperature=5.0),
    )
