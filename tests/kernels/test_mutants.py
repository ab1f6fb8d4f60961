"""The planted faults fit the kernels as they are now: `mutants.py` would not plant nothing, or nonsense."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from planted_faults import EXPLAINED, MUTANTS

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_enough_faults_each_with_a_name_of_its_own():
    assert len(MUTANTS) >= 44
    names = Counter(mutant.name for mutant in MUTANTS)
    assert [name for name, count in names.items() if count > 1] == []
    assert set(EXPLAINED) <= set(names)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_changes_its_file_into_other_python(mutant):
    faulty = ast.dump(ast.parse(mutant.source(ROOT)))
    assert faulty != ast.dump(ast.parse((ROOT / mutant.file).read_text()))
    assert (Path(__file__).parent / mutant.test).exists(), f"{mutant.test}: expected a test file"


def test_a_fault_whose_text_is_gone_is_an_error():
    from dataclasses import replace

    for wrong in (replace(MUTANTS[0], old="no such text"), replace(MUTANTS[0], count=2)):
        with pytest.raises(ValueError, match=f"{MUTANTS[0].name}.*expected . times, found"):
            wrong.source(ROOT)
