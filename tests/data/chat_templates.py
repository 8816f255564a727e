"""Published chat templates, written anew: what they write, and what they do to contents and to earlier turns.

The tag `generation` holds what is trained on: the answer and the mark that ends it. Transformers makes its own mask of
it; without the tags a template is as its makers publish it.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.data import others

TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def answer(expression: str) -> str:
    """What is trained on."""
    return f"{{%- generation -%}}{{{{ {expression} }}}}{{%- endgeneration -%}}"


CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' -%}" + answer("m.content + '<|im_end|>'") + "{{ '\n' }}"
    "{%- else -%}{{ m.content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
LLAMA3 = (
    "{%- if date_string is not defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}"
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set first, rest = messages[0]['content'] | trim, messages[1:] -%}"
    "{%- else -%}{%- set first, rest = '', messages -%}{%- endif -%}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + first + '<|eot_id|>' }}"
    "{%- for m in rest -%}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if m['role'] == 'assistant' -%}"
    + answer("m['content'] | trim + '<|eot_id|>'")
    + "{%- else -%}{{ m['content'] | trim + '<|eot_id|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
GEMMA = (
    "{{ bos_token }}{%- set before = '' -%}{%- set rest = messages -%}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set before = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}{%- endif -%}"
    "{%- for m in rest -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- if m['role'] == 'assistant' -%}{{ '<start_of_turn>model\n' }}"
    + answer("m['content'] | trim + '<end_of_turn>'")
    + "{{ '\n' }}{%- else -%}{{ '<start_of_turn>' + m['role'] + '\n' + (before if loop.first else '') }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
MISTRAL = (
    "{{ bos_token }}{%- set system, rest = none, messages -%}{%- if messages[0].role == 'system' -%}"
    "{%- set system, rest = messages[0].content, messages[1:] -%}{%- endif -%}"
    "{%- for m in rest -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('conversation roles must alternate user/assistant') }}{%- endif -%}"
    "{%- if m.role == 'user' -%}"
    "{{ ' [INST] ' + (system + '\n\n' if loop.first and system else '') + m.content + ' [/INST]' }}"
    "{%- else -%}" + answer("' ' + m.content + eos_token") + "{%- endif -%}{%- endfor -%}"
)
# Mistral 0.3: the system's text is put before the newest question, and nowhere once that is answered.
MISTRAL_MOVES_SYSTEM = MISTRAL.replace("loop.first and system", "loop.last and system")
QWEN3 = (
    "{%- if messages[0].role == 'system' -%}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif -%}{%- set ns = namespace(open=true, query=messages | length - 1) -%}"
    "{%- for m in messages[::-1] -%}{%- set is_tool = m.content.startswith('<tool_response>') -%}"
    "{%- if ns.open and m.role == 'user' and not is_tool -%}"
    "{%- set ns.open = false -%}{%- set ns.query = messages | length - 1 - loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- set content = m.content -%}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' -%}{%- set thought = '' -%}{%- if '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{ '<|im_start|>assistant\n' }}{%- if loop.index0 > ns.query and (loop.last or thought) -%}"
    "THOUGHT{%- else -%}" + answer("content + '<|im_end|>'") + "{%- endif -%}{{ '\n' }}"
    "{%- elif m.role == 'tool' -%}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}"
    "{{ '\n<tool_response>\n' + content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{%- endif -%}"
)
_THOUGHT = "'<think>\n' + thought.strip('\n') + '\n</think>\n\n'"
_REST = "content.lstrip('\n') + '<|im_end|>'"
# With thinking a thought is generated; without, the prompt for an answer holds an empty one.
QWEN3_THINKS = QWEN3.replace("THOUGHT", answer(f"{_THOUGHT} + {_REST}"))
QWEN3_PLAIN = "{%- set enable_thinking = false -%}" + QWEN3.replace("THOUGHT", f"{{{{ {_THOUGHT} }}}}" + answer(_REST))
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' }}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' + '\n' }}{% endif %}\n{% endfor %}"
)
SMOLLM3 = (
    "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}"
    "{%- set mode = '/think' if enable_thinking else '/no_think' -%}{%- set own = 'You are a helpful assistant.' -%}"
    "{%- if messages[0].role == 'system' -%}{%- set said = messages[0].content -%}"
    "{%- if '/no_think' in said -%}{%- set mode = '/no_think' -%}{%- elif '/think' in said -%}"
    "{%- set mode = '/think' -%}{%- endif -%}"
    "{%- set own = said.replace('/no_think', '').replace('/think', '').rstrip() -%}{%- endif -%}"
    "{{ '<|im_start|>system\n## Metadata\n\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\nReasoning Mode: ' ~ mode }}"
    "{{ '\n\n## Custom Instructions\n\n' + own + '\n\n<|im_end|>\n' }}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' -%}"
    "{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if mode == '/no_think' else '') }}"
    + answer("m.content.lstrip('\n') + '<|im_end|>'")
    + "{{ '\n' }}{%- elif m.role == 'tool' -%}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if mode == '/no_think' else '') }}{%- endif -%}"
)
PHI3 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}"
    "{% generation %}{{ m['content'] + '<|end|>' + ('\n' + eos_token if loop.last else '') }}{% endgeneration %}"
    "{{ '' if loop.last else '\n' }}{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% elif messages[-1]['role'] != 'assistant' %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{%- set ns = namespace(system='') -%}{%- for m in messages -%}{%- if m['role'] == 'system' -%}"
    "{%- set ns.system = ns.system + m['content'] -%}{%- endif -%}{%- endfor -%}{{ bos_token }}{{ ns.system }}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{ '<｜User｜>' + m['content'] }}"
    "{%- elif m['role'] == 'assistant' -%}{{ '<｜Assistant｜>' }}"
    + answer("m['content'] + '<｜end▁of▁sentence｜>'")
    + "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- endif -%}"
)
# DeepSeek R1 lets every thought go.
DEEPSEEK_R1 = DEEPSEEK.replace("m['content'] + '<｜end▁of", "m['content'].split('</think>')[-1] + '<｜end▁of")
# OLMo 3: the mark that ends an answer comes after the last one alone.
OLMO3 = CHATML.replace("m.content + '<|im_end|>'", "m.content + ('<|im_end|>' if loop.last else '')")
OLMO3 = OLMO3.replace("{{ '\n' }}", "{{ '' if loop.last else '\n' }}")


class Published(NamedTuple):
    """A template with its kind of tokenizer.

    Attributes:
        tokenizer: kind of `tests.data.others`.
        marks: special tokens, added to the tokenizer; `whole`: added tokens that are not special.
        roles: those that it has beside user and assistant.
        rewrites: true if the past is written otherwise as turns are added, so that the last answer alone can be trained
            on in a conversation of several.
        rstrip: true if a mark takes the whitespace after it.
        thinks: true if an answer may begin with a thought.
    """

    template: str
    tokenizer: str
    bos: str
    eos: str
    marks: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("system",)
    rewrites: bool = False
    rstrip: bool = False
    thinks: bool = False

    @property
    def plain(self) -> str:
        """The template without the tag."""
        return TAG.sub("", self.template)


IM = ("<|im_start|>", "<|im_end|>")
THINK = ("</think>", "<tool_call>", "</tool_call>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SENTENCE = "<｜end▁of▁sentence｜>"
QWEN_EOS = (others.EOS, "<|im_end|>")
SYSTEM_AND_TOOL = ("system", "tool")
PUBLISHED = {
    "chatml": Published(CHATML, "gpt2", others.EOS, "<|im_end|>", IM, roles=SYSTEM_AND_TOOL),
    "llama3": Published(LLAMA3, "llama3", "<|begin|>", "<|eot_id|>", HEADERS),
    "gemma": Published(GEMMA, "gemma", "<s>", "</s>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": Published(MISTRAL, "llama2", "<s>", "</s>"),
    "qwen3 with thinking": Published(QWEN3_THINKS, "qwen", *QWEN_EOS, IM, THINK, SYSTEM_AND_TOOL, True, thinks=True),
    "qwen3 without": Published(QWEN3_PLAIN, "qwen", *QWEN_EOS, IM, THINK, SYSTEM_AND_TOOL, rewrites=True),
    "zephyr": Published(ZEPHYR, "llama2", "<s>", "</s>"),
    "smollm3": Published(SMOLLM3, "llama3", "<|begin|>", "<|im_end|>", IM, THINK, SYSTEM_AND_TOOL, thinks=True),
    "phi3": Published(PHI3, "llama2", "<s>", "<|endoftext|>", (*PHI, "<|endoftext|>"), rstrip=True),
    "deepseek": Published(DEEPSEEK, "gpt2", others.EOS, SENTENCE, (SENTENCE,), ("<｜User｜>", "<｜Assistant｜>")),
}


def write(folder: Path, published: Published, learned: SentencePieceTokenizer) -> Path:
    """A folder with the tokenizer and its template, as Transformers saves it."""
    kind = published.tokenizer
    is_level = kind not in ("llama2", "gemma")
    settings: dict[str, Any] = others.byte_level(kind) if is_level else others.byte_fallback(kind, learned)
    settings = copy.deepcopy(settings)
    known = {token["content"] for token in settings["added_tokens"]}
    number = max(*settings["model"]["vocab"].values(), *(token["id"] for token in settings["added_tokens"]))
    new = [name for name in (*published.marks, *published.whole) if name not in known]
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    for i, name in enumerate(new, start=number + 1):
        special, takes = name in published.marks, published.rstrip and name in PHI
        settings["added_tokens"].append({"id": i, "content": name, **flags, "rstrip": takes, "special": special})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"bos_token": published.bos, "eos_token": published.eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(published.plain, encoding="utf-8")
    return folder
