"""Between tokens and text: what a tokenizer knows, and text that comes in pieces."""


def known_ids(tokenizer):
    """How many ids our tokenizer, or transformers' (where the added tokens count in its length alone), can decode; None
    for all. A model may have more, to fill up its matrices: GPT-2's 50257 are often 50304."""
    if hasattr(tokenizer, "__len__"):
        return len(tokenizer)
    return getattr(tokenizer, "vocab_size", None)


class StopFilter:
    """Passes text on up to the first stop string; what may be the beginning of one is held back until it is certain."""

    def __init__(self, stops):
        self.stops, self.held, self.ended = stops, "", False

    def push(self, text, last=False):
        """The text that has become certain."""
        if self.ended:
            return ""
        text = self.held + text
        found = [at for at in map(text.find, self.stops) if at >= 0]
        self.ended = bool(found)
        end = min(found) if found else len(text) if last else self._certain(text)
        self.held = text[end:]
        return text[:end]

    def _certain(self, text):
        return min((at for at in range(len(text)) if any(stop.startswith(text[at:]) for stop in self.stops)),
                   default=len(text))
