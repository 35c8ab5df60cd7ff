"""Cluster any folder or bucket of images.

ray job submit --working-dir . -- python jobs/tac_s3.py \
    --images s3://bucket/prefix --n-clusters 500 --out s3://bucket/runs/a
"""

import sys

from tac_ray.cli import run_command

if __name__ == "__main__":
    run_command(sys.argv[1:])
