"""What a run needs not, it does not load."""

import subprocess
import sys


def test_a_model_is_built_without_the_other_models_of_transformers():
    program = (
        "import sys; from composer_gpt2 import GPT2Model; from composer.models import huggingface;"
        "ask = huggingface._is_registered_causal_lm; GPT2Model.from_name('gpt-nano');"
        "assert huggingface._is_registered_causal_lm is ask;"
        "print([m for m in sys.modules if m.endswith(('modeling_llama', 'modeling_bert'))])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"
