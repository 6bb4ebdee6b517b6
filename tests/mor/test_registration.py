import subprocess
import sys

import pytest

CODE = """
import sys, mor
from mor.peft_format import to_peft
assert "peft" not in sys.modules and mor.to_lora
mor.register_with_peft()
import peft
print(peft.PeftConfig.from_peft_type(peft_type="MOR", target_modules=["qkv"]).ranks)
"""


def test_peft_is_imported_when_it_is_asked_for():
    pytest.importorskip("peft")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 4, 8)", done.stderr
