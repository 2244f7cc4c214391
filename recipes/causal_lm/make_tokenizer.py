"""Train a byte-level BPE of 4,096 tokens on WikiText-2's train split: make_tokenizer.py TRAIN.parquet FOLDER.

GPT-2's 50,257 tokens would be 90 % of so small a model, and most of its time.
"""

import sys

from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"

texts = load_dataset("parquet", data_files=sys.argv[1], split="train")["text"]
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator(
    texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=[END], initial_alphabet=alphabet)
)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(sys.argv[2])
