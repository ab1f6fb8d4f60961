"""Memory that a process has freed is kept where it was asked to be: nothing faults in again."""

import platform
import subprocess
import sys

import pytest
from processes import clean_environment

PROGRAM = """
import resource, sys
import torch
from blip2_kernels.model.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

asked = sys.argv[1] == "keep" and keep_freed_memory()
print(asked, min(faults() for _ in range(20)))  # an aligned block may not fit where the one before it was
"""


def run(how):
    command = [sys.executable, "-c", PROGRAM, how]
    environment = clean_environment(LD_PRELOAD="", GLIBC_TUNABLES="")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    asked, faults = done.stdout.split()
    return asked == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_a_block_taken_again_needs_no_new_pages():
    (asked, kept), (_, default) = run("keep"), run("default")
    assert asked and 4 * kept < default
