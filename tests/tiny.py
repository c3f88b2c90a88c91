"""Tiny random models in the shape of real ones, as folders on disk: seconds to train, and every law holds for
them too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tunesmith.preflight.goldens import cases

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "the cat sat on a mat and read my note about tools, files, timers and music while you were away today "
)


def write_tokenizer(folder: Path, template: str | None = CHATML) -> int:
    """A byte-level BPE tokenizer with ChatML's control tokens; returns the size of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS * 4], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def write_model(
    folder: Path,
    vocabulary: int,
    *,
    kind: str = "llama",
    layers: int = 2,
    hidden: int = 64,
    tied: bool = True,
    seed: int = 0,
) -> None:
    """config.json and model.safetensors (float32) of a random model of the llama family, 4 heads over 2
    key-value heads."""
    heads, kv_heads, inner = cases.HEADS, cases.KV_HEADS, 2 * hidden
    config = {
        "model_type": kind,
        "architectures": ["MistralForCausalLM" if kind == "mistral" else "LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }
    tensors = cases.weights(vocabulary, layers=layers, hidden=hidden, tied=tied, seed=seed)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})


def write_llama(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, write_tokenizer(folder))
    return folder


def write_mistral(folder: Path) -> Path:
    """Mistral's architecture scaled down, with the real v3 tokenizer that mistral-common ships."""
    import shutil

    import mistral_common

    folder.mkdir(parents=True, exist_ok=True)
    shipped = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(shipped, folder / "tokenizer.model.v3")
    write_model(folder, 32768, kind="mistral", tied=False)
    return folder


def conversations(count: int, seed: int = 0) -> list[dict]:
    """Short labelled rows of random words, no two alike."""
    random = np.random.Generator(np.random.PCG64(seed))
    words = WORDS.split()

    def phrase(low: int, high: int) -> str:
        return " ".join(random.choice(words, random.integers(low, high)))

    rows = []
    for index in range(count):
        turns = []
        for turn in range(int(random.integers(1, 3))):
            turns.append({"role": "user", "content": f"{index} {turn} {phrase(2, 8)}"})
            turns.append({"role": "assistant", "content": phrase(1, 12)})
        rows.append({"conversations": turns})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
