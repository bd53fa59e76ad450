"""Convert text and conversations to token datasets: readers, tokenizers, the `.bin/.idx` format, the sample corpus.

Functions for other packages:

    from minimind_mcore.preprocess.convert import convert               # raw files -> prefixes of datasets
    from minimind_mcore.preprocess.options import ChatOptions, Options
    from minimind_mcore.preprocess.tokenize import tokenizer_fingerprint
    from minimind_mcore.preprocess.meta import read_meta
    from minimind_mcore.preprocess.check import check_dataset, quick_check
from minimind_mcore.preprocess.indexed import datasets_at
"""

if __name__ == "preprocess":
    raise ImportError("import minimind_mcore.preprocess instead of preprocess: two copies of a class are not equal")
