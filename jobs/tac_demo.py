"""The demo as a job: pictures and an encoder that ship with the package.

ray job submit --working-dir . -- python jobs/tac_demo.py --out /runs/demo
"""

import sys

from tac_ray.cli import demo_command

if __name__ == "__main__":
    demo_command(sys.argv[1:])
