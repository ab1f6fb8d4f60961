"""Memory that a process has freed is kept where it was asked to be, until it is given back."""

import platform
import subprocess
import sys

import pytest
from processes import clean_environment

PROGRAM = """
import resource, sys
import torch
from blip2_kernels.model.memory import give_back_freed_memory, keep_freed_memory, keeps_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

asked = sys.argv[1] != "default" and keep_freed_memory()
assert asked == keeps_freed_memory()
if sys.argv[1] == "give back":
    torch.ones(2**26)
    kept = resident()
    give_back_freed_memory()
    assert not keeps_freed_memory() and kept - resident() > 2**28 / resource.getpagesize() / 2
print(asked, min(faults() for _ in range(20)))  # an aligned block may not fit where the one before it was
"""


def run(how):
    command = [sys.executable, "-c", PROGRAM, how]
    environment = clean_environment(LD_PRELOAD="", GLIBC_TUNABLES="")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    asked, faults = done.stdout.split()
    return asked == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_a_block_taken_again_needs_no_new_pages_until_memory_is_given_back():
    (asked, kept), (_, default), (_, given_back) = run("keep"), run("default"), run("give back")
    assert asked and 4 * kept < default and 4 * kept < given_back
