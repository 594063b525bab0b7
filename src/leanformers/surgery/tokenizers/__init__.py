"""Cutting a tokenizer down to the tokens that a text needs: the tokenizer half of *keep vocabulary*.

Source: D. Dale's recipe for mT5 as used by idT5 (Fuadi et al. 2023), after "Load What You Need"
(Abdaoui et al. 2020).

    counts = count(tokenizer, texts)              # [vocabulary] how often each id occurs
    keep = choose(counts, tokenizer)              # [size] sorted old ids, closed
    small = trim(tokenizer, keep)                 # new id = position in keep

The kept ids are always sorted, so their order never changes, and the result is an ordinary fast
tokenizer: `tokenizer.json` alone, loaded by `AutoTokenizer` without leanformers.
"""

from leanformers.surgery.tokenizers.choose import choose, count
from leanformers.surgery.tokenizers.closure import close
from leanformers.surgery.tokenizers.trim import save, trim

__all__ = ["choose", "close", "count", "save", "trim"]
