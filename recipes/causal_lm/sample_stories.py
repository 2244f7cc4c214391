"""Sample texts from the stories260K model itself: sample_stories.py MODEL FOLDER.

The weights come without a tokenizer, so a text is the names of its tokens ("<5> <403> ..."), and the tokenizer that is
written beside the texts turns each name back into its id.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

LENGTH = 127
SPLITS = {"train": 4096, "validation": 512, "test": 512}

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
folder = Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
names = {f"<{token}>": token for token in range(model.config.vocab_size)}
tokenizer = Tokenizer(models.WordLevel(names, unk_token="<0>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>", bos_token="<1>", eos_token="<2>").save_pretrained(
    folder
)
for number, (split, size) in enumerate(SPLITS.items()):
    torch.manual_seed(number)
    rows = []
    for start in range(0, size, 256):
        prompt = torch.ones(min(256, size - start), 1, dtype=torch.long)
        given = {"do_sample": True, "temperature": 1.0, "top_k": 0, "min_new_tokens": LENGTH, "max_new_tokens": LENGTH}
        rows += model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **given).tolist()
    lines = [json.dumps({"text": " ".join(f"<{token}>" for token in row)}) for row in rows]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
