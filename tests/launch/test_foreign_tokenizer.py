"""A run on somebody else's tokenizer, from its text to its export."""

from pathlib import Path

from data.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokenizer import Tokenizer
from tests.data import others
from tests.launch.small_run import here, metrics, write_config


def test_a_run_trains_with_it_and_hands_it_on(tmp_path: Path, capsys):
    folder = others.write(tmp_path / "gpt2", others.byte_level("gpt2"), others.EOS)
    config, run = write_config(tmp_path), tmp_path / "run"
    arguments = [f"--config={config}", f"--config.tokenizer.path={folder}", "--config.data.num_workers=1"]
    # More ids than the tokenizer has, and more than fill its last 128.
    steps = ["--config.train.num_steps=6", "--config.model.vocab_size=900"]
    assert here("pretrain", *arguments, *steps) == 0
    tokenizer = Tokenizer.load(run / "tokenizer")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.fingerprint == Tokenizer.load(folder).fingerprint
    losses = [record["loss"] for record in metrics(run) if "loss" in record]
    assert losses[-1] < losses[0]
    capsys.readouterr()
    assert here("generate", run, "--prompt=the cat", "--max_new_tokens=8") == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert Tokenizer.load(run / "export").fingerprint == tokenizer.fingerprint
    assert here("evaluate", run / "export", f"--corpus={tmp_path / 'corpus.jsonl'}") == 0
    assert (
        here("pretrain", *arguments, "--config.model.vocab_size=100", f"--config.train.run_dir={tmp_path / 'b'}") == 2
    )
    assert f"model.vocab_size = 100 is less than the tokenizer's {tokenizer.vocab_size}" in capsys.readouterr().err
