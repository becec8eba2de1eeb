import math

import torch

from fastgpt.evaluate import evaluate
from fastgpt.loading import SHIPPED, check_vocabulary, load_model

# Not from the corpus: in its manner.
TEXT = """
MESSENGER:
My lord, the king is at the gate, and with him
A thousand men that never saw your face.
What answer shall I bear them from this house?

DUKE:
Go tell the king that I am well at peace
With all the world, and would be so with him.
"""


def test_the_shipped_model_is_small_and_knows_its_tongue():
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) <= 8e6
    model, tokenizer = load_model()
    check_vocabulary(model, tokenizer)
    assert evaluate(model, tokenizer, TEXT).nats_per_character < 1.9 < math.log(len(set(TEXT)))


def test_it_goes_on_in_words():
    model, tokenizer = load_model()
    ids = torch.tensor([tokenizer.encode("ROMEO:")])
    text = tokenizer.decode(model.generate(ids, 200, temperature=0.7, seed=1)[0].tolist())
    assert text.startswith("ROMEO:") and len(set(text.split()) & {"the", "and", "to", "of", "I", "my", "you"}) >= 3
