"""Text of a growing token sequence, given out as soon as it is final."""

from __future__ import annotations

from collections.abc import Sequence

from dualpath_ray.serving.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# A character has at most four bytes, so a longer run of undecodable tokens is no character that is about to be completed.
MAX_UNDECODED_TOKENS = 64


class Detokenizer:
    """Decodes token by token; the pieces joined equal the decoded whole.

    A character whose bytes are spread over several tokens is given out with its last one, never in part. Bytes that are no UTF-8
    come out as U+FFFD once the text after them, the end, or MAX_UNDECODED_TOKENS show that they cannot become a character.

    Only a short window is decoded per token. It begins before the tokens not yet given out, because decoders treat the first token
    of a text specially (a leading space is dropped).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0  # tokens at the window's start whose text has all been given out
        self._given = 0  # characters of the window's text that have been given out

    def push(self, token: int) -> str:
        """The text that became final with `token`; often, for characters in several tokens, nothing."""
        if token in self._tokenizer.special_tokens:
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        complete = not text.endswith(REPLACEMENT) or len(self._window) - self._context > MAX_UNDECODED_TOKENS
        piece = (text if complete else text.rstrip(REPLACEMENT))[self._given :]
        self._given += len(piece)
        if complete and piece:
            self._begin(self._window[self._context :])
        return piece

    def push_all(self, tokens: Sequence[int]) -> str:
        """The same for several tokens, at the cost of one where the text of all is complete."""
        shown = [token for token in tokens if token not in self._tokenizer.special_tokens]
        if len(shown) > 1:
            window = self._window + shown
            piece = self._tokenizer.decode(window)[self._given :]
            if piece and not piece.endswith(REPLACEMENT):
                self._begin(window[self._context :])
                return piece
        return "".join(self.push(token) for token in shown)

    def finish(self) -> str:
        """What is left at the end of the sequence: bytes that never became a character, as U+FFFD."""
        piece = self._tokenizer.decode(self._window)[self._given :]
        self._given += len(piece)
        return piece

    def _begin(self, context: list[int]) -> None:
        """A new window, of tokens whose text has been given out."""
        self._window, self._context = context, len(context)
        self._given = len(self._tokenizer.decode(context))
