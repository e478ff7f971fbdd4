"""Text to token ids and back, at the front door.

A :class:`TextStream` holds nothing that its tokens do not tell: pushing the accepted tokens into a fresh one brings it to the
same point, so a request that moves or is resumed carries token ids only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from sllmdask.engine.families import read_sampling_defaults
from sllmdask.errors import CheckpointNotFound, InvalidRequest

#: What a caller may hand to a chat template is its variables, not how the result is made.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "conversation",
        "messages",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
#: What a decoder writes for bytes that are not UTF-8: at the end of a text, most likely half a character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


#: As vocabularies spell a byte that is no character, where the tokenizer falls back on bytes.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def preload() -> None:
    """Import what the first tokenizer would: a second or two of Python. For a thread, while the front door starts."""
    import_module("transformers.models.auto.tokenization_auto")


class Tokenizer:
    """The tokenizer and the chat template of one checkpoint."""

    def __init__(self, hf_tokenizer: Any, sampling_defaults: Mapping[str, Any] | None = None) -> None:
        self._hf = hf_tokenizer
        #: How the checkpoint says that tokens are to be drawn where a request does not, by name of the parameter.
        self.sampling_defaults: Mapping[str, Any] = sampling_defaults or {}

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer files in `path`; nothing is fetched and no code of the checkpoint is run.

        Raises :class:`CheckpointNotFound` if there is no directory, no tokenizer in it, or one that cannot be read.
        :class:`CheckpointCorrupt` if its ``generation_config.json`` makes no sense.
        """
        if not Path(path).is_dir():  # transformers would take the path for the name of a model on a hub
            raise CheckpointNotFound(str(path), "there is no such directory")
        from transformers import AutoTokenizer

        try:
            hf_tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a broken file makes its parser raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointNotFound(str(path), f"its tokenizer cannot be read ({reason})") from error
        # For some architectures, transformers makes up an empty tokenizer where the files are missing.
        if len(hf_tokenizer) <= len(hf_tokenizer.added_tokens_decoder):
            raise CheckpointNotFound(str(path), "it has no tokenizer files (tokenizer.json, or what the model's tokenizer needs)")
        return cls(hf_tokenizer, read_sampling_defaults(Path(path)))

    @property
    def n_vocab(self) -> int:
        """How many token ids the tokenizer knows; the model's output may be wider."""
        return len(self._hf)

    @property
    def description(self) -> str:
        """The contents of a ``tokenizer.json``. Raises :class:`InvalidRequest` for a tokenizer of another kind."""
        backend = getattr(self._hf, "backend_tokenizer", None)
        if backend is None:
            raise InvalidRequest("This model's tokenizer is not one of the tokenizers library, which grammars need.", "grammar")
        text: str = backend.to_str()
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, by itself: UTF-8, or a part of a character. Nothing for an id that no token has."""
        token = self._hf.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return str(token).encode()
        if self._byte_of is not None and all(letter in self._byte_of for letter in token):
            return bytes(self._byte_of[letter] for letter in token)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return str(token).replace("\u2581", " ").encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._hf.added_tokens_decoder)

    @cached_property
    def _byte_of(self) -> dict[str, int] | None:
        """The byte behind each letter of the vocabulary, if its tokens are bytes (as in GPT-2); ``None``: they are text."""
        backend = getattr(self._hf, "backend_tokenizer", None)
        if backend is None or backend.decoder is None or b'"ByteLevel"' not in backend.decoder.__getstate__():
            return None
        # Bytes that are visible characters stand for themselves, the others for the letters from U+0100 on, in order.
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        rest = [byte for byte in range(0x100) if byte not in set(visible)]
        return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """The ids of a plain prompt, with the special tokens that this tokenizer puts around one.

        Of a text of more than `max_length` ids, the special ones at its ends stay, and what is too much is cut from its end.
        """
        if not is_unicode(text):
            raise InvalidRequest("The prompt holds half of a surrogate pair, which is not text.", "prompt")
        if max_length is None:
            return list(self._hf.encode(text, verbose=False))
        # Not by the tokenizer's own truncation: that is a state of it, which another thread may be using.
        encoded = self._hf(text, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
        ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        n_after = next((n for n, flag in enumerate(reversed(special)) if not flag), 0)
        n_kept = max(0, max_length - n_after)
        return ids if len(ids) <= max_length else (ids[:n_kept] + ids[len(ids) - n_after :])[:max_length]

    def encode_chat(self, messages: Sequence[dict[str, Any]], /, **template_kwargs: Any) -> list[int]:
        """The ids of a conversation up to where the model's answer begins.

        `template_kwargs` are variables of the chat template (``tools``, ``documents``, ``enable_thinking``).
        Raises :class:`InvalidRequest` if there is no template, or if it refuses these messages.
        """
        if self._hf.chat_template is None:
            raise InvalidRequest(
                "This model has no chat template. Send a plain prompt to /v1/completions, or add a chat_template.jinja to the "
                "checkpoint.",
                "messages",
            )
        if reserved := sorted(RESERVED_TEMPLATE_KWARGS & template_kwargs.keys()):
            raise InvalidRequest(f"{', '.join(reserved)} cannot be set: not a variable of the template.", "chat_template_kwargs")
        try:
            ids = self._hf.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **template_kwargs
            )
        except Exception as error:  # a template is a program of the checkpoint over data of the caller: it may raise anything
            reason = str(error) or type(error).__name__
            raise InvalidRequest(f"The model's chat template refused the messages: {reason}", "messages") from error
        return list(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`; special tokens are skipped, bytes that are not UTF-8 become U+FFFD."""
        text: str = self._hf.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A text that grows with its tokens and ends before the first of the `stop` strings."""
        return TextStream(self.decode, stop)


class TextStream:
    """Incremental text of one request: what may be shown now, up to the first stop string.

    However the tokens are grouped, :meth:`push` and :meth:`flush` add up to the same text: ``decode`` of all tokens if no
    stop string was found. Where several stop strings match, the one that ends first counts; of two that end together, the
    longer one.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise InvalidRequest("stop must not hold an empty string.", "stop")
        self._decode = decode
        self._stop = tuple(stop)
        #: Tokens consumed so far; once stopped, up to and including the one that completed the stop string.
        self.n_accepted = 0
        self.stopped = False
        # Decoding looks back to the tokens of the last text, since some decoders treat the first token in another way.
        self._window: list[int] = []
        self._n_read = 0  # tokens of the window whose text was taken
        self._read_text = ""  # their text
        self._held = ""  # taken, but it may be the beginning of a stop string

    def push(self, token_ids: Iterable[int]) -> str:
        """Consume the next tokens and return the text that may be shown now, maybe none."""
        shown = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.n_accepted += 1
            self._window.append(token_id)
            shown.append(self._release(self._take()))
        return "".join(shown)

    def flush(self) -> str:
        """The end of the text, when no token follows: what was held back, and U+FFFD for half a character."""
        if self.stopped:
            return ""
        shown = self._release(self._take(last=True)) + ("" if self.stopped else self._held)
        self._held = ""
        return shown

    def _take(self, last: bool = False) -> str:
        """Text of whole characters that the newest tokens completed."""
        text = self._decode(self._window)
        if not last and (text.endswith(REPLACEMENT) or len(text) <= len(self._read_text)):
            return ""
        if text.startswith(self._read_text):
            taken = text[len(self._read_text) :]
        else:  # a byte-fallback decoder gives up a whole run of bytes for one bad byte; what was shown stays
            taken = self._decode(self._window[self._n_read :])
        self._window = self._window[self._n_read :]
        self._n_read = len(self._window)
        self._read_text = self._decode(self._window)
        return taken

    def _release(self, taken: str) -> str:
        """Add `taken` to the held text; return what is certain not to belong to a stop string."""
        text = self._held + taken
        matches = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if matches:
            _, start = min(matches)
            self.stopped, self._held = True, ""
            return text[:start]
        n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8; JSON can smuggle in halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
