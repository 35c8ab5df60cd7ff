"""The paper's tables, on its data sets or on folders with one folder a class.

ray job submit --working-dir . -- python jobs/tac_benchmark.py \
    --dataset cifar-10 --data /data/cifar --out /runs/benchmark/cifar-10

python jobs/tac_benchmark.py --images ../shared/data/imagenette-val ../shared/data/cifar10-test \
    --model local-dir:../shared/encoders/mnv2-wordnet --out runs/benchmark/shared

`--table 4`, `--table 5`, `--table 6`, `--figure 5` and `--n-clusters 100,200,500` measure other
things over the same artifacts; the options of the stages of `tac-ray run` are taken too.
"""

import sys

from tac_ray.benchmark.command import benchmark_command

if __name__ == "__main__":
    benchmark_command(sys.argv[1:])
