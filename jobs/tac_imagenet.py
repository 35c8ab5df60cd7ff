"""ImageNet-1K as in the paper: fitted to train, scored on train and val.

ray job submit --working-dir . -- python jobs/tac_imagenet.py \
    --images s3://bucket/imagenet/train --val-images s3://bucket/imagenet/val --out s3://bucket/run

Any tree in ImageNet layout works; smaller ones need --n-clusters.
"""

import sys

from tac_ray.cli import run_command

if __name__ == "__main__":
    run_command(
        ["--resize", "256", *sys.argv[1:]],
        methods=("kmeans", "train-free", "tac", "graph"),
        n_clusters=1000,
        labels="folder",
    )
